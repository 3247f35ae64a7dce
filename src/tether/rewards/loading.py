"""From what a configuration says to a callable: `file.py:name`, `package.module:name`, an address, or built in.

Knows how to find a reward function and which arguments it takes; does not call it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args, get_type_hints

from torch import nn

from tether.errors import STOPS, UserError
from tether.rewards.judge import Judge
from tether.rewards.mathematics import MathVerify
from tether.rewards.models import ModelReward
from tether.rewards.remote import Remote
from tether.rewards.shape import Format, Length
from tether.rewards.verifiers import Arithmetic, ExactMatch, Numeric, Regex
from tether.user_code import import_place
from tether.yaml_file import BOOLEANS

BUILT_IN: dict[str, Callable[..., Callable[..., Any]]] = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "numeric": Numeric,
    "arithmetic": Arithmetic,
    "math_verify": MathVerify,
    "length": Length,
    "format": Format,
    "judge": Judge,
    "reward_model": ModelReward,
}
GIVEN = ("prompts", "completions", "completion_ids")  # arguments that every reward function can have


@dataclasses.dataclass(frozen=True)
class RewardFunction:
    """A reward as it was asked for, and the arguments that it takes.

    Attributes:
        label: how messages call it, for example `rewards.py:correct`.
        name: what its metric is called, for example `correct`.
        call: the function itself.
        accepts: the argument names that it takes; None means all, by `**kwargs`.
        required: columns that it cannot do without.
        source: the file that defines it, empty where unknown.
        built_in: a verifier of this package.
    """

    label: str
    name: str
    call: Callable[..., Any]
    accepts: frozenset[str] | None
    required: tuple[str, ...]
    source: str = ""
    built_in: bool = False


def load_reward(spec: str) -> RewardFunction:
    """Find the reward function that `spec` names.

    Args:
        spec: `path/to/file.py:name`, `package.module:name` (the current folder is importable), or a built-in verifier
            with options, for example `numeric?answer=solution&wrong=0`. `=` and `?` may stand in a value; `&` too,
            unless it looks like the next option. `http://…` and `https://…` are remote scorers, their options after
            `#`, which no server is sent: `http://scorer:8000/score#batch=16&timeout=30`.

    Raises:
        UserError: there is no such file, module, name or option; the file fails when imported; it is not callable.
    """
    if re.match(r"https?://", spec, re.IGNORECASE):
        url, _, options = spec.partition("#")
        return describe(_built_in(f"reward `{url}`", Remote, options, "#", url=url), label=url, name="remote")
    head, question, options = spec.partition("?")
    if head in BUILT_IN:
        return describe(
            _built_in(f"reward `{head}`", BUILT_IN[head], options, f"{head}?"), label=head, name=head, built_in=True
        )
    place, colon, name = head.rpartition(":")
    if not colon or not place or not name:
        raise UserError(
            f"reward `{spec}`: expected `file.py:name`, `package.module:name`, or one of: {', '.join(BUILT_IN)}; "
            "or the address of a scorer, `http://…`"
        )
    if question:
        raise UserError(f"reward `{spec}`: options after `?` are for the built-in rewards: {', '.join(BUILT_IN)}")
    module = import_place(place, f"reward `{spec}`", "reward", "file.py:name", lambda source: _one_line(spec, source))
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if _defined_in(module, value) and not key.startswith("_")]
        listed = ", ".join(there) or "no function"
        raise UserError(f"reward `{spec}`: {module.__file__ or place} has no `{name}`; it has: {listed}")
    return describe(getattr(module, name), label=head, name=name)


def describe(call: Any, label: str, name: str, built_in: bool = False) -> RewardFunction:
    """What a callable takes, by its signature; UserError where it cannot be called with keyword arguments."""
    if inspect.isclass(call):
        raise UserError(f"reward `{label}` is a class; name a function, or an instance: `{name.lower()} = {name}()`")
    if not callable(call):
        raise UserError(f"reward `{label}` is not callable, but {type(call).__name__}; expected a function")
    try:
        # A module's own __call__ says nothing of what its forward takes.
        parameters = inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters.values()
    except (TypeError, ValueError) as error:
        raise UserError(f"reward `{label}`: its arguments cannot be read: write a Python function around it") from error
    accepts: set[str] = set()
    required = list(getattr(call, "required_columns", ()))
    takes_all = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_all = True
        elif parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(
                f"reward `{label}`: argument `{parameter.name}` is positional-only; expected keyword arguments"
            )
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            accepts.add(parameter.name)
            if parameter.default is parameter.empty and parameter.name not in GIVEN:
                required.append(parameter.name)
    taken = None if takes_all else frozenset(accepts)
    return RewardFunction(label, name, call, taken, tuple(required), _source_file(call), built_in)


def _source_file(call: Any) -> str:
    target = call.forward if isinstance(call, nn.Module) else call
    target = inspect.unwrap(target.func if isinstance(target, functools.partial) else target)
    if not inspect.isroutine(target):
        target = type(target).__call__
    code = getattr(target, "__code__", None)
    return "" if code is None else str(code.co_filename)


def check_columns(function: RewardFunction, columns: Iterable[str]) -> None:
    """UserError where `function` requires a column that is not among `columns`."""
    present = list(columns)
    missing = [column for column in function.required if column not in present]
    if not missing:
        return
    if function.built_in:
        remedy = getattr(function.call, "missing_column", f"name the right one: `{function.label}?answer=COLUMN`")
    else:
        remedy = f"give the argument a default, or rename it (always there: {', '.join(GIVEN)})"
    raise UserError(
        f"reward `{function.label}` needs the column `{missing[0]}`, but the prompts have: "
        f"{', '.join(present) or 'no columns'}: {remedy}"
    )


def _built_in(place: str, factory: Any, options: str, start: str, **values: Any) -> Callable[..., Any]:
    """A verifier with the options of `key=value&key=value`, and `values` besides."""
    fields = {field.name: field for field in dataclasses.fields(factory) if field.init and field.name not in values}
    types = get_type_hints(factory)
    # Only `&word=` separates, so that a regular expression can hold `&`.
    for option in re.split(r"&(?=\w+=)", options) if options else []:
        key, equals, text = option.partition("=")
        if key in fields and not equals:
            raise UserError(f"{place}: option `{key}` has no value: `{start}{key}=…`")
        if key not in fields:
            example = "right=1" if "right" in fields else f"{next(iter(fields))}=…"
            raise UserError(f"{place}: no option `{key}`; it has: {', '.join(fields)} (as in `{start}{example}`)")
        if key in values:
            raise UserError(f"{place}: option `{key}` is given twice")
        values[key] = _option(f"{place}: option `{key}`", types[key], text)
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in values:
            raise UserError(f"{place} needs the option `{field.name}`: `{start}{field.name}=…`")
    made: Callable[..., Any] = factory(**values)
    return made


def _option(place: str, kind: Any, text: str) -> str | bool | float:
    if kind is str:
        if not text:
            raise UserError(f"{place} is empty; expected text")
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UserError(f"{place} is {text!r}; expected true or false")
        return BOOLEANS[text.lower()]
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):  # NaN too
        raise UserError(f"{place} is {text!r}; expected a finite number")
    if kind is int or int in get_args(kind):
        if not value.is_integer():
            raise UserError(f"{place} is {text!r}; expected a whole number")
        return int(value)
    return value


@contextmanager
def _one_line(spec: str, source: str) -> Iterator[None]:
    """Whatever importing a user's code raises, as a UserError that names the line."""
    try:
        yield
    except (UserError, *STOPS):
        raise
    except SyntaxError as error:
        raise UserError(
            f"reward `{spec}`: {error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
        ) from error
    except BaseException as error:
        place = location_of(error, source)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"reward `{spec}` fails when imported: {type(error).__name__}: {reason} ({place})") from error


def location_of(error: BaseException, source: str) -> str:
    """`file, line N`: where in `source` the error came from, else the innermost place known."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")] or list(frames)  # type: ignore[assignment]
    own = [frame for frame in frames if frame.filename == source]
    if not frames:
        return "place unknown"
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _defined_in(module: ModuleType, value: object) -> bool:
    if not callable(value):
        return False
    return getattr(value, "__module__", None) == module.__name__ or type(value).__module__ == module.__name__
