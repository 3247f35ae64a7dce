"""Environments of many kinds, as people bring them. Each is short, and shows its step and a draw."""

from __future__ import annotations

import copy
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, NormalizeObservation, NormalizeReward

VECTOR = spaces.Box(-np.inf, np.inf, (2,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
KINDS: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "vector": (VECTOR, spaces.Discrete(2)),
    "float64": (spaces.Box(-1e6, 1e6, (2,), np.float64), spaces.Discrete(3, start=5)),
    "continuous": (VECTOR, spaces.Box(-2, 2, (1,), np.float32)),
    "several": (VECTOR, spaces.MultiDiscrete([2, 3])),
    "bytes": (spaces.Box(0, 255, (4,), np.uint8), spaces.Discrete(2)),
    "board": (spaces.Box(0, 2, (9,), np.uint8), spaces.Discrete(9)),
    "counts": (spaces.Box(-5, 5, (3,), np.int8), spaces.Discrete(2)),
    "image": (IMAGE, spaces.Discrete(2)),
    "channels first": (spaces.Box(0, 255, (1, 36, 40), np.uint8), spaces.Discrete(2)),
    "grey": (spaces.Box(0, 255, (36, 40), np.uint8), spaces.Discrete(2)),
    "mask": (spaces.Box(0, 1, (36, 36, 1), np.uint8), spaces.Discrete(2)),
    "dict": (spaces.Dict({"place": spaces.Discrete(3), "speed": spaces.Box(-1, 1, (2,))}), spaces.Discrete(2)),
}
TRICKS = ("normalised", "own statistics", "everyone's random numbers", "endless", "reused arrays", "tells of success")


class Zoo(gymnasium.Env[Any, Any]):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, kind: str, trick: str, render_mode: str | None) -> None:
        self.render_mode, self.trick = render_mode, trick
        self.observation_space, self.action_space = copy.deepcopy(KINDS[kind])
        self.buffer: Any = None
        self.time = 0

    def seen(self) -> Any:
        draw = np.random.normal() if self.trick == "everyone's random numbers" else self.np_random.normal()  # noqa: NPY002
        space = self.observation_space
        if self.trick == "samples":
            return space.sample()
        if isinstance(space, spaces.Dict):
            return {"place": self.time % 3, "speed": np.full(2, np.clip(draw, -1, 1), np.float32)}
        assert isinstance(space, spaces.Box)
        numbers = np.resize([self.time, draw], space.shape)
        found = np.clip(numbers, space.low, space.high).astype(space.dtype)
        if self.trick == "reused arrays":
            if self.buffer is None:
                self.buffer = found
            self.buffer[...] = found
            return self.buffer
        return found

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.time += 1
        over = self.time >= 5 and self.trick != "endless"
        info = {"is_success": np.array([bool(self.np_random.random() < 0.5)])} if over else {}
        told = info if self.trick == "tells of success" else {}
        return self.seen(), float(np.sum(action)) + self.time / 10, over and self.time % 2 == 1, False, told

    def render(self) -> Any:
        return np.full((12, 16, 3), 10 * self.time % 256, np.uint8)


class OwnStatistics(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Subtracts the mean of what it has seen; kept by `state_dict`, in forms of all kinds."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.total, self.seen = np.zeros(2, np.float64), 0

    def observation(self, observation: Any) -> Any:
        self.total = self.total + observation
        self.seen += 1
        return (observation - self.total / self.seen).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "seen": (self.seen, [np.int64(3), None, "text", 1.5]), 7: {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state[7] == {}
        assert state["seen"][1] == [3, None, "text", 1.5]
        self.total, self.seen = state["total"], state["seen"][0]


class Forgetful(gymnasium.ObservationWrapper[Any, Any, Any]):
    """The same, but nobody can ask for it."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.running = {"total": np.zeros(2), "seen": 0}
        self.scale = 2.0

    def observation(self, observation: Any) -> Any:
        self.running["total"] = self.running["total"] + observation
        self.running["seen"] += 1
        return (observation - self.running["total"] / self.running["seen"]).astype(np.float32)


def make_env(kind: str = "vector", trick: str = "", render_mode: str | None = None) -> Any:
    env: Any = Zoo(kind, trick, render_mode)
    if kind == "dict":
        env = FlattenObservation(env)
    if trick == "normalised":
        env = NormalizeReward(NormalizeObservation(env))
    if trick == "own statistics":
        env = OwnStatistics(env)
    if trick == "forgetful":
        env = Forgetful(env)
    return env


class Leaves(Zoo):
    """Ends the program, in one way or another, in the step of this number."""

    def __init__(self, how: str, at: int) -> None:
        super().__init__("vector", "", None)
        self.how, self.at, self.done = how, at, 0

    def step(self, action: Any) -> Any:
        self.done += 1
        if self.done >= self.at:
            if self.how == "exit":
                sys.exit()
            if self.how == "zero":
                sys.exit(0)
            raise KeyboardInterrupt
        return super().step(action)

    def close(self) -> None:
        if self.how == "close":
            sys.exit("at the end")


def make_leaving(how: str, at: int = 3) -> Any:
    return Leaves(how, at)
