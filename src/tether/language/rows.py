"""Rows out of data files: JSONL, JSON, CSV, Parquet, folders written by `datasets`, hub names.

Knows nothing of prompts, templates or tokens. A row is a dict from column name to value, every row with the same
columns.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tether.chat import GIVEN_BESIDE, KWARGS
from tether.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
HUB_NAME = re.compile(r"(?P<name>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
LONGEST_FIELD = 2**31 - 1  # bytes; Python's csv module stops at 131,072 characters unless told otherwise

FILLED_UP = (*GIVEN_BESIDE, KWARGS)  # columns of objects that a chat template reads

Row = dict[str, Any]


def load_rows(path: str, split: str = "train") -> list[Row]:
    """Every row of a data set, in the order of the file.

    Args:
        path: a file (.jsonl, .json, .csv, each also as .gz; .parquet), a folder written by `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk`, any other local folder that `datasets.load_dataset` reads, or a name on the hub:
            `owner/name`, or `owner/name:config` for one of a data set's configurations.
        split: which split; a single file has none, so there only `train` is meaningful.

    Returns:
        Dicts with the same keys in the same order. A column that a JSON row lacks is None, as in `datasets`. Values of
        a CSV file are text, as CSV has no types. In messages and tools out of Parquet and `datasets` the nulls are left
        out with which these fill up objects that have not all keys.

    Raises:
        UserError: the data cannot be read, or holds no rows.
    """
    if not path.strip():
        raise UserError("no data given: name a file (.jsonl, .json, .csv, .parquet), a folder or a dataset on the hub")
    location = Path(path).expanduser()
    if location.is_file():
        rows = _load_file(location, split)
    elif location.is_dir():
        rows = _load_folder(location, split)
    elif path.lower().endswith(SUFFIXES) or HUB_NAME.fullmatch(path) is None:
        raise UserError(f"{path}: no such file or folder (seen from {Path.cwd()})")
    else:
        rows = _load_from_hub(path, split)
    if not rows:
        raise UserError(f"{path}: holds no rows; expected at least one")
    return rows


def _load_file(location: Path, split: str) -> list[Row]:
    name = location.name.lower()
    if not name.endswith(SUFFIXES):
        raise UserError(f"{location}: cannot tell the format by its name; expected one of {', '.join(SUFFIXES)}")
    if split != "train":
        raise UserError(
            f"{location}: split `{split}` was asked for, but a single file has no splits: leave the split out"
        )
    if name.endswith(".parquet"):
        return _read_parquet(location)
    text = _read_text(location)
    if not text.strip():
        raise UserError(f"{location}: the file is empty; expected at least one row")
    if name.removesuffix(".gz").endswith(".csv"):
        return _parse_csv(location, text)
    if name.removesuffix(".gz").endswith(".json"):
        return _same_columns(_parse_json(location, text))
    return _same_columns(_parse_jsonl(location, text))


def _read_text(location: Path) -> str:
    """The file's text, decompressed; a byte order mark is dropped."""
    try:
        data = location.read_bytes()
        if location.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{location}: not a complete gzip file: {_line(error)}") from error
    except OSError as error:
        raise UserError(f"{location}: cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError(
            f"{location}, line {line}: not UTF-8 text (byte 0x{byte:02x}): save the file as UTF-8"
        ) from error


def _parse_jsonl(location: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{location}, line {number}: malformed JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of levels
            raise UserError(f"{location}, line {number}: JSON that cannot be read: {_line(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{location}, line {number}: found {_json_type(row)}; expected one JSON object a line")
        rows.append(row)
    return rows


def _parse_json(location: Path, text: str) -> list[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        lines = error.msg == "Extra data" and text.lstrip().startswith("{")
        remedy = ": one object a line is JSONL, so name the file .jsonl" if lines else ""
        raise UserError(
            f"{location}, line {error.lineno}: malformed JSON: {error.msg} (column {error.colno}){remedy}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: JSON that cannot be read: {_line(error)}") from error
    if not isinstance(rows, list):
        remedy = ": one object a line is JSONL, so name the file .jsonl" if isinstance(rows, dict) else ""
        raise UserError(f"{location}: found {_json_type(rows)}; expected a list of objects{remedy}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{location}, row {number}: found {_json_type(row)}; expected an object")
    return rows


def _parse_csv(location: Path, text: str) -> list[Row]:
    previous = csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    rows: list[Row] = []
    try:
        for fields in reader:
            if not fields:  # a blank line
                continue
            if header is None:
                header = fields
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise UserError(f"{location}, line {reader.line_num}: column `{repeated[0]}` appears twice")
            elif len(fields) != len(header):
                raise UserError(
                    f"{location}, line {reader.line_num}: {len(fields)} fields; the header has {len(header)} "
                    f"({', '.join(header)}): put quotes around fields that hold commas"
                )
            else:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise UserError(f"{location}, line {reader.line_num}: malformed CSV: {_line(error)}") from error
    finally:
        csv.field_size_limit(previous)
    return rows


def _read_parquet(location: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return _without_filling(parquet.ParquetFile(location).read().to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{location}: not a readable Parquet file: {_line(error)}") from error


def _load_folder(location: Path, split: str) -> list[Row]:
    import datasets  # here, as it takes a second to import

    saved = (location / "dataset_dict.json").is_file() or (location / "state.json").is_file()
    try:
        if not saved:
            return _without_filling(datasets.load_dataset(str(location), split=split).to_list())
        data = datasets.load_from_disk(str(location))
        if isinstance(data, datasets.Dataset):
            if split not in ("train", str(data.split)):
                raise UserError(
                    f"{location}: split `{split}` was asked for, but the folder holds one dataset without splits"
                )
            return _without_filling(data.to_list())
        if split not in data:
            raise UserError(f"{location}: no split `{split}`; it has: {', '.join(data)}")
        return _without_filling(data[split].to_list())
    except UserError:
        raise
    except Exception as error:  # `datasets` raises many kinds for a folder it cannot read; each becomes one line
        raise UserError(
            f"{location}: `datasets` cannot read this folder: {type(error).__name__}: {_line(error)}"
        ) from error


def _load_from_hub(path: str, split: str) -> list[Row]:
    import datasets

    match = HUB_NAME.fullmatch(path)
    assert match is not None  # the caller has checked
    try:
        return _without_filling(datasets.load_dataset(match["name"], match["config"], split=split).to_list())
    except Exception as error:  # network, hub and format errors of several libraries; each becomes one line
        remedy = f": give one as `{match['name']}:CONFIG`" if "onfig name is missing" in str(error) else ""
        raise UserError(
            f"{path}: no such file or folder, and no dataset of this name could be loaded from the hub: "
            f"{type(error).__name__}: {_line(error)}{remedy}"
        ) from error


def plain_rows(rows: Sequence[Any]) -> list[Any]:
    """Rows in memory as `load_rows` gives them: those of a `datasets.Dataset` as those of its folder."""
    if type(rows).__module__.partition(".")[0] == "datasets":
        return _without_filling(list(rows))
    return list(rows)


def _without_filling(rows: Sequence[Any]) -> list[Row]:
    """Rows of Arrow, whose objects have every key that any object at this place has, null where their own had none.

    In messages, tools and documents a null would be read as one that was written (`{"city": "Rome", "a": null}`). A
    null that was meant cannot be told from filling there. Other columns stay as they are.
    """
    return [
        {
            name: _without_nulls(value) if name in FILLED_UP or _is_messages(value) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(entry, dict) and "role" in entry for entry in value)
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _same_columns(rows: list[Row]) -> list[Row]:
    """Rows that all have the union of the columns, None where a row lacks one."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")


def _line(error: BaseException) -> str:
    """An exception's message on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "…"
