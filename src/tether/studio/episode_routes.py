"""Addresses of episodes: the list, one episode, the same prompt across iterations, a film."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from tether.runs.episode_queries import find_episodes
from tether.runs.episodes import EPISODES_FILE

from .asking import Episodes, Id, Runs, Store
from .episodes import across_iterations, episode_details, film_of, summary_of
from .places import relative
from .replies import Json, reading

MOST_ROWS = 200  # of one answer

router = APIRouter(prefix="/api")


@router.get("/episodes")
def episodes(
    folder: Store,
    wanted: Episodes,
    limit: Annotated[int, Query(ge=1, le=MOST_ROWS)] = 50,
    offset: Annotated[int, Query(ge=0, le=2**53)] = 0,
) -> Json:
    """Episodes that pass the filters, and how many there are in all."""
    with reading(folder / EPISODES_FILE):
        found, total = find_episodes(folder, wanted.filter, wanted.order, wanted.descending, limit, offset)
    return Json({"episodes": [summary_of(episode) for episode in found], "total": total})


@router.get("/episode")
def episode(folder: Store, catalogue: Runs, id: Id) -> Json:
    """One episode, step by step."""
    details = episode_details(folder, id)
    if details["film"] is not None:
        details["film"] = "/api/film?" + urlencode({"run": relative(catalogue.root, folder), "id": id})
    return Json(details)


@router.get("/same-prompt")
def same_prompt(folder: Store, id: Id) -> Json:
    """How the answer to this prompt changed: one episode of each iteration."""
    return Json({"episodes": across_iterations(folder, id)})


@router.get("/film")
def film(folder: Store, catalogue: Runs, id: Id) -> FileResponse:
    """The film of an episode of the control world."""
    file, kind = film_of(catalogue.root, folder, id)
    return FileResponse(file, media_type=kind)
