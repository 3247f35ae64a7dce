"""Measures of variety, by hand."""

from __future__ import annotations

import pytest

from tether.language.diversity import distinct_share, repeated_ngrams


def test_distinct_responses_are_counted_once() -> None:
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
    assert distinct_share(["a", "b"]) == 1.0
    assert distinct_share([]) == 0.0


def test_repeated_ngrams_within_a_response() -> None:
    # 1 2 3 4, 2 3 4 1, 3 4 1 2, 4 1 2 3, 1 2 3 4: the fifth repeats the first
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated_ngrams([[7] * 13]) == pytest.approx(9 / 10)
    assert repeated_ngrams([[1, 2, 3, 4, 5]]) == 0.0
    assert repeated_ngrams(["abab"], n=2) == pytest.approx(1 / 3)


def test_ngrams_that_responses_share_are_not_repeated_and_short_ones_do_not_count() -> None:
    assert repeated_ngrams([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0
    assert repeated_ngrams([[1, 2], [7] * 5]) == 0.5
    assert repeated_ngrams([[1, 2]]) == 0.0
