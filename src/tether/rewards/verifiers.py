"""The built-in rewards: verifiers that compare a completion with a known answer.

Each is a callable with the calling convention of any reward function, so a user's file can import and reuse one. They
know nothing of models or tokens.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

from tether.chat import said
from tether.errors import RewardError, UserError
from tether.rewards.numeric import last_expression, stated_number

Text = str | Sequence[dict[str, Any]]


class ExampleError(RewardError):
    """An example that a verifier cannot score, whatever the completion: its answer or its prompt is at fault.

    Attributes:
        index: which of the examples that were given.
        alone: the message without that number, for callers who know a better name of the example.
    """

    def __init__(self, verifier: str, what: str, index: int, problem: str) -> None:
        super().__init__(f"{verifier}: {what} of example {index} {problem}")
        self.index = index
        self.alone = f"{verifier}: {what} {problem}"


def text_of(completion: Text) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else said(completion[-1])


@dataclass(frozen=True)
class ExactMatch:
    """`right` where the completion equals the answer column, else `wrong`; outer white space is ignored."""

    answer: str = "answer"
    """Column with the expected text."""
    ignore_case: bool = False
    """Compare without regard to upper and lower case."""
    right: float = 1.0
    wrong: float = -1.0

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The column that `__call__` reads out of `columns`."""
        return (self.answer,)

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion; RewardError where an answer is null."""
        scores = []
        for index, (completion, answer) in enumerate(zip(completions, columns[self.answer], strict=True)):
            if answer is None:
                raise ExampleError("exact_match", f"column `{self.answer}`", index, "is null; expected an answer")
            given, expected = text_of(completion).strip(), str(answer).strip()
            if self.ignore_case:
                given, expected = given.casefold(), expected.casefold()
            scores.append(self.right if given == expected else self.wrong)
        return scores


@dataclass(frozen=True)
class Regex:
    """`right` where a regular expression of Python's `re` is found in the completion, else `wrong`.

    `re` does not let other threads run while it matches, so no timeout can stop a pattern that backtracks without end:
    avoid nested repetition such as `(a+)+`.
    """

    pattern: str
    """The regular expression; `(?s)` at its start lets `.` match line ends."""
    full: bool = False
    """The whole completion must match, outer white space aside; otherwise the pattern may stand anywhere in it."""
    ignore_case: bool = False
    right: float = 1.0
    wrong: float = -1.0
    compiled: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern, re.IGNORECASE if self.ignore_case else 0)
        except re.error as error:
            raise UserError(
                f"reward `regex`: the pattern {self.pattern!r} is no regular expression: {error}"
            ) from error
        object.__setattr__(self, "compiled", compiled)

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion."""
        texts = [text_of(completion) for completion in completions]
        if self.full:
            matches = [self.compiled.fullmatch(text.strip()) for text in texts]
        else:
            matches = [self.compiled.search(text) for text in texts]
        return [self.wrong if match is None else self.right for match in matches]


@dataclass(frozen=True)
class Numeric:
    r"""`right` where the number that the completion states equals the one in the answer column.

    Both are read alike: the number after `####`, else in `\boxed{}`, else the last one of the text; so the column can
    hold a number, or a worked solution of GSM8K that ends in `#### 72`. See `tether.rewards.numeric.stated_number`.
    """

    answer: str = "answer"
    """Column with the expected number, or a text that states it."""
    tolerance: float = 0.0
    """Largest absolute difference that still counts as right."""
    right: float = 1.0
    wrong: float = -1.0
    partial: float | None = None
    """Graded: the score of a completion that states a number, but not the right one. Without it: `wrong`."""

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The column that `__call__` reads out of `columns`."""
        return (self.answer,)

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion; RewardError where an answer states no number."""
        answers = columns[self.answer]
        expected = [_expected(answer, self.answer, index) for index, answer in enumerate(answers)]
        return [_grade(completion, number, self) for completion, number in zip(completions, expected, strict=True)]


@dataclass(frozen=True)
class Arithmetic:
    """`right` where the completion states the value of the last arithmetic expression in the prompt.

    Needs no answer column: "What is 12 + 7?", "(3 - 5) * 2 =" or "12 x 3" is worked out exactly. Of a chat prompt the
    last message is read.
    """

    tolerance: float = 0.0
    """Largest absolute difference that still counts as right; a third written as 0.33 needs one."""
    right: float = 1.0
    wrong: float = -1.0
    partial: float | None = None
    """Graded: the score of a completion that states a number, but not the right one. Without it: `wrong`."""

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion; RewardError where a prompt holds no expression that has a value."""
        scores = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = text_of(prompt)
            shown = f"the prompt {' '.join(text.split())[-80:]!r}"
            try:
                expression = last_expression(text)
            except ZeroDivisionError as error:
                raise ExampleError("arithmetic", shown, index, "divides by zero: take it out of the data") from error
            if expression is None:
                raise ExampleError("arithmetic", shown, index, "holds no expression such as `12 + 7`")
            scores.append(_grade(completion, expression[1], self))
        return scores


def _grade(completion: Text, expected: Fraction, verifier: Numeric | Arithmetic) -> float:
    given = stated_number(text_of(completion))
    if given is None:
        return verifier.wrong
    if abs(given - expected) <= Fraction(verifier.tolerance):
        return verifier.right
    return verifier.wrong if verifier.partial is None else verifier.partial


def _expected(answer: object, column: str, index: int) -> Fraction:
    """The number that the answer column states."""
    number = None
    if isinstance(answer, str):
        number = stated_number(answer)
    elif isinstance(answer, numbers.Real | Decimal) and not isinstance(answer, bool) and math.isfinite(answer):
        number = Fraction(str(answer))  # 0.1 as the user wrote it, not as the nearest binary fraction
    if number is None:
        found = f"is {str(answer)[-60:]!r}; expected a number or a text that states one"
        raise ExampleError("numeric", f"column `{column}`", index, found)
    return number
