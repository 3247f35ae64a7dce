"""Turns rows of text or chat into tokenized samples with their targets: what supervised fine-tuning learns from.

Three forms of a row: `prompt` + `completion`, `messages`, `text`. Knows tokenizers and chat templates; nothing of
files, models or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tether.chat import ChatOptions, ChatTemplate, Conversation, variables_of
from tether.errors import UserError
from tether.language.packing import TokenizedSamples
from tether.language.preferences import answer_to, warn_of_repeats
from tether.language.rows import plain_rows
from tether.pipeline.supervised import fate_of
from tether.tokens import shared_length, tokenize_behind, tokenize_text

Row = Mapping[str, Any]
Turns = Literal["all", "last", "each"]


@dataclass(frozen=True)
class RowFormat(ChatOptions):
    """How a row of training data is read."""

    kind: Literal["prompt", "messages", "text"] | None = None
    """Form of the rows: prompt and completion, messages, or text. None: the first of these whose columns there are."""
    prompt_column: str = "prompt"
    """Column with what the model reads, as text or as a list of messages."""
    completion_column: str = "completion"
    """Column with what it learns to answer, in the same form."""
    messages_column: str = "messages"
    """Column with whole conversations; `turns` says which messages of the assistant are learned."""
    text_column: str = "text"
    """Column with text of which everything is learned."""
    template: str | None = None
    """Prompt made of columns, for example "Question: {question}\\nAnswer:". Takes the place of `prompt_column`."""
    system: str | None = None
    """System message put before every conversation that has none; needs a chat template."""
    chat: bool = False
    """Wrap text prompts and completions as messages of the user and the assistant through the chat template."""
    turns: Turns = "all"
    """Answers of a conversation that are learned: all of them in one sample, the last alone, or each in a sample of its
    own that ends with it. The last two are for templates that render a turn otherwise once the conversation goes on,
    such as those that leave out what was thought earlier (Qwen3, DeepSeek, gpt-oss)."""

    def columns(self, kind: str) -> tuple[str, ...]:
        """The columns that a row of this kind needs."""
        return {
            "prompt": (() if self.template is not None else (self.prompt_column,)) + (self.completion_column,),
            "messages": (self.messages_column,),
            "text": (self.text_column,),
        }[kind]


@dataclass(frozen=True)
class TokenizedRows:
    """Samples, the row (from 0) that each is of, and how many were too long."""

    samples: TokenizedSamples
    rows: list[int]
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
    rows = plain_rows(rows)
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token, expected one to end responses with: set its `eos_token`")
    if not rows:
        raise UserError(f"{origin}: no rows, expected at least one")
    kind = row_format.kind or _detect(rows[0], row_format, origin)
    _check_columns(rows, row_format.columns(kind), origin)
    chat = ChatTemplate(tokenizer, row_format, "rows")
    if kind == "text":
        samples = [[sample] for sample in _text_samples(rows, tokenizer, row_format, origin)]
    elif kind == "messages":
        samples = []
        for place, row in _places(rows, origin):
            messages = _messages(row[row_format.messages_column], row_format, place)
            conversation = Conversation(messages, variables_of(row, place))
            samples.append(_conversations(conversation, 0, chat, row_format.turns, place))
    else:
        samples = _prompt_samples(rows, chat, row_format, origin)
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
    encoded = tokenize_text(tokenizer, texts, [place for place, _ in _places(rows, origin)])
    ended = [_with_eos(ids, tokenizer) for ids in encoded]
    return [_Sample(ids, [True] * len(ids)) for ids in ended]


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids`, ended by eos; white space after an eos of their own, as templates write it, is never generated."""
    eos = tokenizer.eos_token_id
    if eos in ids:
        last = len(ids) - 1 - ids[::-1].index(eos)
        if not tokenizer.decode(ids[last + 1 :]).strip():
            return ids[: last + 1]
    return [*ids, eos]


# ---- prompt and completion ----


def _prompt_samples(rows: Sequence[Row], chat: ChatTemplate, row_format: RowFormat, origin: str) -> list[list[_Sample]]:
    samples: list[list[_Sample] | None] = []
    texts: list[tuple[str, str]] = []
    text_places: list[str] = []
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
            text_places.append(place)
            continue
        if isinstance(prompt, str) or isinstance(completion, str):
            raise UserError(
                f"{place}: `{row_format.prompt_column}` holds {type(prompt).__name__} and "
                f"`{row_format.completion_column}` {type(completion).__name__}, expected two texts or two message lists"
            )
        before = _messages(prompt, row_format, f"{place}, column `{row_format.prompt_column}`")
        after = _check_messages(completion, f"{place}, column `{row_format.completion_column}`")
        after = answer_to(before, after, f"{place}, column `{row_format.completion_column}`")
        conversation = Conversation([*before, *after], variables_of(row, place))
        samples.append(_conversations(conversation, len(before), chat, row_format.turns, place))
    warn_of_repeats(texts, text_places, row_format.completion_column)
    of_text = iter(_join([p for p, _ in texts], [c for _, c in texts], chat.tokenizer, text_places))
    return [[next(of_text)] if sample is None else sample for sample in samples]


def _join(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, places: Sequence[str]
) -> list[_Sample]:
    """Prompt and completion as one sequence that starts with exactly the ids that generation would read.

    The two are tokenized together, as they would stand in running text. Where that merges characters across the
    boundary, and so changes the prompt's ids, the completion is tokenized by itself.
    """
    if not prompts:
        return []
    prompt_ids = tokenize_text(tokenizer, prompts, places)
    joint_ids = tokenize_text(tokenizer, [p + c for p, c in zip(prompts, completions, strict=True)])
    merged = [i for i, ids in enumerate(prompt_ids) if joint_ids[i][: len(ids)] != ids]
    if merged:
        alone = tokenize_behind(tokenizer, [completions[i] for i in merged])
        for i, ids in zip(merged, alone, strict=True):
            joint_ids[i] = prompt_ids[i] + ids
    samples = []
    for before, ids in zip(prompt_ids, joint_ids, strict=True):
        whole = [*before, *_with_eos(ids[len(before) :], tokenizer)]
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


def _check_messages(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{place}: found {type(value).__name__}, expected a list of messages with at least one in it")
    checked = []
    for number, message in enumerate(value, 1):
        role, content = (message.get(key) if isinstance(message, Mapping) else None for key in ("role", "content"))
        called = content is None and role == "assistant" and bool(message.get("tool_calls"))  # a call alone is enough
        if not (isinstance(content, str) or called) or not isinstance(role, str):
            raise UserError(
                f"{place}, message {number}: found {_shorten(message)}, expected `role` and `content`, both text"
            )
        # Columns saved by `datasets` hold every key that any message has, null where this one lacks it.
        checked.append({key: part for key, part in message.items() if part is not None})
    return checked


def _messages(value: Any, row_format: RowFormat, place: str) -> list[dict[str, Any]]:
    messages = _check_messages(value, place)
    if row_format.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": row_format.system}, *messages]


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _conversations(
    messages: Conversation, first_learned: int, chat: ChatTemplate, turns: Turns, place: str
) -> list[_Sample]:
    """The samples of one conversation, of whose answers from index `first_learned` on `turns` are learned."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    learned = [i for i in answers if i >= first_learned]
    if not learned:
        raise UserError(f"{place}: no message of the assistant to learn, expected at least one")
    if chat.missing:
        raise UserError(f"{place}: messages need a chat template; the tokenizer has none: use plain text, or set one")
    if turns == "all":
        return [_conversation(messages, learned, chat, place)]
    chosen = learned[-1:] if turns == "last" else learned
    parts = [(Conversation(messages[: i + 1], messages.variables), [i]) for i in chosen]
    return [_conversation(part, answer, chat, place) for part, answer in parts]


def _conversation(messages: Conversation, learned: list[int], chat: ChatTemplate, place: str) -> _Sample:
    """One sample; the messages at the indices `learned` are its targets."""
    ids, is_target = _marked_targets(messages, learned, chat, place) or _targets_by_prefixes(
        messages, learned, chat, place
    )
    return _end_turns_with_eos(ids, is_target, chat.tokenizer.eos_token_id)


def _marked_targets(
    messages: Conversation, learned: list[int], chat: ChatTemplate, place: str
) -> tuple[list[int], list[bool]] | None:
    """The tokens that the template marks as the assistant's; None where it marks none, or not message by message."""
    if not chat.marks_answers(messages, place):
        return None
    ids, is_target = chat.marked_tokens(messages, place)
    if not any(is_target):
        raise UserError(f"{place}: the chat template marks no token as the assistant's, expected some")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if learned == answers:
        return ids, is_target
    begins = [i for i, flag in enumerate(is_target) if flag and not (i and is_target[i - 1])]
    if len(begins) != len(answers):
        return None
    for answer, start, end in zip(answers, begins, [*begins[1:], len(ids)], strict=True):
        if answer not in learned:
            is_target[start:end] = [False] * (end - start)
    return ids, is_target


def _targets_by_prefixes(
    messages: Conversation, learned: list[int], chat: ChatTemplate, place: str
) -> tuple[list[int], list[bool]]:
    """A turn's tokens are those between the prompt that generation would read and the end of the turn."""
    ids = chat.tokens(messages, place)
    is_target = [False] * len(ids)
    for i in learned:
        if i == 0:
            raise UserError(f"{place}: the first message is the assistant's, expected one of the user or the system")
        before = chat.tokens(Conversation(messages[:i], messages.variables), place, generation_prompt=True)
        through, end = ids, len(ids)
        if i < len(messages) - 1:
            through = chat.tokens(Conversation(messages[: i + 1], messages.variables), place)
            end = _turn_end(ids, through, chat.tokenizer)
        if ids[: len(before)] != before or end <= len(before):
            goes_on = through is not ids and through[: len(before)] == before
            raise UserError(f"{place}, message {i + 1}: {_why_refused(through, before, goes_on, chat)}")
        is_target[len(before) : end] = [True] * (end - len(before))
    return ids, is_target


def _turn_end(ids: list[int], through: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Where in `ids` the turn ends that `through` ends with; 0 where they differ before that.

    Some templates write eos after the last turn alone (Phi-3): a turn that has an end of its own ends before it.
    """
    if ids[: len(through)] == through:
        return len(through)
    shorter = through[:-1]
    if through[-1:] != [tokenizer.eos_token_id] or ids[: len(shorter)] != shorter:
        return 0
    last = next((token for token in reversed(shorter) if tokenizer.decode([token]).strip()), None)
    return len(shorter) if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder else 0


def _why_refused(ids: list[int], before: list[int], goes_on: bool, chat: ChatTemplate) -> str:
    if goes_on:
        return (
            "the chat template renders the conversation up to here differently once it goes on, so the assistant's "
            "tokens cannot be told: learn the last answer alone (`--rows.turns last`), or each as an example of its "
            "own (`--rows.turns each`), or mark them with {% generation %} in the template"
        )
    same = shared_length(ids, before)
    asked = chat.tokenizer.decode(before[max(0, same - 4) :], clean_up_tokenization_spaces=False)
    answered = chat.tokenizer.decode(ids[max(0, same - 4) : same + 8], clean_up_tokenization_spaces=False)
    return (
        f"the chat template asks for an answer with {asked[-60:]!r}, but renders this one as {answered[:60]!r}: change "
        "the template (`--rows.chat-template FILE`) or its variables (`--rows.chat-template-kwargs`), or mark the "
        "answer with {% generation %} in it"
    )


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


def _bound(samples: Sequence[Sequence[_Sample]], max_tokens: int, overlong: str, origin: str) -> TokenizedRows:
    """The samples of each row, one after another, less those that are too long."""
    kept: list[_Sample] = []
    rows: list[int] = []
    skipped = truncated = 0
    for number, sample in ((number, sample) for number, own in enumerate(samples, 1) for sample in own):
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
        rows.append(number - 1)
    if not kept:
        raise UserError(f"{origin}: all {skipped} rows are longer than {max_tokens} tokens: raise `max_tokens`")
    tokenized = TokenizedSamples.from_lists([s.token_ids for s in kept], [s.is_target for s in kept])
    return TokenizedRows(tokenized, rows, skipped, truncated)
