"""What torch can do on a device that a user names. Knows no model and no world."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from tether.errors import UserError, reason

AUTO = "auto"


def choose_device(device: str) -> str:
    """The device that is meant: `auto` is cuda where torch finds one, else cpu. MPS is used where it is named.

    Raises:
        UserError: torch cannot hold a number on this device.
    """
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last: meta, which holds no numbers
        raise UserError(f"device is {device!r}, which torch cannot use here ({reason(error)})") from error
    return device


def check_compiler(device: str) -> None:
    """Raises UserError where `torch.compile` makes no code for this device: on a CPU it asks for a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise UserError(f"compile is set, but torch.compile does not work here ({reason(error)})") from error


def busy_seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call keeps a GPU busy, or else the processor, all threads together: others' work does not count."""
    if device.type != "cuda":
        started = time.process_time()
        function()
        return time.process_time() - started
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - started
