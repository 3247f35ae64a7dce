"""Every sampled episode of a run, in one SQLite file that people and the studio can query while the run goes on.

Knows `Episode` and SQL; nothing of training. The table, in `episodes.db` (write-ahead log):

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
      details       TEXT                  JSON object: the world's own facts, such as the parts of the score
      actions       TEXT                  JSON list of text, one per step
      action_ids    TEXT                  JSON list, one per step: a token id, or a control
      states        TEXT                  JSON list of text, one per step: what was observed before the action (NULL
                                          where that is the prompt and the actions so far)
      log_probs, "values", rewards, advantages, returns, reference_log_probs
                    BLOB                  one little-endian float32 per step: numpy.frombuffer(blob, "<f4")
                                          (reference_log_probs NULL without a reference)

    sqlite3 episodes.db 'SELECT id, score, response FROM episodes WHERE iteration = 3 ORDER BY score DESC LIMIT 5'
"""

from __future__ import annotations

import contextlib
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

EPISODES_FILE = "episodes.db"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS episodes (
  id INTEGER PRIMARY KEY, iteration INTEGER NOT NULL, position INTEGER NOT NULL,
  prompt TEXT NOT NULL, response TEXT NOT NULL,
  score REAL, reward REAL, length INTEGER NOT NULL, kl REAL,
  terminated INTEGER NOT NULL, truncated INTEGER NOT NULL,
  details TEXT NOT NULL, actions TEXT NOT NULL, action_ids TEXT NOT NULL, states TEXT,
  log_probs BLOB NOT NULL, "values" BLOB NOT NULL, rewards BLOB NOT NULL,
  advantages BLOB NOT NULL, returns BLOB NOT NULL, reference_log_probs BLOB
);
CREATE INDEX IF NOT EXISTS episodes_by_iteration ON episodes (iteration, score);
CREATE INDEX IF NOT EXISTS episodes_by_score ON episodes (score);
"""
_ARRAYS = ("log_probs", "values", "rewards", "advantages", "returns", "reference_log_probs")
_JSON = ("details", "actions", "action_ids", "states")
_COLUMNS = (
    *("iteration", "position", "prompt", "response", "score", "reward", "length", "kl", "terminated", "truncated"),
    *_JSON,
    *_ARRAYS,
)
_NAMES = ", ".join(f'"{name}"' for name in _COLUMNS)
_INSERT = f"INSERT INTO episodes ({_NAMES}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_ORDERS = {
    "newest": "id DESC",
    "oldest": "id",
    "best": "score DESC, id",
    "worst": "score, id",
    "most kl": "kl DESC, id",
    "longest": "length DESC, id",
}
Order = Literal["newest", "oldest", "best", "worst", "most kl", "longest"]


@dataclass(frozen=True)
class StoredEpisode(Episode):
    """An `Episode` as it was stored (numbers per step rounded to float32), with its place in the run."""

    id: int = 0
    iteration: int = 0
    position: int = 0
    reward: float = math.nan
    length: int = 0
    kl: float | None = None


class EpisodeStore:
    """The writing end. One process writes, any number read."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / EPISODES_FILE
        with _named(self.file):
            self._connection = sqlite3.connect(self.file, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(_SCHEMA)

    def append(self, iteration: int, episodes: Sequence[Episode]) -> None:
        """Store the episodes of an iteration: all of them or, if the process dies, none."""
        rows = [_row(iteration, position, episode) for position, episode in enumerate(episodes)]
        with _named(self.file), self._transaction():
            self._connection.executemany(_INSERT, rows)

    def remove_after(self, iteration: int) -> None:
        """Remove the episodes of later iterations."""
        with _named(self.file), self._transaction():
            self._connection.execute("DELETE FROM episodes WHERE iteration > ?", (iteration,))

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
    query = f"SELECT id, {_NAMES} FROM episodes {where} ORDER BY {_ORDERS[order]} LIMIT ? OFFSET ?"
    return [_stored(row) for row in _query(folder, query, [*parameters, limit, offset])]


def read_episode(folder: str | Path, id: int) -> StoredEpisode:
    """The episode with this id.

    Raises:
        UserError: there is none.
    """
    rows = _query(folder, f"SELECT id, {_NAMES} FROM episodes WHERE id = ?", [id])
    if not rows:
        raise UserError(f"{Path(folder) / EPISODES_FILE}: no episode {id}, expected 1 to {count_episodes(folder)}")
    return _stored(rows[0])


def read_revisited(folder: str | Path, limit: int = 4) -> list[tuple[StoredEpisode, StoredEpisode]]:
    """The first and the last episode of the same prompt, for prompts that were visited in iterations far apart.

    Those furthest apart come first. Safe while the run is going on.
    """
    query = (
        "SELECT MIN(id) AS first, MAX(id) AS last FROM episodes GROUP BY prompt HAVING MIN(iteration) < MAX(iteration) "
        "ORDER BY MAX(iteration) - MIN(iteration) DESC, first LIMIT ?"
    )
    pairs = _query(folder, query, [limit])
    return [(read_episode(folder, pair["first"]), read_episode(folder, pair["last"])) for pair in pairs]


def count_episodes(folder: str | Path, iteration: int | None = None) -> int:
    """How many episodes the run in `folder` has stored, of one iteration or of all."""
    where, parameters = ("WHERE iteration = ?", [iteration]) if iteration is not None else ("", [])
    return int(_query(folder, f"SELECT COUNT(*) FROM episodes {where}", parameters)[0][0])


def _query(folder: str | Path, query: str, parameters: Sequence[Any]) -> list[Any]:
    file = Path(folder) / EPISODES_FILE
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected the folder of a run")
    with (
        _named(file),
        contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection,
    ):
        connection.row_factory = sqlite3.Row
        return connection.execute(query, parameters).fetchall()


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """SQLite's errors do not say which file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise UserError(f"{file}: {error}; if the file is damaged, move it away and go on without it") from error


def _row(iteration: int, position: int, episode: Episode) -> tuple[Any, ...]:
    return (
        *(iteration, position, episode.prompt, episode.response, episode.score),
        *(sum(episode.rewards), len(episode.log_probs), _kl(episode), episode.terminated, episode.truncated),
        *(_to_json(getattr(episode, name)) for name in _JSON),
        *(_pack(getattr(episode, name)) for name in _ARRAYS),
    )


def _stored(row: Any) -> StoredEpisode:
    values: dict[str, Any] = {f.name: row[f.name] for f in fields(StoredEpisode)}
    for name in _JSON:
        values[name] = None if values[name] is None else json.loads(values[name])
    for name in _ARRAYS:
        values[name] = None if values[name] is None else np.frombuffer(values[name], "<f4").tolist()
    for name in ("terminated", "truncated"):
        values[name] = bool(values[name])
    for name in ("score", "reward"):
        values[name] = math.nan if values[name] is None else values[name]
    if values["kl"] is None and values["reference_log_probs"] is not None:
        values["kl"] = math.nan
    return StoredEpisode(**values)


def _to_json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _pack(numbers: list[float] | None) -> bytes | None:
    return None if numbers is None else np.asarray(numbers, dtype="<f4").tobytes()


def _kl(episode: Episode) -> float | None:
    if episode.reference_log_probs is None:
        return None
    return sum(episode.log_probs) - sum(episode.reference_log_probs)
