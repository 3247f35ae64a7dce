"""A reward over HTTP: completions go to a scorer on another machine in batches, scores come back.

The request is a POST of `{"prompts": […], "completions": […], "columns": {"answer": […], …}}`, the answer
`{"scores": […]}` (or `rewards`, or the bare list): one number or null for each completion.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tether.errors import RewardError, UserError
from tether.rewards.client import AnswerError, Reader, Service, ask_all
from tether.rewards.shape import is_finite
from tether.rewards.verifiers import Text


@dataclass(frozen=True)
class Remote:
    """Scores from `url`. A service that is away, slow, or answers nonsense is asked again, then named in one line."""

    url: str
    """Address of the scorer, http:// or https://."""
    batch: int = 32
    """Completions in one request."""
    concurrency: int = 4
    """Requests under way at once."""
    timeout: float = 60.0
    """Seconds for one attempt."""
    retries: int = 5
    """Further attempts for a request that failed, each after twice the wait of the one before."""
    backoff: float = 0.5
    """Seconds before the second attempt."""
    token_env: str = ""
    """Environment variable with a token, sent as `Authorization: Bearer …`; it is kept out of the configuration."""

    def __post_init__(self) -> None:
        check_service(f"reward `{self.url}`", self.url, self.concurrency, self.timeout, self.retries, self.backoff)
        if self.batch < 1:
            raise UserError(f"reward `{self.url}`: option `batch` is {self.batch}; expected at least 1")
        bearer(f"reward `{self.url}`", self.token_env, needed=True)

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
        headers = bearer(f"reward `{self.url}`", self.token_env, needed=True)
        service = Service(self.url, self.timeout, self.retries, self.backoff, headers=headers)
        try:
            found = ask_all(service, payloads, readers, self.concurrency)
        except AnswerError as error:
            raise RewardError(f"reward `{self.url}`: {error}: see to the scorer, then --resume") from error
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


def check_service(label: str, url: str, concurrency: int, timeout: float, retries: int, backoff: float) -> None:
    """UserError where the address or a number cannot be meant."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{label}: no address: {error}; expected http://HOST:PORT/PATH") from error
    if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
        raise UserError(f"{label}: {url!r} is no address; expected http://HOST:PORT/PATH")
    if parts.username or parts.password:
        raise UserError(
            f"{label}: the address holds a password, which every log would show: use an environment variable"
        )
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("backoff", backoff, 0)):
        if value < least:
            raise UserError(f"{label}: option `{name}` is {value:g}; expected at least {least}")
    if not timeout > 0:
        raise UserError(f"{label}: option `timeout` is {timeout:g}; expected seconds above 0")


def bearer(label: str, variable: str, needed: bool) -> dict[str, str]:
    """The header with the token that an environment variable holds; UserError where it is needed and not set."""
    token = os.environ.get(variable, "").strip() if variable else ""
    if variable and needed and not token:
        raise UserError(f"{label}: the environment variable {variable} is not set; it should hold the token")
    return {"Authorization": f"Bearer {token}"} if token else {}
