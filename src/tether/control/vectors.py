"""What steps several environments: this process, worker processes, or a vector environment that an id brings.

Two kinds. `Seeded` ones begin an episode where and when they are told, with the seed that they are told; `Automatic`
ones do so themselves, from one random generator. N = environments.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from tether.control.atari import AtariEnvironment, make_games
from tether.control.infos import flag_of, floats
from tether.control.kept import States, layers

logger = logging.getLogger(__name__)

Env = gymnasium.Env[Any, Any]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]
Results = tuple[NDArray[Any], Numbers, Flags, Flags, Numbers | None]
"""Observations (N, *obs), rewards, terminated, truncated and success (N,); success None where none is told."""


class Seeded(Protocol):
    """Environments that are told when to begin an episode. An ended one must be told before the next step."""

    observation_space: Any
    action_space: Any

    def reset(self, seeds: Sequence[int], mask: Flags) -> NDArray[Any]:
        """Begin an episode with its seed where `mask` (N,) is True; the observations (N, *obs) of all, a new array."""

    def step(self, actions: NDArray[Any]) -> Results:
        """Do one action in each; new arrays."""

    @property
    def limited(self) -> bool:
        """Whether they come with a time limit."""

    def gathered(self) -> list[tuple[States, States]]:
        """Of each, what the user's wrappers had gathered before its episode began, and what they have now."""

    def bring(self, states: Sequence[States], mask: Flags) -> list[str]:
        """Give the wrappers what they had gathered, where `mask` (N,) is True; a line for what fits none."""

    def freeze(self) -> None:
        """What the wrappers have gathered stays as it is from now on."""

    def digests(self) -> list[dict[str, str]]:
        """Of each, a digest of whatever else its wrappers hold."""

    def close(self) -> None:
        """Close all of them; the second time nothing."""


class Loop:
    """One environment after the other, in this process.

    gymnasium's SyncVectorEnv does the same in half as much time again (66 against 44 µs for 8 CartPoles), for the
    copies of everything and the merging of infos.
    """

    def __init__(self, envs: Sequence[Env]) -> None:
        self._envs = list(envs)
        space: Any = envs[0].observation_space
        self.observation_space = space
        self.action_space: Any = envs[0].action_space
        shape = (len(envs), *space.shape)
        self._seen: NDArray[Any] = np.zeros(shape, dtype=space.dtype)

    def reset(self, seeds: Sequence[int], mask: Flags) -> NDArray[Any]:
        """As `Seeded` says."""
        self._seen = self._seen.copy()
        for index in np.flatnonzero(mask).tolist():
            self._seen[index], _ = self._envs[index].reset(seed=seeds[index])
        return self._seen

    def step(self, actions: NDArray[Any]) -> Results:
        """As `Seeded` says."""
        self._seen = observations = np.empty_like(self._seen)
        rewards, terminated, truncated, successes = [], [], [], []
        for index, env in enumerate(self._envs):
            observations[index], reward, ended, cut, info = env.step(actions[index].copy())  # which it may change
            rewards.append(reward)
            terminated.append(ended)
            truncated.append(cut)
            successes.append(flag_of(info) if info else None)
        return (
            observations,
            np.array(rewards, dtype=np.float64),
            np.array(terminated, dtype=np.bool_),
            np.array(truncated, dtype=np.bool_),
            floats(successes),
        )

    @property
    def limited(self) -> bool:
        """As `Seeded` says."""
        return all(has_limit(env) for env in self._envs)

    def gathered(self) -> list[tuple[States, States]]:
        """As `Seeded` says."""
        return [env.get_wrapper_attr("gathered")() for env in self._envs]

    def bring(self, states: Sequence[States], mask: Flags) -> list[str]:
        """As `Seeded` says."""
        chosen = [self._envs[index].get_wrapper_attr("bring")(states[index]) for index in np.flatnonzero(mask).tolist()]
        return [line for lines in chosen for line in lines]

    def freeze(self) -> None:
        """As `Seeded` says."""
        for env in self._envs:
            env.get_wrapper_attr("freeze")()

    def digests(self) -> list[dict[str, str]]:
        """As `Seeded` says."""
        return [env.get_wrapper_attr("digests")() for env in self._envs]

    def close(self) -> None:
        """As `Seeded` says."""
        for env in self._envs:
            env.close()
        self._envs = []


class Games:
    """Atari games of ale-py's vector environment, which begins a chosen one anew with a chosen seed at any time.

    Its own next-step autoreset never comes to act, as every ended game is begun anew before the next step.
    """

    def __init__(self, name: str, count: int, options: dict[str, Any]) -> None:
        self._vector = make_games(name, count, options)
        self.observation_space: Any = self._vector.single_observation_space
        self.action_space: Any = self._vector.single_action_space

    def reset(self, seeds: Sequence[int], mask: Flags) -> NDArray[Any]:
        """As `Seeded` says."""
        chosen: Any = np.array(seeds, dtype=np.int64)[mask]
        observations, _ = self._vector.reset(seed=chosen, options={"reset_mask": np.array(mask)})
        return observations

    def step(self, actions: NDArray[Any]) -> Results:
        """As `Seeded` says."""
        observations, rewards, terminated, truncated, _ = self._vector.step(actions)
        return observations, rewards.astype(np.float64), terminated, truncated, None

    limited = True  # by frames, in the emulator

    def gathered(self) -> list[tuple[States, States]]:
        """As `Seeded` says; there are no wrappers."""
        return []

    def bring(self, states: Sequence[States], mask: Flags) -> list[str]:
        """As `Seeded` says; there are no wrappers."""
        return []

    def freeze(self) -> None:
        """As `Seeded` says; there are no wrappers."""

    def digests(self) -> list[dict[str, str]]:
        """As `Seeded` says; there are no wrappers."""
        return []

    def close(self) -> None:
        """As `Seeded` says."""
        self._vector.close()


def has_limit(env: Any) -> bool:
    """Whether an environment, or a vector environment, comes with a time limit that can be seen."""
    spec = getattr(env, "spec", None)
    limited = getattr(spec, "max_episode_steps", None) is not None
    return limited or isinstance(env.unwrapped, AtariEnvironment) or any(isinstance(e, TimeLimit) for e in layers(env))
