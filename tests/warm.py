"""Imported by the server that forks processes for tests: what a command does once per process is done here for all."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
import torch.utils.tensorboard

import tether.cli  # noqa: F401
from tests.models import make_model
from tether.config import load_config
from tether.language.models import load_causal_lm
from tether.pipeline.ppo import PPOConfig

torch.set_num_threads(1)
with TemporaryDirectory() as folder:
    make_model().save_pretrained(folder)
    load_causal_lm(folder)
load_config(PPOConfig, [], "tether ppo", "")
