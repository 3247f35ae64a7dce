"""Numbers with no more digits than their error warrants, and the interval of a share.

Knows numbers alone; nothing of what they measure.
"""

from __future__ import annotations

import math
from typing import TypeGuard

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution


def wilson(successes: float, count: float, z: float = NORMAL_95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927); (0, 1) where there is nothing to go by."""
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    # an end at 0 or 1 is exact, where rounding would leave a little
    return (0.0 if share == 0 else max(0.0, middle - half)), (1.0 if share == 1 else min(1.0, middle + half))


def with_error(mean: float, error: float | None) -> str:
    """`0.913 ± 0.021`: the error with two digits that say something, the mean to the same decimals.

    `error` is a standard error; None, NaN or 0 say that it is unknown, and the mean stands alone with three digits.
    """
    if math.isnan(mean) or not _known(error):
        return rounded(mean, None)
    return f"{rounded(mean, error)} ± {rounded(error, error)}"


def rounded(value: float, error: float | None) -> str:
    """`value` to the decimals of the two leading digits of `error`; without a known error, three digits. NaN: `-`."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    decimals = _decimals(error, 2) if _known(error) else _decimals(value, 3)
    return f"{round(value, decimals) + 0.0:,.{max(0, decimals)}f}"  # no -0.00


def share(successes: float, count: float) -> str:
    """`89.0% (81.4 to 93.7%)`: a share with its 95 % interval; `-` of nothing."""
    if count == 0:
        return "-"
    return percent(successes / count, wilson(successes, count))


def percent(value: float, interval: tuple[float, float]) -> str:
    """A share with the interval that goes with it, all with the digits that half the interval warrants."""
    half = 100 * (interval[1] - interval[0]) / 2
    shown, low, high = (rounded(100 * number, half) for number in (value, *interval))
    return f"{shown}% ({low} to {high}%)"


def _known(error: float | None) -> TypeGuard[float]:
    return error is not None and math.isfinite(error) and error > 0


def _decimals(value: float, digits: int) -> int:
    """After the point of the first `digits` digits of a number; below 0 where they end before the point."""
    if value == 0:
        return 0
    return digits - 1 - int(f"{abs(value):.{digits - 1}e}".partition("e")[2])
