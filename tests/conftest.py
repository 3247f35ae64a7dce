"""Makes the builders beside the tests importable as `tests.models` and `tests.toy`; keeps torch on one thread.

What was imported is left alone by Python's garbage collector, which would go through it at the beginning of every loop.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


_left_alone = ExitStack()


def pytest_collection_finish() -> None:
    from tether.memory import old_objects_left_alone

    _left_alone.enter_context(old_objects_left_alone())


def pytest_unconfigure() -> None:
    _left_alone.close()
