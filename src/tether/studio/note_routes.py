"""The address that keeps what people note about a run. It and those of labels are the only ones that write."""

from __future__ import annotations

import threading

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from tether.errors import UserError
from tether.runs.notes import LONGEST_NOTE, Notes, checked_notes, write_notes

from .asking import Runs
from .places import run_folder
from .replies import Json, UnfitError

MOST_SENT = 100  # tags in a request; how many are kept is for `checked_notes` to say

router = APIRouter(prefix="/api")
_writing = threading.Lock()


class Noted(BaseModel):
    """What the page posts: the notes as they shall be."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=1000)
    note: str = Field(max_length=2 * LONGEST_NOTE)
    tags: list[str] = Field(max_length=MOST_SENT)


@router.post("/notes")
def note(catalogue: Runs, said: Noted) -> Json:
    """Keep the notes of a run; they are on the disk when this answers."""
    folder = run_folder(catalogue.root, said.run)
    with _writing:
        write_notes(folder, _checked(said))
    kept = catalogue.summary(folder)
    return Json({"note": kept.note, "tags": kept.tags})


def _checked(said: Noted) -> Notes:
    try:
        return checked_notes(said.note, said.tags)
    except UserError as error:
        raise UnfitError(str(error)) from error
