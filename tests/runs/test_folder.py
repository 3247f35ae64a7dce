"""A run's folder: what is written, who may write, and how it is made whole after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.episode import Episode
from tether.errors import UserError
from tether.runs import (
    Run,
    count_episodes,
    latest_checkpoint,
    load_state,
    read_config,
    read_episodes,
    read_metrics,
    save_state,
)

CONFIG = {"model": "m", "learner": {"learning_rate": 1e-5, "betas": [0.9, 0.95]}}


def episode(score: float = 1.0) -> Episode:
    numbers = [0.25, score]
    return Episode("2 + 2 =", "4", score, True, False, ["4", "."], [1, 2], *([numbers] * 5))


def new(folder: Path, **arguments: bool) -> Run:
    return Run.create(folder, CONFIG, tensorboard=False, **arguments)


def test_configuration_lands_in_the_folder(tmp_path: Path) -> None:
    with new(tmp_path / "a" / "run") as run:
        assert run.config == CONFIG
    assert read_config(tmp_path / "a" / "run") == CONFIG
    with Run.open(tmp_path / "a" / "run") as run:
        assert run.config == CONFIG
        run.update_config(CONFIG | {"model": "other"})
    assert read_config(tmp_path / "a" / "run") == CONFIG | {"model": "other"}


def test_metrics_lines(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        run.log(1, {"time/collect": 0.5, "score": torch.tensor(0.25), "tokens": 12, "kl": math.nan, "time/a": 1.0})
        run.log(2, {"score": 1e-5, "kl": math.inf})
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"iteration": 1, "score": 0.25, "tokens": 12, "kl": null, "time/collect": 0.5, "time/a": 1.0}\n'
            '{"iteration": 2, "score": 1e-05, "kl": null}\n'
        )
    assert [row["score"] for row in read_metrics(tmp_path)] == [0.25, 1e-5]


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with new(tmp_path) as run:  # other files do not matter
        run.log(1, {"score": 1.0})
        run.log_episodes(1, [episode()])
        run.save_checkpoint(1, lambda folder: save_state(folder, "state", {}))
    with pytest.raises(
        UserError,
        match=r"holds a run already; go on with it by --resume, .* or replace it by --overwrite",
    ):
        new(tmp_path)
    with new(tmp_path, overwrite=True) as run:
        assert run.latest_checkpoint() is None
    assert read_metrics(tmp_path) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_folders_that_cannot_be_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be the run's folder: File exists"):
        new(tmp_path / "file")
    with pytest.raises(UserError, match=r"nothing: holds no run \(config.yaml is missing\)"):
        Run.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    run = new(tmp_path)
    for attempt in (lambda: new(tmp_path, overwrite=True), lambda: Run.open(tmp_path)):
        with pytest.raises(UserError, match=f"process {os.getpid()} is writing this run"):
            attempt()
    run.close()
    run.close()
    Run.open(tmp_path).close()


def test_a_killed_process_lets_go_even_if_its_children_live(tmp_path: Path) -> None:
    hears, says = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            run = new(tmp_path / "run")
            if os.fork() == 0:
                os.write(says, f"{os.getpid()}\n".encode())
            time.sleep(60)
            run.close()
        finally:
            os._exit(1)
    os.close(says)
    with os.fdopen(hears) as stream:
        orphan = int(stream.readline())
    try:
        with pytest.raises(UserError, match=f"process {holder} is writing this run"):
            Run.open(tmp_path / "run")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        Run.open(tmp_path / "run", tensorboard=False).close()
    finally:
        os.kill(orphan, signal.SIGKILL)


def write_iterations(run: Run, first: int, last: int) -> None:
    for iteration in range(first, last + 1):
        run.log(iteration, {"score": iteration / 8, "kl": 0.1 * iteration})
        run.log_episodes(iteration, [episode(score=iteration), episode(score=-iteration)])
        if iteration % 2 == 0:
            run.save_checkpoint(iteration, lambda folder, i=iteration: save_state(folder, "state", {"at": i}))


def contents(folder: Path) -> tuple[bytes, object, list[str]]:
    episodes = read_episodes(folder, limit=1000)
    return (folder / "metrics.jsonl").read_bytes(), episodes, sorted(os.listdir(folder / "checkpoints"))


def test_rewound_and_resumed_equals_never_stopped(tmp_path: Path) -> None:
    with new(tmp_path / "straight") as run:
        write_iterations(run, 1, 6)
    with new(tmp_path / "killed") as run:
        write_iterations(run, 1, 5)
    # What a kill in iteration 6 leaves behind.
    with (tmp_path / "killed" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": 6, "sco')
    (tmp_path / "killed" / "checkpoints" / ".iteration-000006.partial").mkdir()
    (tmp_path / "killed" / ".metrics.jsonl.partial").write_bytes(b"{")
    assert [row["iteration"] for row in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    with Run.open(tmp_path / "killed", tensorboard=False) as run:
        latest = run.latest_checkpoint()
        assert latest is not None
        assert latest[0] == 4
        assert load_state(latest[1], "state") == {"at": 4}
        run.rewind(4)
        assert [row["iteration"] for row in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4]
        assert count_episodes(tmp_path / "killed") == 8
        write_iterations(run, 5, 6)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_rewind_to_the_start_keeps_what_was_logged_before_it(tmp_path: Path) -> None:
    with new(tmp_path) as run:
        run.log(0, {"score": 0.0})
        write_iterations(run, 1, 3)
        run.rewind(0)
        assert run.latest_checkpoint() is None
        assert count_episodes(tmp_path) == 0
    assert read_metrics(tmp_path) == [{"iteration": 0, "score": 0.0}]


def test_sigkill_leaves_a_folder_that_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = os.fork()
    if child == 0:
        try:
            write_iterations(new(folder), 1, 100_000)
        finally:
            os._exit(1)
    while latest_checkpoint(folder) is None:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Run.open(folder, tensorboard=False) as run:
        latest = run.latest_checkpoint()
        assert latest is not None
        run.rewind(latest[0])
        write_iterations(run, latest[0] + 1, latest[0] + 2)
    iterations = list(range(1, latest[0] + 3))
    assert [row["iteration"] for row in read_metrics(folder)] == iterations
    assert [(e.id, e.iteration) for e in read_episodes(folder, limit=10**6)] == [
        (2 * i + j - 1, i) for i in iterations for j in (0, 1)
    ]


def test_tensorboard_has_the_same_numbers_and_drops_rewound_ones(tmp_path: Path) -> None:
    with Run.create(tmp_path, CONFIG) as run:
        for iteration in (1, 2, 3):
            run.log(iteration, {"score": float(iteration), "time/collect": 0.5, "kl": math.nan})
    with Run.open(tmp_path) as run:
        run.rewind(1)
        run.log(2, {"score": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/score", "time/collect", "train/kl"}
    assert [(event.step, event.value) for event in events.Scalars("train/score")] == [(1, 1.0), (2, 20.0)]


def test_metrics_of_equal_runs_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with new(tmp_path / name) as run:
            measured = {"memory/collect": len(name) * 9.5, "time/collect": len(name) * 0.1}
            run.log(1, measured | {"score": 0.1 + 0.2, "kl": 1e-17})
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    line = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert list(line) == ["iteration", "score", "kl", "time/collect", "memory/collect"]
    assert re.fullmatch("0.30000000000000004", repr(line["score"]))


@pytest.mark.parametrize("name", ["config.yaml", "notes.json", "frontier.json", "unscored.jsonl"])
def test_what_is_there_without_a_start_or_cost_something_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("# by hand\n")
    with pytest.raises(UserError, match="holds a run already"):
        Run.create(tmp_path, {})
    assert (tmp_path / name).read_text() == "# by hand\n"


def test_a_start_that_failed_is_replaced_and_its_log_goes_on(tmp_path: Path) -> None:
    for name in ("config.yaml", "starts.jsonl", "console.log"):
        (tmp_path / name).write_text("first\n")
    Run.create(tmp_path, {"seed": 1}).close()
    assert read_config(tmp_path) == {"seed": 1}
    assert (tmp_path / "console.log").read_text() == (tmp_path / "starts.jsonl").read_text() == "first\n"
