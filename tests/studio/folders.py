"""Folders of runs for the tests of the studio, made without training; and a client of the studio over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from tether.config import config_to_dict
from tether.episode import Episode
from tether.pipeline.control import ControlConfig
from tether.pipeline.ppo import PPOConfig
from tether.runs import Run
from tether.studio import create_app

URL = "http://127.0.0.1:8555"


def episode(prompt: str, response: str, score: float = 0.0, **changes: Any) -> Episode:
    """Steps of three letters each; numbers grow with the step."""
    pieces = [response[i : i + 3] for i in range(0, len(response), 3)]
    numbers = [0.25 * step - 0.5 for step in range(len(pieces))]
    fields: dict[str, Any] = {
        "prompt": prompt,
        "response": response,
        "score": score,
        "terminated": True,
        "truncated": False,
        "actions": pieces,
        "action_ids": list(range(len(pieces))),
        "log_probs": [-1.0 - step for step in range(len(pieces))],
        "values": numbers,
        "rewards": numbers,
        "advantages": numbers,
        "returns": numbers,
        "reference_log_probs": [-1.25 - step for step in range(len(pieces))],
        "new_log_probs": [-1.5 - step for step in range(len(pieces))],
        "entropies": [1.0] * len(pieces),
        "clipped": [step == 1 for step in range(len(pieces))],
        "alternatives": [[(piece, 0.5), ("other", 0.25)] for piece in pieces],
        "details": {"group": 0},
    }
    return Episode(**fields | changes)


def make_run(
    folder: Path,
    iterations: int = 3,
    episodes: Sequence[Episode] = (),
    metrics: Mapping[str, float] | None = None,
    **config: Any,
) -> Path:
    """A run of a language model: `episodes` in each iteration, whose score is a tenth of its number."""
    settings = config_to_dict(PPOConfig(**{"model": "a/model", "iterations": iterations, "output": "run"} | config))
    with Run.create(folder, settings, tensorboard=False) as run:
        for iteration in range(1, iterations + 1):
            run.log(iteration, row(iteration) | dict(metrics or {}))
            if episodes:
                run.log_episodes(iteration, episodes)
    return folder


def make_control_run(folder: Path, iterations: int = 2, episodes: Sequence[Episode] = ()) -> Path:
    config = ControlConfig(env="CartPole-v1")
    steps = config.environments.count * config.collect.steps
    settings = config_to_dict(config) | {"total_steps": steps * iterations}
    with Run.create(folder, settings, tensorboard=False) as run:
        for iteration in range(1, iterations + 1):
            run.log(iteration, {"score": 10.0 * iteration, "episode_length": 20.0})
            if episodes:
                run.log_episodes(iteration, episodes)
    return folder


def row(iteration: int) -> dict[str, float]:
    return {
        "score": iteration / 10,
        "kl": 0.5,
        "response_length": 8.0,
        "entropy": 1.0,
        "time/tokens_per_second_sampled": 100.0 * iteration,
    }


def client(root: Path, **headers: str) -> TestClient:
    """As the page asks; an exception of the server is its answer 500, as in life."""
    app = create_app(root)
    return TestClient(app, base_url=URL, headers={"Origin": URL, **headers}, raise_server_exceptions=False)
