"""The studio's benchmark runs as it is asked to, and writes what it has measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_benchmarks import load, run
from tether.runs import count_episodes


@pytest.mark.slow
def test_lists_episodes_and_training_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studio, file = load("studio", monkeypatch), tmp_path / "figures.json"
    asked = "--episodes 60 --tokens 8 --workloads tiny --iterations 1"
    assert run(studio, monkeypatch, *asked.split(), "--folder", str(tmp_path), "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert count_episodes(tmp_path / "large") == figures["store"]["episodes"] == 60
    requests = figures["store"]["requests"]
    assert [row["request"] for row in requests][: len(studio.LISTS)] == list(studio.LISTS)
    assert all(len(row["http_ms"]) == len(row["direct_ms"]) == studio.REPEATS for row in requests)
    assert all(min(*row["http_ms"], *row["direct_ms"]) > 0 for row in requests)
    (result,) = figures["training"]
    (row,) = result["iterations"]
    assert set(row) == {"iteration", "alternatives", "last seen", "making episodes", "writing"}
    assert all(seconds > 0 for seconds in row.values())
    assert 0 < studio.share(result) < 1
    said = capsys.readouterr().out
    assert "| best first |" in said
    assert "| tiny |" in said


def test_a_folder_that_is_not_there_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(load("studio", monkeypatch), monkeypatch, "--json", str(tmp_path / "none" / "figures.json")) == 2
    assert "its folder does not exist" in capsys.readouterr().err
