"""Rewards for the shape of a completion: how long it is, and whether it keeps to a format. They know no answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import UserError
from tether.rewards.verifiers import Text, text_of


@dataclass(frozen=True)
class Length:
    """`per_token` for each token of a completion, eos included. For a limit there is `collect.overlong_penalty`."""

    per_token: float = 0.0
    """Added for each token; below 0 shorter is better."""

    def __post_init__(self) -> None:
        if not self.per_token:
            raise UserError("reward `length` rewards nothing: give `per_token`, as in `length?per_token=-0.001`")

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """One score per completion."""
        return [self.per_token * len(ids) for ids in completion_ids]


@dataclass(frozen=True)
class Format:
    """`right` where the completion is sections in tags, each once and in this order, and nothing else, else `wrong`.

    With `tags=think,answer`: `<think>…</think> <answer>…</answer>`, white space around and between them.
    """

    tags: str = "think,answer"
    """Names of the sections, with commas between."""
    opened: bool = False
    """The first opening tag stands at the end of the prompt already."""
    right: float = 1.0
    wrong: float = -1.0
    partial: float | None = None
    """Graded: the score for a format that is wrong, but has some of the tags exactly once, times their share."""

    def __post_init__(self) -> None:
        names = self.names
        if not all(name.replace("_", "").replace("-", "").isalnum() for name in names) or len(set(names)) < len(names):
            raise UserError(
                f"reward `format`: option `tags` is {self.tags!r}; expected different names, as think,answer"
            )

    @property
    def names(self) -> list[str]:
        """The tags' names in their order."""
        return [name.strip() for name in self.tags.split(",")]

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion."""
        return [self._score(text_of(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        text = f"<{self.names[0]}>{text}" if self.opened else text
        marks = [mark for name in self.names for mark in (f"<{name}>", f"</{name}>")]
        once = sum(text.count(mark) == 1 for mark in marks)
        if once == len(marks) and self._in_order(text.strip(), marks):
            return self.right
        given = once - self.opened  # the tag of the prompt is not the model's doing
        if self.partial is None or not given:
            return self.wrong
        return self.partial * given / (len(marks) - self.opened)

    @staticmethod
    def _in_order(text: str, marks: Sequence[str]) -> bool:
        places = [text.index(mark) for mark in marks]
        if places != sorted(places) or places[0] != 0 or places[-1] + len(marks[-1]) != len(text):
            return False
        ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
        # from each closing tag to the next opening one nothing but white space
        return all(not text[ends[i] : places[i + 1]].strip() for i in range(1, len(marks) - 1, 2))


def is_finite(value: object) -> bool:
    """Whether `value` is a number of JSON that can be a score: no bool, no NaN, no infinity."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False
