"""What can be taken along: tables as CSV that no spreadsheet takes for formulas, sent as they are read.

Knows the columns of each table; nothing of HTTP.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tether.runs.episode_queries import EpisodeSummary, find_episodes
from tether.runs.episodes import EPISODES_FILE, query_store

from .asking import Wanted
from .metrics import Row
from .replies import reading
from .runs import RunSummary

PAGE = 5_000  # episodes that are read at once
TEXTS = 500  # of them whose texts are
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def guarded(value: Any) -> Any:
    """A cell. Text that a spreadsheet would compute gets an apostrophe before it; numbers are as they are."""
    if isinstance(value, str) and value.lstrip(" \n").startswith(_FORMULA):
        return f"'{value}"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return value


def csv_lines(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[bytes]:
    """The table in pieces, the header first."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow([guarded(column) for column in columns])
    for row in rows:
        writer.writerow([guarded(value) for value in row])
        if buffer.tell() > 1 << 16:
            yield _taken(buffer)
    yield _taken(buffer)


def runs_table(runs: Sequence[RunSummary]) -> Iterator[bytes]:
    """The table of runs, without its sparklines."""
    columns = [field.name for field in fields(RunSummary) if field.name != "spark"]
    return csv_lines(columns, ([asdict(run)[name] for name in columns] for run in runs))


def metrics_table(rows: Sequence[Row]) -> Iterator[bytes]:
    """All metrics, one line per iteration."""
    columns = list(dict.fromkeys(["iteration", *(name for row in rows for name in row)]))
    return csv_lines(columns, ([row.get(name) for name in columns] for row in rows))


def episodes_table(folder: Path, wanted: Wanted) -> Iterator[bytes]:
    """All episodes that pass the filters, with whole texts.

    The first page is read before anything is sent, so that a store that cannot be read is told as one.
    """
    columns = [field.name for field in fields(EpisodeSummary) if field.name != "messages"]  # the prompt has them
    pages = _pages(folder, wanted)
    return csv_lines(columns, _cells(columns, folder, itertools.chain([next(pages)], pages)))


def steps_table(steps: dict[str, Any]) -> Iterator[bytes]:
    """One line per step of an episode."""
    columns = [name for name, values in steps.items() if values is not None]
    count = len(steps["action"])
    rows = ([step, *(steps[name][step] for name in columns)] for step in range(count))
    return csv_lines(["step", *columns], rows)


def file_name(*parts: str) -> str:
    """A name that every system takes, of names that a run may have."""
    joined = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-.") for part in parts)
    return joined[:150].lstrip("-.") or "export"


def _pages(folder: Path, wanted: Wanted) -> Iterator[list[EpisodeSummary]]:
    offset = 0
    while True:
        with reading(folder / EPISODES_FILE):
            page, total = find_episodes(folder, wanted.filter, wanted.order, wanted.descending, PAGE, offset)
        yield page
        offset += PAGE
        if offset >= total:
            return


def _cells(columns: Sequence[str], folder: Path, pages: Iterable[list[EpisodeSummary]]) -> Iterator[list[Any]]:
    for page in pages:
        for start in range(0, len(page), TEXTS):
            part = page[start : start + TEXTS]
            texts = _texts(folder, [episode.id for episode in part])
            for episode in part:
                values = asdict(episode) | texts.get(episode.id, {})
                yield [values[name] for name in columns]


def _texts(folder: Path, ids: Sequence[int]) -> dict[int, dict[str, str]]:
    marks = ", ".join("?" * len(ids))
    rows = query_store(folder, f"SELECT id, prompt, response FROM episodes WHERE id IN ({marks})", list(ids))
    return {row["id"]: {"prompt": row["prompt"], "response": row["response"]} for row in rows}


def _taken(buffer: io.StringIO) -> bytes:
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode("utf-8", "backslashreplace")
