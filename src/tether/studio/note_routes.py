"""The address that keeps what people note about a run. It and those of labels are the only ones that write."""

from __future__ import annotations

import threading

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from tether.errors import UserError
from tether.runs.notes import LONGEST_NOTE, Notes, checked_notes, read_notes, write_notes

from .asking import Runs
from .places import run_folder
from .replies import ConflictError, Json, UnfitError

MOST_SENT = 100  # tags in a request; how many are kept is for `checked_notes` to say

router = APIRouter(prefix="/api")
_writing = threading.Lock()


class Words(BaseModel):
    """A note and tags."""

    model_config = ConfigDict(extra="forbid")

    note: str = Field(max_length=2 * LONGEST_NOTE)
    tags: list[str] = Field(max_length=MOST_SENT)


class Noted(Words):
    """What the page posts: the notes as they shall be, and as it last saw them."""

    run: str = Field(max_length=1000)
    seen: Words


@router.post("/notes")
def note(catalogue: Runs, said: Noted) -> Json:
    """Keep the notes of a run; they are on the disk when this answers. Refused where others were written meanwhile."""
    folder = run_folder(catalogue.root, said.run)
    with _writing:
        there = read_notes(folder)
        if there != Notes(said.seen.note, tuple(said.seen.tags)):
            raise ConflictError("these notes were changed meanwhile, and nothing was replaced")
        write_notes(folder, _checked(said))
    kept = catalogue.summary(folder)
    return Json({"note": kept.note, "tags": kept.tags})


def _checked(said: Noted) -> Notes:
    try:
        return checked_notes(said.note, said.tags)
    except UserError as error:
        raise UnfitError(str(error)) from error
