"""What people note about a run: a text and tags, in `notes.json` in its folder. Safe while the run trains.

The training neither reads nor writes the file; only a run that replaces this one (`--overwrite`) removes it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tether.errors import UserError

from .folder import NOTES_FILE, replace_file

LONGEST_NOTE = 10_000  # characters
LONGEST_TAG = 40
MOST_TAGS = 20
_LONGEST_FILE = 1024 * 1024  # bytes: far above what fits the limits


@dataclass(frozen=True)
class Notes:
    """A text and tags; both may be empty."""

    note: str = ""
    tags: tuple[str, ...] = ()


def read_notes(folder: Path) -> Notes:
    """The notes of the run in `folder`; empty ones where nobody has written any.

    Raises:
        UserError: the file is not as `write_notes` writes it.
    """
    file = folder / NOTES_FILE
    if not file.is_file():
        return Notes()
    try:
        if file.stat().st_size > _LONGEST_FILE:
            raise ValueError(f"longer than {_LONGEST_FILE:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged: {error}; mend it, or move it away") from error
    note, tags = (found.get(name) if isinstance(found, dict) else None for name in ("note", "tags"))
    if not isinstance(note, str) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise UserError(f'{file}: expected {{"note": text, "tags": [text, …]}}; mend it, or move it away')
    return Notes(note, tuple(tags))


def write_notes(folder: Path, notes: Notes) -> None:
    """Replace the notes of a run: whole, or not at all.

    Raises:
        UserError: what is there cannot be read, and would be lost; or the file cannot be written.
    """
    read_notes(folder)
    try:
        replace_file(folder / NOTES_FILE, json.dumps(asdict(notes), indent=1).encode() + b"\n")
    except OSError as error:
        raise UserError(f"{folder / NOTES_FILE}: cannot be written: {error.strerror}") from error


def checked_notes(note: str, tags: Sequence[str]) -> Notes:
    """Notes as they are kept: the text stripped, each tag once, in one line.

    Raises:
        UserError: something is too long, or not printable.
    """
    note = note.strip()
    if len(note) > LONGEST_NOTE:
        raise UserError(f"note: {len(note):,} characters, expected at most {LONGEST_NOTE:,}")
    names = list(dict.fromkeys(name for tag in tags if (name := " ".join(tag.split()))))
    if len(names) > MOST_TAGS:
        raise UserError(f"tags: {len(names)}, expected at most {MOST_TAGS}")
    for name in names:
        if len(name) > LONGEST_TAG or not name.isprintable() or "," in name:
            expected = f"at most {LONGEST_TAG} printable characters, no comma"
            raise UserError(f"tags: found {name[: LONGEST_TAG + 1]!r}, expected {expected}")
    return Notes(note, tuple(names))
