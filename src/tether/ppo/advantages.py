"""Credit: how much better than expected each action turned out. Tensors in, tensors out.

N = episodes, T = steps. Sources: GAE, Schulman et al. 2016 (arXiv:1506.02438); RLOO, Ahmadian et al. 2024
(arXiv:2402.14740); GRPO, Shao et al. 2024 (arXiv:2402.03300); two λ, and one that follows the length, Yue et al. 2025
(VAPO, arXiv:2504.05118).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tether.ppo.distributed import all_sum
from tether.ppo.trajectories import Trajectories


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages."""

    estimator: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: a critic's values (Schulman et al. 2016). rloo, grpo: the other episodes from the same start are the
    baseline, no critic is trained, and each start needs at least two episodes."""
    gamma: float = 1.0
    """Discount γ per step. 1 where episodes are short and scored at the end; 0.99 is usual where they are long."""
    lam: float = 0.95
    """GAE's λ: 0 trusts the critic alone, 1 the observed rewards alone. 0.95: Schulman et al. 2017, section 6."""
    value_lam: float | None = None
    """λ of the critic's targets alone; 1 makes them the observed returns. Yuan et al. 2025 (VC-PPO, arXiv:2503.01491)
    and VAPO take 1 here and less for the policy. None: the policy's."""
    length_adaptive: float | None = None
    """α above 0: the policy's λ in an episode of l steps is 1 − 1/(α·l) in place of `lam`, and 0 where l is 1/α or
    less. VAPO takes 0.05, for thousands of steps. None: off."""
    whiten_rewards: bool = False
    """Scale the batch's rewards, penalties included, to variance 1 per step before anything else; their mean stays
    (Ziegler et al. 2019). The critic then learns scaled returns."""
    whiten: bool | None = None
    """Shift and scale advantages to mean 0, variance 1 over the whole batch. None: with gae yes, with groups no."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam", "value_lam"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number from 0 to 1")
        if self.length_adaptive is not None and not 0 < self.length_adaptive < math.inf:
            raise ValueError(f"length_adaptive is {self.length_adaptive}, expected a finite number above 0")
        for name in ("value_lam", "length_adaptive"):
            if getattr(self, name) is not None and not self.uses_critic:
                raise ValueError(f"{name} is {getattr(self, name)}, but estimator {self.estimator} has no λ: drop one")

    @property
    def uses_critic(self) -> bool:
        """Whether values are needed and trained."""
        return self.estimator == "gae"


def estimate(trajectories: Trajectories, config: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (N, T), 0 where the mask is False. Returns, the critic's targets, are not whitened."""
    if config.whiten_rewards:
        whitened = whiten(trajectories.rewards, trajectories.mask, shift_mean=False)
        trajectories = replace(trajectories, rewards=whitened)
    if config.uses_critic:
        alpha = config.length_adaptive
        lam = config.lam if alpha is None else length_adaptive_lam(trajectories, alpha)
        advantages, returns = gae(trajectories, config.gamma, lam)
        if config.value_lam is not None:
            _, returns = gae(trajectories, config.gamma, config.value_lam)
    else:
        advantages = group_advantages(trajectories, normalise=config.estimator == "grpo")
        returns = rewards_to_go(trajectories, config.gamma)
    whiten_them = config.uses_critic if config.whiten is None else config.whiten
    return (whiten(advantages, trajectories.mask) if whiten_them else advantages), returns


def gae(trajectories: Trajectories, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, equation 16 of Schulman et al. 2016: A_t = Σ_l (γλ)^l δ_{t+l}.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t), where V(s_{t+1}) is 0 after a terminated step and `bootstrap_values` after a
    truncated one (terminated wins where both are set); nothing flows back over either. Steps outside the mask are
    skipped: the successor of a step is the next step of the mask. λ is one number, or (N, T).
    """
    rewards, values, mask = trajectories.rewards, trajectories.values, trajectories.mask
    ended = trajectories.terminated | trajectories.truncated
    beyond_end = trajectories.bootstrap_values.masked_fill(trajectories.terminated, 0.0)
    successor = torch.where(ended, beyond_end, _next_valid(values, mask))
    # outside the mask nothing is added and nothing fades: what comes later passes through
    delta = (rewards + gamma * successor - values).masked_fill(~mask, 0.0)
    fade = torch.ones_like(delta).mul_(gamma * lam).masked_fill(ended, 0.0).masked_fill(~mask, 1.0)
    advantages = torch.empty_like(delta)
    advantage = delta.new_zeros(len(delta))
    for t, (delta_t, fade_t) in enumerate(zip(delta.T.flip(0), fade.T.flip(0), strict=True), start=1):
        advantage = torch.addcmul(delta_t, fade_t, advantage)
        advantages[:, -t] = advantage
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, (advantages + values).masked_fill(~mask, 0.0)


def length_adaptive_lam(trajectories: Trajectories, alpha: float) -> Tensor:
    """(N, T): λ = 1 − 1/(α·l) at the steps of an episode of l steps, so that Σ λ^t ≈ α·l; never below 0 (VAPO).

    l counts the steps of the mask that the batch holds of the episode, from the row's begin or the end before it.
    """
    mask = trajectories.mask
    ended = (trajectories.terminated | trajectories.truncated) & mask
    episode = ended.cumsum(dim=1) - ended.long()  # in its row, counted from 0, of each step
    lengths = torch.zeros_like(trajectories.values).scatter_add(1, episode, mask.to(trajectories.values.dtype))
    return (1.0 - 1.0 / (alpha * lengths.gather(1, episode))).clamp(min=0.0)


def _next_valid(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T): the value of the next step of the mask, 0 where there is none."""
    steps = values.shape[1]
    own = torch.arange(steps, device=values.device).expand_as(mask).masked_fill(~mask, steps)
    # the first step of the mask from t on, seen from the step before
    first = own.flip(1).cummin(dim=1).values.flip(1)
    none = values.new_zeros(len(values), 1)
    following = torch.cat([first[:, 1:], torch.full_like(first[:, :1], steps)], dim=1)
    return torch.cat([values, none], dim=1).gather(1, following)


def rewards_to_go(trajectories: Trajectories, gamma: float) -> Tensor:
    """(N, T): G_t = r_t + γ G_{t+1} up to the episode's end, `bootstrap_values` beyond a truncation."""
    without_critic = replace(trajectories, values=torch.zeros_like(trajectories.values))
    return gae(without_critic, gamma, lam=1.0)[0]


def group_advantages(trajectories: Trajectories, normalise: bool) -> Tensor:
    """(N, T): each episode's total reward against those of its group, the same at each of its steps.

    normalise False is RLOO: the baseline is the mean of the *other* members (equation 8 of Ahmadian et al. 2024).
    normalise True is GRPO: (R − mean) / (std + 1e-4), std with Bessel's correction (section 4.1.2 of Shao et al. 2024).

    Raises:
        ValueError: an episode has no other member in its group.
    """
    mask = trajectories.mask
    total = trajectories.rewards.masked_fill(~mask, 0.0).sum(dim=1)  # (N,)
    groups = trajectories.groups if trajectories.groups is not None else torch.arange(len(total), device=total.device)
    _, member_of = torch.unique(groups, return_inverse=True)
    size = torch.bincount(member_of).to(total.dtype)
    if bool((size < 2).any()):
        raise ValueError("rloo and grpo need at least 2 episodes from each start; with one, use the estimator gae")
    mean = torch.zeros_like(size).index_add_(0, member_of, total) / size
    centred = total - mean[member_of]
    if normalise:
        variance = torch.zeros_like(size).index_add_(0, member_of, centred**2) / (size - 1)
        advantage = centred / (variance.sqrt() + 1e-4)[member_of]
    else:
        # R − mean of the others = (R − mean of all) · n / (n − 1)
        advantage = centred * (size / (size - 1))[member_of]
    return advantage[:, None].expand_as(mask).masked_fill(~mask, 0.0)


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8, shift_mean: bool = True) -> Tensor:
    """Mean 0 and variance 1 over the valid steps of the whole batch on all ranks; 0 outside the mask.

    Without `shift_mean` the mean is added again: (x − mean) / std + mean, as `whiten` of Ziegler et al. 2019 has it.
    """
    count, total = all_sum(torch.stack([mask.sum().to(values.dtype), values[mask].sum()]))
    mean = total / count
    variance = all_sum((values[mask] - mean).square().sum()) / count
    whitened = (values - mean) * torch.rsqrt(variance + epsilon)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def scale_and_clip(scores: Tensor, scale: float, clip: float | None) -> Tensor:
    """Multiply scores by `scale`, then clip them to ±`clip` where one is given. Any shape."""
    scaled = scores * scale
    return scaled if clip is None else scaled.clamp(-clip, clip)
