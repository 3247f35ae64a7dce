"""How a run was started, and what it printed, as the page shows them. Knows two files of a run; nothing of HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tether.runs.console import CONSOLE_FILE
from tether.runs.starts import STARTS_FILE

from .replies import reading

SHOWN = 64 * 1024  # bytes of the log's end
LONGEST_STARTS = 4 * 1024 * 1024  # bytes
_TEXTS = ("command", "folder")
_OBJECTS = ("commit", "versions", "machine")


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl that are whole, the newest first."""
    file = folder / STARTS_FILE
    if not file.is_file():
        return []
    with reading(file), file.open("rb") as stream:
        lines = stream.read(LONGEST_STARTS).split(b"\n")[:-1]
    return [start for line in reversed(lines) if (start := _start(line)) is not None]


def console_end(folder: Path) -> tuple[str, int]:
    """The end of what was printed, from a whole line on, and how many bytes are before it."""
    file = folder / CONSOLE_FILE
    if not file.is_file():
        return "", 0
    with reading(file), file.open("rb") as stream:
        size = stream.seek(0, 2)
        before = max(0, size - SHOWN)
        stream.seek(before)
        end = stream.read(SHOWN)
    if before and (newline := end.find(b"\n")) >= 0:
        before += newline + 1
        end = end[newline + 1 :]
    return end.decode("utf-8", "replace"), before


def _start(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("time"), (int, float)):
        return None
    start: dict[str, Any] = {name: found.get(name) for name in ("time", "iteration")}
    start |= {name: str(found.get(name, "")) for name in _TEXTS}
    return start | {name: value if isinstance(value := found.get(name), dict) else None for name in _OBJECTS}
