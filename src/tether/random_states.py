"""The process's global random generators, which a user's code may draw from. Tether's own are elsewhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_random_states(seed: int) -> None:
    """Start torch's, Python's and numpy's global generators from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # noqa: NPY002


def random_states() -> dict[str, Any]:
    """States of torch's, Python's and numpy's global generators, as tensors and plain numbers."""
    version, internal, gauss = random.getstate()
    generator: Any = numpy.random.get_state(legacy=False)  # noqa: NPY002 - it is the global one that is meant
    return {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            torch.from_numpy(generator["state"]["key"].astype("int64")),
            int(generator["state"]["pos"]),
            int(generator["has_gauss"]),
            float(generator["gauss"]),
        ],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from `random_states`."""
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    key, position, has_gauss, cached = states["numpy"]
    numpy.random.set_state(("MT19937", key.numpy().astype("uint32"), position, has_gauss, cached))  # noqa: NPY002


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Afterwards the global generators go on as if nothing had been drawn inside."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)
