"""A run's `metrics.jsonl`, read as it grows: each byte once, from the start again when the file was written anew.

That it was is told by its bytes: file systems give a new file the number of one that was removed.

Knows lines of JSON with an iteration and numbers; nothing of what the numbers mean.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import threading
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_WINDOW = 8192  # bytes from the beginning and before the place of the last look, by which the file is known again


class MetricsLog:
    """What is in the file so far; safe to use from several threads.

    Attributes:
        fault: the first line that cannot be read, in words; None where all can.
        edition: changes whenever the file is read from the start again, so that earlier rows are no longer its own.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.fault: str | None = None
        self._lock = threading.Lock()
        self._rows: list[Row] = []
        self._place = self._lines = 0  # bytes that were read, whole lines
        self._head = self._tail = b""
        self._begin()

    def rows(self) -> list[Row]:
        """All whole lines, in their order. A torn last one waits for its end."""
        with self._lock:
            try:
                if self.file.is_file():  # a pipe would wait for its writer
                    with self.file.open("rb") as stream:
                        self._read(stream)
                else:
                    self._begin()
            except OSError as error:
                self._begin()
                self.fault = f"{self.file.name}: cannot be read: {error.strerror}"
            return list(self._rows)

    def _read(self, stream: Any) -> None:
        size = os.fstat(stream.fileno()).st_size
        if self._place and (size < self._place or not self._is_known(stream)):
            self._begin()
        if size == self._place:
            return
        stream.seek(self._place)
        whole, newline, _ = stream.read(size - self._place).rpartition(b"\n")
        if newline:
            if len(self._head) < _WINDOW:
                self._head = (self._head + whole + newline)[:_WINDOW]
            self._tail = (self._tail + whole + newline)[-_WINDOW:]
            self._place += len(whole) + 1
            for line in whole.split(b"\n"):
                self._add(line)

    def _is_known(self, stream: Any) -> bool:
        """Whether what was read is still there, as far as its two ends tell; iterations take other times each time."""
        stream.seek(0)
        if stream.read(len(self._head)) != self._head:
            return False
        stream.seek(self._place - len(self._tail))
        return bool(stream.read(len(self._tail)) == self._tail)

    def _begin(self) -> None:
        self._rows, self._place, self._lines, self.fault = [], 0, 0, None
        self._head = self._tail = b""
        self.edition = secrets.token_hex(8)

    def _add(self, line: bytes) -> None:
        self._lines += 1
        row = _row(line)
        if row is not None:
            self._rows.append(row)
        elif self.fault is None:
            self.fault = f"{self.file.name}, line {self._lines}: found {line[:40]!r}, expected a JSON object"


def _row(line: bytes) -> Row | None:
    """A line's iteration and numbers; None where it has none."""
    try:
        found = json.loads(line)
        iteration = found["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(found, dict) or isinstance(iteration, bool) or not isinstance(iteration, int):
        return None
    return {name: _number(value) for name, value in found.items()}


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float)) and abs(value) < 2**1000 else None
