"""YAML with a mapping at the top: read with errors of one line, written so that it comes back equal.

Numbers are those that people write: `1e-3`, `1.5e3`, `+.5`, `+inf` and `nan` too, which YAML 1.1 takes for text; `010`
is ten, and `12:30` and `2026-01-31` are text. `None` is null; `y` and `n` are text.

Knows nothing of what the fields mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tether.errors import UserError

# What people write for a boolean, in lower case: in YAML 1.1, JSON, Python, shells.
BOOLEANS = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(("false", "no", "off", "n", "0"), False)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: the file cannot be read, is not YAML, has a key twice, or has something else at the top.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8, expected a YAML file") from None
    try:
        data = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise UserError(f"{place}: not valid YAML: {one_line(error.problem or str(error))}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{file}:{line}: not valid YAML: character {error.character!r} is not allowed") from None
    except (ValueError, KeyError, AttributeError) as error:
        # What PyYAML lets through from values of the right form that do not exist: !!bool maybe.
        raise UserError(f"{file}: not valid YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise UserError(f"{file}: not valid YAML: nested too deeply") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{file}: the top level is {describe(data)}, expected a mapping of fields to values")
    return data


def parse_yaml(text: str) -> Any:
    """What a piece of YAML says, such as the value of a flag.

    Raises:
        ValueError: it is no YAML, or says something twice.
    """
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(one_line(str(error))) from error


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML of plain nested data, in its order, which `read_yaml` reads back equal."""
    return yaml.dump(dict(data), Dumper=_ExactDumper, sort_keys=False, allow_unicode=True)


def describe(value: Any) -> str:
    """A value from a file as messages call it, such as `text 'x'`, `null` or `a list`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, Mapping):
        return "a mapping"
    shown = repr(value) if isinstance(value, (str, int, float)) else str(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"text {shown}" if isinstance(value, str) else shown


def one_line(text: str) -> str:
    """`text` with every run of spaces and line breaks as one space."""
    return " ".join(text.split())


_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0o[0-7_]+|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.?(?:inf|Inf|INF)$|[-+]?(?:infinity|Infinity)$|\.?(?:nan|NaN|NAN)$"
)
_NULL = re.compile(r"None$")
_TAG = "tag:yaml.org,2002:"
_OTHERWISE = {f"{_TAG}{name}" for name in ("int", "float", "timestamp")}  # PyYAML's, of YAML 1.1


class _Loader(yaml.SafeLoader):
    """Numbers as people write them; PyYAML would let the last of two equal keys win without a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's
        first: [(tag, form) for tag, form in forms if tag not in _OTHERWISE]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).replace("_", "")
        return int(text, 0) if text.lstrip("+-")[1:2].isalpha() else int(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _ExactDumper(yaml.SafeDumper):
    """PyYAML's plain styles do not bring back every line break and control character; escapes do."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_ExactDumper.add_representer(str, _represent_text)
for _class in (_Loader, _ExactDumper):  # the dumper quotes text that would be read as a number
    _class.add_implicit_resolver(f"{_TAG}int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789.iInN"))
    _class.add_implicit_resolver(f"{_TAG}null", _NULL, ["N"])
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
