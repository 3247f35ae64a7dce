"""What a training prints is kept in its folder as well, and nothing of that can end it."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

import pytest
import torch

from tether.errors import UserError
from tether.runs import Display
from tether.runs.console import PROGRESS, ConsoleLog, recorded


def test_printed_lines_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (sys.stdout, sys.stderr)
    with ConsoleLog(tmp_path / "console.log"):
        print("one", "line", flush=True)
        sys.stderr.write("half ")
        print("\x1b[31mred\x1b[0m", end="")
        print(" 10 %\r 50 %\r100 %")
        sys.stderr.write("a line\nno end")
        assert sys.stdout.isatty() is False
    assert (sys.stdout, sys.stderr) == before
    print("not kept")
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines == ["one line", "100 %", "half a line", "no end"]
    shown = capsys.readouterr()
    assert shown.out == "one line\n\x1b[31mred\x1b[0m 10 %\r 50 %\r100 %\nnot kept\n"
    assert shown.err == "half a line\nno end"


def test_warnings_are_kept_once_with_and_without_a_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, before = logging.getLogger(), list(PROGRESS.handlers)
    for number, handlers in enumerate(([], [logging.NullHandler()])):
        monkeypatch.setattr(root, "handlers", list(handlers))
        with ConsoleLog(tmp_path / f"{number}.log"):
            logging.getLogger("tether.test").warning("look %d", 7)
        assert root.handlers == handlers
        kept = (tmp_path / f"{number}.log").read_text()
        assert kept.count("look 7") == 1
    assert kept == "tether: look 7\n"
    assert PROGRESS.handlers == before


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("x.yaml: found 1,\nexpected 2"), "error: x.yaml: found 1, expected 2"),
        (FloatingPointError("the loss is nan"), "error: the loss is nan"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0"),
    ],
)
def test_what_ended_the_run_is_the_last_line(tmp_path: Path, error: BaseException, last: str) -> None:
    with pytest.raises(type(error)), ConsoleLog(tmp_path / "console.log"):
        raise error
    assert (tmp_path / "console.log").read_text().splitlines()[-1] == last


def test_a_full_disk_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ConsoleLog(tmp_path / "console.log"):
        print("kept")
        monkeypatch.setattr(os, "write", full)
        print("lost")
        print("lost too")
        monkeypatch.undo()
        print("not tried again")
    assert (tmp_path / "console.log").read_text() == "kept\n"
    shown = capsys.readouterr()
    assert shown.out == "kept\nlost\nlost too\nnot tried again\n"
    assert shown.err.count("\n") == 1
    assert "console.log: cannot be written: No space left on device; the run goes on without it" in shown.err


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded(tmp_path / "gone", torch.device("cpu")):
        print("going on")
    assert capsys.readouterr().out == "going on\n"


def test_each_start_begins_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tether", "ppo", "--hf-token", "s3cret"])
    for iteration in (0, 4):
        with recorded(tmp_path, torch.device("cpu"), iteration):
            print("text")
    first, second, third, fourth = (tmp_path / "console.log").read_text().splitlines()
    assert first.startswith("--- 20")
    assert first.endswith(": tether ppo --hf-token '***'")
    assert " goes on after iteration 4: tether ppo" in third
    assert second == fourth == "text"


def test_a_table_on_a_terminal_is_kept_as_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Display(20, ("score",)) as display, ConsoleLog(tmp_path / "console.log"):
        display.update(3, {"score": 0.5})
        display.note("a note")
    lines = (tmp_path / "console.log").read_text().splitlines()
    first, note = [line for line in lines if line.strip()]
    assert first.startswith("iteration  3/20  score  +0.500  ")
    assert note == "a note"
