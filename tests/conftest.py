"""Makes the builders beside the tests importable as `tests.models` and `tests.toy`; keeps torch on one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
