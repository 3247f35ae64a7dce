"""Turns rows of text or chat into tokenized samples with their targets: what supervised fine-tuning learns from.

Three forms of a row: `prompt` + `completion`, `messages`, `text`. Knows tokenizers and chat templates; nothing of
files, models or training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tether.errors import UserError
from tether.language.packing import TokenizedSamples
from tether.language.prompts import tokenize_text
from tether.pipeline.supervised import fate_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RowFormat:
    """How a row of training data is read."""

    kind: Literal["prompt", "messages", "text"] | None = None
    """Form of the rows: prompt and completion, messages, or text. None: the first of these whose columns there are."""
    prompt_column: str = "prompt"
    """Column with what the model reads, as text or as a list of messages."""
    completion_column: str = "completion"
    """Column with what it learns to answer, in the same form."""
    messages_column: str = "messages"
    """Column with whole conversations; every message of the assistant is learned."""
    text_column: str = "text"
    """Column with text of which everything is learned."""
    template: str | None = None
    """Prompt made of columns, for example "Question: {question}\\nAnswer:". Takes the place of `prompt_column`."""
    system: str | None = None
    """System message put before every conversation that has none; needs a chat template."""
    chat: bool = False
    """Wrap text prompts and completions as messages of the user and the assistant through the chat template."""

    def columns(self, kind: str) -> tuple[str, ...]:
        """The columns that a row of this kind needs."""
        return {
            "prompt": (() if self.template is not None else (self.prompt_column,)) + (self.completion_column,),
            "messages": (self.messages_column,),
            "text": (self.text_column,),
        }[kind]


@dataclass(frozen=True)
class TokenizedRows:
    """Samples, and what became of the rows that were too long."""

    samples: TokenizedSamples
    skipped: int
    truncated: int


@dataclass(frozen=True)
class _Sample:
    token_ids: list[int]
    is_target: list[bool]


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    row_format: RowFormat,
    max_tokens: int,
    overlong: Literal["error", "skip", "truncate"] = "error",
    origin: str = "rows",
) -> TokenizedRows:
    """Tokenize rows; only responses are targets (in `text` rows everything is), the eos that ends them included.

    Args:
        rows: dicts from column to value.
        tokenizer: the model's.
        row_format: which columns to read, and how.
        max_tokens: longest sample, eos included.
        overlong: what to do with a longer one. `truncate` cuts its end off, so that it does not learn eos.
        origin: the rows' name in messages, such as their file.

    Raises:
        UserError: names the row (counted from 1) that cannot be read, has no target, or is too long.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, expected one to end responses with: set its `eos_token`")
    if not rows:
        raise UserError(f"{origin}: no rows, expected at least one")
    kind = row_format.kind or _detect(rows[0], row_format, origin)
    _check_columns(rows, row_format.columns(kind), origin)
    if kind == "text":
        samples = _text_samples(rows, tokenizer, row_format, origin)
    elif kind == "messages":
        samples = [
            _conversation(_messages(row[row_format.messages_column], row_format, place), 0, tokenizer, place)
            for place, row in _places(rows, origin)
        ]
    else:
        samples = _prompt_samples(rows, tokenizer, row_format, origin)
    return _bound(samples, max_tokens, overlong, origin)


def _places(rows: Sequence[Row], origin: str) -> list[tuple[str, Row]]:
    return [(f"{origin}, row {number}", row) for number, row in enumerate(rows, 1)]


def _detect(row: Row, row_format: RowFormat, origin: str) -> str:
    for kind in ("prompt", "messages", "text"):
        if all(column in row for column in row_format.columns(kind)):
            return kind
    expected = f"`{row_format.prompt_column}` and `{row_format.completion_column}`, `{row_format.messages_column}` or "
    raise UserError(
        f"{origin}, row 1: found the columns {', '.join(sorted(row)) or 'none'}, expected {expected}"
        f"`{row_format.text_column}`: name yours, as in `--rows.prompt-column question --rows.completion-column answer`"
    )


def _check_columns(rows: Sequence[Row], columns: Sequence[str], origin: str) -> None:
    for place, row in _places(rows, origin):
        for column in columns:
            if row.get(column) is None:
                found = "an empty value" if column in row else f"the columns {', '.join(sorted(row)) or 'none'}"
                raise UserError(f"{place}: found {found}, expected a value in the column `{column}`")


# ---- text ----


def _require_text(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: `{column}` holds {type(value).__name__}, expected text")
    return value


def _text_samples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, origin: str
) -> list[_Sample]:
    column = row_format.text_column
    texts = [_require_text(row[column], column, place) for place, row in _places(rows, origin)]
    eos = tokenizer.eos_token_id
    encoded = [_with_eos(ids, eos) for ids in tokenize_text(tokenizer, texts)]
    return [_Sample(ids, [True] * len(ids)) for ids in encoded]


def _with_eos(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


# ---- prompt and completion ----


def _prompt_samples(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, row_format: RowFormat, origin: str
) -> list[_Sample]:
    samples: list[_Sample | None] = []
    texts: list[tuple[str, str]] = []
    for place, row in _places(rows, origin):
        completion = row[row_format.completion_column]
        if row_format.template is None:
            prompt = row[row_format.prompt_column]
        else:
            prompt = _fill_template(row_format.template, row, place)
        if row_format.chat:
            asked = _require_text(prompt, row_format.prompt_column, place)
            answered = _require_text(completion, row_format.completion_column, place)
            prompt, completion = [{"role": "user", "content": asked}], [{"role": "assistant", "content": answered}]
        if isinstance(prompt, str) and isinstance(completion, str):
            if row_format.system is not None:
                raise UserError(f"{place}: `system` needs chat, found a text prompt: set `chat`")
            samples.append(None)
            texts.append((prompt, completion))
            continue
        if isinstance(prompt, str) or isinstance(completion, str):
            raise UserError(
                f"{place}: `{row_format.prompt_column}` holds {type(prompt).__name__} and "
                f"`{row_format.completion_column}` {type(completion).__name__}, expected two texts or two message lists"
            )
        before = _messages(prompt, row_format, f"{place}, column `{row_format.prompt_column}`")
        after = _check_messages(completion, f"{place}, column `{row_format.completion_column}`")
        samples.append(_conversation([*before, *after], len(before), tokenizer, place))
    of_text = iter(_join([p for p, _ in texts], [c for _, c in texts], tokenizer))
    return [next(of_text) if sample is None else sample for sample in samples]


def _join(prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[_Sample]:
    """Prompt and completion as one sequence that starts with exactly the ids that generation would read.

    The two are tokenized together, as they would stand in running text. Where that merges characters across the
    boundary, and so changes the prompt's ids, the completion is tokenized by itself.
    """
    if not prompts:
        return []
    prompt_ids = tokenize_text(tokenizer, prompts)
    joint_ids = tokenize_text(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    merged = [i for i, ids in enumerate(prompt_ids) if joint_ids[i][: len(ids)] != ids]
    if merged:
        alone = tokenize_text(tokenizer, [completions[i] for i in merged], special_tokens=False)
        for i, ids in zip(merged, alone, strict=True):
            joint_ids[i] = prompt_ids[i] + ids
    samples, eos = [], tokenizer.eos_token_id
    for before, ids in zip(prompt_ids, joint_ids, strict=True):
        whole = _with_eos(ids, eos) if len(ids) > len(before) else [*ids, eos]
        samples.append(_Sample(whole, [False] * len(before) + [True] * (len(whole) - len(before))))
    return samples


def _fill_template(template: str, row: Row, place: str) -> str:
    try:
        return template.format(**row)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{place}: the template {template!r} cannot be filled ({type(error).__name__}: {error}), "
            f"expected only the columns {', '.join(sorted(row))}"
        ) from error


# ---- chat ----


def _check_messages(value: Any, place: str) -> list[dict[str, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{place}: found {type(value).__name__}, expected a list of messages with at least one in it")
    for number, message in enumerate(value, 1):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise UserError(
                f"{place}, message {number}: found {_shorten(message)}, expected `role` and `content`, both text"
            )
    return [dict(message) for message in value]


def _messages(value: Any, row_format: RowFormat, place: str) -> list[dict[str, str]]:
    messages = _check_messages(value, place)
    if row_format.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": row_format.system}, *messages]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _conversation(
    messages: list[dict[str, str]], first_learned: int, tokenizer: PreTrainedTokenizerBase, place: str
) -> _Sample:
    """One conversation; the assistant's messages from index `first_learned` on are the targets."""
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first_learned]
    if not learned:
        raise UserError(f"{place}: no message of the assistant to learn, expected at least one")
    _require_chat_template(tokenizer, place)
    marked = re.search(r"{%-?\s*generation\s*-?%}", tokenizer.get_chat_template()) is not None
    # The template's marks say which tokens are the assistant's, not which message they belong to.
    if marked and learned == [i for i, m in enumerate(messages) if m["role"] == "assistant"]:
        rendered = _render(messages, tokenizer, place, return_assistant_tokens_mask=True)
        ids, is_target = rendered["input_ids"], [bool(flag) for flag in rendered["assistant_masks"]]
        if not any(is_target):
            raise UserError(f"{place}: the chat template marks no token as the assistant's, expected some")
    else:
        ids, is_target = _targets_by_prefixes(messages, learned, tokenizer, place)
    return _end_turns_with_eos(list(ids), is_target, tokenizer.eos_token_id)


def _render_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Token ids of a conversation that the assistant is to go on with."""
    _require_chat_template(tokenizer, place)
    return list(_render(messages, tokenizer, place, add_generation_prompt=True)["input_ids"])


def _require_chat_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    if not tokenizer.chat_template:
        raise UserError(f"{place}: messages need a chat template; the tokenizer has none: use plain text, or set one")


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, place: str, **options: bool
) -> Mapping[str, list[int]]:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except TemplateError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{place}: the chat template refuses these messages: {detail}") from error


def _targets_by_prefixes(
    messages: list[dict[str, str]], learned: list[int], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[bool]]:
    """A turn's tokens are those between the prompt that generation would read and the end of the turn."""
    ids = list(_render(messages, tokenizer, place)["input_ids"])
    is_target = [False] * len(ids)
    for i in learned:
        if i == 0:
            raise UserError(f"{place}: the first message is the assistant's, expected one of the user or the system")
        before = _render_prompt(messages[:i], tokenizer, place)
        last = i == len(messages) - 1
        through = ids if last else list(_render(messages[: i + 1], tokenizer, place)["input_ids"])
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise UserError(
                f"{place}, message {i + 1}: the chat template renders the conversation up to here differently once it "
                "goes on, so the assistant's tokens cannot be told: mark them with {% generation %} in the template"
            )
        is_target[len(before) : len(through)] = [True] * (len(through) - len(before))
    return ids, is_target


def _end_turns_with_eos(ids: list[int], is_target: list[bool], eos: int) -> _Sample:
    """Every turn's targets end with its eos; the last turn gets one when the template writes none."""
    position = 0
    while position < len(ids):
        if not is_target[position]:
            position += 1
            continue
        end = position
        while end < len(ids) and is_target[end]:
            end += 1
        if eos in ids[position:end]:
            # What follows eos, such as the line break of ChatML, is never generated.
            last = max(i for i in range(position, end) if ids[i] == eos)
            is_target[last + 1 : end] = [False] * (end - last - 1)
        elif end < len(ids) and ids[end] == eos:
            is_target[end] = True
            end += 1
        elif not any(is_target[end:]):
            # The turn ends with another token than eos: learn to write that too, then eos.
            return _Sample([*ids, eos], is_target[:end] + [True] * (len(ids) + 1 - end))
        position = end
    length = max(i for i, flag in enumerate(is_target) if flag) + 1
    return _Sample(ids[:length], is_target[:length])


# ---- length ----


def _bound(samples: Sequence[_Sample], max_tokens: int, overlong: str, origin: str) -> TokenizedRows:
    kept: list[_Sample] = []
    skipped = truncated = 0
    for number, sample in enumerate(samples, 1):
        place = f"{origin}, row {number}"
        fate = fate_of(place, len(sample.token_ids), max_tokens, overlong)
        if fate == "skip":
            skipped += 1
            continue
        if fate == "truncate":
            truncated += 1
            sample = _Sample(sample.token_ids[:max_tokens], sample.is_target[:max_tokens])
        if not any(sample.is_target[1:]):
            cut = f" in its first {max_tokens} tokens" if fate == "truncate" else ""
            raise UserError(f"{place}: nothing to learn{cut}, expected a response")
        kept.append(sample)
    if not kept:
        raise UserError(f"{origin}: all {skipped} rows are longer than {max_tokens} tokens: raise `max_tokens`")
    tokenized = TokenizedSamples.from_lists([s.token_ids for s in kept], [s.is_target for s in kept])
    return TokenizedRows(tokenized, skipped, truncated)
