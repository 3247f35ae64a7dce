"""Which device is meant, and what is said where torch has none such."""

from __future__ import annotations

import time

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


def test_on_the_cpu_the_process_s_own_time_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.5])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    monkeypatch.setattr(time, "perf_counter", None)
    called: list[bool] = []
    assert busy_seconds(lambda: called.append(True), torch.device("cpu")) == 2.5
    assert called == [True]
