"""From what environments show to the network and back: the one way by which policies are trained and tried.

Knows that observations may be normalised and that a policy acts; nothing of episodes.
N = environments.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tether.control.normalisation import ObservationNormaliser


class ActingPolicy(Protocol):
    """What acts; `ControlPolicy` does."""

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    def noise(self, steps: int, count: int, generator: torch.Generator) -> Tensor:
        """(steps, count, …) the randomness of `steps` calls of `act`."""
        ...

    def act(self, observations: Tensor, noise: Tensor | None) -> Tensor:
        """(N,) or (N, A) actions in the states (N, *obs); None instead of noise: the likeliest."""
        ...

    def to_environment(self, actions: Tensor) -> NDArray[Any]:
        """Actions as the environments take them."""
        ...


class Actor:
    """A policy with the statistics that its observations are normalised by.

    Args:
        policy: what acts.
        normaliser: of observations; None: they are taken as they are.
    """

    def __init__(self, policy: ActingPolicy, normaliser: ObservationNormaliser | None = None) -> None:
        self.policy = policy
        self.normaliser = normaliser

    def see(self, observations: NDArray[Any], learn: NDArray[np.bool_] | None = None) -> Tensor:
        """(N, *obs) what the policy is shown of `observations` (N, *obs).

        Args:
            observations: as the environments gave them.
            learn: (N,) those that the statistics take in first. None: they stay as they are, as in an evaluation.
        """
        if self.normaliser is None:
            return torch.from_numpy(observations)
        if learn is None:
            return torch.from_numpy(self.normaliser.normalise(observations))
        if learn.all():
            return torch.from_numpy(self.normaliser(observations))
        self.normaliser(observations[learn])
        return torch.from_numpy(self.normaliser.normalise(observations))

    def act(self, seen: Tensor, noise: Tensor | None) -> tuple[Tensor, NDArray[Any]]:
        """Actions in the states `seen` (N, *obs), as the policy speaks of them and as the environments take them.

        Args:
            seen: what `see` gave.
            noise: (N, …) of one step, as the policy's `noise` gives it. None: the likeliest actions.
        """
        action = self.policy.act(seen.to(self.policy.device), noise)
        return action, self.policy.to_environment(action)
