"""What torch can do on a device that a user names. Knows no model and no world."""

from __future__ import annotations

import torch

from tether.errors import UserError, reason


def check_device(device: str) -> None:
    """Raises UserError where torch cannot hold a number on this device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # the last: meta, which holds no numbers
        raise UserError(f"device is {device!r}, which torch cannot use here ({reason(error)})") from error


def check_compiler(device: str) -> None:
    """Raises UserError where `torch.compile` makes no code for this device: on a CPU it asks for a C++ compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise UserError(f"compile is set, but torch.compile does not work here ({reason(error)})") from error


def multiplies_bfloat16(device: str) -> bool:
    """Whether the device has instructions for products of bfloat16 matrices, which are the faster ones then."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = torch.cpu.get_capabilities()
        return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: ARM
    return False
