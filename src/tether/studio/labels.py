"""Labelling as the page sees it: the next pair, progress, and how far those who label agree.

Knows sets of pairs and the measures of agreement; nothing of HTTP.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tether.errors import UserError
from tether.runs.labels import Answer, LabelSet, person_name

from .agreement import cohen_kappa, krippendorff_alpha
from .places import relative
from .replies import UnfitError
from .runs import Catalogue

LONGEST_NAME = 100  # characters
LONGEST_NOTE = 10_000


def label_sets(catalogue: Catalogue) -> list[dict[str, Any]]:
    """All sets under the root; a damaged one with its fault."""
    return [_described(catalogue.root, file) for file in catalogue.label_files()]


def annotator_name(name: str) -> str:
    """The name as it is kept.

    Raises:
        UnfitError: nobody can be called so.
    """
    name = person_name(name)
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UnfitError(f"annotator: expected a name of 1 to {LONGEST_NAME} printable characters")
    return name


def near_names(name: str, labels: LabelSet) -> list[dict[str, Any]]:
    """Who has judged under a name that differs in capitals, accents, spaces or signs alone, and how many pairs.

    Nobody where the name itself is known already.
    """
    counts = Counter(answer.annotator for answer in labels.answers())
    if name in counts:
        return []
    return [{"name": other, "done": counts[other]} for other in sorted(counts) if _bare(other) == _bare(name)]


def _bare(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum()) or name


def standing(labels: LabelSet, annotator: str, pair: int | None = None) -> dict[str, Any]:
    """What the page shows next: this pair, or the first that is not judged, and how far this person is."""
    shown = labels.next_pair(annotator) if pair is None else labels.shown_pair(annotator, pair)
    done = labels.done(annotator)
    return {
        "pair": None if shown is None else asdict(shown),
        "progress": {"done": done, "total": labels.count()},
        "can_undo": done > 0,
    }


def agreement(answers: Sequence[Answer]) -> dict[str, Any]:
    """Each person's counts, by the side that was chosen, and how far they agree on what they judged; a skip is none."""
    judged: dict[str, dict[int, str]] = defaultdict(dict)  # annotator → pair → answer
    units: dict[int, list[str]] = defaultdict(list)
    people: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        people[answer.annotator][_side(answer)] += 1
        if answer.answer != "skip":
            judged[answer.annotator][answer.pair] = answer.answer
            units[answer.pair].append(answer.answer)
    names = sorted(people)
    return {
        "annotators": [
            {"name": name, "done": people[name].total()}
            | {side: people[name][side] for side in ("left", "right", "tie", "both_bad", "skip")}
            for name in names
        ],
        "cohen": [_cohen(a, b, judged[a], judged[b]) for a, b in itertools.combinations(names, 2)],
        "krippendorff": {
            "alpha": krippendorff_alpha(units.values()),
            "n": sum(len(unit) > 1 for unit in units.values()),
        },
    }


def _cohen(a: str, b: str, first: dict[int, str], second: dict[int, str]) -> dict[str, Any]:
    shared = sorted(first.keys() & second.keys())
    kappa = cohen_kappa([first[pair] for pair in shared], [second[pair] for pair in shared])
    return {"a": a, "b": b, "kappa": kappa, "n": len(shared)}


def _side(answer: Answer) -> str:
    if answer.answer in ("a", "b"):
        return "left" if answer.answer == answer.left else "right"
    return answer.answer


def _described(root: Path, file: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"set": relative(root, file), "name": file.name, "updated": file.stat().st_mtime}
    row |= {"pairs": 0, "labelled": 0, "annotators": [], "fault": None}
    try:
        with LabelSet(file) as labels:
            answers = labels.answers()
            row["name"] = str(labels.about.get("name") or file.name)
            row["pairs"] = labels.count()
    except UserError as error:
        return row | {"fault": str(error).replace(f"{file.parent}/", "")}
    row["labelled"] = len({answer.pair for answer in answers if answer.answer != "skip"})
    row["annotators"] = sorted({answer.annotator for answer in answers})
    row["updated"] = max((answer.time for answer in answers), default=row["updated"])
    return row
