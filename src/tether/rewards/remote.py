"""A reward over HTTP: completions go to a scorer on another machine in batches, scores come back.

The request is a POST of `{"prompts": […], "completions": […], "columns": {"answer": […], …}}`, the answer
`{"scores": […]}` (or `rewards`, or the bare list): one number or null for each completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import RewardError, UserError
from tether.rewards.client import AnswerError, Reader, Service
from tether.rewards.shape import is_finite
from tether.rewards.verifiers import Text


@dataclass(frozen=True, kw_only=True)
class Remote(Service):
    """Scores from `url`. A service that is away, slow, or answers nonsense is asked again, then named in one line."""

    batch: int = 32
    """Completions in one request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise UserError(f"{self.label}: option `batch` is {self.batch}; expected at least 1")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """One score per completion.

        Raises:
            RewardError: the service did not answer with one finite number or null per completion.
        """
        columns.pop("completion_ids", None)
        payloads, readers = [], []
        for start in range(0, len(completions), self.batch):
            part = slice(start, start + self.batch)
            own = {name: values[part] for name, values in columns.items()}
            payloads.append({"prompts": prompts[part], "completions": completions[part], "columns": own})
            readers.append(_reader(len(completions[part])))
        try:
            found = self.ask_all(payloads, readers)
        except AnswerError as error:
            raise RewardError(f"{self.label}: {error}") from error
        return [score for scores in found for score in scores]


def _reader(count: int) -> Reader[list[float | None]]:
    def read(answer: Any, last: bool) -> list[float | None]:
        scores = answer
        if isinstance(answer, dict):
            scores = next((answer[name] for name in ("scores", "rewards") if name in answer), None)
        if not isinstance(scores, list):
            raise AnswerError(f'answered {_shown(answer)}, expected {{"scores": [one number per completion]}}')
        if len(scores) != count:
            raise AnswerError(f"answered {len(scores)} scores for {count} completions")
        for index, score in enumerate(scores):
            if score is not None and not is_finite(score):
                raise AnswerError(f"answered {score!r:.40} for completion {index} of a batch, expected a finite number")
        return [None if score is None else float(score) for score in scores]

    return read


def _shown(answer: object) -> str:
    return " ".join(repr(answer).split())[:60]
