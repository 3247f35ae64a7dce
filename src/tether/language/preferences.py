"""Preferences: pairs of responses of which a person, or a stand-in, preferred one.

The forms in use are read: `prompt` + `chosen` + `rejected` as text or messages, and whole conversations whose prompt is
what both share. Knows nothing of reward models or of training; tokens are made elsewhere.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tether.chat import ChatOptions, Conversation, said, variables_of
from tether.errors import UserError
from tether.language.rows import Row, load_rows, plain_rows
from tether.tokens import shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Text = str | Messages

ASSISTANT = "\n\nAssistant:"  # what a response follows in the dialogues of Bai et al. 2022 (HH)
LONGEST_WORD = 12  # characters: a prompt of one is no question, and a response may begin with the same
LISTED_ROWS = 10  # a warning names so many rows
TRUE, FALSE = ("true", "1", "yes", "tie"), ("false", "0", "no", "chosen", "")  # as files write them


@dataclass(frozen=True)
class PreferencesConfig(ChatOptions):
    """Which comparisons to use, and how to read them."""

    path: str = ""
    """File (.jsonl, .json, .csv, also as .gz; .parquet), folder saved by `datasets`, or hub name (`name:config`)."""
    split: str = "train"
    """Split of a dataset folder or of a hub dataset."""
    prompt_column: str | None = None
    """Column with the prompt, text or messages. None: `prompt` where there is one, else what both responses share."""
    chosen_column: str = "chosen"
    """Column with the response that was preferred, or with the whole conversation that ends in it."""
    rejected_column: str = "rejected"
    """Column with the other one, in the same form."""
    margin_column: str | None = None
    """Column with how much better the chosen one is, 0 or more. None: `margin` where there is one."""
    tie_column: str | None = None
    """Column that is true, or says `tie`, where neither was preferred. None: `tie` where there is one."""
    chat: bool = False
    """Turn text prompts and responses into messages of the user and the assistant."""
    responses: Literal["auto", "alone", "whole"] = "auto"
    """Whether texts beside a prompt are responses alone, or whole dialogues that begin with the prompt, which is read
    once. auto: whole where both begin with it, or with a dialogue that holds it; an error where one does."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What happens to a comparison that was there before: left out, or kept, as when several people judged a pair."""

    def __post_init__(self) -> None:
        if self.chosen_column == self.rejected_column:
            raise ValueError(f"chosen_column and rejected_column are both {self.chosen_column!r}: name two columns")


@dataclass(frozen=True)
class Preference:
    """One comparison.

    Attributes:
        prompt: text, or the messages before the responses (a `Conversation`, with the row's tools).
        chosen: the response that was preferred, in the same form; as messages, all that follow the prompt.
        rejected: the other one.
        margin: by how much the chosen one is better, 0 or more, in units of the score. 0 where nothing is said.
        tie: neither was preferred.
        row: 1-based row in the data set.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0
    tie: bool = False
    row: int = 0

    @property
    def key(self) -> str:
        """The same for equal prompts, and only for these."""
        return json.dumps([self.prompt, getattr(self.prompt, "variables", None)], sort_keys=True)


@dataclass(frozen=True)
class Preferences:
    """The comparisons that can be learned from, and the rows that were left out, by the reason.

    Attributes:
        pairs: in the order of the data.
        duplicates: rows that repeat an earlier one.
        empty: rows whose prompt, chosen or rejected response has no text.
        identical: rows whose two responses are equal although one is said to be preferred.
    """

    pairs: list[Preference]
    duplicates: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    identical: tuple[int, ...] = ()


def load_preferences(config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Preferences:
    """Read and check the comparisons of the data set that `config.path` names.

    Args:
        config: which data set, and how to read it.
        tokenizer: of the model that will read them: messages are refused where it has no chat template. None: unasked.

    Raises:
        UserError: the data, or one row of it, is not as `config` says. Rows that say nothing (duplicates, empty and
            identical pairs) are left out, with one logged warning for each kind; it is an error when none is left.
    """
    if not config.path.strip():
        raise UserError("no preferences given: name a file (.jsonl, .json, .csv, .parquet), a folder or a hub dataset")
    return preferences_from_rows(load_rows(config.path, config.split), config, tokenizer)


def preferences_from_rows(
    rows: Sequence[Row], config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> Preferences:
    """The same from rows in memory, each a dict of columns."""
    path = config.path or "preferences"
    rows = plain_rows(rows)
    if not rows:
        raise UserError(f"{path}: there are no rows; give at least one comparison")
    columns = _columns(rows[0], config, path)
    pairs: list[Preference] = []
    duplicates: list[int] = []
    empty: list[int] = []
    identical: list[int] = []
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        pair = _preference(row, number, columns, config, f"{path}, row {number}")
        if not all(map(_has_text, (pair.prompt, pair.chosen, pair.rejected))):
            empty.append(number)
            continue
        if pair.chosen == pair.rejected and not pair.tie:
            identical.append(number)
            continue
        said = json.dumps([pair.key, pair.chosen, pair.rejected, pair.margin, pair.tie], sort_keys=True)
        if said in seen and config.duplicates == "drop":
            duplicates.append(number)
            continue
        seen.add(said)
        pairs.append(pair)
    _warn(path, duplicates, "that repeat an earlier one (`duplicates: keep` keeps them)")
    _warn(path, empty, "with an empty prompt or response")
    _warn(path, identical, "whose chosen and rejected responses are identical")
    if not pairs:
        raise UserError(
            f"{path}: no comparison is left of {len(rows)} rows: {len(empty)} are empty, {len(identical)} identical, "
            f"{len(duplicates)} duplicates"
        )
    if tokenizer is not None and not tokenizer.chat_template:
        chats = [pair for pair in pairs if not isinstance(pair.prompt, str)]
        if chats:
            raise UserError(
                f"{path}, row {chats[0].row}: the comparison is of chat messages, but the tokenizer of "
                f"{tokenizer.name_or_path or 'the model'} has no chat template: use another model, or text"
            )
    return Preferences(pairs, tuple(duplicates), tuple(empty), tuple(identical))


def _warn(path: str, rows: Sequence[int], what: str) -> None:
    if not rows:
        return
    listed = ", ".join(map(str, rows[:LISTED_ROWS]))
    more = f" and {len(rows) - LISTED_ROWS:,} more" if len(rows) > LISTED_ROWS else ""
    noun = "comparison" if len(rows) == 1 else "comparisons"
    place = "row" if len(rows) == 1 else "rows"
    logger.warning("%s: left out %s %s %s: %s %s%s", path, f"{len(rows):,}", noun, what, place, listed, more)


@dataclass(frozen=True)
class _Columns:
    prompt: str | None
    margin: str | None
    tie: str | None


def _columns(row: Row, config: PreferencesConfig, path: str) -> _Columns:
    """The columns that there are; every row has the same."""
    listed = ", ".join(map(str, row)) or "none"
    for option in ("chosen_column", "rejected_column", "prompt_column", "margin_column", "tie_column"):
        name = getattr(config, option)
        if name is not None and name not in row:
            flag = option.replace("_", "-")
            raise UserError(
                f"{path}: no column `{name}` ({option}); it has: {listed}: name yours by `--preferences.{flag} NAME`"
            )

    def optional(name: str | None, usual: str) -> str | None:
        return name if name is not None else (usual if usual in row else None)

    return _Columns(
        optional(config.prompt_column, "prompt"),
        optional(config.margin_column, "margin"),
        optional(config.tie_column, "tie"),
    )


def _preference(row: Row, number: int, columns: _Columns, config: PreferencesConfig, where: str) -> Preference:
    chosen = _text(row.get(config.chosen_column), f"{where}: column `{config.chosen_column}`")
    rejected = _text(row.get(config.rejected_column), f"{where}: column `{config.rejected_column}`")
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = ("text", "messages") if isinstance(chosen, str) else ("messages", "text")
        raise UserError(
            f"{where}: `{config.chosen_column}` is {kinds[0]} and `{config.rejected_column}` {kinds[1]}; expected "
            "the same form"
        )
    given: Text | None = None
    if columns.prompt is not None:
        value = row.get(columns.prompt)
        # A data set that mixes both forms has null where the prompt is within the conversations.
        given = None if value is None else _text(value, f"{where}: column `{columns.prompt}`")
    prompt, chosen, rejected = _apart(given, chosen, rejected, config, where)
    if config.chat and isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = _as_messages(chosen), _as_messages(rejected)
    if not isinstance(prompt, str):
        prompt = Conversation(prompt, variables_of(row, where))
    tie = _tie(None if columns.tie is None else row.get(columns.tie), f"{where}: column `{columns.tie}`")
    margin = _margin(None if columns.margin is None else row.get(columns.margin), f"{where}: column `{columns.margin}`")
    if tie and margin > 0:
        raise UserError(f"{where}: a tie with a margin of {margin:g}; expected no margin where neither is better")
    return Preference(prompt, chosen, rejected, margin, tie, number)


def _apart(
    prompt: Text | None, chosen: Text, rejected: Text, config: PreferencesConfig, where: str
) -> tuple[Text, Text, Text]:
    """Prompt and responses, all text or all messages, the prompt not in the responses."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            return _text_apart(chosen, rejected, where)
        question = prompt if isinstance(prompt, str) else said(prompt[-1])
        found, chosen, rejected = _texts_after(question, chosen, rejected, config, where)
        if isinstance(prompt, str):
            return found, chosen, rejected
        return prompt, _as_messages(chosen), _as_messages(rejected)
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    if isinstance(prompt, list):
        places = [_after(prompt, side, f"{where}: `{name}`") for name, side in _sides(chosen, rejected, config)]
        leads = [side[:start] for side, (start, _) in zip((chosen, rejected), places, strict=True)]
        if leads[0] != leads[1]:
            raise UserError(
                f"{where}: before the prompt, `{config.chosen_column}` and `{config.rejected_column}` begin with "
                "other messages; expected responses to the same prompt"
            )
        return leads[0] + prompt, chosen[places[0][1] :], rejected[places[1][1] :]
    if isinstance(prompt, str) and all(m["role"] == "assistant" for m in (chosen[0], rejected[0])):
        return [{"role": "user", "content": prompt}], chosen, rejected
    return _conversations_apart(chosen, rejected, where)


def _sides(chosen: Messages, rejected: Messages, config: PreferencesConfig) -> list[tuple[str, Messages]]:
    return [(config.chosen_column, chosen), (config.rejected_column, rejected)]


def _after(prompt: Messages, response: Messages, place: str) -> tuple[int, int]:
    """Where in the messages of a response the prompt begins and ends; 0, 0 where they are a response alone.

    They may begin with a system message that the prompt lacks, or lack the first of the prompt's.
    """
    found = [(message["role"], said(message).strip()) for message in response]
    asked = [(message["role"], said(message).strip()) for message in prompt]
    start = next((i for i, (role, _) in enumerate(found) if role != "system"), 0)
    for begin, lead in ((0, 0), (0, start), *((k, 0) for k in range(1, len(asked)))):
        if found[lead : lead + len(asked) - begin] == asked[begin:]:
            return lead, lead + len(asked) - begin
    if found[0][0] == "system" or (found[0][0] == "user" and asked[-1][0] == "user"):
        raise UserError(
            f"{place} begins with a message of the {found[0][0]} that is not the prompt's; expected the response "
            "alone, or the whole conversation with the same prompt"
        )
    return 0, 0


def response_to(prompt: Text, response: Text, place: str) -> Text:
    """The messages of a response alone, where they may be a whole conversation that begins with the prompt's.

    Raises:
        UserError: they begin with another prompt; `place` is where they stand.
    """
    return response if isinstance(prompt, str) or isinstance(response, str) else answer_to(prompt, response, place)


def answer_to(prompt: Messages, response: Messages, place: str) -> Messages:
    """`response_to` where both are messages."""
    start, end = _after(prompt, response, place)
    if start:
        raise UserError(f"{place} begins with a system message that the prompt has not; expected the same prompt")
    if end == len(response):
        raise UserError(f"{place} holds the prompt's messages and no answer to them")
    return response[end:]


def _texts_after(
    prompt: str, chosen: str, rejected: str, config: PreferencesConfig, where: str
) -> tuple[str, str, str]:
    """The prompt as it is read, and what follows it in both texts."""
    if config.responses == "alone":
        return prompt, chosen, rejected
    whole = config.responses == "whole"
    word = _is_word(prompt) and not whole  # which a response may well begin with
    names = config.chosen_column, config.rejected_column
    ends = [0 if word else end_of_prompt(prompt, side) for side in (chosen, rejected)]
    if all(ends):
        return prompt, chosen[ends[0] :], rejected[ends[1] :]
    asked = prompt.strip()
    within = [asked != "" and asked in side[: max(0, side.rfind(ASSISTANT))] for side in (chosen, rejected)]
    if all(within):
        return _text_apart(chosen, rejected, where)
    remedy = "; set `responses` to alone where they are responses that repeat it"
    if any(ends) or any(within):
        holds, other = names if ends[0] or within[0] else names[::-1]
        raise UserError(f"{where}: `{holds}` holds the prompt, `{other}` does not; expected both or none{remedy}")
    if not word and chosen[: shared_length(chosen, rejected)].lstrip().find(prompt.strip()) > 0:
        raise UserError(
            f"{where}: `{names[0]}` and `{names[1]}` hold the prompt, but do not begin with it; expected the responses "
            f"alone, or whole dialogues that begin with it{remedy}"
        )
    if whole:
        raise UserError(
            f"{where}: `{names[0]}` and `{names[1]}` do not begin with the prompt, but `responses` is whole"
        )
    return prompt, chosen, rejected


def end_of_prompt(prompt: str, text: str) -> int:
    """Where a prompt that a text begins with ends in it; 0 where it does not, or goes on within a word.

    Scripts without capitals, such as Chinese, have no words that could be told here.
    """
    exact = text.startswith(prompt)
    said = prompt if exact else prompt.strip()
    start = 0 if exact else len(text) - len(text.lstrip())
    end = start + len(said)
    if not said or not text.startswith(said, start):
        return 0
    return 0 if _in_word(said[-1]) and _in_word(text[end : end + 1]) else end


def begins_with(prompt: str, text: str) -> bool:
    """Whether a response is a whole text that holds its prompt, rather than one that begins with the same word."""
    return not _is_word(prompt) and end_of_prompt(prompt, text) > 0


def warn_of_repeats(texts: Sequence[tuple[str, str]], places: Sequence[str], column: str) -> None:
    """Say so where responses to prompts, (prompt, response) each, are whole texts: the prompts are then read twice."""
    repeats = [place for pair, place in zip(texts, places, strict=True) if begins_with(*pair)]
    if repeats:
        logger.warning(
            "%s: `%s` begins with the prompt (%d of %d rows do), so that it is read twice; leave it out unless "
            "responses are to repeat it",
            repeats[0],
            column,
            len(repeats),
            len(texts),
        )


def _is_word(prompt: str) -> bool:
    return len(prompt.split()) < 2 and len(prompt.strip()) <= LONGEST_WORD and prompt.strip().isascii()


def _in_word(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def _text_apart(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt goes through the last `Assistant:` that both share."""
    place = chosen.rfind(ASSISTANT, 0, shared_length(chosen, rejected))
    if place < 0:
        raise UserError(
            f"{where}: there is no prompt, and the two responses do not begin with a shared dialogue that has a turn "
            f"{ASSISTANT!r}: give the prompts in a column of their own"
        )
    end = place + len(ASSISTANT)
    return chosen[:end], chosen[end:], rejected[end:]


def _conversations_apart(chosen: Messages, rejected: Messages, where: str) -> tuple[Messages, Messages, Messages]:
    """The prompt is the longest shared beginning that leaves each conversation at least one turn."""
    most = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < most and chosen[count] == rejected[count]:
        count += 1
    if count == 0:
        raise UserError(
            f"{where}: there is no prompt, and the two conversations share no first message: give the prompts in a "
            "column of their own, or begin both with the same messages"
        )
    return chosen[:count], chosen[count:], rejected[count:]


def _as_messages(response: str) -> Messages:
    return [{"role": "assistant", "content": response}]


def _text(value: Any, place: str) -> Text:
    """A text, or messages with a role and a content each."""
    if isinstance(value, str):
        return _utf8(value, place)
    if not isinstance(value, list | tuple):
        found = "null or missing" if value is None else f"{type(value).__name__} ({value!r:.40})"
        raise UserError(f"{place} is {found}; expected text or a list of messages")
    if not value:
        raise UserError(f"{place} is an empty list; expected at least one message")
    messages = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{place}, message {number} is {type(message).__name__}; expected `role` and `content`")
        for name in ("role", "content"):
            called = name == "content" and message.get("role") == "assistant" and message.get("tool_calls")
            if not isinstance(message.get(name), str) and not (called and message.get(name) is None):
                found = "missing or null" if message.get(name) is None else type(message[name]).__name__
                raise UserError(f"{place}, message {number}: `{name}` is {found}; expected text")
        _utf8(message.get("content") or "", f"{place}, message {number}")
        # Columns saved by `datasets` hold every key that any message has, null where this one lacks it.
        messages.append({name: part for name, part in message.items() if part is not None})
    return messages


def _utf8(text: str, place: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer can read
        raise UserError(f"{place} holds {text[error.start]!r}, half of a surrogate pair, not text") from error
    return text


def _has_text(text: Text) -> bool:
    if isinstance(text, str):
        return bool(text.strip())
    return bool(text) and bool(said(text[-1]).strip())


def _margin(value: Any, place: str) -> float:
    if value is None or value == "":
        return 0.0
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{place} is {value!r:.40}; expected a number of 0 or more")
    return number


def _tie(value: Any, place: str) -> bool:
    if value is None:
        return False
    word = str(value).strip().lower()
    if isinstance(value, bool | str | int) and word in TRUE + FALSE:
        return word in TRUE
    raise UserError(f"{place} is {value!r:.40}; expected true, false or `tie`")
