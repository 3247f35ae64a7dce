"""What a training prints, kept in its folder too: progress, warnings, errors, a line each in `console.log`.

A full disk ends the log with a warning, never the run. Knows text; nothing of what it says.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import torch

from tether.errors import UserError

from .starts import STARTS_FILE, append_start, describe_start, without_secrets

CONSOLE_FILE = "console.log"
LONGEST_LINE = 10_000  # characters
PROGRESS = logging.getLogger("tether.progress")
"""Lines of progress that a terminal shows as a table; nobody but the log of a run hears them."""
PROGRESS.propagate = False
PROGRESS.setLevel(logging.INFO)

_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")  # of terminals


@contextmanager
def recorded(folder: Path, device: torch.device, iteration: int = 0) -> Iterator[None]:
    """Note the start of a run in its folder, and keep what is printed until the end.

    Args:
        folder: of the run.
        device: where the parameters are.
        iteration: the one that the run goes on from; 0 for a new run.
    """
    start = describe_start(device, iteration)
    try:
        append_start(folder, start)
    except OSError as error:
        logging.getLogger(__name__).warning("%s: cannot be written: %s", STARTS_FILE, error.strerror)
    with ConsoleLog(folder / CONSOLE_FILE) as log:
        going_on = f" goes on after iteration {iteration}" if iteration else ""
        log.line(f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}{going_on}: {start['command']}")
        yield


class ConsoleLog:
    """Appends to a file what is printed and logged meanwhile. A context manager; an exception ends the log with it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None
        self._copies: list[_Copy] = []
        self._loggers: list[logging.Logger] = []
        self._handler = _Handler(self)

    def __enter__(self) -> Self:
        try:
            self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._give_up(error)
            return self
        self._copies = [_Copy(sys.stdout, self), _Copy(sys.stderr, self)]
        sys.stdout, sys.stderr = self._copies
        # without a handler logging prints warnings by sys.stderr, which is copied; with one it would not
        root = logging.getLogger()
        self._loggers = [PROGRESS, *([root] if root.handlers else [])]
        for logger in self._loggers:
            logger.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._loggers:
            logger.removeHandler(self._handler)
        for name, copy in zip(("stdout", "stderr"), self._copies, strict=False):
            copy.end_line()
            if getattr(sys, name) is copy:
                setattr(sys, name, copy.stream)
        if isinstance(error, (UserError, FloatingPointError)):
            self.line(f"error: {' '.join(str(error).split())}")
        elif isinstance(error, KeyboardInterrupt):
            self.line("interrupted")
        elif error is not None:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.line(line)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def line(self, text: str) -> None:
        """Append a line, at once."""
        if self._descriptor is None:
            return
        data = (without_secrets(text[:LONGEST_LINE]) + "\n").encode("utf-8", "backslashreplace")
        try:
            os.write(self._descriptor, data)
        except OSError as error:
            os.close(self._descriptor)
            self._descriptor = None
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        stream = self._copies[1].stream if self._copies else sys.stderr
        print(f"tether: {self.file}: cannot be written: {error.strerror}; the run goes on without it", file=stream)


class _Copy:
    """A stream that the log hears too: whole lines, of those that are written over the last state alone."""

    def __init__(self, stream: TextIO, log: ConsoleLog) -> None:
        self.stream = stream
        self._log = log
        self._rest = ""
        self._lock = threading.RLock()  # a signal's handler may print within a print

    def write(self, text: str) -> int:
        written = self.stream.write(text)
        with self._lock:
            *lines, rest = (self._rest + text).split("\n")
            self._rest = rest[-LONGEST_LINE:]
            for line in lines:
                self._log.line(_readable(line))
        return written

    def end_line(self) -> None:
        with self._lock:
            if line := _readable(self._rest):
                self._log.line(line)
            self._rest = ""

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Handler(logging.Handler):
    """Logged messages as the command line shows them."""

    def __init__(self, log: ConsoleLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.name == PROGRESS.name else "tether: "
        for line in self.format(record).splitlines():
            self._log.line(prefix + line)


def _readable(line: str) -> str:
    return _CONTROLS.sub("", line.removesuffix("\r").rpartition("\r")[2])
