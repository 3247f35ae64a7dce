"""A training state on disk, to the last bit: nested data with tensors → NAME.json + NAME.safetensors and back.

No pickle: loading a file can run nothing. Knows nothing of what the state means.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.errors import UserError

# JSON objects with one of these as their only key stand for what JSON has no notation for.
_TENSOR, _DICT, _TUPLE, _FLOAT = "$tensor", "$dict", "$tuple", "$float"


def save_state(folder: Path, name: str, state: Mapping[Any, Any]) -> None:
    """Write `state` as `folder`/`name`.json and `folder`/`name`.safetensors.

    Nested dicts (keys: str, int, float, bool, None), lists and tuples of tensors, int, float (NaN with its payload,
    infinities), str, bool and None. Tensors of any dtype that safetensors knows, on any device; memory that two of
    them share is written twice.

    Raises:
        TypeError: something else is in `state`; the message names its path.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    tree = _encode(dict(state), "", tensors, storages)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")


def load_state(folder: Path, name: str) -> dict[Any, Any]:
    """What `save_state` was given: equal in every bit, type and key order; tensors on the CPU.

    Raises:
        UserError: a file is missing or damaged.
    """
    file = folder / f"{name}.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        file = folder / f"{name}.safetensors"
        return _decode(tree, load_file(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{file}: damaged, expected what a checkpoint saved ({error})") from None


def _encode(value: Any, path: str, tensors: dict[str, Tensor], storages: set[int]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses tensors that overlap in memory.
        storage = tensor.untyped_storage().data_ptr()
        tensors[path] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
        return {_TENSOR: path}
    if isinstance(value, (list, tuple)):
        entries = [_encode(entry, f"{path}/{index}", tensors, storages) for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else {_TUPLE: entries}
    if isinstance(value, dict):
        # The position in the path tells {"1": …} from {1: …}, and "a/b" from a within b.
        pairs = []
        for index, (key, entry) in enumerate(value.items()):
            place = key if isinstance(key, str) and not {"/", ":"} & set(key) else f"{index}:{key}"
            pairs.append((_encode(key, path, tensors, storages), _encode(entry, f"{path}/{place}", tensors, storages)))
        if all(isinstance(key, str) for key in value) and not any(key.startswith("$") for key in value):
            return dict(pairs)
        return {_DICT: pairs}
    raise TypeError(f"state at {path or '/'}: cannot store {type(value).__name__}")


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(entry, tensors) for entry in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _FLOAT in tree:
        return struct.unpack(">d", bytes.fromhex(tree[_FLOAT]))[0]
    if _TUPLE in tree:
        return tuple(_decode(entry, tensors) for entry in tree[_TUPLE])
    if _DICT in tree:
        return {_decode(key, tensors): _decode(entry, tensors) for key, entry in tree[_DICT]}
    return {key: _decode(entry, tensors) for key, entry in tree.items()}
