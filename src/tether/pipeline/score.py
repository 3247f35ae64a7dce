"""`tether score`: what a reward model says of the responses in a file, as a column more.

Knows nothing of how the responses were made or of how the model was trained.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from tether.chat import ChatOptions, Conversation, variables_of
from tether.errors import UserError
from tether.language.preferences import response_to, warn_of_repeats
from tether.language.rows import Row, load_rows
from tether.pipeline.generate import check_output, open_rows, write_row
from tether.pipeline.opening_language import describe_policy
from tether.pipeline.progress import Tally
from tether.rewards.models import RewardModel
from tether.uncertainty import rounded, with_error

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1024  # scored together, so that texts of about equal lengths meet; written as they come
RESPONSES = ("response", "completion")


@dataclass(frozen=True)
class ScoreConfig(ChatOptions):
    """Scores of a reward model for the responses in a file."""

    model: str = ""
    """Folder or hub name of a reward model, or folder of an ensemble."""
    data: str = ""
    """Rows: file (.jsonl, .json, .csv, also as .gz; .parquet), folder saved by `datasets`, or hub name."""
    split: str = "train"
    """Split of a dataset folder or of a hub dataset."""
    output: str = ""
    """JSONL file for the rows with their scores."""
    overwrite: bool = False
    """Replace a file that is already there."""
    prompt_column: str = "prompt"
    """Column with the prompt, text or messages."""
    response_column: str | None = None
    """Column with the response, text or messages. None: `response`, else `completion`."""
    column: str = "score"
    """Column for the score."""
    combine: Literal["mean", "min", "mean-std"] = "mean"
    """Score of an ensemble: mean, min, or mean less `k` standard deviations (Coste et al. 2023)."""
    k: float = 1.0
    """Standard deviations that `mean-std` takes off."""
    normalise: bool = True
    """Mean 0 and standard deviation 1 on the samples that the model was normalised on. Off: raw scores."""
    truncate: bool = False
    """Texts longer than the model's context lose their beginning. Off: they are an error."""
    microbatch_tokens: int = 8192
    """Tokens (padding included) that go through the model at once."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's parameters."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""

    def __post_init__(self) -> None:
        if not self.column:
            raise ValueError("column is empty, expected a name")
        if self.microbatch_tokens < 1:
            raise ValueError(f"microbatch_tokens is {self.microbatch_tokens}, expected 1 or more")
        if not 0 <= self.k < math.inf:
            raise ValueError(f"k is {self.k}, expected 0 or more")


def score(config: ScoreConfig, show: bool = True) -> list[float]:
    """Score every row, write the rows with the scores, and return these.

    Raises:
        UserError: names the folder, file, row or field that cannot be used.
        RewardError: a text does not fit the model.
    """
    if not config.output:
        raise UserError("no output given: name a JSONL file with --output")
    rows, response = _rows(config)
    check_output(config.output, config.overwrite)
    logger.info("loading %s", config.model or "the reward model")
    model = RewardModel(
        config.model,
        config.combine,
        config.k,
        config.normalise,
        config.truncate,
        config.dtype,
        config.device,
        config.microbatch_tokens,
        config.trust_remote_code,
        config,
    )
    members = "" if len(model.members) == 1 else f"{len(model.members)} members, each "
    logger.info("%s%s", members, describe_policy(model.members[0], config.model))
    tally = Tally(len(rows), "responses")
    parts: list[tuple[list[Row], list[Any], list[Any], list[str]]] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE]
        names = [f"{config.data}, row {start + number}" for number in range(1, len(part) + 1)]
        prompts = [_prompt(row, config.prompt_column, name) for row, name in zip(part, names, strict=True)]
        answers = [
            response_to(prompt, row[response], name) for prompt, row, name in zip(prompts, part, names, strict=True)
        ]
        parts.append((part, prompts, answers, names))
    for _, *texts in parts:
        model.tokens(*texts)  # a text that does not fit is found before the first is scored
    scores: list[float] = []
    with open_rows(config.output, config.overwrite) as file:
        assert file is not None  # a path was given
        for part, *texts in parts:
            found = model.score(*texts)
            for row, value in zip(part, found, strict=True):
                write_row(file, row | {config.column: value})
            scores += found
            tally.update(len(scores))
    if show:
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan
        error = spread / math.sqrt(len(scores))
        mean = with_error(statistics.fmean(scores), error)
        text = f"{len(scores):,} scores, mean {mean}, standard deviation {rounded(spread, error)}: {config.output}"
        Console(highlight=False, soft_wrap=True).print(text, markup=False)
    return scores


def _prompt(row: Row, column: str, name: str) -> Any:
    """The prompt of a row, messages with what their template reads beside them."""
    value = row[column]
    return value if isinstance(value, str) else Conversation(value, variables_of(row, name))


def _rows(config: ScoreConfig) -> tuple[list[Row], str]:
    """The rows, each with text or messages in its columns, and the name of the column with responses."""
    rows = load_rows(config.data, config.split)
    response = config.response_column or next((name for name in RESPONSES if name in rows[0]), RESPONSES[0])
    for name in (config.prompt_column, response):
        if name not in rows[0]:
            raise UserError(
                f"{config.data}: no column `{name}`; it has: {', '.join(rows[0])}: name yours, as in "
                "`--prompt-column question --response-column answer`"
            )
    if config.column in rows[0] and not config.overwrite:
        raise UserError(
            f"{config.data}: has a column `{config.column}`: name another with --column, or set `overwrite`"
        )
    for number, row in enumerate(rows, start=1):
        place = f"{config.data}, row {number}"
        _check(row[config.prompt_column], f"{place}: column `{config.prompt_column}`")
        _check(row[response], f"{place}: column `{response}`")
        if isinstance(row[config.prompt_column], str) and not isinstance(row[response], str):
            raise UserError(f"{place}: `{config.prompt_column}` is text and `{response}` messages; expected one form")
        response_to(row[config.prompt_column], row[response], f"{place}: column `{response}`")
    texts = [(row[config.prompt_column], row[response]) for row in rows]
    if all(isinstance(text, str) for pair in texts for text in pair):
        warn_of_repeats(texts, [f"{config.data}, row {number}" for number in range(1, len(rows) + 1)], response)
    return rows, response


def _check(value: Any, place: str) -> None:
    """Text, or messages with contents."""
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not value:
        found = "null or missing" if value is None else f"{type(value).__name__} ({value!r:.40})"
        raise UserError(f"{place} is {found}; expected text or a list of messages")
    for number, message in enumerate(value, start=1):
        role, content = (message.get(n) if isinstance(message, Mapping) else None for n in ("role", "content"))
        called = content is None and role == "assistant" and message.get("tool_calls")  # a call alone is enough
        if not isinstance(role, str) or not (isinstance(content, str) or called):
            raise UserError(f"{place}, message {number}: expected `role` and `content`, both text")
