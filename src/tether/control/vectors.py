"""What steps several environments: this process, worker processes, or a vector environment that an id brings.

Two kinds. `Seeded` ones begin an episode where and when they are told, with the seed that they are told; `Automatic`
ones do so themselves, from one random generator. N = environments.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from tether.control.atari import AtariEnvironment, make_games
from tether.control.infos import batched_success, final_infos, final_observations, flag_of, floats, warn_once
from tether.control.kept import States, bring_states, digests_of, freeze, kept_layers, layers, states_of
from tether.control.loading import one_line_errors, reason_of
from tether.errors import UserError
from tether.random_states import random_states_kept, seed_random_states

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
            observations[index], reward, ended, cut, info = env.step(actions[index])
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


class Workers:
    """Each environment in a worker process, by gymnasium's AsyncVectorEnv.

    The global generators of a process are begun from the seed of each episode, so that environments that draw from
    them see what is theirs, and the same when an episode is done again.

    Args:
        label: of the environment, for messages.
        makers: of each.
        seeds: of each process's global generators while its environment is made.
    """

    def __init__(self, label: str, makers: Sequence[Callable[[], Env]], seeds: Sequence[int]) -> None:
        self._label = label
        self._waiting = False
        with random_states_kept():
            first = makers[0]()  # what cannot be made is told before there are any processes
        self.limited = has_limit(first)
        first.close()
        stand_in = StandIn(first.observation_space, first.action_space)
        starts = [
            functools.partial(_start, make, stand_in, os.getpid(), index, seed)
            for index, (make, seed) in enumerate(zip(makers, seeds, strict=True))
        ]
        with one_line_errors(f"{label}: its worker processes cannot be started"):
            self._vector = AsyncVectorEnv(starts, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.observation_space: Any = self._vector.single_observation_space
        self.action_space: Any = self._vector.single_action_space

    def reset(self, seeds: Sequence[int], mask: Flags) -> NDArray[Any]:
        """As `Seeded` says."""
        options = {"reset_mask": np.array(mask)}
        observations, _ = self._answer(lambda: self._vector.reset(seed=list(seeds), options=options))
        return np.array(observations)

    def step(self, actions: NDArray[Any]) -> Results:
        """As `Seeded` says."""
        observations, rewards, terminated, truncated, infos = self._answer(lambda: self._vector.step(actions))
        for text in filter(None, infos.get("strange", ())):
            warn_once(text)
        return np.array(observations), rewards, terminated, truncated, batched_success(infos, len(rewards))

    def gathered(self) -> list[tuple[States, States]]:
        """As `Seeded` says."""
        return self._call("gathered")

    def bring(self, states: Sequence[States], mask: Flags) -> list[str]:
        """As `Seeded` says."""
        found: list[list[str]] = self._call("bring", list(states), mask.tolist())
        return [line for lines in found for line in lines]

    def freeze(self) -> None:
        """As `Seeded` says."""
        self._call("freeze")

    def digests(self) -> list[dict[str, str]]:
        """As `Seeded` says."""
        return self._call("digests")

    def _call(self, name: str, *arguments: Any) -> list[Any]:
        """What each environment's `Reported.told` says of this."""
        found = self._answer(lambda: (self._vector.call("told", name, *arguments), {}))[0]
        if errors := [said for said, answer in found if said]:
            self.close()
            raise UserError(errors[0])
        return [answer for _, answer in found]

    def _answer(self, call: Callable[[], Any]) -> Any:
        self._waiting = True
        try:
            answer = call()
        except (EOFError, OSError) as error:
            # A pipe ends a moment before its process does.
            ended = wait([process.sentinel for process in self._vector.processes], timeout=1.0)
            for process in self._vector.processes:
                if process.sentinel in ended:
                    process.join(1.0)
            gone = [process.exitcode for process in self._vector.processes if process.exitcode is not None]
            self.close()
            raise UserError(
                f"{self._label}: a worker process ended{f' with exit code {gone[0]}' if gone else ''} (it crashed, or "
                "was killed, for example for its memory); `vectorization: sync` steps the environments in this process"
            ) from error
        self._waiting = False
        if "error" in answer[-1]:
            self.close()
            raise UserError(next(message for message in answer[-1]["error"] if message))
        return answer

    def close(self) -> None:
        """As `Seeded` says. An unfinished step is not waited for."""
        if self._vector.closed:
            return
        if not self._waiting:
            self._vector.close()
            return
        for process in self._vector.processes:
            process.terminate()
        for process in self._vector.processes:
            process.join()
        for pipe in self._vector.parent_pipes:
            pipe.close()
        self._vector.closed = True


class StandIn(gymnasium.Env[Any, Any]):
    """Has the spaces of an environment, and at most tells why that one is not here."""

    def __init__(self, observation_space: Any, action_space: Any, error: str = "") -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.error = error

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The error."""
        raise UserError(self.error)


def has_limit(env: Any) -> bool:
    """Whether an environment, or a vector environment, comes with a time limit that can be seen."""
    spec = getattr(env, "spec", None)
    limited = getattr(spec, "max_episode_steps", None) is not None
    return limited or isinstance(env.unwrapped, AtariEnvironment) or any(isinstance(e, TimeLimit) for e in layers(env))


def _start(make: Callable[[], Env], stand_in: StandIn, parent: int, index: int, seed: int) -> Env:
    """The environment in a worker process; in the parent, where gymnasium asks for the spaces only, no second one."""
    if os.getpid() == parent:
        return stand_in
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends the workers
    seed_random_states(seed)
    try:
        return Reported(make(), index)
    except (UserError, KeyboardInterrupt) as error:
        spaces_alone = StandIn(stand_in.observation_space, stand_in.action_space, _words(error, "making it"))
        return Reported(spaces_alone, index)


def _words(error: UserError | KeyboardInterrupt, doing: str) -> str:
    """One line. A KeyboardInterrupt in a worker process, which no Ctrl-C reaches, is the environment's own."""
    return str(error) if isinstance(error, UserError) else f"environment: {doing} raised {reason_of(error)}"


class Reported(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment in a worker process: errors are told in the info, of which nothing else is sent but success.

    Each episode begins with the process's global generators begun from its seed.

    gymnasium's own way prints the traceback of every worker and raises the last one's error.
    """

    def __init__(self, env: Env, index: int) -> None:
        super().__init__(env)
        space = env.observation_space
        self._index = index
        self._nothing = np.zeros(space.shape or (), dtype=space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The environment's own, or the error."""
        if seed is not None:
            seed_random_states(seed)
        try:
            observation, _ = self.env.reset(seed=seed, options=options)
        except (UserError, KeyboardInterrupt) as error:
            return self._nothing, {"error": _words(error, "reset")}
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The environment's own, or the error."""
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except (UserError, KeyboardInterrupt) as error:
            return self._nothing, 0.0, False, False, {"error": _words(error, "step")}
        strange: list[str] = []
        success = flag_of(info, strange.append) if info else None
        told: dict[str, Any] = {} if success is None else {"success": success}
        return observation, float(reward), terminated, truncated, told | ({"strange": strange[0]} if strange else {})

    def told(self, name: str, *arguments: Any) -> tuple[str, Any]:
        """What became of a method of `Checked`: the error, empty where there was none, and the answer."""
        if isinstance(self.env, StandIn):
            return self.env.error, None
        try:
            if name == "bring":  # the states and the mask of all environments
                states, mask = arguments
                return "", self.env.get_wrapper_attr(name)(states[self._index]) if mask[self._index] else []
            return "", self.env.get_wrapper_attr(name)(*arguments)
        except UserError as error:
            return str(error), None


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


class Automatic:
    """A vector environment that an id brings: it begins episodes itself, in the step that ends one or in the next, or
    those that it is told to.

    Attributes:
        pending: (N,) bool, the next step will ignore the action and begin an episode.
        limited: whether it comes with a time limit.
    """

    def __init__(self, label: str, vector: VectorEnv[Any, Any, Any], limited: bool = False) -> None:
        self._label = label
        self._vector = vector
        self._mode = AutoresetMode(vector.metadata.get("autoreset_mode"))
        self._kept = kept_layers(vector)
        self.limited = limited
        self.pending: Flags = np.zeros(vector.num_envs, dtype=np.bool_)
        self.observation_space: Any = vector.single_observation_space
        self.action_space: Any = vector.single_action_space

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode in all of them; seeds the one generator with the first of `seeds`."""
        self.pending = np.zeros_like(self.pending)
        with one_line_errors(f"{self._label}: reset failed"):
            observations, _ = self._vector.reset(seed=seeds[0])
        return np.array(observations)

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[Any], Numbers, Flags, Flags, NDArray[Any], Numbers | None]:
        """Do one action in each that is not pending; `Results` with the successors (N, *obs) before the success.

        Raises:
            UserError: it fails; or an episode was cut off, and the state that it was cut off in is not told.
        """
        try:
            seen, rewards, terminated, truncated, infos = self._vector.step(actions)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self._label}: step raised {reason_of(error)}") from error
        terminated, truncated = np.array(terminated, dtype=np.bool_), np.array(truncated, dtype=np.bool_)
        observations = successors = np.array(seen)
        ended = terminated | truncated
        success = None
        if infos:
            success = batched_success(infos, len(terminated))
        if self._mode == AutoresetMode.NEXT_STEP:
            self.pending = ended
        elif ended.any() and self._mode == AutoresetMode.SAME_STEP:
            success = batched_success(final_infos(infos), len(terminated)) if infos else None
            successors, known = final_observations(infos, ended, observations, self._label)
            if (truncated & ~terminated & ~known).any():
                raise UserError(
                    f"{self._label}: an episode was cut off, but its last observation is neither `final_obs` nor "
                    "`final_observation` in the info, and the one that was returned is the next episode's: its value "
                    "would be learned from; let the environment tell it, or set `vectorization: sync`"
                )
        elif ended.any():
            observations = successors.copy()
            with one_line_errors(f"{self._label}: reset failed"):
                begun, _ = self._vector.reset(options={"reset_mask": ended})
            observations[ended] = np.array(begun)[ended]
        return observations, np.array(rewards, dtype=np.float64), terminated, truncated, successors, success

    def gathered(self) -> list[tuple[States, States]]:
        """What wrappers around it have gathered, twice: there is no episode that could be done again."""
        found = states_of(self._kept, self._label)
        return [(found, found)] if found else []

    def bring(self, states: Sequence[States]) -> list[str]:
        """Give the wrappers what they had gathered; a line for what fits none."""
        return bring_states(self._kept, states[0], self._label)

    def freeze(self) -> None:
        """What the wrappers have gathered stays as it is from now on."""
        freeze(self._vector)

    def digests(self) -> list[dict[str, str]]:
        """A digest of whatever else its wrappers hold."""
        return [digests_of(self._vector)]

    def snapshot(self) -> dict[str, Any] | None:
        """Its arrays, numbers and random generator as `restore` takes them; None where it is made of other things too.

        Spaces and the description that gymnasium has registered are constants. An array of another library, an
        emulator, an object of its own: what it does with them cannot be known, and nothing is saved.
        """
        around = [layer for layer in layers(self._vector) if layer is not self._vector.unwrapped]
        if any(layer not in self._kept and not type(layer).__module__.startswith("gymnasium.") for layer in around):
            return None
        saved: dict[str, Any] = {"pending": torch.from_numpy(self.pending.copy())}
        attributes: dict[str, Any] = {}
        for name, value in vars(self._vector.unwrapped).items():
            if isinstance(value, (spaces.Space, EnvSpec)) or name == "metadata":
                continue
            if isinstance(value, np.random.Generator):
                try:
                    attributes[name] = ["generator", json.dumps(value.bit_generator.state)]
                except TypeError:  # the state of this kind of generator holds arrays
                    return None
            elif value is None or isinstance(value, (bool, str)):
                attributes[name] = ["plain", value]
            elif isinstance(value, float):
                attributes[name] = ["plain", float(value)]  # numpy's float64 is a float too
            elif isinstance(value, int):
                attributes[name] = ["integer", str(value)]  # of any size
            elif type(value) is np.ndarray and value.ndim > 0 and value.dtype.kind in "fiub":
                attributes[name] = ["array", torch.from_numpy(value.copy())]
            else:
                return None
        return saved | {"attributes": attributes}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `snapshot`."""
        self.pending = saved["pending"].numpy().copy()
        for name, (form, value) in saved["attributes"].items():
            if form == "generator":
                state = json.loads(value)
                generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
                generator.bit_generator.state = state
                setattr(self._vector.unwrapped, name, generator)
            elif form == "integer":
                setattr(self._vector.unwrapped, name, int(value))
            else:
                setattr(self._vector.unwrapped, name, value.numpy().copy() if form == "array" else value)

    def close(self) -> None:
        """Close it; the second time nothing."""
        try:
            with one_line_errors(f"{self._label}: close failed"):
                self._vector.close()
        except UserError as error:
            logger.warning("%s", error)
