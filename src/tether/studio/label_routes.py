"""Addresses of labelling: sets, the next pair, answers, undo, agreement. Of all addresses these and notes write."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from tether.errors import UserError
from tether.runs.labels import LabelSet

from .asking import MOST, Runs
from .labels import LONGEST_NOTE, agreement, annotator_name, label_sets, near_names, standing
from .places import label_file
from .replies import Json, NotFoundError

router = APIRouter(prefix="/api/labels")

SetName = Annotated[str, Query(max_length=1000, description="path of the file within the runs folder")]
Annotator = Annotated[str, Query(max_length=1000)]


class Judgement(BaseModel):
    """What the page posts for an answer."""

    model_config = ConfigDict(extra="forbid")

    set: str = Field(max_length=1000)
    annotator: str = Field(max_length=1000)
    pair: int = Field(ge=1, le=MOST)
    answer: Literal["left", "right", "tie", "skip", "both_bad"]
    note: str | None = Field(default=None, max_length=LONGEST_NOTE)


class Person(BaseModel):
    """What the page posts to undo."""

    model_config = ConfigDict(extra="forbid")

    set: str = Field(max_length=1000)
    annotator: str = Field(max_length=1000)


@router.get("")
def sets(catalogue: Runs) -> Json:
    """The sets of pairs."""
    return Json({"sets": label_sets(catalogue), "left_out": catalogue.left_out})


@router.get("/next")
def next_pair(catalogue: Runs, set: SetName, annotator: Annotator) -> Json:
    """The first pair that this person has not judged; `near` are others whose names are almost theirs."""
    name = annotator_name(annotator)
    with LabelSet(label_file(catalogue.root, set)) as labels:
        return Json(standing(labels, name) | {"near": near_names(name, labels)})


@router.post("/answer")
def answer(catalogue: Runs, said: Judgement) -> Json:
    """Keep an answer; it is on the disk when this says ok."""
    name = annotator_name(said.annotator)
    with LabelSet(label_file(catalogue.root, said.set), writable=True) as labels:
        try:
            labels.shown_pair(name, said.pair)
        except UserError as error:
            raise NotFoundError(str(error)) from error
        labels.answer(name, said.pair, said.answer, (said.note or "").strip() or None)
        return Json({"ok": True} | standing(labels, name))


@router.post("/undo")
def undo(catalogue: Runs, said: Person) -> Json:
    """Take the newest answer back; its pair is shown again."""
    name = annotator_name(said.annotator)
    with LabelSet(label_file(catalogue.root, said.set), writable=True) as labels:
        undone = labels.undo(name)
        return Json({"undone": undone} | standing(labels, name, undone))


@router.get("/agreement")
def agreeing(catalogue: Runs, set: SetName) -> Json:
    """How far those who labelled agree."""
    with LabelSet(label_file(catalogue.root, set)) as labels:
        return Json(agreement(labels.answers()))
