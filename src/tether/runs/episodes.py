"""Every sampled episode of a run, in one SQLite file that people and the studio can query while the run goes on.

Knows `Episode` and SQL; nothing of training. `episode_queries` asks it for lists. `episodes.db` (write-ahead log,
user_version 2) has a narrow table to search in, and one with what belongs to each step:

    episodes
      id            INTEGER PRIMARY KEY   in the order of collection, from 1
      iteration     INTEGER               from 1
      position      INTEGER               index within the iteration, from 0
      prompt, response          TEXT
      score         REAL                  what the world gave for the whole episode (NULL: NaN)
      reward        REAL                  sum of the rewards of all steps, penalties included
      length        INTEGER               steps
      kl            REAL                  Σ log π_old − log π_ref over the steps, nats (NULL without a reference)
      terminated, truncated     INTEGER   0 or 1
      prompt_hash   TEXT                  the same for the same prompt (BLAKE2b, 16 hexadecimal digits)
      "group"       INTEGER               the same within an iteration for episodes from the same start (NULL: none)
      frames        TEXT                  file of a film, relative to the run's folder (NULL: none)
      details       TEXT                  JSON object: the world's own facts, such as the parts of the score

    steps
      episode_id    INTEGER PRIMARY KEY   id in `episodes`
      actions       TEXT                  JSON list of text, one per step
      action_ids    TEXT                  JSON list, one per step: a token id, or a control
      states        TEXT                  JSON list of text, one per step: what was observed before the action (NULL
                                          where that is the prompt and the actions so far)
      alternatives  TEXT                  JSON list, one per step: the likeliest actions in words, likeliest first
                                          (NULL where none were kept)
      alternative_probabilities BLOB      float32, one for each of these, in the same order
      log_probs, "values", rewards, advantages, returns, reference_log_probs, new_log_probs, entropies
                    BLOB                  one little-endian float32 per step: numpy.frombuffer(blob, "<f4")
                                          (NULL where they are not known)
      clipped       BLOB                  one byte per step, 0 or 1: the gradient was clipped away (NULL: not known).
                                          Layout 1 lacks it; such a store gets it when its run goes on

    sqlite3 episodes.db 'SELECT id, score, response FROM episodes WHERE iteration = 3 ORDER BY score DESC LIMIT 5'
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tether.episode import Episode
from tether.errors import UserError

from .messages import Turns, chat_turns

EPISODES_FILE = "episodes.db"
LAYOUT = 2  # PRAGMA user_version; 0 is what one table held, or an empty file
READABLE = (1, LAYOUT)

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS episodes (
  id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, position INTEGER NOT NULL,
  prompt TEXT NOT NULL, response TEXT NOT NULL,
  score REAL, reward REAL, length INTEGER NOT NULL, kl REAL,
  terminated INTEGER NOT NULL, truncated INTEGER NOT NULL,
  prompt_hash TEXT NOT NULL, "group" INTEGER, frames TEXT, details TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS steps (
  episode_id INTEGER PRIMARY KEY, actions TEXT NOT NULL, action_ids TEXT NOT NULL, states TEXT,
  alternatives TEXT, alternative_probabilities BLOB,
  log_probs BLOB NOT NULL, "values" BLOB NOT NULL, rewards BLOB NOT NULL,
  advantages BLOB NOT NULL, returns BLOB NOT NULL, reference_log_probs BLOB, new_log_probs BLOB, entropies BLOB,
  clipped BLOB
);
CREATE INDEX IF NOT EXISTS episodes_by_numbers ON episodes
  (iteration, score, kl, length, reward, terminated, truncated, "group", prompt_hash);
CREATE INDEX IF NOT EXISTS episodes_by_prompt ON episodes (prompt_hash, iteration, score);
PRAGMA user_version = {LAYOUT};
"""
_ARRAYS = (
    *("log_probs", "values", "rewards", "advantages", "returns"),
    *("reference_log_probs", "new_log_probs", "entropies"),
)
_COLUMNS = (
    *("iteration", "position", "prompt", "response", "score", "reward", "length", "kl", "terminated", "truncated"),
    *("prompt_hash", "group", "frames", "details"),
)
_STEP_JSON = ("actions", "action_ids", "states")
_STEP_COLUMNS = (*_STEP_JSON, "alternatives", "alternative_probabilities", *_ARRAYS, "clipped")


def _insert(table: str, columns: Sequence[str]) -> str:
    names = ", ".join(f'"{name}"' for name in columns)
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})"


_INSERT = _insert("episodes", ("id", *_COLUMNS))
_INSERT_STEPS = _insert("steps", ("episode_id", *_STEP_COLUMNS))
_WHOLE = ", ".join(["id", *(f'"{name}"' for name in (*_COLUMNS, *_STEP_COLUMNS))])
_ORDERS = {
    "newest": "id DESC",
    "oldest": "id",
    "best": "score DESC, id",
    "worst": "score, id",
    "most kl": "kl DESC, id",
    "longest": "length DESC, id",
}
Order = Literal["newest", "oldest", "best", "worst", "most kl", "longest"]


@dataclass(frozen=True, repr=False)
class StoredEpisode(Episode):
    """An `Episode` as it was stored (numbers per step rounded to float32), with its place in the run."""

    id: int = 0
    iteration: int = 0
    position: int = 0
    reward: float = math.nan
    length: int = 0
    kl: float | None = None
    prompt_hash: str = ""
    group: int | None = None

    @property
    def messages(self) -> Turns | None:
        """The turns of a chat prompt; None of any other."""
        return chat_turns(self.details.get("messages"))


class EpisodeStore:
    """The writing end. One process writes, any number read."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / EPISODES_FILE
        with _named(self.file):
            self._connection = sqlite3.connect(self.file, isolation_level=None)
            try:
                if self._connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
                    self._migrate(_layout(self._connection, self.file))
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.executescript(_SCHEMA)
            except BaseException:
                self._connection.close()
                raise

    def _migrate(self, layout: int) -> None:
        """Bring a store of an older layout to the newest, whole or not at all."""
        if layout < LAYOUT:
            with self._transaction():
                self._connection.execute("ALTER TABLE steps ADD COLUMN clipped BLOB")
                self._connection.execute(f"PRAGMA user_version = {LAYOUT}")

    def append(self, iteration: int, episodes: Sequence[Episode]) -> None:
        """Store the episodes of an iteration: all of them or, if the process dies, none."""
        with _named(self.file), self._transaction():
            first = self._connection.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM episodes").fetchone()[0]
            rows = (
                (first + position, *_row(iteration, position, episode)) for position, episode in enumerate(episodes)
            )
            self._connection.executemany(_INSERT, rows)
            steps = ((first + position, *_steps(episode)) for position, episode in enumerate(episodes))
            self._connection.executemany(_INSERT_STEPS, steps)

    def remove_after(self, iteration: int) -> None:
        """Remove the episodes of later iterations."""
        with _named(self.file), self._transaction():
            later = "SELECT id FROM episodes WHERE iteration > ?"
            self._connection.execute(f"DELETE FROM steps WHERE episode_id IN ({later})", (iteration,))
            self._connection.execute("DELETE FROM episodes WHERE iteration > ?", (iteration,))

    def films(self) -> set[str]:
        """The films that episodes name."""
        with _named(self.file):
            rows = self._connection.execute("SELECT frames FROM episodes WHERE frames IS NOT NULL").fetchall()
        return {name for (name,) in rows}

    def sync(self) -> None:
        """Flush to the disk all that was stored, so that it survives the loss of power too."""
        with _named(self.file):
            self._connection.execute("PRAGMA wal_checkpoint(FULL)")

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def read_episodes(
    folder: str | Path,
    iteration: int | None = None,
    *,
    limit: int = 50,
    offset: int = 0,
    order: Order = "oldest",
) -> list[StoredEpisode]:
    """Episodes of the run in `folder`: of one iteration or of all, in this order. Safe while the run is going on."""
    where, parameters = ("WHERE iteration = ?", [iteration]) if iteration is not None else ("", [])
    page = f"SELECT id FROM episodes {where} ORDER BY {_ORDERS[order]} LIMIT ? OFFSET ?"
    query = (
        f"SELECT {_WHOLE} FROM episodes JOIN steps ON episode_id = id WHERE id IN ({page}) ORDER BY {_ORDERS[order]}"
    )
    return [_stored(row) for row in query_store(folder, query, [*parameters, limit, offset])]


def read_episode(folder: str | Path, id: int) -> StoredEpisode:
    """The episode with this id.

    Raises:
        UserError: there is none.
    """
    query = f"SELECT {_WHOLE} FROM episodes JOIN steps ON episode_id = id WHERE id = ?"
    rows = query_store(folder, query, [id]) if 0 < id < 2**63 else []
    if not rows:
        raise UserError(f"{Path(folder) / EPISODES_FILE}: no episode {id}, expected 1 to {count_episodes(folder)}")
    return _stored(rows[0])


def read_revisited(folder: str | Path, limit: int = 4) -> list[tuple[StoredEpisode, StoredEpisode]]:
    """The first and the last episode of the same prompt, for prompts that were visited in iterations far apart.

    Those furthest apart come first. Safe while the run is going on.
    """
    query = (
        "SELECT MIN(id) AS first, MAX(id) AS last FROM episodes GROUP BY prompt_hash "
        "HAVING MIN(iteration) < MAX(iteration) ORDER BY MAX(iteration) - MIN(iteration) DESC, first LIMIT ?"
    )
    pairs = query_store(folder, query, [limit])
    return [(read_episode(folder, pair["first"]), read_episode(folder, pair["last"])) for pair in pairs]


def count_episodes(folder: str | Path, iteration: int | None = None) -> int:
    """How many episodes the run in `folder` has stored, of one iteration or of all."""
    where, parameters = ("WHERE iteration = ?", [iteration]) if iteration is not None else ("", [])
    return int(query_store(folder, f"SELECT COUNT(*) FROM episodes {where}", parameters)[0][0])


def query_store(folder: str | Path, query: str, parameters: Sequence[Any]) -> list[Any]:
    """Rows of the store in `folder`, opened for reading alone; each gives its columns by number and by name.

    Raises:
        UserError: there is no store, it is damaged, or an older version of Tether wrote it.
    """
    file = Path(folder) / EPISODES_FILE
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected the folder of a run")
    with (
        _named(file),
        contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection,
    ):
        if _layout(connection, file) == 1:  # shown as the newest
            connection.execute("CREATE TEMP VIEW steps AS SELECT *, NULL AS clipped FROM main.steps")
        connection.execute(f"PRAGMA mmap_size = {2**40}")  # as much as SQLite allows: pages are read without a copy
        connection.row_factory = sqlite3.Row
        return connection.execute(query, parameters).fetchall()


def _layout(connection: sqlite3.Connection, file: Path) -> int:
    """The layout of a store. Raises UserError where this version cannot read it."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found not in READABLE:
        whose = "an older" if found < LAYOUT else "a newer"
        raise UserError(
            f"{file}: has layout {found} of {whose} version of Tether, expected {' or '.join(map(str, READABLE))}; "
            "read it with that version, or move it away and go on without it"
        )
    return found


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """SQLite's errors do not say which file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise UserError(f"{file}: {error}; if the file is damaged, move it away and go on without it") from error


def hash_prompt(prompt: str) -> str:
    """What `prompt_hash` holds."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _row(iteration: int, position: int, episode: Episode) -> tuple[Any, ...]:
    group = episode.details.get("group")
    return (
        *(iteration, position, storable(episode.prompt), storable(episode.response), episode.score),
        *(sum(episode.rewards), len(episode.log_probs), _kl(episode), episode.terminated, episode.truncated),
        *(hash_prompt(episode.prompt), group if isinstance(group, int) else None, episode.frames),
        _to_json(episode.details),
    )


def _steps(episode: Episode) -> tuple[Any, ...]:
    alternatives, probabilities = None, None
    if episode.alternatives is not None:
        alternatives = [[text for text, _ in step] for step in episode.alternatives]
        probabilities = [probability for step in episode.alternatives for _, probability in step]
    return (
        *(_to_json(getattr(episode, name)) for name in _STEP_JSON),
        *(_to_json(alternatives), _pack(probabilities)),
        *(_pack(getattr(episode, name)) for name in _ARRAYS),
        None if episode.clipped is None else bytes(episode.clipped),
    )


def _stored(row: Any) -> StoredEpisode:
    values: dict[str, Any] = {f.name: row[f.name] for f in fields(StoredEpisode)}
    for name in (*_STEP_JSON, "details", "alternatives"):
        values[name] = None if values[name] is None else json.loads(values[name])
    for name in _ARRAYS:
        values[name] = None if values[name] is None else np.frombuffer(values[name], "<f4").tolist()
    values["clipped"] = None if values["clipped"] is None else [byte == 1 for byte in values["clipped"]]
    if values["alternatives"] is not None:
        probabilities = iter(np.frombuffer(row["alternative_probabilities"], "<f4").tolist())
        values["alternatives"] = [[(text, next(probabilities)) for text in step] for step in values["alternatives"]]
    for name in ("terminated", "truncated"):
        values[name] = bool(values[name])
    for name in ("score", "reward"):
        values[name] = math.nan if values[name] is None else values[name]
    if values["kl"] is None and values["reference_log_probs"] is not None:
        values["kl"] = math.nan
    return StoredEpisode(**values)


def storable(text: str) -> str:
    """`text`, halves of surrogate pairs written out as escapes: UTF-8 has no code for them."""
    if not isinstance(text, str) or text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _to_json(value: Any) -> str | None:
    return None if value is None else storable(json.dumps(value, ensure_ascii=False))


def _pack(numbers: list[float] | None) -> bytes | None:
    return None if numbers is None else np.asarray(numbers, dtype="<f4").tobytes()


def _kl(episode: Episode) -> float | None:
    if episode.reference_log_probs is None:
        return None
    return sum(episode.log_probs) - sum(episode.reference_log_probs)
