"""What people said of pairs of answers: one SQLite file per set, written so that an answer once taken is never lost.

Knows pairs, people and their answers; nothing of models, pages or reward models. `NAME.labels.db` (flushed to the disk
at every answer, user_version 2) is all there is: SQLite keeps no log beside it, so that a copy of the file has every
answer. Only while one is written, or after a writer was killed, there is a `-journal` too.

    about      key TEXT PRIMARY KEY, value TEXT       JSON: name, policies, sampling, and a secret for the order
    pairs      id INTEGER PRIMARY KEY                 from 1, in the order in which they are shown
               prompt TEXT                            JSON: text or chat messages
               text TEXT                              of chat messages, what the first policy read: its chat template
                                                      applied (NULL: the prompt is text; layout 1 lacks the column)
               a, b TEXT                              the answers of the first and of the second policy
               disagreement REAL                      of the ensemble that chose the pair (NULL: none did)
    answers    pair, annotator                        one row for each that is judged
               answer TEXT                            a, b, tie, both_bad or skip
               left TEXT                              a or b: which one stood on the left
               note TEXT, time REAL, sequence INTEGER the newest has the highest

    sqlite3 pairs.labels.db 'SELECT answer, COUNT(*) FROM answers GROUP BY answer'
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import sqlite3
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tether.errors import UserError, reason

from .episodes import storable
from .messages import Turns, chat_turns, prompt_text

LABELS_SUFFIX = ".labels.db"
LAYOUT = 2
READABLE = (1, LAYOUT)
_BESIDE = ("-wal", "-shm", "-journal")
ANSWERS = ("a", "b", "tie", "both_bad", "skip")
Shown = Literal["left", "right", "tie", "both_bad", "skip"]

_SCHEMA = f"""
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE pairs (
  id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, text TEXT, a TEXT NOT NULL, b TEXT NOT NULL, disagreement REAL
);
CREATE TABLE answers (
  pair INTEGER NOT NULL REFERENCES pairs (id), annotator TEXT NOT NULL,
  answer TEXT NOT NULL CHECK (answer IN ('a', 'b', 'tie', 'both_bad', 'skip')),
  left TEXT NOT NULL CHECK (left IN ('a', 'b')), note TEXT, time REAL NOT NULL, sequence INTEGER NOT NULL UNIQUE,
  PRIMARY KEY (pair, annotator)
) WITHOUT ROWID;
CREATE INDEX answers_by_annotator ON answers (annotator, sequence);
PRAGMA user_version = {LAYOUT};
"""


_LAST = (
    "WHERE sequence = (SELECT MAX(sequence) FROM answers AS others "
    "WHERE others.pair = answers.pair AND person(others.annotator) = person(answers.annotator))"
)


def person_name(name: str) -> str:
    """A name as it is kept: its characters composed (NFC), as é may be one or two, and single spaces."""
    return " ".join(unicodedata.normalize("NFC", name).split())


@dataclass(frozen=True)
class NewPair:
    """Two answers to one prompt.

    Attributes:
        prompt: text, or chat messages.
        a: what the first policy said.
        b: what the second policy said, or the first once more.
        disagreement: of the ensemble that chose it; None where none did.
        text: of chat messages, what the first policy read.
    """

    prompt: Any
    a: str
    b: str
    disagreement: float | None = None
    text: str | None = None


@dataclass(frozen=True)
class ShownPair:
    """A pair as one person sees it: in an order that is theirs, and without names.

    `prompt` is text, of a chat the one that the first policy read; `messages` are the turns of a chat.
    """

    id: int
    prompt: str
    messages: Turns | None
    left: str
    right: str


@dataclass(frozen=True)
class Answer:
    """What one person said of one pair.

    Attributes:
        answer: one of `ANSWERS`.
        left: which of `a` and `b` stood on the left.
        time: of the answer, seconds since 1970.
    """

    pair: int
    annotator: str
    answer: str
    left: str
    note: str | None
    time: float


def create_labels(file: Path, about: Mapping[str, Any], pairs: Sequence[NewPair]) -> None:
    """Write a new set of pairs: the whole file or none.

    Raises:
        UserError: the file cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
    values = {**about, "secret": secrets.token_hex(16), "created": time.time()}
    rows = [
        (_json(p.prompt), None if p.text is None else storable(p.text), storable(p.a), storable(p.b), p.disagreement)
        for p in pairs
    ]
    with _named(file):
        partial.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO about VALUES (?, ?)", [(k, _json(v)) for k, v in values.items()])
            connection.executemany("INSERT INTO pairs (prompt, text, a, b, disagreement) VALUES (?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
        for suffix in _BESIDE:  # of a file that stood there before
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        os.replace(partial, file)


class LabelSet:
    """A set of pairs that is open: for reading alone, or for answers too. A context manager.

    Raises:
        UserError: the file is none of these, or damaged.
    """

    def __init__(self, file: Path, writable: bool = False) -> None:
        self.file = file
        mode = "rw" if writable else "ro"
        _settle(file)
        with _named(file):
            self._connection = sqlite3.connect(
                f"{file.resolve().as_uri()}?mode={mode}", uri=True, isolation_level=None, timeout=10
            )
            try:
                self._connection.create_function("person", 1, person_name, deterministic=True)
                self._connection.execute("PRAGMA trusted_schema = OFF")
                self._connection.execute("PRAGMA synchronous = FULL")  # flushes at every answer
                found = self._connection.execute("PRAGMA user_version").fetchone()[0]
                if found not in READABLE:
                    expected = " or ".join(map(str, READABLE))
                    raise UserError(f"{file}: layout {found}, expected {expected}: not a set that `tether label` wrote")
                if found == 1:  # shown as the newest
                    self._connection.execute("CREATE TEMP VIEW pairs AS SELECT *, NULL AS text FROM main.pairs")
                self.about = {
                    str(key): json.loads(value)
                    for key, value in self._connection.execute("SELECT key, value FROM about")
                }
            except BaseException:
                self._connection.close()
                raise

    def __enter__(self) -> LabelSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; it is whole when nobody else has it open."""
        self._connection.close()
        _settle(self.file)

    def count(self) -> int:
        """Pairs in all."""
        return int(self._rows("SELECT COUNT(*) FROM pairs")[0][0])

    def done(self, annotator: str) -> int:
        """Pairs that this person has judged or skipped."""
        query = "SELECT COUNT(DISTINCT pair) FROM answers WHERE person(annotator) = ?"
        return int(self._rows(query, person_name(annotator))[0][0])

    def next_pair(self, annotator: str) -> ShownPair | None:
        """The first pair that this person has not judged; None where all are."""
        query = (
            "SELECT id, prompt, text, a, b FROM pairs "
            "WHERE id NOT IN (SELECT pair FROM answers WHERE person(annotator) = ?) ORDER BY id LIMIT 1"
        )
        rows = self._rows(query, person_name(annotator))
        return self._shown(annotator, *rows[0]) if rows else None

    def shown_pair(self, annotator: str, id: int) -> ShownPair:
        """This pair as this person sees it.

        Raises:
            UserError: there is none.
        """
        rows = self._rows("SELECT id, prompt, text, a, b FROM pairs WHERE id = ?", id)
        if not rows:
            raise UserError(f"{self.file.name}: no pair {id}, expected 1 to {self.count()}")
        return self._shown(annotator, *rows[0])

    def answer(self, annotator: str, pair: int, answer: Shown, note: str | None = None) -> None:
        """Keep what a person said; on the disk when this returns. An earlier answer to the pair gives way.

        Raises:
            UserError: there is no such pair.
        """
        annotator = person_name(annotator)
        left = self._left(annotator, self.shown_pair(annotator, pair).id)
        sides = {"left": left, "right": "b" if left == "a" else "a"}
        values = (pair, annotator, sides.get(answer, answer), left, note, time.time())
        with _named(self.file), self._transaction():
            newest = self._connection.execute("SELECT COALESCE(MAX(sequence), 0) FROM answers").fetchone()[0]
            earlier = "DELETE FROM answers WHERE pair = ? AND person(annotator) = ?"
            self._connection.execute(earlier, (pair, annotator))
            query = (
                "INSERT INTO answers (pair, annotator, answer, left, note, time, sequence) VALUES (?, ?, ?, ?, ?, ?, ?)"
            )
            self._connection.execute(query, (*values, newest + 1))

    def undo(self, annotator: str) -> int | None:
        """Take back this person's newest answer; the pair's id, or None where there is none."""
        annotator = person_name(annotator)
        with _named(self.file), self._transaction():
            query = "SELECT pair FROM answers WHERE person(annotator) = ? ORDER BY sequence DESC LIMIT 1"
            rows = self._connection.execute(query, (annotator,)).fetchall()
            if not rows:
                return None
            pair = int(rows[0][0])
            self._connection.execute("DELETE FROM answers WHERE pair = ? AND person(annotator) = ?", (pair, annotator))
        return pair

    def answers(self) -> list[Answer]:
        """All of them, the oldest first; of what one person said of a pair under two spellings, the newest."""
        query = f"SELECT pair, person(annotator), answer, left, note, time FROM answers {_LAST} ORDER BY sequence"
        return [Answer(*row) for row in self._rows(query)]

    def preferences(self) -> Iterator[dict[str, Any]]:
        """Rows that `tether reward` reads, one for each answer that says something, in the order of pairs."""
        query = (
            "SELECT prompt, a, b, answer, person(annotator), note FROM answers JOIN pairs ON pairs.id = pair "
            f"{_LAST} AND answer IN ('a', 'b', 'tie') ORDER BY pair, sequence"
        )
        for prompt, a, b, answer, annotator, note in self._rows(query):
            chosen, rejected = (b, a) if answer == "b" else (a, b)
            with _named(self.file):
                row = {"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected}
            row |= ({"tie": True} if answer == "tie" else {}) | {"annotator": annotator}
            yield row | ({"note": note} if note else {})

    def _left(self, annotator: str, pair: int) -> str:
        """Which answer stands on the left: chance, but the same at every look."""
        said = f"{self.about.get('secret')}\n{pair}\n{person_name(annotator)}"
        return "ab"[hashlib.sha256(said.encode()).digest()[0] & 1]

    def _shown(self, annotator: str, id: int, prompt: str, text: str | None, a: str, b: str) -> ShownPair:
        with _named(self.file):
            asked = json.loads(prompt)
        left, right = (a, b) if self._left(annotator, id) == "a" else (b, a)
        shown = prompt_text(asked) if text is None else str(text)
        return ShownPair(id, shown, chat_turns(asked), str(left), str(right))

    def _rows(self, query: str, *parameters: Any) -> list[Any]:
        with _named(self.file):
            return self._connection.execute(query, parameters).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def count_answers(answers: Sequence[Answer]) -> dict[str, int]:
    """How often each of `ANSWERS` was given."""
    counts = Counter(answer.answer for answer in answers)
    return {answer: counts[answer] for answer in ANSWERS}


def _settle(file: Path) -> None:
    """Bring what stands beside the file into it: an earlier version's log, the journal of a writer that was killed.
    What is written from then on stands in the file.

    Who closes the file last does so. While others have it open, or where nothing may be written, all stays as it is.
    """
    if not any(file.with_name(file.name + suffix).exists() for suffix in _BESIDE) and not _logs_beside(file):
        return
    with contextlib.suppress(sqlite3.Error):  # whoever opens the file next is told what is wrong with it
        address = f"{file.resolve().as_uri()}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, isolation_level=None, timeout=0)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("SELECT COUNT(*) FROM sqlite_schema")


def _logs_beside(file: Path) -> bool:
    """Whether what is written goes to a log beside the file first (SQLite's WAL), as in sets of an earlier version."""
    try:
        with file.open("rb") as opened:
            return opened.read(20)[18:] == b"\x02\x02"
    except OSError:
        return False


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """What SQLite and JSON say of a damaged file, with its name."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    except (sqlite3.Error, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged or no set of labels: {reason(error)}") from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)
