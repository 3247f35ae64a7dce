"""The loop, the same for every world: collect → credit → update.

It knows neither what an episode is about nor where metrics go; `tether.pipeline` gives it both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tether.episode import Episode
from tether.memory import PeakMemory, old_objects_left_alone, phases_apart
from tether.ppo import ActorCritic, LastSeen, Learner, Trajectories

MEMORY_EVERY = 10  # iterations after which large models' peaks are measured again, which costs time


class World(Protocol):
    """Where episodes come from."""

    policy: Any  # an ActorCritic

    def collect(self) -> Trajectories:
        """Let the policy act, and return what happened."""
        ...

    def metrics(self, trajectories: Trajectories) -> dict[str, float]:
        """What to report of the batch collected last."""
        ...

    def episodes(
        self, trajectories: Trajectories, advantages: Tensor, returns: Tensor, last_seen: LastSeen | None = None
    ) -> list[Episode]:
        """The batch collected last, for people and for storage; `last_seen` is the learner's, after its update."""
        ...

    def save_policy(self, folder: Path) -> None:
        """Write the policy and its critic."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Random states and whatever else the next `collect` depends on, the policy's parameters excepted."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


@dataclass(frozen=True, repr=False)
class Iteration:
    """What one turn of the loop did."""

    number: int
    trajectories: Trajectories
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    last_seen: LastSeen | None = None

    def __repr__(self) -> str:
        shown = [f"{name} {self.metrics[name]:.3g}" for name in ("score", "reward") if name in self.metrics]
        return f"Iteration({', '.join([str(self.number), *shown])}, {self.trajectories!r}, {len(self.metrics)} metrics)"


def iterate(world: World, learner: Learner) -> Iterator[Iteration]:
    """PPO, one iteration at a time, from where the learner stands to the end of its run."""
    turn = 0
    with old_objects_left_alone():
        while learner.iteration < learner.iterations:
            started = time.perf_counter()
            with phases_apart(turn == 1 or turn % MEMORY_EVERY == 0):
                trajectories = world.collect()
                advantages, returns = learner.credit(trajectories)
                memory, learning = PeakMemory(trajectories.mask.device), time.perf_counter()
                metrics = world.metrics(trajectories) | learner.update(trajectories, advantages, returns)
                ended = time.perf_counter()
                metrics |= {"time/learning": ended - learning, "time/iteration": ended - started}
                if (peak := memory.lap()) is not None:
                    metrics["memory/learning"] = peak
            turn += 1
            yield Iteration(learner.iteration, trajectories, advantages, returns, metrics, learner.last_seen)


__all__ = ["ActorCritic", "Iteration", "World", "iterate"]
