"""A run that was stopped, by whatever and whenever, and resumed ends as one that never stopped: the same bytes."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models import make_model, make_tokenizer
from tests.processes import Commands, Moment
from tests.run_folders import assert_same_run, metric_lines, newest_checkpoint

from tether.config import dump_config
from tether.language.prompts import PromptsConfig
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import PPOConfig
from tether.ppo import KLConfig, LearnerConfig
from tether.rewards import RewardsConfig
from tether.runs import latest_checkpoint, read_config

ITERATIONS = 5

REWARDS = """
import os, random, signal, time
import numpy, torch

calls = 0

def noisy(completions, **_):
    "Draws from every global generator; once, it may stop its own run."
    global calls
    calls += 1
    noise = random.random() + random.gauss(0, 1) + numpy.random.randn() + float(torch.randn(()))
    if str(calls) == os.environ.get("STOP_AT"):
        for _ in range(int(os.environ["STOP_TIMES"])):
            os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
            time.sleep(0.5)
        time.sleep(float(os.environ["STOP_HANG"]))
    return [text.count("a") + noise for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, prompts and reward; `settings.yaml` is the configuration of every run here."""
    folder = tmp_path_factory.mktemp("resume")
    make_model(hidden_size=8, intermediate_size=16, head_dim=4).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    texts = ["ab", "c", "deab", "fa", "bc"]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    (folder / "rewards.py").write_text(REWARDS)
    config = PPOConfig(
        model=str(folder / "model"),
        iterations=ITERATIONS,
        checkpoint_every=2,
        prompts=PromptsConfig(str(folder / "prompts.jsonl")),
        reward=RewardsConfig((f"{folder / 'rewards.py'}:noisy",)),
        sampling=SamplingConfig(max_new_tokens=4, top_p=0.9),
        collect=CollectConfig(prompts=3, samples_per_prompt=2),
        kl=KLConfig(beta=0.1, target=0.01, horizon=20),
        learner=LearnerConfig(epochs=1, minibatches=2, learning_rate=3e-3, target_kl=5.0),
    )
    (folder / "settings.yaml").write_text(dump_config(config))
    separate = replace(config, separate_value_trunk=True, checkpoint_every=1, keep_checkpoints=1)
    (folder / "separate.yaml").write_text(dump_config(separate))
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield Commands(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def whole(folder: Path, commands: Commands) -> Path:
    """A run that never stopped; beside it the number of moments at which its files are touched."""
    run = folder / "whole"
    assert commands.run(start(folder, run), run=run) == 0, commands.log.read_text()
    run.with_suffix(".events").write_text(commands.log.with_suffix(".events").read_text())
    assert len(metric_lines(run)) == ITERATIONS
    return run


def start(folder: Path, run: Path, settings: str = "settings.yaml") -> list[str]:
    return ["ppo", "--config", str(folder / settings), "--output", str(run)]


def moments(count: int, events: int, seed: int) -> list[Moment]:
    """One in each stretch of the run; half of them right at a change of a file, half a random time after it.

    The last ones are all right at a change: the run is over soon after them.
    """
    draw = random.Random(seed)
    edges = [round(i * events / count) for i in range(count + 1)]
    delays = [draw.uniform(0.0, 0.02) if i % 2 and i < count - 2 else 0.0 for i in range(count)]
    return [Moment(draw.randint(edges[i] + 1, edges[i + 1]), delays[i]) for i in range(count)]


def go_on(commands: Commands, folder: Path, run: Path, settings: str = "settings.yaml") -> list[str]:
    """What a user types after a crash: resume, or start again where not even the configuration had been written."""
    return ["ppo", "--resume", str(run)] if (run / "config.yaml").exists() else start(folder, run, settings)


def kill_and_resume(commands: Commands, folder: Path, whole: Path, moment: Moment, settings: str) -> str:
    """Returns in what state the killed run was found."""
    run = folder / f"killed-{whole.name}-{moment.event}"
    code = commands.run(start(folder, run, settings), run=run, kill=moment)
    assert code in (-9, 0), commands.log.read_text()
    if code == 0:
        state = "ended before"
    elif list(run.glob("checkpoints/.*.partial")):
        state = "while saving"
    else:
        state = "between checkpoints" if latest_checkpoint(run) else "before the first checkpoint"
    assert commands.run(go_on(commands, folder, run, settings)) == 0, commands.log.read_text()
    assert_same_run(run, whole)
    assert not list(run.glob("checkpoints/.*"))
    return state


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path, whole: Path, commands: Commands) -> None:
    events = int(whole.with_suffix(".events").read_text())
    states = [
        kill_and_resume(commands, folder, whole, moment, "settings.yaml") for moment in moments(10, events, seed=0)
    ]
    assert {"before the first checkpoint", "while saving"} <= set(states)
    assert states.count("ended before") <= 1


@pytest.mark.slow
def test_killed_at_thirty_moments_with_a_critic_of_its_own(folder: Path, commands: Commands) -> None:
    run = folder / "separate"
    assert commands.run(start(folder, run, "separate.yaml"), run=run) == 0
    events = int(commands.log.with_suffix(".events").read_text())
    states = [kill_and_resume(commands, folder, run, m, "separate.yaml") for m in moments(30, events, seed=1)]
    assert {"before the first checkpoint", "while saving", "between checkpoints"} <= set(states)


def test_killed_again_and_again(folder: Path, whole: Path, commands: Commands) -> None:
    run = folder / "again"
    # each resumption gets through less than a checkpoint's way and so none comes to the end
    for event in (30, 24, 18, 12):
        code = commands.run(go_on(commands, folder, run), run=run, kill=Moment(event, 0.01))
        assert code == -9
    assert commands.run(go_on(commands, folder, run)) == 0
    assert_same_run(run, whole)


def stop(by: str, at: int, times: int = 1, hang: float = 0.0) -> dict[str, str]:
    """Environment in which the reward's `at`-th call sends its process a signal."""
    return {"STOP_BY": by, "STOP_AT": str(at), "STOP_TIMES": str(times), "STOP_HANG": str(hang)}


@pytest.mark.parametrize("by", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_finishes_its_iteration_and_saves(
    by: str, folder: Path, whole: Path, commands: Commands
) -> None:
    run = folder / by
    assert commands.run(start(folder, run), environment=stop(by, at=3)) == 0
    said = commands.log.read_text()
    assert "finishing this iteration, then saving" in said
    assert f"tether ppo --resume {run}" in said
    assert len(metric_lines(run)) == 3
    assert newest_checkpoint(run)[0] == 3  # where none was due
    assert commands.run(["ppo", "--resume", str(run)]) == 0
    assert_same_run(run, whole)


def test_a_second_ctrl_c_stops_at_once(folder: Path, whole: Path, commands: Commands) -> None:
    """In the midst of a reward that would take another minute; the last whole iteration is saved."""
    run = folder / "at-once"
    started = time.monotonic()
    code = commands.run(start(folder, run), environment=stop("SIGINT", at=4, times=2, hang=60.0))
    assert code == 130
    assert time.monotonic() - started < 40
    said = commands.log.read_text()
    assert "tether: interrupted" in said
    assert "Traceback" not in said
    assert newest_checkpoint(run)[0] == 3
    assert commands.run(["ppo", "--resume", str(run)]) == 0
    assert_same_run(run, whole)


def test_a_run_that_is_over_goes_on_with_more_iterations(folder: Path, whole: Path, commands: Commands) -> None:
    run = folder / "more"
    assert commands.run([*start(folder, run), "--iterations", "3"]) == 0
    assert commands.run(["ppo", "--resume", str(run)]) == 0  # nothing left to do
    assert len(metric_lines(run)) == 3
    assert commands.run(["ppo", f"--resume={run}", "--iterations", str(ITERATIONS)]) == 0
    assert_same_run(run, whole)
    assert read_config(run)["iterations"] == ITERATIONS


def test_the_same_configuration_runs_the_same(folder: Path, whole: Path, commands: Commands) -> None:
    """From config.yaml in the run's folder; the global generators that the reward draws from start from the seed."""
    run = folder / "same"
    assert commands.run(["ppo", "--config", str(whole / "config.yaml"), "--output", str(run)]) == 0
    assert_same_run(run, whole)
