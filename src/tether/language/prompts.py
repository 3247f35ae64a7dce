"""Prompts: from the rows of a data set to the token ids that a policy continues.

Text prompts and chat messages, chat through the tokenizer's own template. Knows nothing of sampling or of rewards; all
columns of the data set travel with a prompt, for whoever needs them.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tether.chat import ChatOptions, ChatTemplate, Conversation, variables_of
from tether.episode import short_repr
from tether.errors import UserError
from tether.language.rows import Row, load_rows, plain_rows
from tether.tokens import encode_plain, tokenize_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Messages", "Prompt", "PromptsConfig", "load_prompts", "load_rows", "prompts_from_rows"]

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptsConfig(ChatOptions):
    """Which prompts to use, and how to read them."""

    path: str = ""
    """File (.jsonl, .json, .csv, also as .gz; .parquet), folder saved by `datasets`, or hub name (`name:config`)."""
    split: str = "train"
    """Split of a dataset folder or of a hub dataset."""
    column: str | None = None
    """Column with the prompt, as text or as a list of messages. Without it: `prompt`, else `messages`."""
    system: str | None = None
    """System message put before every conversation; needs a chat template."""
    template: str | None = None
    """Text prompt made of columns, for example "Question: {question}\\nAnswer:". Takes the place of `column`."""
    chat: bool = False
    """Wrap each text prompt as one user message through the chat template."""
    max_tokens: int | None = None
    """Longest prompt, in tokens. Without it: what the model's context leaves room for."""
    overlong: Literal["error", "skip"] = "error"
    """What happens to a prompt that is longer: stop with an error, or leave it out and say how many were."""


@dataclass(frozen=True, repr=False)
class Prompt:
    """One prompt, ready to be continued.

    Attributes:
        text: what the model reads, the chat template applied.
        token_ids: `text` in tokens; no eos that the tokenizer would append.
        source: what a reward gets as `prompts[i]`: the text, or the messages of a chat prompt (a `Conversation`, with
            the tools that its template read beside them).
        columns: every column of the row, the prompt's own included.
        row: 1-based row in the data set.
        file: the data set, as messages call it.
    """

    text: str
    token_ids: tuple[int, ...]
    source: str | Messages
    columns: dict[str, Any]
    row: int
    file: str = "prompts"

    @property
    def place(self) -> str:
        """Where it is from, for messages."""
        return f"{self.file}, row {self.row}"

    def __repr__(self) -> str:
        return f"Prompt({short_repr(self.text)}, {len(self.token_ids)} tokens, row {self.row})"


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None, reserve: int
) -> list[Prompt]:
    """Read, render and tokenise the prompts of the data set that `config.path` names.

    Args:
        config: which data set, and how to read it.
        tokenizer: the policy's; text prompts get its usual special tokens (BOS if it adds one and the text does not
            begin with it), chat prompts exactly those that its template writes.
        context_length: tokens that the model can see, None for a model without a limit.
        reserve: tokens of the context kept free for the response.

    Raises:
        UserError: the data, or one row of it, is not as `config` says. With `overlong="skip"` prompts that are too long
            are left out with a logged warning; it is an error when none is left.
    """
    return prompts_from_rows(load_rows(config.path, config.split), config, tokenizer, context_length, reserve)


def prompts_from_rows(
    rows: Sequence[Row],
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
    reserve: int,
) -> list[Prompt]:
    """The same from rows in memory, each a dict of columns; all else as in `load_prompts`."""
    rows = plain_rows(rows)
    if not rows:
        raise UserError("prompts: there are none; give at least one row")
    path = config.path or "prompts"
    room = _room(config, context_length, reserve)
    if config.template is not None and config.column is not None:
        raise UserError(
            "prompts: `column` and `template` are both set, but a template names its columns itself: drop one"
        )
    columns = list(rows[0])
    if config.template is not None:
        _check_template(config.template, columns, path)
        column = None
    else:
        column = _prompt_column(config, columns)
    sources = [_source(config, row, column, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    kinds = [isinstance(source, str) for source in sources]
    if any(kinds) != all(kinds):
        odd = kinds.index(not kinds[0])
        found, first = ("text", "a list of messages") if kinds[odd] else ("a list of messages", "text")
        raise UserError(f"{path}, row {odd + 1}: the prompt is {found}, but that of row 1 is {first}: use one form")
    if kinds[0]:
        if config.system is not None:
            raise UserError(
                "prompts.system is set, but the prompts are plain text: add `--prompts.chat`, or leave it out"
            )
        texts = [source for source in sources if isinstance(source, str)]
        token_ids = tokenize_text(tokenizer, texts, [f"{path}, row {number}" for number in range(1, len(rows) + 1)])
    else:
        texts = _render_chats(ChatTemplate(tokenizer, config, "prompts"), sources, path)
        token_ids = encode_plain(tokenizer, texts)
    prompts = [
        Prompt(text, tuple(ids), source, row, number, path)
        for number, (text, ids, source, row) in enumerate(zip(texts, token_ids, sources, rows, strict=True), start=1)
    ]
    for prompt in prompts:
        if not prompt.token_ids:
            raise UserError(f"{path}, row {prompt.row}: the tokenizer makes no token of the prompt {prompt.text!r}")
    return _fitting(prompts, config, path, room, context_length, reserve)


def _room(config: PromptsConfig, context_length: int | None, reserve: int) -> int | None:
    """Tokens that a prompt may have; None for no limit."""
    if config.max_tokens is not None and config.max_tokens < 1:
        raise UserError(f"prompts.max_tokens is {config.max_tokens}; expected at least 1")
    if config.overlong not in ("error", "skip"):
        raise UserError(f"prompts.overlong is {config.overlong!r}; expected `error` or `skip`")
    if context_length is None:
        return config.max_tokens
    if context_length - reserve < 1:
        raise UserError(
            f"sampling.max_new_tokens is {reserve}, which leaves no room for a prompt in the model's context of "
            f"{context_length} tokens: lower max_new_tokens"
        )
    room = context_length - reserve
    return room if config.max_tokens is None else min(room, config.max_tokens)


def _prompt_column(config: PromptsConfig, columns: Sequence[str]) -> str:
    listed = ", ".join(columns)
    if config.column is not None:
        if config.column not in columns:
            raise UserError(f"{config.path}: no column `{config.column}` (prompts.column); it has: {listed}")
        return config.column
    for name in ("prompt", "messages"):
        if name in columns:
            return name
    raise UserError(
        f"{config.path}: no column `prompt` or `messages`; it has: {listed}: name the one to use, as in "
        f"`--prompts.column {columns[0]}`, or write `--prompts.template`"
    )


def _template_columns(template: str) -> list[str]:
    """The columns that a `str.format` template names; ValueError where it is malformed."""
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    return [field.split(".")[0].split("[")[0] for field in fields]


def _check_template(template: str, columns: Sequence[str], path: str) -> None:
    try:
        names = _template_columns(template)
    except ValueError as error:
        raise UserError(f"prompts.template: {error}: write {{{{ and }}}} for braces that are meant as such") from error
    if not names:
        raise UserError("prompts.template names no column; expected at least one, as in `Question: {question}`")
    for name in names:
        if name not in columns:
            raise UserError(f"prompts.template: names the column `{name}`, but {path} has: {', '.join(columns)}")


def _source(config: PromptsConfig, row: Row, column: str | None, where: str) -> str | Messages:
    """The prompt as a reward will see it: text, or messages."""
    if column is None:
        assert config.template is not None
        for name in _template_columns(config.template):
            if row[name] is None:
                raise UserError(f"{where}: column `{name}`, which prompts.template names, is null or missing")
        try:
            value: object = config.template.format(**row)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{where}: prompts.template cannot be filled: {type(error).__name__}: {error}") from error
        field = "the prompt made by prompts.template"
    else:
        value, field = row[column], f"column `{column}`"
    if isinstance(value, list):
        return Conversation(_messages(config, value, where, field), variables_of(row, where))
    if not isinstance(value, str):
        found = "null or missing" if value is None else f"{type(value).__name__} ({value!r:.40})"
        raise UserError(f"{where}: {field} is {found}; expected text or a list of messages")
    _check_text(value, where, field)
    if not config.chat:
        return value
    return Conversation(_messages(config, [{"role": "user", "content": value}], where, field), variables_of(row, where))


def _check_text(text: str, where: str, field: str) -> None:
    if not text.strip():
        raise UserError(f"{where}: {field} is empty; expected a prompt")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer can read
        raise UserError(f"{where}: {field} holds {text[error.start]!r}, half of a surrogate pair, not text") from error


def _messages(config: PromptsConfig, messages: list[Any], where: str, field: str) -> Messages:
    """The conversation, checked: roles and text contents, the last turn not the assistant's."""
    if not messages:
        raise UserError(f"{where}: {field} is an empty list; expected at least one message")
    checked: Messages = []
    for number, message in enumerate(messages, start=1):
        place = f"{field}, message {number}"
        if not isinstance(message, dict):
            raise UserError(
                f"{where}: {place} is {type(message).__name__}; expected an object with `role` and `content`"
            )
        for key in ("role", "content"):
            if message.get(key) is None:
                if key == "content" and message.get("role") == "assistant" and message.get("tool_calls"):
                    continue  # a call is all that the message says
                raise UserError(f"{where}: {place} has no `{key}`; it has: {', '.join(map(str, message)) or 'nothing'}")
            if not isinstance(message[key], str):
                raise UserError(f"{where}: {place}: `{key}` is {type(message[key]).__name__}; expected text")
        # Columns saved by `datasets` hold every key that any message has, null where this one lacks it.
        checked.append({key: value for key, value in message.items() if value is not None})
    last = checked[-1]
    if last["role"] == "assistant":
        raise UserError(
            f"{where}: {field} ends with an assistant turn, but that turn is what the policy writes: "
            "leave the last message out of the prompt (a column of its own can hold it for the reward)"
        )
    for number, message in enumerate(checked, start=1):
        if message is last or message["role"] == "user":
            _check_text(message["content"], where, f"{field}, message {number}")
    if config.system is None:
        return checked
    if checked[0]["role"] == "system":
        raise UserError(f"{where}: {field} begins with a system message, and prompts.system is set too: leave one out")
    return [{"role": "system", "content": config.system}, *checked]


def _render_chats(chat: ChatTemplate, sources: Sequence[str | Messages], path: str) -> list[str]:
    if chat.missing:
        raise UserError(
            f"{path}: the prompts are chat messages, but the tokenizer of {chat.tokenizer.name_or_path or 'the model'} "
            "has no chat template: use an instruction-tuned model's tokenizer, a template of your own "
            "(`--prompts.chat-template FILE`), or text prompts (`--prompts.template`)"
        )
    return [
        chat.render(messages, f"{path}, row {number}", generation_prompt=True)
        for number, messages in enumerate(sources, start=1)
        if not isinstance(messages, str)
    ]


def _fitting(
    prompts: list[Prompt],
    config: PromptsConfig,
    path: str,
    room: int | None,
    context_length: int | None,
    reserve: int,
) -> list[Prompt]:
    """The prompts with at most `room` tokens; the others are an error, or are left out and counted."""
    if room is None:
        return prompts
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= room]
    if len(fitting) == len(prompts):
        return prompts
    if context_length is not None and room == context_length - reserve:
        limit = f"the model's context of {context_length} less max_new_tokens ({reserve}) leaves room for {room}"
        remedy = "lower max_new_tokens"
    else:
        limit, remedy = f"prompts.max_tokens is {room}", "raise prompts.max_tokens"
    if config.overlong == "error":
        first = next(prompt for prompt in prompts if len(prompt.token_ids) > room)
        raise UserError(
            f"{path}, row {first.row}: the prompt has {len(first.token_ids)} tokens, but {limit}: shorten it, "
            f"{remedy}, or leave such prompts out with `--prompts.overlong skip`"
        )
    if not fitting:
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise UserError(
            f"{path}: every one of the {len(prompts)} prompts is too long (the shortest has {shortest} tokens), "
            f"as {limit}: {remedy}, or bring shorter prompts"
        )
    skipped = len(prompts) - len(fitting)
    logger.warning("%s: skipped %d of %d prompts: %s tokens", path, skipped, len(prompts), limit)
    return fitting
