"""The one batch type that flows through the house: what a policy did, and what came of it.

Read this file first. A world fills `Trajectories`, the learner reads them; neither needs to know the other.

N = episodes, T = steps of the longest episode, A = size of a vector action.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Context(Protocol):
    """What an `ActorCritic` needs to see the states again: a world's own type, opaque to the learner."""

    @property
    def lengths(self) -> Tensor:
        """(N,) int: what each row costs to evaluate, in a unit of the context's own."""
        ...

    def select(self, rows: Tensor) -> Context:
        """The context of these rows alone, with padding that no row needs cut off."""
        ...

    def steps(self, mask: Tensor) -> Context:
        """The n steps where `mask` (N, T) is True as rows of one step each; asked for only where steps stand alone."""
        ...


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What a policy says of given actions in given states: all (N, T), differentiable, 0 where the mask is False."""

    log_probs: Tensor
    values: Tensor
    entropy: Tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({' × '.join(map(str, self.log_probs.shape))} steps)"


@dataclass(frozen=True, repr=False)
class LastSeen(Evaluation):
    """What an update saw of each step when it evaluated it for the last time, before the optimizer step that followed.

    NaN where it never did. `clipped`, (N, T) bool, says where the gradient was clipped away then.
    """

    clipped: Tensor


class ActorCritic(Protocol):
    """A policy π(a|s) with a value function V(s): the only seam between the learner and a world."""

    def evaluate(self, context: Any, actions: Tensor, mask: Tensor) -> Evaluation:
        """Log-probabilities of `actions`, state values and entropies at the steps where `mask` (N, T) is True."""
        ...

    def policy_parameters(self) -> list[nn.Parameter]:
        """Parameters that the policy's distribution depends on (a shared trunk included)."""
        ...

    def value_parameters(self) -> list[nn.Parameter]:
        """Parameters of the critic alone."""
        ...


@dataclass(frozen=True, repr=False)
class Trajectories:
    """Episodes as tensors, right-padded to the longest. Steps where `mask` is False carry no meaning.

    A row is one episode, or a stretch of time in which several follow each other: `terminated` and `truncated` say
    where they end, and a stretch that ends while an episode goes on is truncated there.

    Attributes:
        actions: (N, T) or (N, T, A), what was done.
        log_probs: (N, T), log π_old(a|s) of the distribution that was really sampled.
        values: (N, T), V_old(s) before the action.
        rewards: (N, T), reward of the step, penalties included.
        mask: (N, T) bool, the step exists and is the policy's own.
        terminated: (N, T) bool, the episode ended here: no future beyond it.
        truncated: (N, T) bool, the episode was cut off here: the future exists but was not seen.
        bootstrap_values: (N, T), V of the successor state where `truncated`, else 0.
        context: what `ActorCritic.evaluate` needs to see the states again.
        reference_log_probs: (N, T), log π_ref(a|s), or None where there is no reference policy.
        kl_to_reference: (N, T), KL(π_old‖π_ref) over all actions at the state, in nats; NaN in episodes where it was
            not measured. None where there is no reference, or no such sum.
        groups: (N,) int, episodes that share a start have the same number; None when no two do.
        markov: the context shows each step's whole state, so that steps can be told apart from their episodes.
    """

    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    mask: Tensor
    terminated: Tensor
    truncated: Tensor
    bootstrap_values: Tensor
    context: Any
    reference_log_probs: Tensor | None = None
    kl_to_reference: Tensor | None = None
    groups: Tensor | None = None
    markov: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.mask.shape)
        if len(shape) != 2:
            raise ValueError(f"mask has shape {shape}, expected (N, T)")
        for name in ("log_probs", "values", "rewards", "terminated", "truncated", "bootstrap_values"):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}, expected {shape} like mask")
        if tuple(self.actions.shape[:2]) != shape:
            raise ValueError(f"actions have shape {tuple(self.actions.shape)}, expected {shape} or {shape} + (A,)")

    def __len__(self) -> int:
        return len(self.mask)

    def __repr__(self) -> str:
        rows, steps = self.mask.shape
        ends = f"{int(self.terminated.sum())} terminated, {int(self.truncated.sum())} truncated"
        return f"Trajectories({rows} episodes, up to {steps} steps, {int(self.mask.sum())} in all, {ends})"

    def select(self, rows: Tensor) -> Trajectories:
        """The episodes with these indices, cut to the longest among them."""
        steps = int(last_step(self.mask[rows]).max()) + 1 if len(rows) else 0
        cut: dict[str, Any] = {}
        for name in _STEPWISE:
            tensor = getattr(self, name)
            cut[name] = None if tensor is None else tensor[rows, :steps]
        cut["context"] = self.context.select(rows)
        cut["groups"] = None if self.groups is None else self.groups[rows]
        return replace(self, **cut)


_STEPWISE = (
    "actions",
    "log_probs",
    "values",
    "rewards",
    "mask",
    "terminated",
    "truncated",
    "bootstrap_values",
    "reference_log_probs",
    "kl_to_reference",
)


def last_step(mask: Tensor) -> Tensor:
    """(N,) int: index of each episode's last valid step; −1 for an episode without one."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * steps).amax(dim=1) - 1 if mask.shape[1] else mask.new_full((len(mask),), -1, dtype=torch.long)
