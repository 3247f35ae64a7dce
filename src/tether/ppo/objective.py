"""The losses of PPO (Schulman et al. 2017, arXiv:1707.06347), one number per step; how steps become one loss.

N = episodes, T = steps. Every function works on any shape; sums and means are taken in one place, `step_weights`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tether.ppo.distributed import all_sum


def clipped_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The policy loss of each step, and whether its gradient was clipped away (bool).

    −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)A) with ρ = π/π_old, equation 7 of Schulman et al. 2017; different bounds
    are "clip-higher" of DAPO (Yu et al. 2025, arXiv:2503.14476). `dual_clip` c > 1 bounds the loss of a bad action by
    c·|A| (Ye et al. 2020, arXiv:1912.09729, equation 5).
    """
    ratio = (log_probs - old_log_probs).exp()
    plain = advantages * ratio
    clipped = advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(plain, clipped)
    was_clipped = clipped < plain
    if dual_clip is not None:
        bound = advantages * dual_clip
        too_bad = (advantages < 0) & (surrogate < bound)
        surrogate = torch.where(too_bad, bound, surrogate)
        was_clipped = was_clipped | too_bad
    return -surrogate, was_clipped


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """½(V − R)² of each step; with a clip range the larger of it and of ½(clip(V, V_old ± range) − R)²."""
    loss = (values - returns).square()
    if clip_range is not None:
        near_old = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (near_old - returns).square())
    return loss / 2


def step_weights(mask: Tensor, aggregation: Literal["step", "episode"]) -> Tensor:
    """(N, T) weights that sum to 1 over all ranks: a loss is Σ weight · loss of the step, however a batch is cut.

    step: every valid step counts the same. episode: every episode counts the same, its steps share its weight
    (the mean of means in GRPO's equation 3).
    """
    valid = mask.to(torch.float32)
    if aggregation == "step":
        return valid / all_sum(valid.sum())
    steps = valid.sum(dim=1, keepdim=True)
    return valid / steps.clamp(min=1) / all_sum((steps > 0).sum())
