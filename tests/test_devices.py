"""Which device is meant, and what is said where torch has none such."""

from __future__ import annotations

import pytest
import torch

from tether.devices import busy_seconds, choose_device
from tether.errors import UserError


@pytest.mark.parametrize(("found", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_there_is_one_else_the_cpu(
    found: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # only by name
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    assert choose_device("auto") == expected
    assert choose_device("mps") == "mps"


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
def test_a_device_that_cannot_be_used_is_said_in_one_line(device: str) -> None:
    with pytest.raises(UserError, match=f"^device is '{device}', which torch cannot use here"):
        choose_device(device)


def test_what_a_call_waits_for_does_not_count() -> None:
    assert busy_seconds(lambda: sum(range(100_000)), torch.device("cpu")) > 0
    assert busy_seconds(lambda: None, torch.device("cpu")) < 0.05
