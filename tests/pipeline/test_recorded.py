"""What a training leaves of its start and of what it printed, when it begins and when it goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models import make_model, make_tokenizer
from tests.run_folders import metric_lines

from tether.cli import main
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.pipeline.sft import SFTConfig, sft
from tether.ppo import LearnerConfig


def starts(folder: Path) -> list[int]:
    return [json.loads(line)["iteration"] for line in (folder / "starts.jsonl").read_text().splitlines()]


def test_a_command_leaves_its_progress_and_adds_to_it_when_it_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ["--environments.vectorization", "sync", "--environments.count", "2", "--collect.steps", "32"]
    assert main(["control", "--env", "CartPole-v1", *small, "--total-steps", "128", "--output", str(run)]) == 0
    assert main(["control", "--resume", str(run), "--total-steps", "256"]) == 0
    lines = (run / "console.log").read_text().splitlines()
    assert starts(run) == [0, 2]
    assert [line.startswith("--- ") for line in lines].count(True) == 2
    shown = [found[1] for line in lines if (found := re.match(r"iteration +(\d)/\d ", line))]
    assert shown == ["1", "2", "3", "4"]


def test_warnings_and_the_error_that_ended_it_are_kept(tmp_path: Path) -> None:
    calls = 0

    def fails(completions: list[str], **_: object) -> list[float]:
        nonlocal calls
        calls += 1
        print(f"call {calls}")
        return [float("nan") if calls > 2 else 1.0] * len(completions)

    config = PPOConfig(
        output=str(tmp_path),
        iterations=5,
        sampling=SamplingConfig(max_new_tokens=4),
        collect=CollectConfig(prompts=2),
        learner=LearnerConfig(epochs=1, minibatches=1),
    )
    with pytest.raises(Exception, match="nan"):
        train_ppo(config, Parts(make_model(), make_tokenizer(), ["ab", "c"], fails))
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert "call 3" in lines
    assert lines[-1].startswith("error: ")
    assert "nan" in lines[-1]


def test_equal_runs_have_equal_metrics_whatever_was_printed(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: object) -> list[float]:
        print(id(completions))
        return [float(len(text)) for text in completions]

    config = PPOConfig(
        iterations=2, sampling=SamplingConfig(max_new_tokens=4), collect=CollectConfig(prompts=4), seed=3
    )
    for name in ("a", "b"):
        here = replace(config, output=str(tmp_path / name))
        train_ppo(here, Parts(make_model(), make_tokenizer(), ["ab", "c", "de", "fa"], reward))
    assert metric_lines(tmp_path / "a") == metric_lines(tmp_path / "b")


def test_fine_tuning_is_recorded_too(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n' * 8)
    output = tmp_path / "sft"
    sft(SFTConfig(model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl"), output=str(output)), show=True)
    assert starts(output) == [0]
    assert re.search(r"^step 1/", (output / "console.log").read_text(), re.MULTILINE)
