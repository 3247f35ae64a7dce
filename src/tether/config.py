"""Configuration: frozen dataclasses filled from YAML and from flags, flags win.

Every error is one line that names the file or flag, the field, what was found and what was expected.
Knows dataclasses and tyro; knows no field of any configuration.

A section is a dataclass within a dataclass, always present. Help texts are taken from the docstring under a field
(or from an `Attributes:` section of the class). Fields may be bool, int, float, str, Path, Literal, tuple, list,
dict and unions of those with None. Checks that need several fields belong in `__post_init__`: they raise ValueError,
and run once, after the YAML file and the flags were merged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tyro
import tyro.constructors

from tether.errors import UserError
from tether.yaml_file import BOOLEANS, describe, dump_yaml, one_line, parse_yaml, read_yaml

ConfigT = TypeVar("ConfigT")

# PyYAML follows YAML 1.1, where a float needs a dot: `1e-5` is text there. Everyone means the number.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_NOTHING = ("null", "none", "~")
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
    Any: "anything",
}


def load_config(cls: type[ConfigT], args: Sequence[str], prog: str, description: str) -> ConfigT:
    """The configuration that `args` ask for: the defaults of `cls`, then `--config FILE.yaml`, then flags.

    Flags are the fields' paths, `--section.field-name VALUE`; `--help` prints them all and raises SystemExit(0).

    Raises:
        UserError: anything wrong in the file or the flags.
    """
    file = _config_file(args)
    given = {} if file is None else read_yaml(file)
    values = _resolve(cls, given, file or "", "")
    values = _parse_flags(cls, values, args, prog, description)
    try:
        return _construct(cls, values, "", "")
    except UserError:
        if file is not None:
            config_from_dict(cls, given, file)  # the file alone may be at fault: then say so
        raise


def config_from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], where: str) -> ConfigT:
    """An instance of `cls` from plain nested data; fields that `mapping` leaves out keep their defaults.

    `where` names the source in messages, such as a file's name.
    """
    return _construct(cls, _resolve(cls, mapping, where, ""), where, "")


def config_to_dict(instance: Any) -> dict[str, Any]:
    """Plain nested data (dict, list, str, numbers, None) in the order of the fields."""
    return {f.name: _plain(getattr(instance, f.name)) for f in dataclasses.fields(instance) if f.init}


def dump_config(instance: Any) -> str:
    """YAML in the order of the fields, which `load_config --config` reads back to an equal instance."""
    return dump_yaml(config_to_dict(instance))


# From plain data to values of the declared types ------------------------------------------------------------


def _resolve(cls: Any, mapping: Any, where: str, path: str, default: Any = None) -> dict[str, Any]:
    """Every field of `cls` by name, sections as nested dicts; `dataclasses.MISSING` for what nobody gave.

    `mapping` wins over `default` (an instance of `cls`), and that over the defaults of the class.
    """
    if mapping is None:  # a section whose lines are all commented out
        mapping = {}
    if not isinstance(mapping, Mapping):
        raise _error(where, path, f"found {describe(mapping)}, expected a mapping of fields to values")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name in mapping:
        if name not in fields:
            raise _error(where, _join(path, name), f"no such field{_hint(str(name), fields)}")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        base = _field_default(field) if default is None else getattr(default, name)
        if dataclasses.is_dataclass(hints[name]):
            section = None if base is dataclasses.MISSING else base
            values[name] = _resolve(hints[name], mapping.get(name), where, _join(path, name), section)
        elif name in mapping:
            values[name] = _convert(hints[name], mapping[name], where, _join(path, name))
        else:
            values[name] = base
    return values


def _construct(cls: Any, values: Mapping[str, Any], where: str, path: str) -> Any:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if value is dataclasses.MISSING:
            raise _error(where, _join(path, name), f"missing, expected {_expected(hints[name])}")
        section = dataclasses.is_dataclass(hints[name])
        arguments[name] = _construct(hints[name], value, where, _join(path, name)) if section else value
    try:
        return cls(**arguments)
    except ValueError as error:  # by __post_init__
        raise _error(where, path, one_line(str(error))) from None


def _convert(hint: Any, value: Any, where: str, path: str) -> Any:
    """`value` as the type `hint`; only changes that lose nothing: int → float, list → tuple, `1e-5` → float."""

    def wrong() -> UserError:
        scalar = value is not None and not isinstance(value, (list, dict))
        quote = "; put it in quotes" if hint is str and scalar else ""
        return _error(where, path, f"found {describe(value)}, expected {_expected(hint)}{quote}")

    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise wrong()
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where, path, wrong())
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise wrong()
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(value) != len(arguments):
            raise _error(where, path, f"found {len(value)} values, expected {len(arguments)}")
        hints = arguments if fixed else [arguments[0]] * len(value)
        pairs = enumerate(zip(hints, value, strict=True))
        return origin(_convert(kind, entry, where, f"{path}[{position}]") for position, (kind, entry) in pairs)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong()
        return {
            _convert(arguments[0], key, where, path): _convert(arguments[1], entry, where, _join(path, key))
            for key, entry in value.items()
        }
    if hint is float and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the largest float is no number here
            if isinstance(value, (int, float)) or (isinstance(value, str) and _EXPONENT.fullmatch(value)):
                return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is bool and isinstance(value, (str, int)) and str(value).lower() in BOOLEANS:
        return BOOLEANS[str(value).lower()]
    if type(value) is not hint:
        raise wrong()
    return value


def _convert_union(members: Sequence[Any], value: Any, where: str, path: str, wrong: UserError) -> Any:
    """The member whose type fits exactly comes first, so that `float | str` keeps the text '1e5'."""
    if type(value) in members:
        return value
    sections: list[UserError] = []
    for member in members:
        try:
            return _convert(member, value, where, path)
        except UserError as error:
            if isinstance(value, (list, dict)) and get_origin(member) in (tuple, list, dict):
                sections.append(error)  # says which entry is wrong
    raise sections[0] if len(sections) == 1 else wrong


def _field_default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return str(value) if isinstance(value, Path) else value


# Flags ------------------------------------------------------------------------------------------------------


def _config_file(args: Sequence[str]) -> str | None:
    file: str | None = None
    for position, argument in enumerate(args):
        if argument == "--config":
            if position + 1 == len(args) or args[position + 1].startswith("--"):
                raise UserError("--config: found no value, expected a YAML file")
            file = args[position + 1]
        elif argument.startswith("--config="):
            file = argument.removeprefix("--config=")
    return file


def _parse_flags(cls: Any, values: dict[str, Any], args: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """`values` with those that the flags name replaced."""
    args = _spelled_out(cls, args)
    default = _unchecked_instance(_unchecked(cls, top=True), cls, values)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed, unknown = tyro.cli(
                type(default), args=args, default=default, prog=prog, description=description, return_unknown_args=True
            )
    except SystemExit as error:
        if error.code:
            raise UserError(_flag_error(cls, args, complaint.getvalue())) from None
        raise  # --help
    if unknown:
        raise UserError(_unknown_flag(cls, args, unknown[0]))
    return _raw(cls, parsed)


def _spelled_out(cls: Any, args: Sequence[str]) -> list[str]:
    """`args` with every boolean as tyro takes it: `--flag yes` as `--flag`, `--flag=off` as `--no-flag`."""
    hints, words, left = _flags(cls), [], list(args)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        hint = hints.get(flag)
        if hint is not bool and not _is_optional_bool(hint):
            words.append(word)
            continue
        if not equals and left:
            value = left[0]
        value = value.lower()
        known = value in BOOLEANS or (hint is not bool and value in _NOTHING)
        if known and not equals:
            left.pop(0)
        if not known:
            words.append(word)
        elif hint is bool:
            words.append(flag if BOOLEANS[value] else _off(flag))
        else:
            words += [flag, str(BOOLEANS.get(value))]
    return words


def _is_optional_bool(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and set(get_args(hint)) == {bool, type(None)}


def _off(flag: str) -> str:
    """`--section.no-name` for `--section.name`."""
    section, _, name = flag.rpartition(".")
    return f"{section}.no-{name}" if section else f"--no-{name.removeprefix('--')}"


def _mapping(words: list[str]) -> dict[Any, Any]:
    value = parse_yaml(words[0])
    if not isinstance(value, dict):
        raise ValueError(f"{words[0]!r} is no mapping")
    return value


# of itself tyro has no flag for a mapping that is empty by default
_MAPPING = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="'{NAME: VALUE, ...}'",
    instance_from_str=_mapping,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


@functools.cache
def _unchecked(cls: Any, top: bool = False) -> Any:
    """`cls` without its `__post_init__`, in every section.

    The checks must see the file and the flags together, and tyro builds defaults and sections on the way. It finds
    the help texts through the base class.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    if top:
        help_text = "YAML file with values for these options, nested like their names; flags win over it."
        config = Annotated[str | None, tyro.conf.arg(help=help_text, metavar="FILE.yaml", help_behavior_hint="")]
        fields.append(("config", config, dataclasses.field(default=None, kw_only=True)))
    for field in dataclasses.fields(cls):
        if field.init:
            hint: Any = hints[field.name]
            if dataclasses.is_dataclass(hint):
                hint = _unchecked(cast(Any, hint))
            elif get_origin(hint) is dict:
                hint = Annotated[hint, _MAPPING]
            fields.append((field.name, hint, dataclasses.field(default=tyro.MISSING, kw_only=True)))
    namespace: dict[str, Any] = {"__post_init__": lambda self: None}
    if not (cls.__doc__ or "").startswith(f"{cls.__name__}("):  # what `dataclass` writes where there is no docstring
        namespace["__doc__"] = cls.__doc__
    frozen = cls.__dataclass_params__.frozen
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace=namespace, frozen=frozen)


def _unchecked_instance(unchecked: Any, cls: Any, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = _unchecked_instance(_unchecked(cast(Any, hints[name])), hints[name], value)
        else:
            arguments[name] = tyro.MISSING if value is dataclasses.MISSING else value
    return unchecked(**arguments)


def _raw(cls: Any, instance: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    values = {f.name: getattr(instance, f.name) for f in dataclasses.fields(cls) if f.init}
    return {n: _raw(hints[n], v) if dataclasses.is_dataclass(hints[n]) else v for n, v in values.items()}


def _flags(cls: Any, path: str = "") -> dict[str, Any]:
    """Type of each flag, such as {"--learner.learning-rate": float}."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(cls).items():
        full = _join(path, name)
        if dataclasses.is_dataclass(hint):
            flags.update(_flags(hint, full))
        else:
            flags["--" + full.replace("_", "-")] = hint
    return flags


def _flag_error(cls: Any, args: Sequence[str], complaint: str) -> str:
    """One line for what tyro said in a box of many: only the flag that it names is taken from there."""
    hints = _flags(cls)
    named = [flag for flag in re.findall(r"--[\w.-]*\w", complaint) if flag in hints]
    if not named:
        return one_line(re.sub(r"[^\x20-\x7e]|-{4,}", " ", complaint))
    flag, found = named[0], "no value"
    for position, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            rest = [value] if equals else []
            for following in args[position + 1 :] if not equals else ():
                if following.startswith("--"):
                    break
                rest.append(following)
            found = " ".join(repr(entry) for entry in rest) or "no value"
    return f"{flag}: found {found}, expected {_expected(hints[flag])}"


def _unknown_flag(cls: Any, args: Sequence[str], token: str) -> str:
    hints = _flags(cls)
    if not token.startswith("-"):
        # of several equal words, the one that is no flag's value
        before = [args[place - 1] if place else "" for place, word in enumerate(args) if word == token]
        previous = next((word for word in before if hints.get(word.replace("_", "-"), bool) is bool), before[0])
        if hints.get(previous.replace("_", "-")) is bool:
            ways = f"{previous} alone is true, {_off(previous)} false"
            return f"{previous}: found {token!r}, expected true or false ({ways})"
        return f"{token!r}: found after {previous or 'the command'}, expected an option that starts with --"
    name = token.partition("=")[0].replace("_", "-")
    same_end = [flag for flag in hints if flag.rpartition(".")[2] == name.removeprefix("--").rpartition(".")[2]]
    hint = f"; did you mean {same_end[0]}?" if same_end else _hint(name, [*hints, "--config"])
    return f"{token}: no such option{hint or '; --help lists them'}"


# Words ------------------------------------------------------------------------------------------------------


def _error(where: str, path: str, message: str) -> UserError:
    """`where` is empty for values that came from flags."""
    return UserError(": ".join(part for part in (where, path, message) if part))


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _hint(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments)) if len(arguments) > 1 else repr(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(member) for member in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)}: " + ", ".join(_expected(member) for member in arguments)
    if origin in (tuple, list):
        return f"a list, each entry {_expected(arguments[0])}"
    if origin is dict:
        return "a mapping" if arguments[1] is Any else f"a mapping, each value {_expected(arguments[1])}"
    return _NAMES.get(hint, str(hint))
