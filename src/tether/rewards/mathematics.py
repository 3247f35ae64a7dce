"""`math_verify`: mathematical answers compared by the library math-verify, in a process of their own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import UserError
from tether.rewards.scoring import require, scoring_process
from tether.rewards.verifiers import ExampleError, Text, text_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MathVerify:
    r"""`right` where the completion's mathematical answer equals the one in the answer column, by math-verify.

    Fractions, roots, polynomials, sets, intervals, matrices and units are compared by what they mean. Of a completion
    the last answer counts: a number, or LaTeX marked by `\boxed{}` or `$…$`.
    The column holds the answer alone, or a solution that marks it by `\boxed{}`, `$…$` or `####`. Answers are read in a
    process of their own, where nothing but arithmetic is ever evaluated; one that takes too long to read is wrong.
    """

    answer: str = "answer"
    """Column with the expected answer."""
    right: float = 1.0
    wrong: float = -1.0
    partial: float | None = None
    """Graded: the score of a completion that states an answer, but not the right one. Without it: `wrong`."""
    timeout: int = 3
    """Whole seconds that reading, and comparing, one answer may take."""

    def __post_init__(self) -> None:
        require("math_verify", "reward `math_verify`")
        if self.timeout < 1:
            raise UserError(f"reward `math_verify`: option `timeout` is {self.timeout}; expected at least 1")

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The column that `__call__` reads out of `columns`."""
        return (self.answer,)

    def __call__(self, completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion; RewardError where an answer of the column cannot be read."""
        scores, late = [], 0
        for index, (completion, answer) in enumerate(zip(completions, columns[self.answer], strict=True)):
            if answer is None or not str(answer).strip():
                found = "null" if answer is None else "empty"
                raise ExampleError("math_verify", f"column `{self.answer}`", index, f"is {found}; {EXPECTED}")
            text = text_of(completion)
            request = {"expected": str(answer), "given": text if text.strip() else None, "timeout": self.timeout}
            # parsing both and comparing have a limit each; what does not heed it is ended a little later
            reply = scoring_process("math").ask(request, 3 * self.timeout + 2) or {"verdict": "late"}
            verdict = reply.get("verdict", "late")
            late += verdict == "late"
            if verdict == "gold":
                found = f"is {str(answer)[-60:]!r}; {EXPECTED}"
                raise ExampleError("math_verify", f"column `{self.answer}`", index, found)
            score = self.right if verdict == "right" else self.wrong
            if verdict == "wrong" and self.partial is not None:
                score = self.partial
            scores.append(score)
        if late:
            logger.warning("math_verify: %d of %d answers took too long to read and count as wrong", late, len(scores))
        return scores


EXPECTED = r"expected a mathematical answer, such as \frac{1}{2}, or a solution with \boxed{}, $…$ or ####"
