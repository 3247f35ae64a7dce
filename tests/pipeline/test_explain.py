"""`tether explain`: episodes of both worlds in one table, from runs and from what is trained on the spot."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.models import make_model, make_tokenizer

from tether.cli import main
from tether.language.sampler import SamplingConfig
from tether.pipeline.explain import ExplainConfig, explain
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.runs import read_episodes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each world: `language` and `control`."""
    folder = tmp_path_factory.mktemp("runs")
    config = PPOConfig(output=str(folder / "language"), iterations=1, sampling=SamplingConfig(max_new_tokens=6))
    parts = Parts(make_model(), make_tokenizer(), ["ab", "c"], lambda completions, **_: [len(c) for c in completions])
    train_ppo(config, parts)
    command = f"control --env CartPole-v1 --output {folder / 'control'} --total-steps 1024"
    assert main(shlex.split(command)) == 0
    return folder


def test_both_tables_have_the_same_columns_and_the_numbers_of_the_runs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    shown = explain(ExplainConfig(language=str(runs / "language"), control=str(runs / "control"), rows=6))
    printed = capsys.readouterr().out
    headers = [line.split() for line in printed.splitlines() if line.split()[:2] == ["step", "state"]]
    assert len(headers) == 2
    assert headers[0] == ["step", "state", "action", "log", "π", "KL", "V(s)", "reward", "advantage", "return"]
    assert [word for word in headers[0] if word != "KL"] == headers[1]
    for episode in (shown.language, shown.control):
        assert f"{episode.log_probs[0]:+.3f}" in printed
        assert f"{episode.returns[-1]:+.3f}" in printed
        differences = [r - v for r, v in zip(episode.returns, episode.values, strict=True)]
        assert episode.advantages == pytest.approx(differences)
    stored = read_episodes(runs / "control", order="newest", limit=1)[0]
    assert shown.control.states == stored.states
    assert f"({len(stored.actions) - 6} more steps)" in printed
    assert shown.control.rewards == [1.0] * len(stored.actions)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--language control --control control", "a run of the control world"),
        ("--language language --control language", "a run of the language world"),
        ("--language nowhere --control control", "nowhere: holds no run"),
        ("--language language --control control --rows 1", "rows is 1, expected at least 2"),
    ],
)
def test_runs_of_the_wrong_kind_are_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    monkeypatch.chdir(runs)
    assert main(shlex.split(f"explain {flags}")) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_without_runs_it_trains_both(capsys: pytest.CaptureFixture[str]) -> None:
    shown = explain(ExplainConfig())
    assert shown.language.prompt == "What is 2 + 2?"
    assert abs(shown.language.score) == 1
    assert len(shown.control.actions) > 50  # a random policy falls after some 20 steps
    assert "What is 2 + 2?" in capsys.readouterr().out
