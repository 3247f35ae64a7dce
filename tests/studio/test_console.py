"""How a run was started and what it printed, as the page asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests.studio.folders import client, make_run

from tether.runs import recorded

CPU = torch.device("cpu")


def test_starts_come_newest_first_with_the_end_of_what_was_printed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo")
    for iteration in (0, 3):
        with recorded(folder, CPU, iteration):
            print("<b>printed</b>")
    with (folder / "starts.jsonl").open("a") as stream:
        stream.write('{"time": 1, "torn')
    asking = client(tmp_path)
    found = asking.get("/api/console", params={"run": "ppo"}).json()
    assert [start["iteration"] for start in found["starts"]] == [3, 0]
    assert found["starts"][0]["machine"]["device"] == "cpu"
    assert found["text"].count("<b>printed</b>\n") == 2
    assert found["before"] == 0
    log = asking.get("/api/export/console.log", params={"run": "ppo"})
    assert (log.text, log.headers["content-type"]) == (found["text"], "text/plain; charset=utf-8")
    assert log.headers["content-disposition"] == 'attachment; filename="ppo-console.log"'


def test_of_a_long_log_the_end_is_shown_from_a_whole_line_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "ppo")
    lines = [f"line {n}: é\n" for n in range(20_000)]
    (folder / "console.log").write_text("".join(lines))
    found = client(tmp_path).get("/api/console", params={"run": "ppo"}).json()
    assert found["text"].startswith("line ")
    assert found["text"].endswith(lines[-1])
    assert found["before"] + len(found["text"].encode()) == (folder / "console.log").stat().st_size


def test_an_older_run_has_neither(tmp_path: Path) -> None:
    make_run(tmp_path / "ppo")
    asking = client(tmp_path)
    assert asking.get("/api/console", params={"run": "ppo"}).json() == {"starts": [], "text": "", "before": 0}
    reply = asking.get("/api/export/console.log", params={"run": "ppo"})
    assert reply.status_code == 404
    assert json.loads(reply.text)["error"] == "console.log: this run has kept nothing of what it printed"
