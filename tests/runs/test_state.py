"""A state comes back equal in every bit, type and key order."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tether.errors import UserError
from tether.runs import load_state, save_state

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bit pattern, NaN payloads among them; 0-d and empty tensors too."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


nan_payloads = st.integers(0, 2**51 - 1).map(lambda n: struct.unpack(">d", struct.pack(">Q", 0x7FF8 << 48 | n))[0])
leaves = tensors() | st.none() | st.booleans() | st.integers() | st.floats() | nan_payloads | st.text(max_size=8)
keys = st.text(max_size=4) | st.sampled_from(["$tensor", "$dict", "0:1", "a/b", "__metadata__"]) | st.integers(0, 3)
trees = st.recursive(
    leaves,
    lambda children: (
        st.lists(children, max_size=3)
        | st.lists(children, max_size=3).map(tuple)
        | st.dictionaries(keys, children, max_size=4)
    ),
    max_leaves=12,
)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)
    elif isinstance(expected, float):
        assert struct.pack(">d", found) == struct.pack(">d", expected)
    else:
        assert found == expected


@given(st.dictionaries(keys, trees, max_size=4))
@settings(max_examples=200, deadline=None)
def test_roundtrip_is_bit_exact(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    save_state(folder, "state", state)
    assert_same(load_state(folder, "state"), state)


def test_adam_goes_on_as_if_never_saved(tmp_path: Path) -> None:
    def train(steps: int, weight: Tensor, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            ((weight - 1.0) ** 2).sum().backward()
            optimizer.step()

    weight = torch.arange(4.0, requires_grad=True)
    adam = torch.optim.AdamW([weight], lr=0.1)
    train(3, weight, adam)
    save_state(tmp_path, "learner", {"weight": weight, "adam": adam.state_dict()})
    train(3, weight, adam)

    state = load_state(tmp_path, "learner")
    resumed = state["weight"].requires_grad_()
    again = torch.optim.AdamW([resumed], lr=0.5)
    again.load_state_dict(state["adam"])
    train(3, resumed, again)
    assert torch.equal(resumed, weight)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"base": base, "same": base, "transposed": base.T, "part": base[1:2, 1:], "one": torch.ones(8)[2]}
    save_state(tmp_path, "state", state)
    assert_same(load_state(tmp_path, "state"), state)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^state at /a/1: cannot store object$"):
        save_state(tmp_path, "state", {"a": [1, object()]})


def test_damage_is_a_user_error(tmp_path: Path) -> None:
    save_state(tmp_path, "state", {"a": torch.ones(3)})
    tensor_file, tree_file = tmp_path / "state.safetensors", tmp_path / "state.json"
    tensor_file.write_bytes(tensor_file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"state\.safetensors: damaged"):
        load_state(tmp_path, "state")
    tree_file.write_text('{"a": ')
    with pytest.raises(UserError, match=r"state\.json: damaged"):
        load_state(tmp_path, "state")
    tree_file.unlink()
    with pytest.raises(UserError, match=r"state\.json: cannot be read: No such file"):
        load_state(tmp_path, "state")
