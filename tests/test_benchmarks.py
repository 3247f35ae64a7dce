"""The benchmarks of whole iterations and of drawing run as they are asked to, and write what they have measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
    return int(module.main())


@pytest.mark.slow
def test_an_iteration_of_tether_does_the_work_that_the_workload_asks_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vs_trl, file = load("vs_trl", monkeypatch), tmp_path / "figures.json"
    asked = ("--quick", "--contestants", "tether", "--precision", "float32", "--json", str(file))
    assert run(vs_trl, monkeypatch, *asked) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() == {"machine", "workloads", "results", "summary"}
    (result,), (row,) = figures["results"], figures["summary"]
    shape = vs_trl.WORKLOADS["tiny"]
    drawn = shape.sequences * shape.response_tokens
    assert result["counts"] == {
        "optimizer steps": shape.epochs * shape.minibatches,
        "tokens drawn": drawn,
        "tokens trained on": shape.epochs * drawn,
    }
    assert len(result["iterations"]) == 1, "the first of the two warms up"
    (seconds,), (generation,), (learning,) = row["seconds"], row["generation"], row["learning"]
    assert 0 < generation + learning <= seconds
    assert row["peak_bytes"] > 1e8
    assert row["trl_seconds_over_its"] == row["its_peak_over_trl"] == []
    assert "| tiny | float32 | tether |" in capsys.readouterr().out


def test_ratios_are_of_runs_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    vs_trl = load("vs_trl", monkeypatch)
    results = [
        vs_trl.Result(contestant, "tiny", "float32", number, [dict.fromkeys(NAMES, seconds)], {"steps": 1}, peak)
        for contestant, number, seconds, peak in (
            ("tether", 0, 1.0, 300),
            ("trl", 0, 4.0, 600),
            ("tether", 1, 3.0, 300),
            ("trl", 1, 6.0, 400),
        )
    ]
    ours, theirs = vs_trl.summarise(results)
    assert ours["trl_seconds_over_its"] == [4.0, 2.0]
    assert ours["its_peak_over_trl"] == [0.5, 0.75]
    assert theirs["trl_seconds_over_its"] == []


NAMES = ("seconds", "generation", "learning")


def test_contestants_that_do_less_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    vs_trl = load("vs_trl", monkeypatch)
    results = [
        vs_trl.Result(contestant, "tiny", "float32", 0, [], {"optimizer steps": steps}, 0)
        for contestant, steps in (("tether", 16), ("trl", 4))
    ]
    vs_trl.check_same_work(results[:1])
    with pytest.raises(vs_trl.FailedError, match="'optimizer steps': 4"):
        vs_trl.check_same_work(results)


@pytest.mark.slow
def test_drawing_counts_the_tokens_of_the_lengths_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoding, file = load("decoding", monkeypatch), tmp_path / "figures.json"
    asked = ("--quick", "--contestants", "tether", "--precision", "float32", "--json", str(file))
    assert run(decoding, monkeypatch, *asked) == 0
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    assert [r["lengths"] for r in results] == ["full", "geometric"]
    for result in results:
        assert result["tokens"] == sum(decoding.make_job("tiny", result["lengths"]).lengths)
        (rate,), (seconds,) = result["tokens_per_second"], result["seconds"]
        assert rate == pytest.approx(result["tokens"] / seconds)
        assert result["tether_over_it"] == []


def test_generate_draws_the_lengths_given(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = load("decoding", monkeypatch)
    prompts = [[5, 6, 7]] * 3
    workload = decoding.Workload(32, 1, 8, 1, 1, 8, 2, 1, 3, 4)
    monkeypatch.setitem(decoding.WORKLOADS, "least", workload)
    job = decoding.Job("least", "geometric", prompts, [3, 1, 2], batch=2)
    for draws in (decoding.transformers_draws, decoding.tether_draws):
        assert draws(job, "float32", "cpu")() == [3, 1, 2]


def test_geometric_lengths_have_the_mean_and_the_cap_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = load("decoding", monkeypatch)
    job = decoding.make_job("tiny", "geometric")
    assert len(job.lengths) == 4 * decoding.WORKLOADS["tiny"].sequences
    assert min(job.lengths) >= 1
    assert max(job.lengths) <= 256
    assert abs(job.tokens / len(job.lengths) - 32) < 5
    assert job == decoding.make_job("tiny", "geometric")


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("vs_trl", ("--trl-python", "nowhere/python"), "cannot be run"),
        ("vs_trl", ("--json", "nowhere/figures.json"), "its folder does not exist"),
        ("decoding", ("--vllm-python", "nowhere/python"), "cannot be run"),
        ("decoding", ("--png", "nowhere/picture.png"), "its folder does not exist"),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    name: str, asked: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(load(name, monkeypatch), monkeypatch, "--quick", *asked) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"{name}.py: ")
    assert says in said
