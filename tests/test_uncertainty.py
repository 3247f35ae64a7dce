"""Digits that an error warrants, and intervals of shares against tables."""

from __future__ import annotations

import math

import pytest

from tether.uncertainty import rounded, share, wilson, with_error


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (0.9134, 0.02149, "0.913 ± 0.021"),
        (0.9, 0.003, "0.9000 ± 0.0030"),
        (487.3121, 4.04, "487.3 ± 4.0"),
        (-123.4, 17.2, "-123 ± 17"),
        (12345.6, 234.5, "12,350 ± 230"),
        (0.5, 0.0996, "0.50 ± 0.10"),  # the error's two digits are those after rounding
        (9.96, 0.99, "9.96 ± 0.99"),
        (0.98712, 0.0, "0.987"),  # all values alike say nothing of the error
        (1.0, math.nan, "1.00"),
        (12345.6, None, "12,300"),
        (math.nan, 0.1, "-"),
    ],
)
def test_an_error_has_two_digits_and_the_mean_the_same_decimals(mean: float, error: float, expected: str) -> None:
    assert with_error(mean, error) == expected


def test_a_number_takes_the_decimals_of_an_error_that_is_not_shown() -> None:
    assert rounded(-0.12345, 0.03) == "-0.123"
    assert rounded(0.0, None) == "0"


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (0, 0, (0.0, 1.0))],
)
def test_wilson_interval(successes: int, count: int, expected: tuple[float, float]) -> None:
    """Values of Newcombe's method 3, as any table of it has them."""
    assert wilson(successes, count) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        (89, 100, "89.0% (81.4 to 93.7%)"),
        (8, 10, "80% (49 to 94%)"),
        (10, 10, "100% (72 to 100%)"),
        (9900, 10000, "99.00% (98.79 to 99.18%)"),
        (0, 0, "-"),
    ],
)
def test_a_share_has_its_interval_and_no_more_digits(successes: int, count: int, expected: str) -> None:
    assert share(successes, count) == expected
