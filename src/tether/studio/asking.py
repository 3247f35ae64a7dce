"""What requests may carry: the parameters that several addresses share, checked before anything is read.

Knows FastAPI's ways; nothing of stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Query, Request

from tether.runs.episode_queries import EpisodeFilter, EpisodeOrder
from tether.runs.episodes import EPISODES_FILE

from .places import run_folder
from .replies import NotFoundError, UnfitError
from .runs import Catalogue

MOST = 2**63 - 1  # SQLite's largest integer

RunName = Annotated[str, Query(max_length=1000, description="path of the run within the runs folder; `.` is itself")]
Id = Annotated[int, Query(ge=1, le=MOST)]
Count = Annotated[int | None, Query(ge=-MOST, le=MOST)]
Number = Annotated[float | None, Query(allow_inf_nan=False)]


def catalogue_of(request: Request) -> Catalogue:
    """The runs of this app."""
    found: Catalogue = request.app.state.catalogue
    return found


Runs = Annotated[Catalogue, Depends(catalogue_of)]


def folder_of(run: RunName, catalogue: Runs) -> Path:
    """The folder of the run that is asked for."""
    return run_folder(catalogue.root, run)


Folder = Annotated[Path, Depends(folder_of)]


@dataclass(frozen=True)
class Wanted:
    """Which episodes, and in which order."""

    filter: EpisodeFilter
    order: EpisodeOrder
    descending: bool


def wanted(
    iteration_from: Count = None,
    iteration_to: Count = None,
    score_from: Number = None,
    score_to: Number = None,
    kl_from: Number = None,
    kl_to: Number = None,
    length_from: Count = None,
    length_to: Count = None,
    ended: Literal["terminated", "truncated", ""] | None = None,
    text: Annotated[str | None, Query(max_length=1000)] = None,
    prompt: Annotated[str | None, Query(max_length=100, description="hash of a prompt")] = None,
    order: EpisodeOrder = "id",
    descending: bool = False,
) -> Wanted:
    """The filters of the list of episodes."""
    if "\x00" in (text or ""):
        raise UnfitError("text: found U+0000, where SQLite would stop to read, expected text without it")
    chosen = EpisodeFilter(
        iteration_from=iteration_from,
        iteration_to=iteration_to,
        score_from=score_from,
        score_to=score_to,
        kl_from=kl_from,
        kl_to=kl_to,
        length_from=length_from,
        length_to=length_to,
        ended=ended or None,
        prompt=prompt or None,
        text=text or None,
    )
    return Wanted(chosen, order, descending)


Episodes = Annotated[Wanted, Depends(wanted)]


def store_of(folder: Folder) -> Path:
    """The folder of a run that has a store of episodes."""
    if not (folder / EPISODES_FILE).is_file():
        raise NotFoundError(f"{EPISODES_FILE}: this run has stored no episodes")
    return folder


Store = Annotated[Path, Depends(store_of)]
