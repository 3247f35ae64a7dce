"""Wrappers around one environment: what it returns is checked, its actions repeated, its images put channels first.

The innermost, `Checked`, also keeps what wrappers of the user's own gather, see `kept`.

Each changes one thing; none knows of several environments or of learning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from tether.control.kept import States, bring_states, digests_of, freeze, kept_layers, layers, states_of
from tether.control.loading import close_told, reason_of
from tether.errors import STOPS, UserError

Wrapper = gymnasium.Wrapper[Any, Any, Any, Any]
Stepped = tuple[NDArray[Any], float, bool, bool, dict[str, Any]]


class Checked(Wrapper):
    """Raises a UserError of one line where an environment raises, or returns something else than its spaces say.

    That the numbers are finite is checked where they are together, over all environments at once.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], label: str) -> None:
        super().__init__(env)
        self.label = label
        self._shape = env.observation_space.shape
        self._dtype = env.observation_space.dtype
        self._steps = 0
        self._spaces = _Sampled(env)
        self._kept = kept_layers(env)
        self._at_start: States = []  # what was gathered before the episode that runs
        self._frozen: States | None = None  # what every episode begins with

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; arguments and results are gymnasium's."""
        self._steps = 0
        if self._kept:
            if self._frozen:
                bring_states(self._kept, self._frozen, self.label)
            self._at_start = states_of(self._kept, self.label)
        if seed is not None:
            self._spaces.seed(seed)
        try:
            result = self.env.reset(seed=seed, options=options)
        except (UserError, *STOPS):
            raise
        except BaseException as error:
            raise UserError(f"{self.label}: reset raised {reason_of(error)}") from error
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
            found = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise UserError(f"{self.label}: reset returned {found}, expected two: (observation, info)")
        self._check_observation(result[0])
        return result

    def step(self, action: Any) -> Stepped:
        """Do `action`; arguments and results are gymnasium's."""
        self._steps += 1
        try:
            result = self.env.step(action)
        except (UserError, *STOPS):
            raise
        except BaseException as error:
            raise UserError(f"{self._here()}: step raised {reason_of(error)}") from error
        if not isinstance(result, tuple) or len(result) != 5:
            found = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise UserError(
                f"{self._here()}: step returned {found}, expected five: (observation, reward, terminated, truncated, "
                "info)"
            )
        observation, reward, terminated, truncated, info = result
        self._check_observation(observation)
        if type(reward) is not float:
            reward = self._number(reward)
        if not isinstance(terminated, (bool, np.bool_)) or not isinstance(truncated, (bool, np.bool_)):
            raise UserError(
                f"{self._here()}: terminated and truncated are {terminated!r} and {truncated!r}, expected True or False"
            )
        if not isinstance(info, dict):
            raise UserError(f"{self._here()}: info is a {type(info).__name__}, expected a dict")
        return observation, reward, bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close it; see `close_told`."""
        close_told(self.env, self.label)

    def gathered(self) -> tuple[States, States]:
        """What the user's wrappers had gathered before the episode that runs, and what they have now."""
        return (self._at_start, states_of(self._kept, self.label)) if self._kept else ([], [])

    def bring(self, states: States) -> list[str]:
        """Go on from what they had gathered; a line for whatever finds no counterpart."""
        if self._frozen is not None:
            self._frozen = states
        return bring_states(self._kept, states, self.label)

    def freeze(self) -> None:
        """Their statistics stay as they are from now on, or begin each episode as they are brought next."""
        freeze(self.env)
        self._frozen = []

    def digests(self) -> dict[str, str]:
        """Of what the wrappers hold that is not kept."""
        return digests_of(self.env)

    def _check_observation(self, observation: Any) -> None:
        if type(observation) is np.ndarray and observation.shape == self._shape and observation.dtype == self._dtype:
            return
        if isinstance(observation, np.ndarray):
            found = f"shape {observation.shape}, {observation.dtype}"
        elif isinstance(observation, np.generic) and self._shape == ():
            return
        else:
            found = f"a {type(observation).__name__}"
        raise UserError(
            f"{self._here()}: the observation is {found}, but its observation_space says shape {self._shape}, "
            f"{self._dtype}: return `np.asarray(observation, dtype=np.{self._dtype})` of that shape"
        )

    def _number(self, reward: SupportsFloat) -> float:
        if isinstance(reward, (int, float, np.integer, np.floating, np.bool_)) or (
            isinstance(reward, np.ndarray) and reward.shape == () and reward.dtype.kind in "fiub"
        ):
            try:
                return float(reward)
            except OverflowError:
                raise UserError(f"{self._here()}: the reward is too large for a float, expected a number") from None
        found = f"shape {reward.shape}" if isinstance(reward, np.ndarray) else f"a {type(reward).__name__}"
        raise UserError(f"{self._here()}: the reward is {found}, expected one number: return `float(reward)`")

    def _here(self) -> str:
        return f"{self.label}, step {self._steps} of its episode" if self._steps else f"{self.label}, reset"


class _Sampled:
    """The spaces of an environment and of its wrappers, which have generators of their own that no reset seeds.

    Many environments draw by `observation_space.sample()`. A generator that nobody drew from is left as it is, as
    seeding costs as much as some steps.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        found = [getattr(layer, name, None) for layer in layers(env) for name in ("observation_space", "action_space")]
        self._spaces = list({id(part): part for space in found for part in _parts(space)}.values())
        self._states: list[Any] = [None] * len(self._spaces)

    def seed(self, seed: int) -> None:
        """Begin the generators that were drawn from anew."""
        for place, space in enumerate(self._spaces):
            if self._states[place] is None or space.np_random.bit_generator.state != self._states[place]:
                space.seed(seed + place)
                self._states[place] = space.np_random.bit_generator.state


def _parts(space: Any) -> Iterator[spaces.Space[Any]]:
    """A space, or those that it is made of."""
    if isinstance(space, spaces.Dict):
        yield from (part for inner in space.spaces.values() for part in _parts(inner))
    elif isinstance(space, spaces.Tuple):
        yield from (part for inner in space.spaces for part in _parts(inner))
    elif isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
        yield space


class ActionRepeat(Wrapper):
    """Does each action several times and sums the rewards; stops early where the episode ends."""

    def __init__(self, env: gymnasium.Env[Any, Any], times: int) -> None:
        super().__init__(env)
        self._times = times

    def step(self, action: Any) -> Stepped:
        """The last observation, flags and info, and the sum of the rewards."""
        total = 0.0
        for _ in range(self._times):
            observation, reward, terminated, truncated, info = self.env.step(copy(action))  # which it may change
            total += float(reward)
            if terminated or truncated:
                break
        return observation, total, terminated, truncated, info


class ChannelsFirst(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Images (H, W, C) as (C, H, W), and (H, W) as (1, H, W)."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        low, high = self.observation(space.low), self.observation(space.high)
        self.observation_space = spaces.Box(low, high, dtype=space.dtype.type)

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """The same pixels in the other order."""
        if observation.ndim == 2:
            return observation[None]
        return np.ascontiguousarray(observation.transpose(2, 0, 1))


class FrameStack(Wrapper):
    """The last observations one after the other along the first axis, oldest first.

    At the start of an episode its first observation fills the places of those that are not there yet.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], count: int) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        low, high = np.concatenate([space.low] * count), np.concatenate([space.high] * count)
        self.observation_space = spaces.Box(low, high, dtype=space.dtype.type)
        self._frames: deque[NDArray[Any]] = deque(maxlen=count)
        self._count = count

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode with the first observation repeated."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._frames.extend([np.array(observation)] * self._count)
        return np.concatenate(self._frames), info

    def step(self, action: Any) -> Stepped:
        """Do `action`, and drop the oldest observation for the new one."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(np.array(observation))  # a copy: the environment may use its array again
        return np.concatenate(self._frames), float(reward), terminated, truncated, info


class Watched(Wrapper):
    """Shows itself to somebody after each reset and each step.

    Args:
        env: what is watched.
        watch: given the environment, and whether an episode has just begun.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], watch: Callable[[Any, bool], None]) -> None:
        super().__init__(env)
        self._watch = watch

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        result = self.env.reset(seed=seed, options=options)
        self._watch(self.env, True)
        return result

    def step(self, action: Any) -> Stepped:
        """Do `action`."""
        result: Any = self.env.step(action)
        self._watch(self.env, False)
        return result
