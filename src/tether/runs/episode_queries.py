"""Lists of stored episodes: filtered, sorted, searched; the answers to one prompt over the run.

Knows the narrow table of `episodes` and its indices, and never reads what belongs to single steps.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tether.errors import UserError

from .episodes import EPISODES_FILE, count_episodes, query_store
from .messages import Turns, chat_turns

SHOWN = 300  # characters of prompt and response in a summary
READERS = 2  # threads that search in texts
MOST = 2**62  # larger numbers of episodes are the same: SQLite's integers have 64 bits

EpisodeOrder = Literal["id", "iteration", "score", "reward", "kl", "length"]
_ORDERS = ("id", "iteration", "score", "reward", "kl", "length")
_BETWEEN = ("iteration", "score", "kl", "length")


@dataclass(frozen=True)
class EpisodeFilter:
    """Which episodes; bounds are included, None does not restrict."""

    iteration_from: int | None = None
    iteration_to: int | None = None
    score_from: float | None = None
    score_to: float | None = None
    kl_from: float | None = None
    kl_to: float | None = None
    length_from: int | None = None
    length_to: int | None = None
    ended: Literal["terminated", "truncated"] | None = None
    prompt: str | None = None
    """A `prompt_hash`."""
    text: str | None = None
    """Within the prompt or the response; capital and small letters of ASCII are the same."""


@dataclass(frozen=True)
class EpisodeSummary:
    """A row of a list: what `StoredEpisode` says of an episode as a whole; score and reward None for NaN.

    `messages` are the turns of a chat prompt, None of any other.
    """

    id: int
    iteration: int
    position: int
    prompt: str
    response: str
    score: float | None
    reward: float | None
    length: int
    kl: float | None
    terminated: bool
    truncated: bool
    group: int | None
    prompt_hash: str
    messages: Turns | None = None


def find_episodes(
    folder: str | Path,
    where: EpisodeFilter | None = None,
    order: EpisodeOrder = "id",
    descending: bool = False,
    limit: int = 50,
    offset: int = 0,
    characters: int | None = SHOWN,
) -> tuple[list[EpisodeSummary], int]:
    """One page of the episodes that pass the filter, and how many do. Safe while the run is going on.

    Prompts and responses are cut to so many characters (None: not at all). Where a number is not known its episodes
    come last, and those with the same are in the order of collection.

    Raises:
        UserError: there is no store, or it cannot be read.
    """
    if order not in _ORDERS:
        raise UserError(f"order is {order!r}, expected one of {', '.join(_ORDERS)}")
    limit, offset = min(limit, MOST), min(offset, MOST)
    condition, parameters = _condition(where or EpisodeFilter())
    by = _sorting(order, descending)
    if where is not None and where.text:
        found, total = _search(folder, where.text, condition, parameters, order, descending, offset + limit)
        page, paged = ", ".join(map(str, found[offset:])), []
    else:
        total = query_store(folder, f"SELECT COUNT(*) FROM episodes WHERE {condition}", parameters)[0][0]
        page = f"SELECT id FROM episodes WHERE {condition} ORDER BY {by} LIMIT ? OFFSET ?"
        paged = [*parameters, limit, offset]
    query = f"SELECT {_columns(characters)} FROM episodes WHERE id IN ({page}) ORDER BY {by}"
    return [_summary(row, characters) for row in query_store(folder, query, paged)], total


def siblings(folder: str | Path, id: int) -> list[EpisodeSummary]:
    """The episodes of the same iteration from the same start, the one itself included; itself alone without a group."""
    own = _find(folder, id)
    if own.group is None:
        return [own]
    query = f'SELECT {_columns(SHOWN)} FROM episodes WHERE iteration = ? AND "group" = ? ORDER BY id'
    return [_summary(row) for row in query_store(folder, query, [own.iteration, own.group])]


def same_prompt(folder: str | Path, id: int, limit: int = 1000) -> list[EpisodeSummary]:
    """The best answer of each iteration to the same prompt, in the order of iterations, with whole texts."""
    own = _find(folder, id)
    best = (
        "SELECT id, ROW_NUMBER() OVER (PARTITION BY iteration ORDER BY score DESC NULLS LAST, id) AS place "
        "FROM episodes WHERE prompt_hash = ?"
    )
    query = (
        f"SELECT {_columns(None)} FROM episodes WHERE id IN (SELECT id FROM ({best}) WHERE place = 1) "
        "ORDER BY iteration LIMIT ?"
    )
    return [_summary(row) for row in query_store(folder, query, [own.prompt_hash, limit])]


def _find(folder: str | Path, id: int) -> EpisodeSummary:
    query = f"SELECT {_columns(SHOWN)} FROM episodes WHERE id = ?"
    rows = query_store(folder, query, [id]) if 0 < id < 2**63 else []
    if not rows:
        raise UserError(f"{Path(folder) / EPISODES_FILE}: no episode {id}, expected 1 to {count_episodes(folder)}")
    return _summary(rows[0])


def _search(
    folder: str | Path, text: str, condition: str, parameters: list[Any], order: str, descending: bool, wanted: int
) -> tuple[list[int], int]:
    """Ids of the first `wanted` episodes with `text` in them that fulfil the condition, and how many there are.

    Every text has to be read, which is most of the time: several threads read a part each.
    """
    pattern = "".join(f"\\{letter}" if letter in "\\%_" else letter for letter in text)
    query = (
        f"WITH found AS MATERIALIZED (SELECT id, {order} AS value FROM episodes WHERE id BETWEEN ? AND ? "
        f"AND {condition} AND (response LIKE ? ESCAPE '\\' OR prompt LIKE ? ESCAPE '\\')) "
        f"SELECT id, value, (SELECT COUNT(*) FROM found) FROM found ORDER BY {_sorting('value', descending)} LIMIT ?"
    )
    last = query_store(folder, "SELECT COALESCE(MAX(id), 0) FROM episodes", [])[0][0]
    size = last // READERS + 1

    def read(part: int) -> list[Any]:
        bounds = [part * size, (part + 1) * size - 1]
        return query_store(folder, query, [*bounds, *parameters, *[f"%{pattern}%"] * 2, wanted])

    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(read, range(READERS)))
    sign = -1 if descending else 1
    rows = sorted((value is None, sign * (value or 0), id) for part in parts for id, value, _ in part)
    return [id for *_, id in rows[:wanted]], sum(part[0][2] for part in parts if part)


def _condition(where: EpisodeFilter) -> tuple[str, list[Any]]:
    """What stands after WHERE, and its parameters; the text that is searched for is not in it."""
    terms: list[str] = ["1"]
    parameters: list[Any] = []
    for name in _BETWEEN:
        for bound, comparison in (("from", ">="), ("to", "<=")):
            value = getattr(where, f"{name}_{bound}")
            if value is not None:
                terms.append(f"{name} {comparison} ?")
                parameters.append(float(value))  # any integer: SQLite's own have 64 bits
    if where.ended is not None:
        terms.append({"terminated": "terminated = 1", "truncated": "truncated = 1"}[where.ended])
    if where.prompt is not None:
        terms.append("prompt_hash = ?")
        parameters.append(where.prompt)
    return " AND ".join(terms), parameters


def _sorting(order: str, descending: bool) -> str:
    return f"{order} {'DESC' if descending else 'ASC'} NULLS LAST, id"


def _columns(characters: int | None) -> str:
    cut = "" if characters is None else ", 1, " + str(characters)
    texts = {name: f"SUBSTR({name}{cut}) AS {name}" if cut else name for name in ("prompt", "response")}
    texts["messages"] = "CASE WHEN json_valid(details) THEN json_extract(details, '$.messages') END AS messages"
    return ", ".join(texts.get(field.name, f'"{field.name}"') for field in fields(EpisodeSummary))


def _summary(row: Any, characters: int | None = None) -> EpisodeSummary:
    values = dict(row)
    values |= {name: bool(values[name]) for name in ("terminated", "truncated")}
    found = values["messages"]
    turns = chat_turns(json.loads(found)) if isinstance(found, str) and found.startswith("[") else None
    if turns is not None and characters is not None:
        turns = [{name: text[:characters] for name, text in turn.items()} for turn in turns]
    return EpisodeSummary(**values | {"messages": turns})
