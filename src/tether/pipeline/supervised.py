"""What fine-tuning and the training of a reward model share: settings, the plan of batches, and the optimizer's step.

Knows models and numbers; nothing of rows, comparisons or losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tether.errors import UserError
from tether.ppo.learner import schedule_factor
from tether.pretrained import context_length

DEFAULT_MAX_TOKENS = 2048  # a context of 128k tokens is no reason to try texts of 128k tokens

Report = Callable[[dict[str, float]], None]
Batch = tuple[float, np.ndarray]  # passes over the data once it is done, and the indices of what is in it


@dataclass(frozen=True)
class SupervisedConfig:
    """Learning from a fixed set of texts."""

    output: str = ""
    """Folder of the run; the trained model is saved in it."""
    overwrite: bool = False
    """Replace a run that is already in `output`."""
    eval_data: str | None = None
    """Held-out data, in the same form as what is learned from."""
    eval_split: str = "train"
    """Split of `eval_data` where that is a dataset folder or a hub dataset."""
    eval_fraction: float = 0.0
    """Share of the data that is held out instead, drawn at random by `seed`."""
    eval_every: int = 0
    """Optimizer steps between held-out losses. 0: only before the first step and after the last, as always."""
    max_tokens: int | None = None
    """Longest sample in tokens: prompt, response and eos. None: the model's context, at most 2048."""
    overlong: Literal["error", "skip", "truncate"] = "error"
    """What happens to a longer one: stop with an error, leave it out, or cut off its end; how many is reported."""
    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, going round the data as often as that takes. None: `epochs` decides."""
    batch_size: int = 32
    """Samples per optimizer step."""
    microbatch_tokens: int = 8192
    """Tokens (padding included) that go through the model at once. Changes memory and speed, never the result."""
    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls from its peak to 0 over the steps of the run."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment (Kingma and Ba 2015)."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment (Kingma and Ba 2015)."""
    adam_epsilon: float = 1e-8
    """Adam's ε (Kingma and Ba 2015)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW, on weight matrices; never on biases, gains of norms or other vectors."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm. 0: never."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights, their gradients and Adam's moments. The loss is float32 always."""
    autocast: bool = False
    """Compute matrix products in bfloat16 while the weights stay float32."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    seed: int = 0
    """Of the order of the samples and of what is held out."""

    def __post_init__(self) -> None:
        for name in ("epochs", "max_steps", "batch_size", "microbatch_tokens", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "max_gradient_norm", "eval_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number of 0 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        for name in ("adam_beta1", "adam_beta2", "eval_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or more and below 1")
        if not 0 < self.adam_epsilon < math.inf:
            raise ValueError(f"adam_epsilon is {self.adam_epsilon}, expected a finite number above 0")
        if self.autocast and self.dtype != "float32":
            raise ValueError("autocast is on and dtype bfloat16: weights are cast already, set one of the two")

    def evaluates(self, step: int, steps: int) -> bool:
        """Whether the held-out loss is taken after this step."""
        return step == steps or (self.eval_every > 0 and step % self.eval_every == 0)


def longest_text(model: PreTrainedModel, max_tokens: int | None) -> int:
    """How many tokens a text may have.

    Raises:
        UserError: more than the model's context were asked for.
    """
    context = context_length(model)
    if max_tokens is None:
        return min(context or DEFAULT_MAX_TOKENS, DEFAULT_MAX_TOKENS)
    if context is not None and max_tokens > context:
        raise UserError(f"max_tokens is {max_tokens}, expected at most the model's context of {context}")
    return max_tokens


def fate_of(place: str, length: int, max_tokens: int, overlong: str) -> str:
    """What becomes of a text of so many tokens: it is kept, or, where it is too long, `overlong`: skip or truncate.

    Raises:
        UserError: it is too long, and `overlong` is error; `place` is where it stands.
    """
    if length <= max_tokens:
        return "keep"
    if overlong == "error":
        raise UserError(
            f"{place}: {length} tokens, expected at most {max_tokens} (`max_tokens`): raise it, or set `overlong` "
            "to skip or truncate"
        )
    return overlong


def plan_batches(
    count: int,
    config: SupervisedConfig,
    generator: np.random.Generator,
    lengths: np.ndarray | None = None,
    batch_tokens: int | None = None,
) -> list[Batch]:
    """Every batch of the run; each pass over the data has an order of its own.

    Args:
        count: how many samples there are.
        config: see `SupervisedConfig`.
        generator: draws the orders.
        lengths: (count,) tokens of the samples, which `batch_tokens` needs.
        batch_tokens: fill a batch up to so many tokens, with at least one sample, in place of `config.batch_size`.
    """
    batches: list[Batch] = []
    epoch = 0
    while config.max_steps is not None or epoch < config.epochs:
        order = generator.permutation(count)
        used = None if lengths is None else np.cumsum(lengths[order])
        start = 0
        while start < count:
            end = min(start + config.batch_size, count)
            if batch_tokens is not None and used is not None:
                before = used[start - 1] if start else 0
                end = max(start + 1, int(np.searchsorted(used, before + batch_tokens, side="right")))
            batches.append((epoch + end / count, order[start:end]))
            if len(batches) == config.max_steps:
                return batches
            start = end
        epoch += 1
    return batches


class Optimizer:
    """AdamW on the parameters that are trained, with the run's schedule of learning rates and clipping.

    Args:
        model: of which those parameters learn that ask for gradients.
        config: see `SupervisedConfig`.
        steps: of the run, which the schedule spans.
    """

    def __init__(self, model: PreTrainedModel, config: SupervisedConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def update(self, step: int) -> dict[str, float]:
        """Move the parameters by their gradients in step 1, 2, …; returns its learning rate and the gradients' norm.

        Raises:
            FloatingPointError: the norm, taken before clipping, is not finite; the parameters are as they were.
        """
        config = self.config
        rate = config.learning_rate * schedule_factor(step - 1, self.steps, config.warmup_steps, config.schedule)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.max_gradient_norm or math.inf))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} at step {step}: lower learning_rate")
        self.adamw.step()
        return {"learning_rate": rate, "gradient_norm": norm}
