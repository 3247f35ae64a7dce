"""Environments in worker processes, by gymnasium's AsyncVectorEnv: what they say and how they fail, told here.

N = environments.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from tether.control.infos import batched_success, flag_of, warn_once
from tether.control.kept import States
from tether.control.loading import one_line_errors, reason_of
from tether.control.vectors import Env, Flags, Results, has_limit
from tether.errors import UserError
from tether.random_states import random_states_kept, seed_random_states


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
