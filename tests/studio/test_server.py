"""The server as a process: its address, its token, its events, and no label lost when it is killed."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests.processes import Commands
from tests.studio.folders import make_run, row

from tether.cli import main
from tether.errors import UserError
from tether.runs import Run
from tether.runs.labels import LabelSet, NewPair, create_labels
from tether.studio import StudioConfig
from tether.studio.server import serve

PAIRS = 2000


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    return Commands(tmp_path_factory.mktemp("commands"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "ppo")
    create_labels(tmp_path / "x.labels.db", {"name": "x"}, [NewPair(f"q{i}", "a", "b") for i in range(PAIRS)])
    return tmp_path


class Studio:
    """A running server."""

    def __init__(self, commands: Commands, root: Path, *flags: str) -> None:
        self.process: BaseProcess = commands.start(["studio", str(root), "--port", "0", "--no-browser", *flags])
        log, deadline = commands.log, time.monotonic() + 60
        while not (found := re.search(r"(http://\S+)\n", log.read_text() if log.exists() else "")):
            assert self.process.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        self.printed = found[1]
        self.url = self.printed.partition("/?")[0].rstrip("/")

    def ask(self, path: str, said: Any = None, **headers: str) -> Any:
        """JSON in, JSON out."""
        data = None if said is None else json.dumps(said).encode()
        own = {"Content-Type": "application/json", "Origin": self.url}
        request = urllib.request.Request(self.url + path, data, own | headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read())

    def end(self, number: int = signal.SIGKILL) -> int | None:
        """Send a signal, and wait for the end."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        self.process.join(20)
        return self.process.exitcode


@pytest.fixture
def studio(commands: Commands, root: Path) -> Iterator[Studio]:
    running = Studio(commands, root)
    yield running
    if running.process.is_alive():
        running.end()


def test_it_prints_its_address_answers_there_and_ends_by_ctrl_c(studio: Studio) -> None:
    assert studio.url.startswith("http://127.0.0.1:")
    assert studio.ask("/api/runs")["runs"][0]["run"] == "ppo"
    with urllib.request.urlopen(studio.url + "/api/events", timeout=10) as stream:  # an open page must not hold it
        assert stream.readline() == b"retry: 2000\n"
        started = time.monotonic()
        assert studio.end(signal.SIGINT) == 0
    assert time.monotonic() - started < 10


def test_events_come_while_a_run_trains(studio: Studio, root: Path) -> None:
    with urllib.request.urlopen(studio.url + "/api/events", timeout=15) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = iter(stream.readline, b"")
        assert next(lines).startswith(b"retry")
        with Run.open(root / "ppo", tensorboard=False) as run:
            run.log(4, row(4))
            said = next(line for line in lines if line.startswith(b"data: "))
        assert json.loads(said.removeprefix(b"data: "))["run"] == "ppo"
    assert studio.ask("/api/metrics?run=ppo&since=3")["rows"] == [{"iteration": 4, **row(4)}]


def test_another_address_than_this_machines_needs_a_token_which_is_made(commands: Commands, root: Path) -> None:
    studio = Studio(commands, root, "--host", "0.0.0.0")
    try:
        found = re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=([\w-]{20,})", studio.printed)
        assert found
        with pytest.raises(urllib.error.HTTPError) as refused:
            studio.ask("/api/runs")
        assert refused.value.code == 401
        assert studio.ask("/api/runs", Authorization=f"Bearer {found[1]}")["runs"]
    finally:
        studio.end()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_works_from_another_machine_is_printed_with_its_token(
    commands: Commands, root: Path, host: str
) -> None:
    if host == "::" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    studio = Studio(commands, root, "--host", host)
    try:
        log, deadline = commands.log, time.monotonic() + 20
        while not (
            found := re.search(r"from another machine: (http://(\S+):\d+)/\?token=([\w-]{20,})\n", log.read_text())
        ):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        assert found[2] not in ("127.0.0.1", "0.0.0.0", "[::1]", "[::]", "localhost")
        assert studio.printed.endswith(f"?token={found[3]}")
        request = urllib.request.Request(f"{found[1]}/api/runs", headers={"Authorization": f"Bearer {found[3]}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            assert json.loads(reply.read())["runs"]
    finally:
        studio.end()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_an_address_that_is_taken_or_not_ours_is_one_line(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: cannot be listened on: .*; try --port 0"):
            serve(StudioConfig(runs=str(root), port=port, browser=False))
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0: cannot be listened on"):
        serve(StudioConfig(runs=str(root), host="192.0.2.1", port=0, browser=False))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["nowhere"], "nowhere: no such folder, expected one with runs: tether studio RUNS"),
        ([".", "--port", "70000"], "port is 70000, expected 0 to 65535"),
        ([".", "--token", "short"], "token: expected at least 8 letters"),
        ([".", "--host", "no such host"], "host: 'no such host' is no name or address of this machine"),
    ],
)
def test_wrong_settings_are_one_line(
    flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["studio", *flags, "--no-browser"]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


# ---- killed at any moment --------------------------------------------------------------------------------------------


def label_until_killed(studio: Studio, generator: random.Random, start: int) -> dict[int, str]:
    """Answers that were acknowledged before the server was killed, at a moment that nobody chose."""
    assert studio.process.pid is not None
    timer = threading.Timer(generator.uniform(0.0, 0.02), os.kill, (studio.process.pid, signal.SIGKILL))
    last = generator.randint(6, 40)  # answers, after which the killer is on its way: by count, not by the clock
    kept: dict[int, str] = {}
    for pair in range(start, PAIRS + 1):
        answer = generator.choice(("tie", "skip", "both_bad"))
        said = {"set": "x.labels.db", "annotator": "ann", "pair": pair, "answer": answer, "note": f"note {pair}"}
        try:
            if studio.ask("/api/labels/answer", said)["ok"]:
                kept[pair] = answer
            if len(kept) == last:
                timer.start()
        except (OSError, http.client.HTTPException, ValueError):  # it is gone; half an answer is none
            break
    studio.process.join(20)
    return kept


def lose_nothing(commands: Commands, root: Path, kills: int) -> None:
    generator = random.Random(7)
    expected: dict[int, str] = {}
    for _ in range(kills):
        studio = Studio(commands, root)
        kept = label_until_killed(studio, generator, max(expected, default=0) + 1)
        assert not studio.process.is_alive()
        expected |= kept
        with LabelSet(root / "x.labels.db") as labels:
            found = {answer.pair: (answer.answer, answer.note) for answer in labels.answers()}
        lost = {pair: answer for pair, answer in expected.items() if found.get(pair) != (answer, f"note {pair}")}
        assert lost == {}
        assert len(found) <= len(expected) + kills  # at most the one that was under way at each kill
    assert len(expected) > 5 * kills


def test_three_kills_lose_no_label_that_was_acknowledged(commands: Commands, root: Path) -> None:
    lose_nothing(commands, root, 3)


@pytest.mark.slow
def test_twenty_kills_lose_no_label_that_was_acknowledged(commands: Commands, root: Path) -> None:
    lose_nothing(commands, root, 20)
