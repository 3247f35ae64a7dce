"""Observations and actions in a few words, for people. It knows arrays and nothing of what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np

SHOWN_NUMBERS = 12  # components that are written one by one; of a larger array the mean is


def in_words(value: Any) -> str:
    """An observation or an action in a few words."""
    numbers = np.asarray(value)
    if numbers.ndim == 0:
        return str(numbers.item())
    if numbers.ndim > 1 or numbers.size > SHOWN_NUMBERS:
        return f"{'×'.join(map(str, numbers.shape))} numbers, mean {numbers.mean():.4g}"
    if np.issubdtype(numbers.dtype, np.integer):
        return " ".join(map(str, numbers.tolist()))
    return " ".join(f"{number:+.3f}" for number in numbers.tolist())
