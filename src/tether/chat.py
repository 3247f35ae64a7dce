"""Conversations through a chat template: which template, what it is given, and one line for whatever it raises.

Whoever renders a conversation does it here. Knows tokenizers and Jinja; nothing of data sets, rewards or training.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from tether.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GIVEN_BESIDE = ("tools", "documents")  # columns that transformers hands to a template beside the messages
KWARGS = "chat_template_kwargs"  # column, and entry of tokenizer_config.json, with further variables
OWN = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)  # arguments of `apply_chat_template` that are not the user's to give
CONTENT = "x7x"  # of an answer that is rendered to see what comes after it
_told: WeakKeyDictionary[PreTrainedTokenizerBase, set[tuple[str, str]]] = WeakKeyDictionary()
"""Warnings that were given of a tokenizer's template; each is given once."""
GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How conversations are rendered."""

    chat_template: str | None = None
    """Chat template: a file, the name of one of the tokenizer's several, or the Jinja text itself. None: the
    tokenizer's own. It is saved with the model."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for example `{enable_thinking: false}`. A row's own, in a column of this name,
    go before."""


OptionsT = TypeVar("OptionsT", bound=ChatOptions)


class Conversation(list[dict[str, Any]]):
    """Messages, and what their template reads beside them.

    Args:
        messages: each with a `role`, and a `content` or `tool_calls`.
        variables: by name: `tools`, `documents`, switches such as `enable_thinking`.
    """

    def __init__(self, messages: Iterable[dict[str, Any]] = (), variables: Mapping[str, Any] | None = None) -> None:
        super().__init__(messages)
        self.variables: dict[str, Any] = dict(variables or {})


def variables_of(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a row of a data set has for the template beside its messages: `tools`, `documents`, further variables.

    Each column may hold JSON text, as files without nested types have it. Columns of these names that hold something
    else are refused by a template that reads them, and by none that does not.

    Raises:
        UserError: the further variables are no mapping.
    """
    found = {name: value for name in GIVEN_BESIDE if (value := _parsed(row.get(name)))}
    further = _parsed(row.get(KWARGS))
    if further:  # neither null nor empty, as in a row among others that have some
        if not isinstance(further, dict):
            raise UserError(f"{place}: column `{KWARGS}` is {_kind(further)}; expected an object of variables")
        _check_names(further, f"{place}: column `{KWARGS}`")
        found |= {key: entry for key, entry in further.items() if entry is not None}
    return found


def _parsed(value: Any) -> Any:
    """What JSON text says; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError:
        return value


def _kind(value: Any) -> str:
    return "text that is not valid JSON" if isinstance(value, str) else type(value).__name__


def said(message: Mapping[str, Any]) -> str:
    """The text of a message for people: its content, or the calls of tools that it has instead."""
    content, calls = message.get("content"), message.get("tool_calls")
    return json.dumps(calls, ensure_ascii=False, default=str) if calls and not content else str(content or "")


class ChatTemplate:
    """The template of a tokenizer, or the one that `options` names in its place, ready to render.

    Args:
        tokenizer: whose template, special tokens and kept variables are used.
        options: see `ChatOptions`.
        section: what messages call the options, such as `prompts`.

    Raises:
        UserError: a file cannot be read, or a variable has a name that is not the user's to give.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions | None = None, section: str = ""
    ) -> None:
        options = options or ChatOptions()
        where = f"{section}." if section else ""
        self.tokenizer = tokenizer
        self.named = None if options.chat_template is None else _read(options.chat_template, tokenizer, where)
        _check_names(options.chat_template_kwargs, f"{where}chat_template_kwargs")
        self.kwargs = {**kept_kwargs(tokenizer), **options.chat_template_kwargs}
        for name in options.chat_template_kwargs:
            if not self.missing and not any(_reads(text, name) for text in self._texts()):
                self._tell(f"{where}chat_template_kwargs", name, "")

    @property
    def missing(self) -> bool:
        """There is no template at all."""
        return self.named is None and not self.tokenizer.chat_template

    def _texts(self) -> list[str]:
        own = self.named or self.tokenizer.chat_template
        return list(own.values()) if isinstance(own, Mapping) else [str(own)]

    def text(self, place: str, variables: Mapping[str, Any] | None = None) -> str:
        """The template's own text: of several the one for tools where there are some, else the default.

        Raises:
            UserError: of several templates none is the default.
        """
        try:
            return str(self.tokenizer.get_chat_template(self.named, (variables or {}).get("tools")))
        except Exception as error:  # of a missing default, by transformers
            raise UserError(f"{place}: no chat template to use: {_line(error)}") from error

    def marks_answers(self, messages: Sequence[Mapping[str, Any]], place: str) -> bool:
        """Whether the template says which tokens are the assistant's, by `{% generation %}`."""
        return GENERATION.search(self.text(place, getattr(messages, "variables", None))) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], place: str, *, generation_prompt: bool = False) -> str:
        """The conversation as text, with what `messages` has for the template beside it where it is a `Conversation`.

        Args:
            messages: at least one.
            place: what errors call it.
            generation_prompt: begin an answer of the assistant at the end.

        Raises:
            UserError: the template raises an error, whatever it is.
        """
        return str(self._apply(messages, place, tokenize=False, add_generation_prompt=generation_prompt))

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], place: str, *, generation_prompt: bool = False
    ) -> list[int]:
        """The same in tokens: exactly the special ones that the template writes."""
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": generation_prompt}
        return list(self._apply(messages, place, **options)["input_ids"])

    def marked_tokens(self, messages: Sequence[Mapping[str, Any]], place: str) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them `{% generation %}` says are the assistant's."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        rendered = self._apply(messages, place, **options)
        return list(rendered["input_ids"]), [bool(flag) for flag in rendered["assistant_masks"]]

    def after_answer(self) -> str:
        """What the template writes after an answer; empty where it cannot be told, as of a template that wants more."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": CONTENT}]
        try:
            _, found, after = self.render(asked, "").rpartition(CONTENT)
        except UserError:
            return ""
        return after if found else ""

    def _apply(self, messages: Sequence[Mapping[str, Any]], place: str, **options: Any) -> Any:
        own: Mapping[str, Any] = getattr(messages, "variables", {})
        template = self.text(place, own)
        for name in own:
            if not _reads(template, name):
                self._tell("", name, place)
            elif name in GIVEN_BESIDE and not isinstance(own[name], list):
                raise UserError(f"{place}: column `{name}` is {_kind(own[name])}; expected a list of objects")
        variables = self.kwargs | {name: value for name, value in own.items() if _reads(template, name)}
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=template, **variables, **options)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            raise UserError(f"{place}: the tokenizer's chat template refuses the messages: {_line(error)}") from error

    def _tell(self, where: str, name: str, place: str) -> None:
        """Warn, once for a tokenizer, of a variable that the template never reads."""
        told = _told.setdefault(self.tokenizer, set())
        if (where, name) not in told:
            told.add((where, name))
            logger.warning("%s: the chat template never reads `%s`, so it is ignored", where or place, name)

    def keep(self) -> None:
        """Let the tokenizer have the template and its variables, so that both are saved with it."""
        if self.named is not None:
            self.tokenizer.chat_template = self.named
        if self.kwargs:
            self.tokenizer.init_kwargs[KWARGS] = dict(self.kwargs)

    def settled(self, options: OptionsT) -> OptionsT:
        """The options with what a file of theirs says, for a run that is resumed when the file is another."""
        return replace(options, chat_template=self.named, chat_template_kwargs=dict(self.kwargs))


def kept_kwargs(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Variables that a tokenizer's template is given, as `ChatTemplate.keep` left them."""
    kept = getattr(tokenizer, "init_kwargs", {}).get(KWARGS)
    return dict(kept) if isinstance(kept, Mapping) else {}


def _read(named: str, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text of the template that an option names."""
    own = tokenizer.chat_template
    if isinstance(own, Mapping) and named in own:
        return str(own[named])
    if "{{" in named or "{%" in named:
        return named
    try:
        text = Path(named).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        detail = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{where}chat_template: {named}: {detail}; expected a file with a Jinja template") from error
    if not text.strip():
        raise UserError(f"{where}chat_template: {named}: the file is empty; expected a Jinja template")
    return text


def _check_names(variables: Mapping[Any, Any], where: str) -> None:
    for name in variables:
        if not isinstance(name, str) or name in OWN:
            raise UserError(f"{where} has `{name}`, which is no variable of a chat template's own; leave it out")


def _reads(template: str, name: str) -> bool:
    read = _variables_read(template)
    return read is None or name in read


@functools.lru_cache(maxsize=64)
def _variables_read(template: str) -> frozenset[str] | None:
    """Variables that a template reads and does not set itself; None where it cannot be parsed."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)  # only parsed, never rendered
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template))))
    except TemplateSyntaxError:
        return None


def _line(error: Exception) -> str:
    """What an error says in one line; its kind too, unless the template's author wrote the words."""
    from jinja2 import TemplateError

    text = " ".join(str(error).split())[:300]
    if text and isinstance(error, TemplateError | ValueError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
