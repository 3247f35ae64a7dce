"""Observations and actions in a few words, for people. It knows arrays and nothing of what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN_NUMBERS = 12  # components that are written one by one; of a larger array the mean is


def in_words(values: NDArray[Any]) -> list[str]:
    """Each of n observations or actions (n, …) in a few words."""
    shape = values.shape[1:]
    if len(shape) > 1 or (shape and shape[0] > SHOWN_NUMBERS):
        size = "×".join(map(str, shape))
        return [f"{size} numbers, mean {value.mean():.4g}" for value in values]
    if not shape:
        return [str(value) for value in values.tolist()]
    form = " ".join(["%d" if np.issubdtype(values.dtype, np.integer) else "%+.3f"] * shape[0])
    return [form % tuple(value) for value in values.tolist()]
