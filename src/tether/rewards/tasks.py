"""Tasks that bring their own problems and their own verifier: `reasoning_gym:chain_sum` and the other hundred.

Problems are made and answers are scored in a process of their own; the same size, seed and options give the same
problems in every run. Knows nothing of models.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tether.errors import RewardError, UserError
from tether.rewards.scoring import require, scoring_process
from tether.rewards.verifiers import Text, text_of

logger = logging.getLogger(__name__)

MOST_PROBLEMS = 1_000_000  # reasoning-gym seeds problem i with seed + i, so seeds are spread this far apart
MOST_SEED = 4000  # times MOST_PROBLEMS still below 2^32
MAKING = 120.0  # seconds for one problem; some are searched for
SCORING = 20.0  # seconds for one answer


@dataclass(frozen=True)
class ProblemsConfig:
    """Which problems of `task`."""

    size: int = 1000
    """How many problems are made."""
    seed: int = 0
    """Of the problems, 0 to 4000. Two seeds have no draw in common: evaluate with another one than you train with."""
    options: dict[str, Any] = field(default_factory=dict)
    """The task's own configuration, for example {max_terms: 3, max_digits: 2}."""
    partial: bool = False
    """Scores as the task gives them, from 0 to 1 with partial credit. Off: 1 where it gives 1, else 0."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MOST_PROBLEMS:
            raise ValueError(f"size is {self.size}, expected 1 to {MOST_PROBLEMS}")
        if not 0 <= self.seed <= MOST_SEED:
            raise ValueError(f"seed is {self.seed}, expected 0 to {MOST_SEED}")
        for name in ("size", "seed"):
            if name in self.options:
                raise ValueError(f"options hold {name}, which is a setting of its own beside them: move it there")


class Task:
    """Problems, and the reward for answering them.

    Args:
        name: `reasoning_gym:NAME`.
        config: see `ProblemsConfig`.

    Attributes:
        rows: a dict per problem: `prompt`, `answer` (None where many are right), `problem` (its number).

    Raises:
        UserError: no such task, or the task refuses its options.
    """

    def __init__(self, name: str, config: ProblemsConfig | None = None) -> None:
        config = config or ProblemsConfig()
        library, colon, self.__name__ = name.partition(":")
        if library != "reasoning_gym" or not colon or not self.__name__:
            raise UserError(f"task `{name}`: expected `reasoning_gym:NAME`, for example `reasoning_gym:chain_sum`")
        require("reasoning_gym", f"task `{name}`")
        self.name, self.partial = name, config.partial
        self._of = {"task": self.__name__, "options": config.options, "size": config.size}
        self._of["seed"] = config.seed * MOST_PROBLEMS
        self.rows: list[dict[str, Any]] = []
        for index in range(config.size):
            reply = scoring_process("gym").ask({"of": self._of, "index": index}, MAKING)
            if reply is not None and "known" in reply:
                near = difflib.get_close_matches(self.__name__, reply["known"], 3) or reply["known"]
                raise UserError(f"task `{name}`: reasoning-gym has no such task; perhaps: {', '.join(near)}")
            if reply is None or "error" in reply:
                reason = f"took longer than {MAKING:g} s" if reply is None else str(reply["error"])
                raise UserError(f"task `{name}`: problem {index} cannot be made: {reason}: see problems.options")
            self.rows.append({"prompt": reply["question"], "answer": reply["answer"], "problem": index})

    def __call__(self, completions: Sequence[Text], problem: Sequence[int]) -> list[float]:
        """One score per completion; 0 for an answer that cannot be read, or not in time, which a warning counts.

        Raises:
            RewardError: the problem cannot be made again, in a process that took the place of one that was ended.
        """
        scores, late = [], 0
        for completion, index in zip(completions, problem, strict=True):
            question = {"of": self._of, "index": int(index), "given": stated_answer(text_of(completion))}
            reply = scoring_process("gym").ask(question, SCORING)
            if reply is not None and "score" not in reply:
                raise RewardError(f"task `{self.name}`: problem {index} cannot be scored: {reply.get('error', reply)}")
            late += reply is None
            score = 0.0 if reply is None else float(reply["score"])
            scores.append(score if self.partial else float(score >= 1.0))
        if late:
            logger.warning("%s: %d of %d answers took too long to score and get 0", self.name, late, len(scores))
        return scores


def stated_answer(text: str) -> str:
    """What stands in the last `<answer>…</answer>` of a completion; without one, the whole completion."""
    opening, closing = "<answer>", "</answer>"
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return (text[start + len(opening) : end] if start >= 0 else text).strip()
