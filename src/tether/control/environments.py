"""Several environments stepped together, whatever steps them: one interface over gymnasium's vector environments.

Knows how episodes are begun, ended and resumed, and what is wrong with the numbers that come back; `making.py` knows
how one environment is made, `together.py` how several are. Nothing here knows of policies or learning.

N = environments, *obs = shape of an observation.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from tether.control.atari import is_atari
from tether.control.automatic import Automatic
from tether.control.kept import States, merged, to_arrays, to_tensors
from tether.control.making import EnvironmentsConfig, build, find_source, make_environment, wrap
from tether.control.together import Kind, in_a_loop, is_native, make_native, make_together, place_of
from tether.control.vectors import Seeded
from tether.control.wrappers import Watched
from tether.errors import UserError

__all__ = ["Environments", "EnvironmentsConfig", "Step", "make_environment", "tell_now_and_then"]

logger = logging.getLogger(__name__)

_LOG_SLACK = 1024  # actions of ended episodes that are kept before they are dropped together
_TOLD_EVERY = 10.0  # seconds between two lines about work that takes long


@dataclass(frozen=True)
class Step:
    """What one action in each of N environments led to.

    Attributes:
        observations: (N, *obs) what the policy sees next; where an episode ended, the next one's first observation
            (native environments with next-step autoreset: the last one again, see `valid`).
        rewards: (N,) float64.
        terminated: (N,) bool, the episode came to its end.
        truncated: (N,) bool, it was cut off; False where it terminated in the same step.
        successors: (N, *obs) the states that the actions led to: final observations where episodes ended, else
            `observations`.
        valid: (N,) bool, False where no transition happened: a native environment with next-step autoreset ignored the
            action and began its next episode, whose first observation is in `observations`.
        success: (N,) float64, what the environment says of its success as `is_success` or `success` in its info, NaN
            where it says nothing; None where none does.
    """

    observations: NDArray[Any]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    successors: NDArray[Any]
    valid: NDArray[np.bool_]
    success: NDArray[np.float64] | None


class Environments:
    """N environments of one kind, each beginning its next episode as soon as one has ended.

    In `sync` and `async` environments and in Atari games every episode has a seed of its own, that of episode k in
    environment i a function of (seed, i, k): what happens in it depends on its seed and its actions alone. Other
    native environments have one random generator for all, seeded once. In `async` ones the global generators of each
    process are begun from the same seed.

    Where there is no time limit, episodes are cut off after `config.longest_episode` actions. What wrappers of the
    user's own gather from episode to episode is part of the state where it can be kept, see `kept`.

    Attributes:
        count: N.
        label: what messages call them.
        kind: what steps them.
        observation_space: of one environment: a vector (n,), or an image (C, H, W) of uint8.
        action_space: of one environment: Discrete, MultiDiscrete, or a Box (A,) of floats.
        observations: (N, *obs) what the policy sees now; None before the first reset.
        seeds: (N,) of the episodes that run; None where episodes have none of their own.

    Raises:
        UserError: the environment cannot be found, made or learnt from.
    """

    observation_space: spaces.Box
    action_space: spaces.Discrete | spaces.MultiDiscrete | spaces.Box
    kind: Kind

    def __init__(self, env: str, config: EnvironmentsConfig, seed: int) -> None:
        source = find_source(env)
        self._set_up(source.label, *make_together(source, config, seed), config, seed)

    @classmethod
    def to_try(
        cls, env: str, config: EnvironmentsConfig, seed: int, watch: Callable[[Any, bool], None] | None = None
    ) -> Environments:
        """One environment to try a policy in: whole games, rewards as they are, statistics of wrappers frozen.

        What training steps by an id's own vector environment is tried in that one too, made for one: it may have other
        wrappers than the id's single environment. Atari games are the same both ways, and single here.

        Args:
            env: see `make_environment`.
            config: of the training; `count` and `vectorization` do not matter.
            seed: of the episodes.
            watch: given the environment, which renders, and whether an episode has just begun, after each reset and
                each step.

        Raises:
            UserError: it cannot be found, made, used or, with `watch`, rendered.
        """
        source = find_source(env)
        config = replace(config, count=1)
        environments = cls.__new__(cls)
        kind: Kind = "sync"
        vector: Seeded | Automatic
        if is_native(source, config) and not (source.spec is not None and is_atari(source.spec)):
            kind, vector = "native", make_native(source, config, watch)
        else:
            single = build(source, config, None if watch is None else "rgb_array", training=False)
            vector = in_a_loop(source.label, [single if watch is None else Watched(single, watch)])
        environments._set_up(source.label, kind, vector, config, seed)
        environments._vector.freeze()
        return environments

    @classmethod
    def of(cls, envs: Sequence[gymnasium.Env[Any, Any]], seed: int) -> Environments:
        """Environments that are made already, stepped one after the other in this process.

        For those that no configuration describes, since they hold a function or a tokenizer. They are checked, seeded
        and resumed as others are, and belong to the result, which closes them.

        Args:
            envs: one or more, each an object of its own, all with the same spaces.
            seed: of the episodes.

        Raises:
            UserError: they cannot be learnt from, or not together.
        """
        if not envs:
            raise UserError("environments: found none, expected at least one")
        for index, env in enumerate(envs):
            if not isinstance(env, gymnasium.Env):
                raise UserError(f"environment {index} is a {type(env).__name__}, expected a gymnasium.Env")
        label = f"environment `{type(envs[0].unwrapped).__name__}`"
        config = EnvironmentsConfig(count=len(envs), vectorization="sync")
        checked = [wrap(env, config, label, place_of(config, index)) for index, env in enumerate(envs)]
        environments = cls.__new__(cls)
        environments._set_up(label, "sync", in_a_loop(label, checked), config, seed)
        return environments

    def _set_up(
        self, label: str, kind: Kind, vector: Seeded | Automatic, config: EnvironmentsConfig, seed: int
    ) -> None:
        self.count = config.count
        self.kind, self._vector = kind, vector
        self.observation_space = self._vector.observation_space
        self.action_space = self._vector.action_space
        self.observations: NDArray[Any] | None = None
        self.seeds: NDArray[np.int64] | None = None
        self.label = label
        self._seed = seed
        self._episodes = np.zeros(self.count, dtype=np.int64)  # begun so far
        self._lengths = np.zeros(self.count, dtype=np.int64)  # steps of the running ones
        self._longest = 0  # of them, or more
        self._limit = None if vector.limited else config.longest_episode
        self._cut = False  # an episode was cut off there
        self._log: list[NDArray[Any]] = []  # the latest actions of all, as far back as a running episode began
        self._all = np.ones(self.count, dtype=np.bool_)
        self._all.setflags(write=False)  # handed out with every step
        self._floats = self.observation_space.dtype.kind == "f"
        self._action_dtype = np.int64 if self.action_space.dtype.kind in "iu" else self.action_space.dtype
        self._action_shape = (self.count, *(self.action_space.shape or ()))

    @property
    def replayable(self) -> bool:
        """Whether every episode has a seed of its own."""
        return not isinstance(self._vector, Automatic)

    def reset(self) -> NDArray[Any]:
        """Begin an episode in every environment; returns the observations (N, *obs)."""
        return self._begin(self._all)

    def step(self, actions: NDArray[Any]) -> Step:
        """Do one action in each environment.

        Args:
            actions: (N,) integers for Discrete, (N, A) integers for MultiDiscrete, (N, A) floats for a Box, as the
                environment understands them.

        Raises:
            UserError: an environment raised, or returned something else than its spaces say or a number that is not
                finite. The message names the environment and the step of its episode.
        """
        if self.observations is None:
            raise RuntimeError("reset has to be called before step")
        actions = np.array(actions, dtype=self._action_dtype)
        if actions.shape != self._action_shape:
            raise ValueError(f"actions have shape {actions.shape}, expected {self._action_shape}")
        if isinstance(self._vector, Automatic):
            return self._step_automatic(self._vector, actions)
        observations, rewards, terminated, truncated, success = self._vector.step(actions)
        self._lengths += 1
        self._longest += 1
        self._check_finite(observations, rewards)
        self._log.append(actions)
        successors = observations
        if self._limit is not None and self._longest >= self._limit:
            truncated = self._cut_off(truncated)
        ended = terminated | truncated
        if ended.any():
            truncated = truncated & ~terminated
            observations = self._begin(ended)
        self.observations = observations
        return Step(observations, rewards, terminated, truncated, successors, self._all, success)

    def _step_automatic(self, vector: Automatic, actions: NDArray[Any]) -> Step:
        valid = ~vector.pending if vector.pending.any() else self._all
        observations, rewards, terminated, truncated, successors, success = vector.step(actions)
        self._lengths += valid
        self._longest += 1
        self._check_finite(successors, rewards)
        if self._limit is not None and self._longest >= self._limit:
            # of it alone: the environment goes on, and what it does next counts as another episode
            truncated = self._cut_off(truncated)
        ended = terminated | truncated
        if ended.any():
            truncated = truncated & ~terminated
            self._lengths[ended] = 0
            if successors is not observations:
                self._check_finite(observations, rewards)
        self.observations = observations
        return Step(observations, rewards, terminated, truncated, successors, valid, success)

    def _cut_off(self, truncated: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(N,) truncated, also where an episode is as long as one may be."""
        self._longest = int(self._lengths.max())
        over = self._lengths >= (self._limit or 0)
        if over.any() and not self._cut:
            self._cut = True
            logger.warning(
                "%s: an episode had not ended after %s steps and was cut off, as by a time limit; "
                "environments.longest_episode says after how many",
                self.label,
                f"{self._limit:,}",
            )
        return truncated | over

    def _begin(self, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """Begin the next episode where `mask` (N,) is True; the observations (N, *obs) of all."""
        seeds = [self._seed_of(index) if begins else 0 for index, begins in enumerate(mask.tolist())]
        self._episodes += mask
        self._lengths[mask] = 0
        self._longest = int(self._lengths.max())
        spare = len(self._log) - self._longest
        if spare > _LOG_SLACK:
            del self._log[:spare]
        vector = self._vector
        if isinstance(vector, Automatic):
            self.observations = vector.reset(seeds)
        else:
            self.seeds = np.where(mask, seeds, 0 if self.seeds is None else self.seeds)
            self.observations = vector.reset(seeds, mask)
        self._check_finite(self.observations, None)
        return self.observations

    def _seed_of(self, index: int, before: int = 0) -> int:
        """The seed of the next episode in environment `index`, or of the one so many before it."""
        episode = int(self._episodes[index]) - before
        # 31 bits: the Atari emulator takes no more.
        return int(np.random.SeedSequence(self._seed, spawn_key=(index, episode)).generate_state(1)[0]) >> 1

    def _check_finite(self, observations: NDArray[Any], rewards: NDArray[np.float64] | None) -> None:
        # The sum of squares is not finite where any number is not. Very large ones overflow too: the slow look decides.
        if self._floats and not math.isfinite(np.vdot(observations, observations)):
            self._refuse(~np.isfinite(observations), observations, "observation")
        if rewards is not None and not math.isfinite(np.vdot(rewards, rewards)):
            self._refuse(~np.isfinite(rewards), rewards, "reward")

    def _refuse(self, wrong: NDArray[np.bool_], values: NDArray[Any], what: str) -> None:
        places = np.argwhere(wrong)
        if not len(places):
            return
        index, *component = places[0].tolist()
        step = int(self._lengths[index])
        when = f"step {step} of its episode" if step else "reset"
        which = f"[{', '.join(map(str, component))}]" if component else ""
        place = f", index {index}" if self.count > 1 else ""
        raise UserError(
            f"{self.label}{place}, {when}: {what}{which} is {values[tuple(places[0])]}, expected a finite number"
        )

    # Resume ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened; tensors, numbers and text only.

        Of episodes with a seed of their own: which ones run, and the actions since they began. This grows with the
        length of episodes: one that never ends is remembered from its first action. Of other native environments:
        their arrays, numbers and random generator, where that is all that they are made of.
        """
        gathered = self._vector.gathered()
        state: dict[str, Any] = {
            "wrappers": to_tensors(gathered) if any(now for _, now in gathered) else [],
            "count": self.count,
            "seed": str(self._seed),
            "episodes": torch.from_numpy(self._episodes.copy()),
            "lengths": torch.from_numpy(self._lengths.copy()),
            "observations": None if self.observations is None else _tensor(self.observations),
        }
        if isinstance(self._vector, Automatic):
            return state | {"form": "attributes", "attributes": self._vector.snapshot()}
        longest = int(self._lengths.max())
        actions = np.array(self._log[len(self._log) - longest :], dtype=self._action_dtype)
        actions = actions.reshape(longest, *self._action_shape)
        return state | {"form": "actions", "actions": torch.from_numpy(actions)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from `state_dict`; `observations` are then what the policy saw last.

        Episodes with a seed of their own are begun anew with it, and their actions done again, which is exact where an
        environment depends on nothing else.

        Returns:
            True where the episodes go on. False where that is not possible: new ones were begun instead, and one
            warning was logged.

        Raises:
            UserError: the state is of another number of environments.
        """
        if state["count"] != self.count:
            raise UserError(
                f"{self.label}: the saved state is of {state['count']} environments, the configuration says "
                f"count {self.count}: resume with the same count"
            )
        self._seed = int(state["seed"])
        self._episodes = state["episodes"].numpy().copy()
        self._log = []
        gathered: list[tuple[States, States]] = to_arrays(state.get("wrappers", []))
        before, now = [first for first, _ in gathered], [last for _, last in gathered]
        if state["observations"] is None:
            self._bring(now, self._all)
            self.observations = None
            self._lengths[:] = 0
            self._longest = 0
            return True
        seen = state["observations"].numpy()
        if state["form"] != ("attributes" if isinstance(self._vector, Automatic) else "actions"):
            reason = "they were stepped in another way (`vectorization`) when they were saved"
        elif isinstance(self._vector, Automatic):
            if state["attributes"] is not None and self._vector.snapshot() is not None:
                self._vector.restore(state["attributes"])
                self._bring(now, self._all)
                self._lengths = state["lengths"].numpy().copy()
                self._longest = int(self._lengths.max())
                self.observations = seen.copy()
                return True
            reason = "this native environment keeps a state that cannot be saved; `vectorization: sync` resumes exactly"
        else:
            self._replay(state["actions"].numpy(), state["lengths"].numpy(), before)
            assert self.observations is not None
            if np.array_equal(self.observations, seen) and self.observations.dtype == seen.dtype:
                return True
            reason = "the same seeds and actions led to other observations, so it depends on something else too"
        logger.warning("%s: its episodes cannot be resumed, new ones begin: %s", self.label, reason)
        self._bring(now, self._all)
        self.reset()
        return False

    def _replay(self, actions: NDArray[Any], lengths: NDArray[np.int64], before: list[States]) -> None:
        """Do `actions` (T, N, …) again so that every episode has its length at the end.

        Episode i begins T - lengths[i] steps later than the longest. What its environment does until then is of no
        matter: an earlier episode's actions, reset where they end. Each begins with what its wrappers had gathered
        `before` it.
        """
        assert not isinstance(self._vector, Automatic)
        seeds = [self._seed_of(index, before=1) for index in range(self.count)]
        begins = len(actions) - lengths
        self.seeds = np.array(seeds)
        self._bring(before, self._all)
        self.observations = self._vector.reset(seeds, self._all)
        tell = tell_now_and_then()
        for number, action in enumerate(actions):
            observations, _, terminated, truncated, _ = self._vector.step(action)
            again = (begins == number + 1) | terminated | truncated
            if again.any():
                if before:
                    self._bring(before, again)
                observations = self._vector.reset(seeds, again)
            self.observations = observations
            tell("%s of %s steps of the running episodes done again", number + 1, len(actions))
        self._lengths = lengths.copy()
        self._longest = len(actions)
        self._log = list(actions)

    def bring_gathered(self, state: dict[str, Any]) -> None:
        """Only what wrappers of the user's own had gathered when `state_dict` gave this, of all environments together.

        A warning says which wrapper has nothing to go on from.

        Raises:
            UserError: what one had gathered belongs to no wrapper that is here: the policy would see other numbers.
        """
        gathered: list[tuple[States, States]] = to_arrays(state.get("wrappers", []))
        together = merged([now for _, now in gathered])
        here = [name for name, _ in (self._vector.gathered() or [([], [])])[0][1]]
        if lost := Counter(name for name, _ in together) - Counter(here):
            names = ", ".join(f"`{name}`" for name in lost)
            raise UserError(
                f"{self.label}: training kept what its wrapper {names} had gathered, but there is none in it now: "
                "expected the environment that the run was trained in"
            )
        self._bring([together] * self.count, self._all)

    def _bring(self, states: list[States], mask: NDArray[np.bool_]) -> None:
        if len(states) != self.count:
            states = [states[0] if states else []] * self.count
        vector = self._vector
        lines = vector.bring(states) if isinstance(vector, Automatic) else vector.bring(states, mask)
        for line in dict.fromkeys(lines):
            logger.warning("%s: %s", self.label, line)

    def digests(self) -> list[dict[str, str]]:
        """Of each environment, a digest of each attribute of its wrappers that `state_dict` does not hold."""
        return self._vector.digests()

    def close(self) -> None:
        """Close every environment and end its worker process; the second time nothing."""
        self._vector.close()

    def __enter__(self) -> Environments:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tell_now_and_then() -> Callable[..., None]:
    """A function that logs a text with numbers in it, but not before ten seconds, nor more often than every ten."""
    last = time.monotonic()

    def tell(text: str, *numbers: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TOLD_EVERY:
            last = time.monotonic()
            logger.info(text, *(f"{number:,}" for number in numbers))

    return tell


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).copy())
