"""Whether torch can compute on a device that a user names. Knows no model and no world."""

from __future__ import annotations

import torch

from tether.errors import UserError, reason


def check_device(device: str) -> None:
    """Raises UserError where torch cannot hold a number on this device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last: meta, which holds no numbers
        raise UserError(f"device is {device!r}, which torch cannot use here ({reason(error)})") from error
