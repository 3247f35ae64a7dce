"""A policy of pure torch and random trajectories: what the tests of the core need, without any world.

N = episodes, T = steps, D = observation size, A = number of actions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tether.ppo import AdvantageConfig, Evaluation, KLConfig, KLController, Learner, LearnerConfig, Trajectories

OBSERVATION_SIZE = 5
ACTIONS = 4


@dataclass(frozen=True)
class ToyContext:
    """Observations (N, T, D) and how many steps each episode has."""

    observations: Tensor
    lengths: Tensor

    def select(self, rows: Tensor) -> ToyContext:
        return ToyContext(self.observations[rows], self.lengths[rows])

    def steps(self, mask: Tensor) -> ToyContext:
        return ToyContext(self.observations[mask].unsqueeze(1), torch.ones(int(mask.sum()), dtype=torch.long))


class ToyPolicy(nn.Module):
    """A small trunk with a categorical policy and a value head."""

    def __init__(self, seed: int = 0, hidden: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Linear(OBSERVATION_SIZE, hidden)
            self.actor = nn.Linear(hidden, ACTIONS)
            self.critic = nn.Linear(hidden, 1)

    def policy_parameters(self) -> list[nn.Parameter]:
        return [*self.trunk.parameters(), *self.actor.parameters()]

    def value_parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    def evaluate(self, context: ToyContext, actions: Tensor, mask: Tensor) -> Evaluation:
        hidden = self.trunk(context.observations[:, : mask.shape[1]]).tanh()
        log_probs = self.actor(hidden).log_softmax(dim=-1)
        return Evaluation(
            log_probs=log_probs.gather(-1, actions[..., None]).squeeze(-1).masked_fill(~mask, 0.0),
            values=self.critic(hidden).squeeze(-1).masked_fill(~mask, 0.0),
            entropy=-(log_probs.exp() * log_probs).sum(dim=-1).masked_fill(~mask, 0.0),
        )


class TablePolicy(nn.Module):
    """One state, `logits` (A,) its only parameters and a value that is always 0: gradients can be written down."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def policy_parameters(self) -> list[nn.Parameter]:
        return [self.logits]

    def value_parameters(self) -> list[nn.Parameter]:
        return []

    def evaluate(self, context: ToyContext, actions: Tensor, mask: Tensor) -> Evaluation:
        log_probs = self.logits.log_softmax(dim=-1)
        entropy = -(log_probs.exp() * log_probs).sum()
        return Evaluation(log_probs[actions] * mask, torch.zeros(mask.shape), entropy * mask)


def trajectories(
    policy: ToyPolicy, episodes: int = 8, steps: int = 7, seed: int = 0, gaps: bool = True, drift: float = 0.3
) -> Trajectories:
    """Random episodes of many lengths; `drift` is how far the old log-probabilities are from the policy's own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, steps + 1, (episodes,), generator=generator)
    lengths[0] = steps
    column = torch.arange(steps)
    mask = column < lengths[:, None]
    if gaps:
        holes = torch.rand(episodes, steps, generator=generator) < 0.25
        mask &= ~(holes & (column < lengths[:, None] - 1))
    at_end = column == lengths[:, None] - 1
    cut_off = torch.rand(episodes, 1, generator=generator) < 0.4
    context = ToyContext(normal(episodes, steps, OBSERVATION_SIZE), lengths)
    actions = torch.randint(0, ACTIONS, (episodes, steps), generator=generator)
    with torch.no_grad():
        now = policy.evaluate(context, actions, mask)
    return Trajectories(
        actions=actions,
        log_probs=(now.log_probs + drift * normal(episodes, steps)) * mask,
        values=(now.values + drift * normal(episodes, steps)) * mask,
        rewards=normal(episodes, steps) * mask,
        mask=mask,
        terminated=at_end & ~cut_off,
        truncated=at_end & cut_off,
        bootstrap_values=normal(episodes, steps) * (at_end & cut_off),
        context=context,
        reference_log_probs=(now.log_probs + drift * normal(episodes, steps)) * mask,
        groups=torch.arange(episodes) // 2,
    )


def one_step(actions: Tensor, **fields: Any) -> Trajectories:
    """Episodes (N,) of a single step each, everything 0 that is not given."""
    zeros = torch.zeros(len(actions), 1)
    whole = torch.ones(len(actions), 1, dtype=torch.bool)
    plain = Trajectories(
        actions=actions[:, None],
        log_probs=zeros,
        values=zeros,
        rewards=zeros,
        mask=whole,
        terminated=whole,
        truncated=~whole,
        bootstrap_values=zeros,
        context=ToyContext(torch.zeros(len(actions), 1, OBSERVATION_SIZE), torch.ones(len(actions), dtype=torch.long)),
    )
    return replace(plain, **fields)


def gradient(
    policy: Any,
    batch: Trajectories,
    advantages: Tensor,
    returns: Tensor,
    config: LearnerConfig | None = None,
    kl: KLConfig | None = None,
    advantage: AdvantageConfig | None = None,
) -> Tensor:
    """Every parameter's gradient in one vector, as one optimizer step over the whole batch sees it."""
    policy = copy.deepcopy(policy)
    whole = replace(config or LearnerConfig(), epochs=1, minibatches=1, max_gradient_norm=0.0, learning_rate=0.0)
    learner = Learner(policy, whole, advantage, KLController(kl) if kl else None)
    gradients: list[Tensor] = []

    def keep(*_: Any) -> None:
        gradients.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters())

    learner.optimizer.register_step_pre_hook(keep)
    learner.update(batch, advantages, returns)
    return torch.cat([g.detach().flatten() for g in gradients])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
