"""Episodes of simulators for people: put together from batch to batch, named in words, filmed where that is asked for.

It knows what a collection saw and how a policy names its actions; nothing of how environments are stepped.
N = environments, T = steps of one collection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tether.control.films import Films
from tether.control.words import in_words
from tether.episode import Episode

EVALUATED_AT_ONCE = 2048  # states: bounds the memory of a CNN's activations


class NamingPolicy(Protocol):
    """What a policy can say of its actions."""

    def likeliest(self, observations: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        """(n, k) or (n, k, A) the likeliest actions in the states (n, *obs), and their probabilities (n, k).

        Likeliest first; k is `count`, or as many actions as there are. None where actions are continuous.
        """
        ...

    def to_environment(self, actions: Tensor) -> NDArray[Any]:
        """Actions as the environments take them."""
        ...


Alternatives = list[list[list[tuple[str, float]]]]
"""(episodes or environments, steps) of the likeliest actions: in words, and their probability."""


@dataclass(frozen=True)
class Rollout:
    """What one collection saw, (T, N) each, for people and metrics."""

    rewards: NDArray[Any]  # as the environments gave them
    terminated: NDArray[np.bool_]
    ended: NDArray[np.bool_]  # terminated or cut off for good: the next step here is of another episode
    mask: NDArray[np.bool_]
    success: NDArray[Any] | None
    shown: NDArray[Any]  # (T, recorded, *obs)
    seeds: NDArray[np.int64] | None  # (T, N) of the episodes that the steps are of
    alternatives: Alternatives | None  # (recorded, T)
    seconds: float


class EpisodeRecorder:
    """Records the episodes of the first few environments.

    Args:
        policy: whose actions they are.
        count: environments that are recorded.
        alternatives: likeliest actions that are kept of each step.
        films: makes films of episodes. None: there are none.
        film_every: steps of all environments between two films.
    """

    def __init__(
        self, policy: NamingPolicy, count: int, alternatives: int, films: Films | None = None, film_every: int = 0
    ) -> None:
        self.policy = policy
        self.count = count
        self.alternatives = alternatives
        self.films = films if film_every else None
        self.film_every = film_every
        self._filmed = -film_every  # steps that were done when the last film was made
        # what unfinished episodes have so far; None where one's beginning was not recorded
        self._open: list[dict[str, list[Any]] | None] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """All environments begin new episodes."""
        self._open = [{} for _ in range(self.count)]

    def likeliest(self, observations: Tensor) -> Alternatives | None:
        """Of the states (n, T, *obs); None where none are kept or known."""
        steps = observations.shape[1]
        if not (self.alternatives and len(observations)):
            return None
        states = observations.flatten(0, 1).split(EVALUATED_AT_ONCE)
        parts = [part for some in states if (part := self.policy.likeliest(some, self.alternatives)) is not None]
        if not parts:
            return None
        actions, probabilities = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        words = in_words(self.policy.to_environment(actions.flatten(0, 1)))
        pairs = list(zip(words, probabilities.flatten().tolist(), strict=True))
        kept = probabilities.shape[1]
        each = [pairs[start : start + kept] for start in range(0, len(pairs), kept)]
        return [each[start : start + steps] for start in range(0, len(each), steps)]

    def finished(
        self, rollout: Rollout, actions: Tensor, numbers: Mapping[str, Tensor], steps_done: int
    ) -> list[Episode]:
        """The episodes that ended in a collection, as wholes; what the others have so far is kept until they end.

        Args:
            rollout: what the collection saw.
            actions: (N, T) or (N, T, A).
            numbers: of each step, (N, T) each, by the names of `Episode`'s fields.
            steps_done: of all environments since the beginning of the run.
        """
        recorded = {name: tensor[: self.count].numpy(force=True) for name, tensor in numbers.items()}
        episodes = []
        for n in range(self.count):
            begin = 0
            for end in [*(np.flatnonzero(rollout.ended[:, n]) + 1), len(rollout.mask)]:
                steps = begin + np.flatnonzero(rollout.mask[begin:end, n])
                self._add(n, self._parts(rollout, actions, recorded, n, steps))
                if end > begin and rollout.ended[end - 1, n]:
                    if (parts := self._open[n]) is not None:
                        episode = self._episode(parts, bool(rollout.terminated[end - 1, n]), n, steps_done)
                        episodes.append(episode)
                    self._open[n] = {}
                begin = int(end)
        return episodes

    def _parts(
        self, rollout: Rollout, actions: Tensor, recorded: dict[str, NDArray[Any]], n: int, steps: NDArray[Any]
    ) -> dict[str, list[Any]]:
        """What is kept of these steps of environment n."""
        acted = self.policy.to_environment(actions[n, steps])
        parts: dict[str, list[Any]] = {name: array[n, steps].tolist() for name, array in recorded.items()}
        parts |= {"states": in_words(rollout.shown[steps, n]), "action_ids": acted.tolist()}
        parts |= {"actions": in_words(acted), "raw": rollout.rewards[steps, n].tolist()}
        if self.films is not None and rollout.seeds is not None:
            parts["seeds"] = rollout.seeds[steps, n].tolist()
        if rollout.alternatives is not None:
            parts["alternatives"] = [rollout.alternatives[n][step] for step in steps]
        return parts

    def _add(self, n: int, parts: dict[str, list[Any]]) -> None:
        """To the episode that environment n is in."""
        episode = self._open[n]
        if episode and episode.keys() != parts.keys():
            episode = self._open[n] = None  # it began when something else was kept of each step
        if episode is not None:
            for name, part in parts.items():
                episode.setdefault(name, []).extend(part)

    def _episode(self, parts: dict[str, list[Any]], terminated: bool, environment: int, steps_done: int) -> Episode:
        """The episode that `parts` are of, filmed where it is time for a film."""
        columns: dict[str, Any] = dict(parts)
        seeds = columns.pop("seeds", None)
        score, length = sum(columns.pop("raw")), len(columns["states"])
        how = "terminated" if terminated else "cut off by the time limit"
        episode = Episode(
            prompt=columns["states"][0],
            response=f"{length} steps, {how}",
            score=score,
            terminated=terminated,
            truncated=not terminated,
            details={"environment": environment},
            **columns,
        )
        if self.films is None or not seeds or steps_done - self._filmed < self.film_every:
            return episode
        self._filmed = steps_done
        name = f"{steps_done:09d}-{environment}"
        made = self.films.make(name, seeds[0], episode.action_ids, episode.states or [])
        if made is None:
            return episode
        return replace(episode, frames=made[0], details=episode.details | {"film": made[1]})

    def state_dict(self) -> dict[str, Any]:
        """What episodes have so far, and when the last film was made."""
        return {"filmed": self._filmed, "open": [_copy(episode) for episode in self._open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; what is recorded anew, `count` being another now, begins with the next episode."""
        self._filmed = int(state.get("filmed", -self.film_every))
        saved = state["open"] + [None] * self.count
        self._open = [_copy(episode) for episode in saved[: self.count]]


def _copy(parts: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    return None if parts is None else {name: list(values) for name, values in parts.items()}
