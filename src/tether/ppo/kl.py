"""The tether: how far the policy has moved from the reference, and what that costs.

Estimators of KL(π‖π_ref) from samples of π (Schulman 2020, "Approximating KL divergence"), the penalty inside the
reward (Stiennon et al. 2020, arXiv:2009.01325), and a fixed or adaptive β (Ziegler et al. 2019, arXiv:1909.08593).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tether.ppo.trajectories import last_step

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class KLConfig:
    """The price of leaving the reference."""

    beta: float = 0.05
    """β in E[r] − β·KL(π‖π_ref), reward units per nat; with `target`, where β starts. 0.05: Stiennon et al. 2020."""
    placement: Literal["reward", "loss"] = "reward"
    """reward: −β·k1 is part of each step's reward, so that the critic foresees it. loss: a term of the loss."""
    loss_estimator: Estimator = "k2"
    """Estimator used when placement is loss. On the policy's own samples k2 has the gradient of the reverse KL."""
    target: float | None = None
    """Nats per episode at which an adaptive β aims. None: β stays fixed."""
    horizon: int = 10_000
    """Adaptive β: episodes over which a constant error of 20 % would change β by 20 % (Ziegler et al. 2019)."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}, expected 0 or more")
        if self.target is not None and not self.target > 0:
            raise ValueError(f"target is {self.target}, expected nats above 0, or none for a fixed beta")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}, expected at least 1 episode")


def estimate_kl(log_probs: Tensor, reference_log_probs: Tensor, estimator: Estimator) -> Tensor:
    """Per-sample estimate of KL(π‖π_ref), any shape, from log π(a) and log π_ref(a) of actions drawn from π.

    k1 = log π − log π_ref is unbiased; k2 = k1²/2 is biased but its gradient is the KL's; k3 = e^(−k1) − 1 + k1 is
    unbiased, never negative and has the least variance near the reference.
    """
    k1 = log_probs - reference_log_probs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    return (-k1).expm1() + k1


def penalised_rewards(
    scores: Tensor, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """(N, T) rewards of episodes that are scored once: −β·k1 at every valid step, and the score (N,) at the last."""
    rewards = (-beta * (log_probs - reference_log_probs)).masked_fill(~mask, 0.0)
    last = last_step(mask)
    if bool((last < 0).any()):
        raise ValueError("an episode without a step cannot be rewarded")
    return rewards.scatter_add(1, last[:, None], scores.to(rewards.dtype)[:, None])


class KLController:
    """Holds β, and moves it towards the target KL where the configuration names one."""

    def __init__(self, config: KLConfig) -> None:
        self.config = config
        self.beta = config.beta

    def update(self, kl: float, episodes: int) -> None:
        """The proportional controller in log space (equation 2 of Ziegler et al. 2019): kl in nats per episode."""
        if self.config.target is None:
            return
        error = min(max(kl / self.config.target - 1.0, -0.2), 0.2)
        self.beta *= 1.0 + error * episodes / self.config.horizon

    def state_dict(self) -> dict[str, Any]:
        """Where β stands."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.beta = float(state["beta"])
