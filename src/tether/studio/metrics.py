"""A run's `metrics.jsonl`, read as it grows: each byte once, from the start again when the file was replaced.

Knows lines of JSON with an iteration and numbers; nothing of what the numbers mean.
"""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class MetricsLog:
    """What is in the file so far; safe to use from several threads.

    Attributes:
        fault: the first line that cannot be read, in words; None where all can.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.fault: str | None = None
        self._rows: list[Row] = []
        self._place = 0  # bytes that were read, whole lines
        self._lines = 0
        self._inode: int | None = None
        self._lock = threading.Lock()

    def rows(self) -> list[Row]:
        """All whole lines, in their order. A torn last one waits for its end."""
        with self._lock:
            try:
                if self.file.is_file():  # a pipe would wait for its writer
                    with self.file.open("rb") as stream:
                        self._read(stream)
                else:
                    self._begin(None)
            except OSError as error:
                self._begin(None)
                self.fault = f"{self.file.name}: cannot be read: {error.strerror}"
            return list(self._rows)

    def _read(self, stream: Any) -> None:
        found = os.fstat(stream.fileno())
        if found.st_ino != self._inode or found.st_size < self._place:
            self._begin(found.st_ino)
        if found.st_size == self._place:
            return
        stream.seek(self._place)
        whole, newline, _ = stream.read(found.st_size - self._place).rpartition(b"\n")
        if newline:
            self._place += len(whole) + 1
            for line in whole.split(b"\n"):
                self._add(line)

    def _begin(self, inode: int | None) -> None:
        self._rows, self._place, self._lines, self._inode, self.fault = [], 0, 0, inode, None

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
