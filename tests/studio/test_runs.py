"""The table of runs: what they are, how far they came, and what is said of damaged ones."""

from __future__ import annotations

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.studio.folders import client, episode, make_control_run, make_run, row

from tether.runs import Run
from tether.runs.lock import FolderLock
from tether.studio import events, runs
from tether.studio.events import changes
from tether.studio.metrics import MetricsLog
from tether.studio.runs import SPARKS, Catalogue, difference, spark


def listed(root: Path) -> dict[str, dict[str, Any]]:
    """What the table says of each run."""
    return {run["run"]: run for run in client(root).get("/api/runs").json()["runs"]}


def test_a_run_is_listed_with_its_last_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "a" / "b", iterations=4, episodes=[episode("q", "an answer")])
    found = listed(tmp_path)["a/b"]
    assert found | {"updated": 0} == {
        "run": "a/b",
        "name": "a/b",
        "kind": "ppo",
        "state": "finished",
        "iteration": 4,
        "iterations": 4,
        "score": 0.4,
        "kl": 0.5,
        "length": 8.0,
        "tokens_per_second": 400.0,
        "alarms": 0,
        "episodes": True,
        "updated": 0,
        "spark": [0.1, 0.2, 0.3, 0.4],
        "fault": None,
        "note": "",
        "tags": [],
    }
    assert abs(found["updated"] - time.time()) < 60


def test_control_runs_count_their_iterations_by_steps(tmp_path: Path) -> None:
    make_control_run(tmp_path / "pole", iterations=2)
    found = listed(tmp_path)["pole"]
    assert (found["kind"], found["state"], found["iterations"], found["length"]) == ("control", "finished", 2, 20.0)


def test_the_folder_may_be_a_run_itself(tmp_path: Path) -> None:
    make_run(tmp_path / "ppo")
    assert listed(tmp_path / "ppo").keys() == {"."}
    assert client(tmp_path / "ppo").get("/api/run", params={"run": "."}).json()["name"] == "ppo"


def test_states(tmp_path: Path) -> None:
    make_run(tmp_path / "finished")
    make_run(tmp_path / "stopped")
    with Run.open(tmp_path / "stopped", tensorboard=False) as run:
        run.update_config(run.config | {"iterations": 100})
    make_run(tmp_path / "empty", iterations=1)
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    make_run(tmp_path / "killed")
    (tmp_path / "killed" / "lock").write_text("4242424\n")
    make_run(tmp_path / "training")
    lock = FolderLock(tmp_path / "training")
    try:
        states = {name: run["state"] for name, run in listed(tmp_path).items()}
    finally:
        lock.release()
    assert states == {name: name for name in ("finished", "stopped", "empty", "training")} | {"killed": "finished"}
    assert listed(tmp_path)["training"]["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.yaml", b"a: [", "config.yaml:1:5: not valid YAML"),
        ("config.yaml", b"\xff\xfe", "config.yaml: byte 0 is not UTF-8"),
        ("config.yaml", b"- 1\n", "the top level is a list"),
        ("config.yaml", b"a: &a [1, *a]\n", "nested too deeply"),
        ("metrics.jsonl", b'{"iteration": 1}\nnothing\n', "metrics.jsonl, line 2: found b'nothing', expected a JSON"),
        ("metrics.jsonl", b"\x00\x00\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "metrics.jsonl, line 1"),
        ("metrics.jsonl", b'{"iteration": "one"}\n', "metrics.jsonl, line 1"),
    ],
)
def test_a_damaged_run_is_listed_with_its_fault(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / name).write_bytes(content)
    found = listed(tmp_path)
    assert found["good"]["state"] == "finished"
    assert found["bad"]["state"] == "damaged"
    assert says in found["bad"]["fault"]
    assert str(tmp_path) not in found["bad"]["fault"]
    page = client(tmp_path).get("/api/run", params={"run": "bad"})
    assert page.status_code == 200
    assert page.json()["fault"] == found["bad"]["fault"]


def test_aliases_that_stand_for_billions_are_not_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (make_run(tmp_path / "bomb") / "config.yaml").write_text("\n".join(lines))
    started = time.monotonic()
    assert "more than" in listed(tmp_path)["bomb"]["fault"]
    assert time.monotonic() - started < 5


def test_a_torn_last_line_waits_for_its_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    assert log.rows() == []
    file.write_bytes(b'{"iteration": 1, "score": 0.5}\n{"iteration": 2, "sc')
    assert log.rows() == [{"iteration": 1, "score": 0.5}]
    with file.open("ab") as stream:
        stream.write(b'ore": NaN, "note": "text"}\n')
    assert log.rows()[1:] == [{"iteration": 2, "score": None, "note": None}]
    assert log.fault is None


def test_a_run_that_went_back_is_read_anew(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=5)
    catalogue = Catalogue(tmp_path)
    assert len(catalogue.log(folder).rows()) == 5
    with Run.open(folder, tensorboard=False) as run:
        run.rewind(2)
        assert [r["iteration"] for r in catalogue.log(folder).rows()] == [1, 2]
        run.log(3, row(7))
    assert [r["score"] for r in catalogue.log(folder).rows()] == [0.1, 0.2, 0.7]


def test_metrics_since_an_iteration_and_by_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run", iterations=4)
    asking = client(tmp_path)
    whole = asking.get("/api/metrics", params={"run": "run"}).json()
    assert (len(whole["rows"]), whole["last"]) == (4, 4)
    assert whole["rows"][0] == {"iteration": 1, **row(1)}
    some = asking.get("/api/metrics", params={"run": "run", "since": 2, "names": "score,kl,nothing"}).json()
    assert some["rows"] == [{"iteration": i, "score": i / 10, "kl": 0.5} for i in (3, 4)]
    assert asking.get("/api/metrics", params={"run": "run", "since": 4}).json() == whole | {"rows": []}


def test_a_runs_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", iterations=2)
    alarms = [
        {"iteration": 1, "kind": "kl", "state": "raised", "since": 1, "value": 30.0, "threshold": 20.0, "seen": "s"},
        {"iteration": 1, "kind": "gap", "state": "raised", "since": 1, "value": 1.0, "threshold": 0.5, "seen": "s"},
        {"iteration": 2, "kind": "gap", "state": "cleared", "since": 1, "value": 0.1, "threshold": 0.5, "seen": "s"},
    ]
    (folder / "alarms.jsonl").write_text("".join(json.dumps(alarm) + "\n" for alarm in alarms) + '{"torn')
    with Run.open(folder, tensorboard=False) as run:
        run.save_checkpoint(2, lambda place: (place / "weights").write_bytes(b"x" * 1000) and None)
    page = client(tmp_path).get("/api/run", params={"run": "run"}).json()
    assert page["alarms"] == alarms
    assert listed(tmp_path)["run"]["alarms"] == 1
    (checkpoint,) = page["checkpoints"]
    assert (checkpoint["iteration"], checkpoint["path"]) == (2, "checkpoints/iteration-000002")
    assert checkpoint["bytes"] > 1000
    assert page["metrics"] == list(row(1))
    assert page["config"]["learner"]["clip_low"] == 0.2
    assert page["rows"] == 2


def test_the_difference_of_two_configurations(tmp_path: Path) -> None:
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", seed=2, model="b/model")
    reply = client(tmp_path).get("/api/difference", params={"run": "a", "with": "b"}).json()
    assert reply["fields"] == [
        {"name": "model", "left": "a/model", "right": "b/model"},
        {"name": "seed", "left": 1, "right": 2},
    ]
    assert difference({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1}, "d": {}}) == [
        {"name": "a.c", "left": [1], "right": None},
        {"name": "d", "left": None, "right": {}},
    ]


def test_sparklines_are_short_and_keep_the_mean() -> None:
    assert spark([]) == []
    assert spark([None, 1.0, float("nan"), "x", 3]) == [1.0, 3.0]
    drawn = spark([float(i) for i in range(1000)])
    assert len(drawn) == SPARKS
    assert drawn == sorted(drawn)
    assert sum(drawn) / SPARKS == pytest.approx(499.5)


def test_the_folder_is_looked_through_once_a_second_however_many_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    looks = []
    walk = runs._folders
    monkeypatch.setattr(runs, "_folders", lambda root, deeper: looks.append(root) or walk(root, deeper))
    catalogue = Catalogue(tmp_path)
    for _ in range(50):
        catalogue.runs()
    assert len(looks) == 1


def test_a_page_hears_of_what_changes_and_of_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "PAUSE", 0.02)
    monkeypatch.setattr(runs, "PAUSE", 0.0)
    monkeypatch.setattr(events, "HEARTBEAT", 0.1)
    folder, _ = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    heard: dict[str | None, list[str]] = {None: [], "run": [], "other": []}

    async def listen(name: str | None) -> None:
        async for line in changes(Catalogue(tmp_path), name):
            heard[name].append(line)

    async def train() -> None:
        await asyncio.sleep(0.3)
        with Run.open(folder, tensorboard=False) as run:
            run.log(4, row(4))
            await asyncio.sleep(0.3)
        os.utime(folder / "metrics.jsonl")
        await asyncio.sleep(0.3)

    async def together() -> None:
        listeners = [asyncio.create_task(listen(name)) for name in heard]
        await train()
        for listener in listeners:
            listener.cancel()

    with ThreadPoolExecutor(1) as thread:  # the browser's tests have a loop of their own in this one
        thread.submit(asyncio.run, together()).result()
    said = [line for line in heard["run"] if line.startswith("event: runs\n")]
    data = [json.loads(line.split("data: ")[1]) for line in said]
    assert data[0] == {"run": "run", "iteration": 4, "state": "training"}
    assert data[-1] == {"run": "run", "iteration": 4, "state": "finished"}
    assert all(line.endswith("\n\n") for lines in heard.values() for line in lines)
    assert [line for line in heard[None] if "event" in line] == said
    assert not any("event" in line for line in heard["other"])
    assert any(line.startswith(":") for line in heard["other"][1:])  # so that the connection is not given up


def test_runs_are_found_beside_many_folders_and_what_is_left_out_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST_FOLDERS", 20)
    monkeypatch.setattr(runs, "PAUSE", 0.0)
    make_run(tmp_path / "z")
    asking = client(tmp_path)
    assert asking.get("/api/runs").json()["left_out"] is None
    for number in range(30):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
    make_run(tmp_path / "images" / "9" / "deep")
    told = asking.get("/api/runs").json()
    assert [run["run"] for run in told["runs"]] == ["z"]
    assert "The 20 nearest folders" in told["left_out"]
    assert "tether studio FOLDER" in asking.get("/api/labels").json()["left_out"]


def test_runs_that_lie_too_deep_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PAUSE", 0.0)
    within = tmp_path / "a" / "b" / "c" / "d"
    make_run(within / "run")  # what it keeps in folders is its own
    asking = client(tmp_path)
    assert asking.get("/api/runs").json()["left_out"] is None
    make_run(within / "e" / "run")
    told = asking.get("/api/runs").json()
    assert [run["run"] for run in told["runs"]] == ["a/b/c/d/run"]
    assert "a/b/c/d/e/run" in told["left_out"]
    assert "tether studio FOLDER" in told["left_out"]


def test_a_run_that_was_done_again_is_known_by_its_bytes(tmp_path: Path) -> None:
    """The file keeps its number in the file system, and has grown past where it was read to."""
    folder = make_run(tmp_path / "run", iterations=3)
    asking = client(tmp_path)
    first = asking.get("/api/metrics", params={"run": "run"}).json()
    file = folder / "metrics.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"iteration": 4, "score": 0.5}\n')
    longer = asking.get("/api/metrics", params={"run": "run"}).json()
    assert (longer["edition"], longer["last"]) == (first["edition"], 4)
    lines = [json.dumps({"iteration": i, "score": -i, "time/iteration": i / 7}) for i in range(1, 30)]
    inode = file.stat().st_ino
    with file.open("r+b") as stream:
        stream.write("".join(f"{line}\n" for line in lines).encode())
    assert file.stat().st_ino == inode
    again = asking.get("/api/metrics", params={"run": "run"}).json()
    assert [row["score"] for row in again["rows"]] == [-i for i in range(1, 30)]
    assert again["edition"] != first["edition"]
