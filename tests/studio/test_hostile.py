"""What models, strange folders and strange pages may send: nothing of it runs, leaks or fails the server."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, assume, given, settings, strategies
from schemathesis import GenerationMode
from starlette.types import ASGIApp, Receive, Scope, Send
from tests.studio.folders import URL, client, episode, make_run

from tether.runs.labels import NewPair, create_labels
from tether.studio import create_app
from tether.studio.app import open_app

TEXTS = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "\u202egnihtemos\u2066 \u200b\x00\x07\x1b[31m red \x7f\x9f",
    '"}]}</script><!--',
    "\ufeff\U000e0041\ufffe half \udc80",
    "𝒳 é 你好 🏳️‍🌈",
]
SECRET = "the-content-of-a-secret-file"
READING = (
    *("run?run={}", "metrics?run={}", "difference?run={}&with={}", "episodes?run={}", "episode?run={}&id=1"),
    *("same-prompt?run={}&id=1", "film?run={}&id=1", "export/metrics.csv?run={}", "export/episodes.csv?run={}"),
    *("export/steps.csv?run={}&id=1", "export/episode.html?run={}&id=1"),
    *("console?run={}", "export/console.log?run={}"),
    *("labels/next?set={}.labels.db&annotator=a", "labels/agreement?set={}.labels.db"),
    "export/preferences.jsonl?set={}.labels.db",
)


def shown(text: str) -> str:
    """As the store keeps it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_models_comes_through_as_data(tmp_path: Path, text: str) -> None:
    make_run(tmp_path / "ppo", iterations=1, episodes=[episode(text, text, details={"group": 0, "note": text})])
    create_labels(tmp_path / "x.labels.db", {"name": text}, [NewPair(text, text, "other")])
    asking = client(tmp_path)
    reply = asking.get("/api/episode", params={"run": "ppo", "id": 1})
    assert reply.headers["content-type"] == "application/json"
    assert reply.content.isascii()
    found = reply.json()
    assert found["prompt"] == found["response"] == shown(text)
    assert "".join(found["steps"]["action"]) == text
    listed = asking.get("/api/episodes", params={"run": "ppo"}).json()["episodes"][0]
    assert shown(text).startswith(listed["response"])
    pair = asking.get("/api/labels/next", params={"set": "x.labels.db", "annotator": "ann"}).json()["pair"]
    assert shown(text) in (pair["left"], pair["right"])
    for path in ("export/episode.html?run=ppo&id=1", "export/episodes.csv?run=ppo", "export/steps.csv?run=ppo&id=1"):
        reply = asking.get(f"/api/{path}")
        assert reply.status_code == 200
        assert "attachment" in reply.headers["content-disposition"]
    assert "<script>alert" not in asking.get("/api/export/episode.html?run=ppo&id=1").text


def test_a_response_of_a_megabyte(tmp_path: Path) -> None:
    long = "<b>\u202e" * 250_000
    one = replace(episode("q", "abc"), response=long, actions=[long], alternatives=[[(long, 1.0)]])
    make_run(tmp_path / "ppo", iterations=1, episodes=[one] * 3)
    asking = client(tmp_path)
    assert asking.get("/api/episode", params={"run": "ppo", "id": 2}).json()["response"] == long
    listed = asking.get("/api/episodes", params={"run": "ppo", "text": "<B>"})
    assert len(listed.content) < 10_000
    assert listed.json()["total"] == 3
    assert len(asking.get("/api/export/episodes.csv", params={"run": "ppo"}).content) > 3_000_000


@pytest.fixture
def guarded(tmp_path: Path) -> Path:
    """A runs folder beside what must not be read."""
    outside = tmp_path / "outside"
    make_run(outside / "run", iterations=1, episodes=[episode("q", SECRET)], model=SECRET)
    create_labels(outside / "run.labels.db", {"name": SECRET}, [NewPair(SECRET, SECRET, "b")])
    (outside / "file").write_text(f"{SECRET}: {SECRET}\n")
    root = tmp_path / "runs"
    make_run(root / "good", iterations=1, episodes=[episode("q", "answer")])
    return root


OUT = (
    *("../outside/run", "good/../../outside/run", "..", "/", "//", "./../outside/run", "good/..", "..\\outside\\run"),
    *(
        "%2e%2e/outside/run",
        "..%2foutside%2frun",
        "good\x00",
        "\x00",
        "x" * 1000,
        "a/" * 400 + "b",
        "~",
        "good/\u202e..",
    ),
    *(
        "good/config.yaml",
        "good/metrics.jsonl/..",
        "nothing",
        "",
        " good",
        "good ",
        "GOOD/../..",
        "C:\\",
        "file:///etc",
    ),
)


@pytest.mark.parametrize("name", OUT)
def test_names_do_not_leave_the_folder(guarded: Path, name: str) -> None:
    asking = client(guarded)
    for path in READING:
        address, _, query = path.partition("?")
        params = {key: value.format(name) for key, value in (pair.split("=") for pair in query.split("&"))}
        reply = asking.get(f"/api/{address}", params=params)
        assert reply.status_code in (403, 404, 422), path
        assert reply.json().keys() == {"error"}
        assert SECRET not in reply.text


def test_absolute_names_of_places_that_are_there(guarded: Path) -> None:
    for name in (str(guarded.parent / "outside" / "run"), str(guarded / "good")):
        assert client(guarded).get("/api/run", params={"run": name}).status_code == 403


def test_links_that_leave_the_folder_are_refused(guarded: Path) -> None:
    outside = guarded.parent / "outside"
    (guarded / "linked").symlink_to(outside / "run")
    (guarded / "linked.labels.db").symlink_to(outside / "run.labels.db")
    (guarded / "circle").symlink_to(guarded / "circle")
    asking = client(guarded)
    for name in ("linked", "circle"):
        for path in READING:
            reply = asking.get(f"/api/{path.format(name, name)}")
            assert reply.status_code in (403, 404), path
            assert SECRET not in reply.text
    assert [run["run"] for run in asking.get("/api/runs").json()["runs"]] == ["good"]
    assert asking.get("/api/labels").json()["sets"] == []


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "alarms.jsonl",
        "episodes.db",
        "notes.json",
        "starts.jsonl",
        "console.log",
        "lock",
    ],
)
def test_files_of_a_run_that_are_links_to_elsewhere_are_not_read(guarded: Path, name: str) -> None:
    folder = make_run(guarded / "trap", iterations=1, episodes=[episode("q", "answer")])
    (folder / name).unlink(missing_ok=True)
    source = guarded.parent / "outside" / "run" / name
    (folder / name).symlink_to(source if source.exists() else guarded.parent / "outside" / "file")
    asking = client(guarded)
    assert asking.get("/api/run", params={"run": "trap"}).status_code == 403
    for path in READING[:13]:
        reply = asking.get(f"/api/{path.format('trap', 'trap')}")
        assert reply.status_code == 403, path
        assert SECRET not in reply.text
    listed = {run["run"]: run for run in asking.get("/api/runs").json()["runs"]}
    assert listed["trap"]["state"] == "damaged"
    assert name in listed["trap"]["fault"]
    assert SECRET not in json.dumps(listed)


def test_links_within_the_folder_are_followed(guarded: Path) -> None:
    (guarded / "again").symlink_to(guarded / "good")
    assert client(guarded).get("/api/run", params={"run": "again"}).json()["run"] == "good"


# ---- folders that are half written or corrupt ------------------------------------------------------------------------


Damage = Callable[[Path], object]


def sql(script: str) -> Damage:
    def damage(folder: Path) -> None:
        with closing(sqlite3.connect(folder / "episodes.db")) as connection:
            connection.executescript(script)

    return damage


def store(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / "episodes.db").write_bytes(change((folder / "episodes.db").read_bytes()))


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """By something that is no file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def no_checkpoint(folder: Path) -> None:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "iteration-000001").touch()


ZEROS = b"0" * 400
DAMAGES: dict[str, Damage] = {
    "notes that are no JSON": written("notes.json", b"{"),
    "notes of another form": written("notes.json", b'{"note": [], "tags": "x"}'),
    "notes nested deeply": written("notes.json", b"[" * 100_000),
    "notes that are a folder": replaced("notes.json", Path.mkdir),
    "starts that are no JSON": written("starts.jsonl", b'{\n[]\n7\n{"time": "x"}\n{"time": 1, "commit": 7}\n\xff\n'),
    "a log of bytes": written("console.log", bytes(range(256)) * 1000),
    "a log that is a pipe": replaced("console.log", os.mkfifo),
    "an empty store": store(lambda data: b""),
    "text for a store": store(lambda data: b"no database " * 1000),
    "half a store": store(lambda data: data[:6000]),
    "noise in the store": store(lambda data: data[:3000] + random.Random(0).randbytes(len(data) - 3000)),
    "no table": sql("DROP TABLE steps"),
    "no columns": sql("DROP TABLE episodes; CREATE TABLE episodes (id INTEGER PRIMARY KEY)"),
    "actions that are no JSON": sql("UPDATE steps SET actions = '[1'"),
    "actions nested deeply": sql(f"UPDATE steps SET actions = '{'[' * 100_000}'"),
    "actions that are a number": sql("UPDATE steps SET actions = '7'"),
    "actions that are null": sql("UPDATE steps SET actions = 'null'"),
    "fewer actions than steps": sql("UPDATE steps SET actions = '[]'"),
    "odd blobs": sql("UPDATE steps SET log_probs = x'00'"),
    "short blobs": sql("UPDATE steps SET log_probs = x'00000000'"),
    "text for a blob": sql("UPDATE steps SET advantages = 'text'"),
    "blobs for text": sql("UPDATE episodes SET prompt = x'ff', response = x'ff'"),
    "text that is not UTF-8": sql("UPDATE episodes SET prompt = CAST(x'ff41' AS TEXT)"),
    "text for numbers": sql("UPDATE episodes SET score = 'x', iteration = 'y', kl = 'z'"),
    "details that are a list": sql("UPDATE episodes SET details = '[1]'"),
    "probabilities that are missing": sql("UPDATE steps SET alternative_probabilities = x''"),
    "alternatives of odd form": sql("UPDATE steps SET alternatives = '[1, {}]'"),
    "steps of nobody": sql("UPDATE steps SET episode_id = episode_id + 100"),
    "a newer layout": sql("PRAGMA user_version = 99"),
    "a folder for a store": replaced("episodes.db", Path.mkdir),
    "a folder for a configuration": replaced("config.yaml", Path.mkdir),
    "no configuration": replaced("config.yaml", lambda file: None),
    "a configuration of other things": written("config.yaml", b"learner: 7\nenvironments: [x]\n"),
    "odd sections": written("config.yaml", b"learner: {clip_low: x}\nenvironments: {count: -1}\n"),
    "metrics of other things": written("metrics.jsonl", b'[]\n7\n{"iteration": null}\n\xff\n'),
    "huge numbers": written("metrics.jsonl", b'{"iteration": 1, "score": 1e999, "kl": 1' + ZEROS + b"}\n"),
    "a huge iteration": written("metrics.jsonl", b'{"iteration": 1' + ZEROS + b"}\n"),
    "text for a score": written("metrics.jsonl", b'{"iteration": 1, "score": "<b>", "kl": [1]}\n'),
    "alarms of other things": written("alarms.jsonl", b'[]\n{"kind": [], "state": 7}\n\xff\n' + b"[" * 99_999 + b"\n"),
    "a checkpoint that is a file": no_checkpoint,
    "a pipe for metrics": replaced("metrics.jsonl", os.mkfifo),
    "a pipe for alarms": replaced("alarms.jsonl", os.mkfifo),
    "a pipe for the lock": replaced("lock", os.mkfifo),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_told_in_one_line(tmp_path: Path, what: str) -> None:
    root = tmp_path / "runs"
    make_run(root / "good", iterations=1, episodes=[episode("q", "answer")])
    bad = make_run(root / "bad", iterations=2, episodes=[episode("q", "an answer")] * 2)
    DAMAGES[what](bad)
    asking = client(root)
    for path in (*READING[:13], "episodes?run={}&order=score&text=a", "labels", "export/runs.csv"):
        reply = asking.get(f"/api/{path.format('bad', 'bad')}")
        assert reply.status_code in (200, 400, 404), (path, reply.text)
        if reply.status_code != 200:
            assert reply.json().keys() == {"error"}
            assert "\n" not in reply.json()["error"]
    listed = {run["run"]: run["state"] for run in asking.get("/api/runs").json()["runs"]}
    assert listed["good"] == "finished"
    assert asking.get("/api/episode", params={"run": "good", "id": 1}).status_code == 200


def test_a_run_cut_off_at_any_byte_is_no_failure(tmp_path: Path) -> None:
    """As a copy that was interrupted, or a disk that was full."""
    whole = make_run(tmp_path / "whole", iterations=2, episodes=[episode("q", "an answer")])
    for part in range(11):
        copy = tmp_path / "runs" / f"part-{part}"
        shutil.copytree(whole, copy)
        for name in ("config.yaml", "metrics.jsonl", "episodes.db"):
            data = (whole / name).read_bytes()
            (copy / name).write_bytes(data[: len(data) * part // 10])
    asking = client(tmp_path / "runs")
    assert len(asking.get("/api/runs").json()["runs"]) == 11
    for part in range(11):
        for path in READING[:13]:
            reply = asking.get(f"/api/{path.format(f'part-{part}', 'part-10')}")
            assert reply.status_code in (200, 400, 404), (part, path, reply.text)
    assert asking.get("/api/episode?run=part-10&id=1").status_code == 200


@pytest.mark.skipif(os.name != "posix", reason="names of other systems are text")
def test_a_folder_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/bad\xff"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes no such names")
    (Path(os.fsdecode(folder)) / "config.yaml").write_text("a: 1\n")
    (found,) = client(tmp_path).get("/api/runs").json()["runs"]
    assert (found["run"], found["state"]) == ("bad\ufffd", "damaged")
    assert client(tmp_path).get("/api/run", params={"run": found["run"]}).status_code == 404


# ---- requests that no page sends -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzzed")
    make_run(root / "ppo", iterations=2, episodes=[episode("q", "an answer")] * 2)
    create_labels(root / "x.labels.db", {"name": "x"}, [NewPair("q", "a", "b")])
    return root


def as_the_page_asks(app: ASGIApp) -> ASGIApp:
    """With our Host and Origin, so that the requests get past the guard."""
    own = {b"host": b"127.0.0.1:8555", b"origin": URL.encode()}

    async def asking(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope.get("headers", []) if name not in own]
        await app({**scope, "headers": [*headers, *own.items()]}, receive, send)

    return asking


DESCRIPTION = open_app(Path.cwd()).openapi()
ENDLESS = "/api/events"
OPERATIONS = [
    (path, method, mode)
    for path, item in DESCRIPTION["paths"].items()
    for method, described in item.items()
    for mode in GenerationMode
    if path != ENDLESS and (mode is GenerationMode.POSITIVE or described.keys() & {"parameters", "requestBody"})
]
VALUES = {  # what gets a request past the first checks, mixed into what schemathesis makes
    "run": ["ppo", ".", "..", "ppo/../ppo", "\x00"],
    "with": ["ppo", "../ppo"],
    "set": ["x.labels.db", "../x.labels.db", "x"],
    "id": [1, 4, 2**63 - 1, "x"],
    "annotator": ["ann", "\u202e", ""],
}


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_no_request_fails_the_server(fuzzed: Path, path: str, method: str, mode: GenerationMode) -> None:
    """Schemathesis makes them of the interface's own description, and of what it forbids."""
    app = as_the_page_asks(create_app(fuzzed))
    operation = schemathesis.openapi.from_dict(DESCRIPTION)[path][method]
    asking = TestClient(app, base_url=URL, raise_server_exceptions=False)

    @settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), data=strategies.data())
    def ask(case: schemathesis.Case, data: strategies.DataObject) -> None:
        query = dict(case.query or {})
        for name, values in VALUES.items():
            if name in query and data.draw(strategies.booleans()):
                query[name] = data.draw(strategies.sampled_from(values))
        assume(len(str(query)) < 10_000)  # the client sends no longer ones
        body = case.body if isinstance(case.body, (dict, list, str, int, float, bool, type(None))) else {}
        if isinstance(body, dict) and "set" in body and data.draw(strategies.booleans()):
            body = body | {"set": "x.labels.db", "pair": 1, "answer": "left"}
        content = None if method == "get" else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if content is not None else {}
        reply = asking.request(method.upper(), path, params=query, content=content, headers=kind)
        assert reply.status_code < 500, reply.text
        if reply.is_error:
            assert reply.json().keys() == {"error"}

    ask()
