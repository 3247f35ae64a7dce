"""What steps several environments: this process, worker processes, or a vector environment that an id brings.

Two kinds. `Seeded` ones begin an episode where and when they are told, with the seed that they are told; `Automatic`
ones do so themselves, from one random generator. N = environments.
"""

from __future__ import annotations

import functools
import json
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
from numpy.typing import NDArray

from tether.control.atari import make_games
from tether.control.loading import one_line_errors, reason_of
from tether.errors import UserError

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
            successes.append(success_of(info) if info else None)
        return (
            observations,
            np.array(rewards, dtype=np.float64),
            np.array(terminated, dtype=np.bool_),
            np.array(truncated, dtype=np.bool_),
            _floats(successes),
        )

    def close(self) -> None:
        """As `Seeded` says."""
        for env in self._envs:
            env.close()
        self._envs = []


class Workers:
    """Each environment in a worker process, by gymnasium's AsyncVectorEnv."""

    def __init__(self, label: str, makers: Sequence[Callable[[], Env]]) -> None:
        self._label = label
        self._waiting = False
        first = makers[0]()  # what cannot be made is told before there are any processes
        first.close()
        stand_in = StandIn(first.observation_space, first.action_space)
        starts = [functools.partial(_start, make, stand_in, os.getpid()) for make in makers]
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
        return np.array(observations), rewards, terminated, truncated, _batched_success(infos, len(rewards))

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


def _start(make: Callable[[], Env], stand_in: StandIn, parent: int) -> Env:
    """The environment in a worker process; in the parent, where gymnasium asks for the spaces only, no second one."""
    if os.getpid() == parent:
        return stand_in
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends the workers
    try:
        return Reported(make())
    except UserError as error:
        return Reported(StandIn(stand_in.observation_space, stand_in.action_space, str(error)))


class Reported(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment in a worker process: errors are told in the info, of which nothing else is sent but success.

    gymnasium's own way prints the traceback of every worker and raises the last one's error.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        space = env.observation_space
        self._nothing = np.zeros(space.shape or (), dtype=space.dtype)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The environment's own, or the error."""
        try:
            observation, _ = self.env.reset(seed=seed, options=options)
        except UserError as error:
            return self._nothing, {"error": str(error)}
        return observation, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The environment's own, or the error."""
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except UserError as error:
            return self._nothing, 0.0, False, False, {"error": str(error)}
        success = success_of(info) if info else None
        return observation, float(reward), terminated, truncated, {} if success is None else {"success": success}


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

    def close(self) -> None:
        """As `Seeded` says."""
        self._vector.close()


class Automatic:
    """A vector environment that an id brings, which begins episodes itself: in the step that ends one, or the next.

    Attributes:
        pending: (N,) bool, the next step will ignore the action and begin an episode.
    """

    def __init__(self, label: str, vector: VectorEnv[Any, Any, Any]) -> None:
        self._label = label
        self._vector = vector
        self._same_step = vector.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
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
        """Do one action in each that is not pending; `Results` with the successors (N, *obs) before the success."""
        try:
            seen, rewards, terminated, truncated, infos = self._vector.step(actions)
        except Exception as error:
            raise UserError(f"{self._label}: step raised {reason_of(error)}") from error
        terminated, truncated = np.array(terminated, dtype=np.bool_), np.array(truncated, dtype=np.bool_)
        observations = successors = np.array(seen)
        if not self._same_step:
            self.pending = terminated | truncated
        elif "final_obs" in infos:
            successors = observations.copy()
            for index in np.flatnonzero(terminated | truncated).tolist():
                successors[index] = infos["final_obs"][index]
            infos = infos.get("final_info", infos)
        success = _batched_success(infos, len(terminated)) if infos else None
        return observations, np.array(rewards, dtype=np.float64), terminated, truncated, successors, success

    def snapshot(self) -> dict[str, Any] | None:
        """Its arrays, numbers and random generator as `restore` takes them; None where it is made of other things too.

        Spaces and the description that gymnasium has registered are constants. An array of another library, an
        emulator, an object of its own: what it does with them cannot be known, and nothing is saved.
        """
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
        self._vector.close()


def success_of(info: dict[str, Any]) -> float | None:
    """What an environment says of its success as `is_success` or `success`; None where it gives no such number."""
    value = info.get("is_success", info.get("success"))
    return float(value) if isinstance(value, (bool, int, float, np.bool_, np.number)) else None


def _floats(values: Sequence[float | None]) -> Numbers | None:
    if all(value is None for value in values):
        return None
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _batched_success(infos: dict[str, Any], count: int) -> Numbers | None:
    """Success (N,) from the info of a gymnasium vector environment: an array beside the mask of who says it."""
    for name in ("is_success", "success"):
        values = np.asarray(infos[name]) if name in infos else None
        if values is not None and values.shape == (count,) and values.dtype.kind in "fiub":
            return np.where(infos.get(f"_{name}", True), values.astype(np.float64), np.nan)
    return None
