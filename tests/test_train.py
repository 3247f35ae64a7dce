"""The loop: collect → credit → update, the same for every world, seen through a world of two numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.toy import ToyPolicy, trajectories
from tether.ppo import Learner, LearnerConfig, Trajectories
from tether.train import Iteration, iterate


class RecordedWorld:
    """Hands out batches of the toy policy, and writes down what is asked of it."""

    def __init__(self, policy: ToyPolicy) -> None:
        self.policy = policy
        self.calls: list[str] = []
        self.batches: list[Trajectories] = []

    def collect(self) -> Trajectories:
        self.calls.append("collect")
        self.batches.append(trajectories(self.policy, seed=len(self.batches)))
        return self.batches[-1]

    def metrics(self, batch: Trajectories) -> dict[str, float]:
        self.calls.append("metrics")
        assert batch is self.batches[-1]
        return {"score": float(len(self.batches))}


class RecordedLearner(Learner):
    calls: list[str]

    def credit(self, batch: Trajectories) -> tuple[Tensor, Tensor]:
        self.calls.append("credit")
        return super().credit(batch)

    def update(self, batch: Trajectories, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        self.calls.append("update")
        return super().update(batch, advantages, returns)


@pytest.fixture
def pieces() -> tuple[RecordedWorld, RecordedLearner]:
    torch.manual_seed(0)
    world = RecordedWorld(ToyPolicy())
    learner = RecordedLearner(world.policy, LearnerConfig(epochs=1, minibatches=2), iterations=3)
    learner.calls = world.calls
    return world, learner


def test_collect_credit_update_in_this_order(pieces: tuple[RecordedWorld, RecordedLearner]) -> None:
    world, learner = pieces
    steps = list(iterate(world, learner))
    assert [step.number for step in steps] == [1, 2, 3]
    assert learner.iteration == 3
    assert world.calls == ["collect", "credit", "metrics", "update"] * 3
    for step, batch in zip(steps, world.batches, strict=True):
        assert step.trajectories is batch
        assert step.advantages.shape == step.returns.shape == batch.mask.shape


def test_metrics_are_those_of_the_world_and_of_the_learner(pieces: tuple[RecordedWorld, RecordedLearner]) -> None:
    steps = list(iterate(*pieces))
    assert [step.metrics["score"] for step in steps] == [1.0, 2.0, 3.0]
    assert all({"policy_loss", "clip_fraction", "gradient_norm"} < step.metrics.keys() for step in steps)
    assert all(0 < step.metrics["time/learning"] <= step.metrics["time/iteration"] for step in steps)


def test_nothing_happens_until_the_next_iteration_is_asked_for(pieces: tuple[RecordedWorld, RecordedLearner]) -> None:
    world, learner = pieces
    steps: Iterator[Iteration] = iterate(world, learner)
    assert world.calls == []
    next(steps)
    assert len(world.batches) == learner.iteration == 1


def test_it_goes_on_from_where_the_learner_stands(pieces: tuple[RecordedWorld, RecordedLearner]) -> None:
    world, learner = pieces
    learner.iteration = 2
    assert [step.number for step in iterate(world, learner)] == [3]
    assert list(iterate(world, learner)) == []
