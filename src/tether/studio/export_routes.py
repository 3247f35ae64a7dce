"""Addresses of what can be taken along: tables as CSV, an episode as a page, preferences, a run's console."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, Response, StreamingResponse

from tether.runs.console import CONSOLE_FILE
from tether.runs.labels import LabelSet, count_answers

from .asking import Episodes, Folder, Id, Runs, Store
from .episode_page import episode_page
from .episodes import episode_details
from .exports import episodes_table, file_name, metrics_table, runs_table, steps_table
from .places import label_file, relative
from .replies import NotFoundError
from .runs import Catalogue

router = APIRouter(prefix="/api/export")


@router.get("/runs.csv")
def runs(catalogue: Runs) -> Response:
    """The table of runs."""
    return _csv(runs_table(catalogue.runs()), "runs")


@router.get("/metrics.csv")
def metrics(folder: Folder, catalogue: Runs) -> Response:
    """All metrics of a run."""
    return _csv(metrics_table(catalogue.log(folder).rows()), _name(catalogue, folder), "metrics")


@router.get("/console.log")
def console(folder: Folder, catalogue: Runs) -> FileResponse:
    """All that the run printed."""
    file = folder / CONSOLE_FILE
    if not file.is_file():
        raise NotFoundError(f"{CONSOLE_FILE}: this run has kept nothing of what it printed")
    name = file_name(_name(catalogue, folder), "console") + ".log"
    return FileResponse(file, media_type="text/plain; charset=utf-8", headers=_attachment(name))


@router.get("/episodes.csv")
def episodes(folder: Store, catalogue: Runs, wanted: Episodes) -> Response:
    """All episodes that pass the filters."""
    return _csv(episodes_table(folder, wanted), _name(catalogue, folder), "episodes")


@router.get("/steps.csv")
def steps(folder: Store, catalogue: Runs, id: Id) -> Response:
    """One episode, a line per step."""
    details = episode_details(folder, id)
    return _csv(steps_table(details["steps"]), _name(catalogue, folder), "episode", str(id))


@router.get("/episode.html")
def page(folder: Store, catalogue: Runs, id: Id) -> Response:
    """One episode as a file that needs nothing else."""
    name = _name(catalogue, folder)
    document = episode_page(name, episode_details(folder, id))
    headers = _attachment(file_name(name, "episode", str(id)) + ".html")
    return Response(document.encode("utf-8", "backslashreplace"), media_type="text/html", headers=headers)


@router.get("/preferences.jsonl")
def preferences(catalogue: Runs, set: Annotated[str, Query(max_length=1000)]) -> Response:
    """What `tether reward` reads; skipped pairs and those of which both are bad are left out, and counted."""
    with LabelSet(label_file(catalogue.root, set)) as labels:
        counts = count_answers(labels.answers())
        lines = [json.dumps(row) + "\n" for row in labels.preferences()]
    headers = _attachment(file_name(set.removesuffix(".labels.db"), "preferences") + ".jsonl")
    headers |= {f"X-Tether-{kind.replace('_', '-').title()}": str(counts[kind]) for kind in ("tie", "both_bad", "skip")}
    return Response("".join(lines), media_type="application/jsonl", headers=headers)


def _name(catalogue: Catalogue, folder: Path) -> str:
    return relative(catalogue.root, folder) if folder != catalogue.root else catalogue.root.name


def _csv(lines: Iterator[bytes], *names: str) -> Response:
    headers = _attachment(file_name(*names) + ".csv")
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def _attachment(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
