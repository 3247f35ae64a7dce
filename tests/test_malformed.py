"""Malformed inputs at the real command line: exit code 2, one line that says what and where, nothing lost.

The inputs are in `malformed_inputs.py`. The lines are those of the tables in `docs/malformed-inputs.md`; after a change
of a message, `TETHER_WRITE_DOCS=1 pytest tests/test_malformed.py` writes the tables anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from tests.malformed_inputs import (
    CONTROL,
    DETAILS,
    ENVIRONMENTS,
    EVAL,
    FAILING_ENVIRONMENTS,
    FAILING_REWARDS,
    FAILING_SERVICES,
    GOOD_REWARD,
    GOOD_WORLD,
    MODELS,
    PORT,
    PPO,
    PREFERENCES,
    PROMPTS,
    RESUME,
    REWARDS,
    RUNS,
    SECTIONS,
    SERVICES,
    SETTINGS,
    STUDIO,
    TASKS,
    TOKENIZERS,
    Case,
    damage,
    make_folders,
    tokenizer,
)
from tether.cli import main
from tether.runs import count_episodes, latest_checkpoint, read_metrics

PAGE = Path(__file__).resolve().parent.parent / "docs" / "malformed-inputs.md"
START, END = "<!-- tables -->", "<!-- end of the tables -->"
WRITE = bool(os.environ.get("TETHER_WRITE_DOCS"))
printed: dict[tuple[str, str], str] = {}  # (section, what is wrong) → the line, for the page


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_folders(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no test may wait for the hub


@pytest.fixture
def work(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with good inputs, so that paths in messages are short and the same everywhere."""
    shutil.copytree(good, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(scope="module")
def straight(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations in which nothing went wrong."""
    return _trained(good, tmp_path_factory.mktemp("straight") / "work", PPO)


@pytest.fixture(scope="module")
def straight_control(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a policy in an environment."""
    return _trained(good, tmp_path_factory.mktemp("straight-control") / "work", CONTROL)


@pytest.fixture(scope="module")
def stopped(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after two iterations, with a checkpoint of each."""
    command = f"{PPO} --iterations 2 --checkpoint-every 1"
    return _trained(good, tmp_path_factory.mktemp("stopped") / "work", command)


FAULTS: dict[str, tuple[int, Any]] = {  # the rest of a path → status and body; of the others there is no answer
    "error": (500, b"out of memory"),
    "refusal": (401, b"no such key"),
    "moved": (302, b""),
    "page": (200, b"<html>Welcome</html>"),
    "half": (200, {"scores": [1.0, 0.0]}),
    "other": (200, {"result": 1}),
    "nan": (200, {"scores": [float("nan")] * 4}),
    "text": (200, {"scores": ["good"] * 4}),
    "chat": (200, {"choices": [{"message": {"content": "I would rather not."}}]}),
    "nothing": (200, {"choices": []}),
}


class Service(ThreadingHTTPServer):
    """A scorer and a judge that count the letter a in two iterations; from the third on each path has a fault."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.good = 2  # iterations
        self.asked = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def handle_error(self, *_: Any) -> None:
        """Nothing: who asked has gone. A traceback parses Python, which two threads of 3.11 may not do at once."""

    def answer(self, path: str, question: dict[str, Any]) -> tuple[int, Any] | None:
        """Status and body; None for none at all."""
        fault = path.split("/")[1]
        with self.lock:
            self.asked += len(question.get("completions", [0]))
            if self.asked > 4 * self.good and fault == "slow":
                self.over.wait(10)
            elif self.asked > 4 * self.good:
                return FAULTS.get(fault)
        if "messages" in question:
            said = f"Score: {question['messages'][0]['content'].count('a') % 10}"
            return 200, {"choices": [{"message": {"content": said}}]}
        return 200, {"scores": [float(text.count("a")) for text in question["completions"]]}


class _Answer(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        found = self.server.answer(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if found is None:
            return
        status, body = found
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://elsewhere/score")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing: standard error is what the tests read."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture(scope="module", autouse=True)
def page() -> Iterator[None]:
    yield
    if WRITE:
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        tail = rest.partition(END)[2]
        tables = [f"## {section}\n\n{_table(section, cases)}\n" for section, cases in SECTIONS.items()]
        PAGE.write_text(f"{head}{START}\n\n" + "\n".join(tables) + f"\n{END}{tail}", encoding="utf-8")


def _trained(good: Path, folder: Path, command: str) -> Path:
    shutil.copytree(good, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split(command)) == 0
    return folder / "run"


def _spoil(case: Case) -> None:
    if case.prepare is not None:
        case.prepare()
    for name, contents in case.files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())


def _fails(case: Case, capsys: pytest.CaptureFixture[str], section: str, port: int | None = None) -> None:
    """Run the command and check the line that it prints, against the case and against the page."""
    if case.needs is not None and find_spec(case.needs) is None:
        pytest.skip(f"{case.needs} is not installed")
    capsys.readouterr()
    address = PORT if port is None else f"127.0.0.1:{port}"
    code = main(shlex.split(case.command.replace(PORT, address)))
    lines = capsys.readouterr().err.splitlines()
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("tether: error: ")
    lines[0] = lines[0].replace(address, PORT)
    for words in case.says:
        assert words in lines[0]
    line = lines[0].replace(str(Path.cwd()), "/home/you")
    line = re.sub(r"attempts in \d+\.\d s", "attempts in 0.3 s", line)
    line = re.sub(r"process \d+", "process 4242", line)
    line = re.sub(r"(for completion \d+ )\('.*?'\)", r"\1('…')", line)  # what was sampled
    if case.library is not None:
        line, found = re.subn(case.library, "…", line)
        assert found == 1, line
    printed[section, case.what] = line
    if not WRITE:
        assert _row(case, line) in PAGE.read_text(encoding="utf-8"), "TETHER_WRITE_DOCS=1 writes the page anew"


def _row(case: Case, line: str) -> str:
    shown = line.removeprefix("tether: error: ").replace("|", "\\|")
    return f"| {case.what} | `{case.command.split()[0]}` | `` {shown} `` |"


def _table(section: str, cases: list[Case]) -> str:
    rows = [_row(case, printed[section, case.what]) for case in cases if (section, case.what) in printed]
    return "\n".join(["| what is wrong | command | the line after `tether: error:` |", "|---|---|---|", *rows])


def _contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _same_numbers(run: Path, straight: Path) -> None:
    """Metrics and weights are those of the run in which nothing went wrong, bit for bit; time and memory may differ."""

    def numbers(folder: Path) -> list[dict[str, float]]:
        measured = ("time/", "memory/")
        return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in read_metrics(folder)]

    assert numbers(run) == numbers(straight)
    assert count_episodes(run) == count_episodes(straight)
    assert _last_weights(run) == _last_weights(straight)


def _last_weights(run: Path) -> bytes:
    return next(run.glob("checkpoints/iteration-000003/policy/*.safetensors")).read_bytes()


def _each(*sections: list[Case]) -> pytest.MarkDecorator:
    names = {id(cases): name for name, cases in SECTIONS.items()}
    chosen = [(names[id(cases)], case) for cases in sections for case in cases]
    ids = [f"{section.split()[0].strip(',').lower()}-{case.what}" for section, case in chosen]
    return pytest.mark.parametrize(("section", "case"), chosen, ids=ids)


@_each(SETTINGS, MODELS, TOKENIZERS, PROMPTS, PREFERENCES, REWARDS, TASKS, DETAILS, STUDIO, SERVICES, ENVIRONMENTS)
def test_a_mistake_is_found_before_anything_is_computed(
    section: str, case: Case, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(case)
    before = _contents(work)
    _fails(case, capsys, section)
    after = {name: data for name, data in _contents(work).items() if "__pycache__" not in name}
    assert after == before  # no half-made run is in the way of the mended command


@_each(FAILING_REWARDS)
def test_nothing_is_lost_when_a_reward_fails(
    section: str, case: Case, work: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(case)
    _fails(case, capsys, section)
    _kept_what_was_sampled(work / "run")
    (work / "rewards.py").write_text(GOOD_REWARD)
    assert main(shlex.split(RESUME)) == 0
    _same_numbers(work / "run", straight)


@_each(FAILING_SERVICES)
def test_nothing_is_lost_when_a_service_fails(
    section: str, case: Case, work: Path, straight: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    _fails(case, capsys, section, service.server_port)
    _kept_what_was_sampled(work / "run")
    service.over.set()
    service.good = 100
    assert main(shlex.split(RESUME)) == 0
    assert [row["iteration"] for row in read_metrics(work / "run")] == [1, 2, 3]
    if "judge" not in case.command:  # the scorer gives what `rewards.py` gives
        assert _last_weights(work / "run") == _last_weights(straight)


def _kept_what_was_sampled(run: Path) -> None:
    """Of a run whose third iteration could not be scored."""
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2]
    assert count_episodes(run) == 8
    latest = latest_checkpoint(run)
    assert latest is not None
    assert latest[0] == 2
    unscored = [json.loads(line) for line in (run / "unscored.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["iteration"] for row in unscored] == [3] * 4
    assert {row["prompt"] for row in unscored} <= {"ab", "cd", "ef", "fa"}
    assert all(row["response"] for row in unscored)


@_each(FAILING_ENVIRONMENTS)
def test_nothing_is_lost_when_an_environment_fails(
    section: str, case: Case, work: Path, straight_control: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _spoil(case)
    _fails(case, capsys, section)
    run = work / "run"
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2]
    assert count_episodes(run) == 6
    latest = latest_checkpoint(run)
    assert latest is not None
    assert latest[0] == 2
    (work / "world.py").write_text(GOOD_WORLD)
    assert main(["control", "--resume", "run"]) == 0
    _same_numbers(run, straight_control)


@_each(RUNS)
def test_a_mistake_leaves_a_run_as_it_is(
    section: str, case: Case, work: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, work / "run")
    _spoil(case)
    before = _contents(work / "run")
    _fails(case, capsys, section)
    assert _contents(work / "run") == before


def test_a_mended_run_goes_on_as_if_nothing_had_been_wrong(
    work: Path, stopped: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, work / "run")
    (work / "prompts.jsonl").rename(work / "elsewhere.jsonl")
    assert main(shlex.split(f"{RESUME} --iterations 3")) == 2
    assert "prompts.jsonl: no such file" in capsys.readouterr().err
    (work / "elsewhere.jsonl").rename(work / "prompts.jsonl")
    assert main(shlex.split(f"{RESUME} --iterations 3")) == 0
    _same_numbers(work / "run", straight)


def test_a_run_that_another_process_writes(work: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(stopped, work / "run")
    code = (  # as `tether.runs.lock` does it, without waiting for torch
        "import fcntl, os, sys; file = open('run/lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(os.getpid(), file=file, flush=True); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        before = _contents(work / "run")
        for command in (f"{RESUME} --iterations 3", f"{PPO} --overwrite"):
            assert main(shlex.split(command)) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1
            assert lines[0].startswith(f"tether: error: run: process {other.pid} is writing this run")
        assert _contents(work / "run") == before
        other.stdin.close()
    assert main(shlex.split(f"{RESUME} --iterations 3")) == 0


def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(
    work: Path, stopped: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stopped, work / "run")
    damage(2)
    assert main(shlex.split(f"{RESUME} --iterations 3")) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "run/checkpoints/iteration-000002: broken (policy/model.safetensors has changed since it was written), "
        "looking for an older one"
    ]
    _same_numbers(work / "run", straight)


def test_a_tokenizer_without_pad_pads_with_eos(work: Path, straight: Path) -> None:
    tokenizer(pad=None)()
    assert main(shlex.split(PPO)) == 0
    _same_numbers(work / "run", straight)


def test_eval_keeps_the_responses_that_a_reward_could_not_score(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "rewards.py").write_text(GOOD_REWARD.replace("calls += 1", "calls += 1; assert calls < 2, 'twice'"))
    command = f"{EVAL} --sampling.batch-size 2 --responses kept.jsonl"
    assert main(shlex.split(command)) == 2
    assert "raised AssertionError: twice" in capsys.readouterr().err
    rows = [json.loads(line) for line in Path("kept.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["ab", "cd", "ef", "fa"]
    assert [row["score"] is None for row in rows] == [False, False, True, True]


def test_a_process_of_its_own_prints_one_line_and_exits_with_2(work: Path) -> None:
    (work / "rewards.py").write_text(FAILING_REWARDS[0].files["rewards.py"])  # type: ignore[arg-type]
    said = {
        f"{PPO} --output other --prompts.path p.jsonl": f"p.jsonl: no such file or folder (seen from {work})",
        PPO: f"reward `rewards.py:score` raised ValueError: no such answer ({work}/rewards.py, line 8); "
        "4 responses without a score: run/unscored.jsonl",
    }
    start = [sys.executable, "-m", "tether"]
    running = [  # side by side, as most of their time goes into imports
        subprocess.Popen([*start, *shlex.split(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in said
    ]
    for process, line in zip(running, said.values(), strict=True):
        errors = process.communicate()[1]
        assert process.returncode == 2
        assert errors.splitlines() == [f"tether: error: {line}"]


@pytest.mark.skipif(WRITE, reason="the page is written after the last test")
def test_the_page_has_these_rows_and_no_others() -> None:
    rows = re.findall(r"^\| (.*?) \| `\w+` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [case.what for cases in SECTIONS.values() for case in cases]
    for cases in SECTIONS.values():
        assert len({case.what for case in cases}) == len(cases)
