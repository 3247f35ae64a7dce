"""Addresses of runs: the table, one run, its metrics, its console, the difference to another, and what changes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from .asking import MOST, Folder, RunName, Runs
from .console import console_end, starts_of
from .events import changes
from .places import run_folder
from .replies import Json, reading
from .runs import config_of, difference, metrics_since, run_details

router = APIRouter(prefix="/api")


@router.get("/runs")
def runs(catalogue: Runs) -> Json:
    """The table of runs; `left_out` says in a line that there may be more, else it is null."""
    return Json({"runs": [asdict(run) for run in catalogue.runs()], "left_out": catalogue.left_out})


@router.get("/run")
def run(folder: Folder, catalogue: Runs) -> Json:
    """One run: configuration, alarms, checkpoints."""
    with reading(folder):
        return Json(run_details(catalogue, folder))


@router.get("/metrics")
def metrics(
    folder: Folder,
    catalogue: Runs,
    since: Annotated[int | None, Query(ge=-MOST, le=MOST)] = None,
    names: Annotated[str | None, Query(max_length=10_000, description="with commas between them")] = None,
) -> Json:
    """Metrics of the iterations after `since`. Where `edition` changes, the file was written anew: ask for all."""
    log = catalogue.log(folder)
    rows = log.rows()
    wanted = names.split(",") if names else None
    last = rows[-1]["iteration"] if rows else 0
    return Json({"rows": metrics_since(rows, since, wanted), "last": last, "edition": log.edition})


@router.get("/difference")
def differing(folder: Folder, catalogue: Runs, other: Annotated[str, Query(alias="with", max_length=1000)]) -> Json:
    """Fields of the configurations of two runs that differ."""
    second = run_folder(catalogue.root, other)
    return Json({"fields": difference(config_of(folder), config_of(second))})


@router.get("/console")
def console(folder: Folder) -> Json:
    """How the run was started each time, and the end of what it printed."""
    text, before = console_end(folder)
    return Json({"starts": starts_of(folder), "text": text, "before": before})


@router.get("/events")
async def events(catalogue: Runs, run: RunName | None = None) -> StreamingResponse:
    """Server-sent events: which runs have changed. Never ends by itself."""
    return StreamingResponse(changes(catalogue, run), media_type="text/event-stream")
