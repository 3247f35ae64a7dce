"""Cohen's kappa and Krippendorff's alpha, against examples that were published."""

from __future__ import annotations

import random

import pytest

from tether.studio.agreement import cohen_kappa, krippendorff_alpha


def labels(table: list[list[int]]) -> tuple[list[int], list[int]]:
    """Two people's labels with these counts, one's label by row, the other's by column."""
    pairs = [(i, j) for i, line in enumerate(table) for j, count in enumerate(line) for _ in range(count)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def units(*people: str) -> list[list[str]]:
    """A column of the table of Krippendorff 2011 for each unit; `.` is a missing value."""
    rows = [person.split() for person in people]
    return [[label for label in column if label != "."] for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("table", "kappa"),
    [
        # percentages of Table 1 in Cohen 1960, "A coefficient of agreement for nominal scales"
        ([[25, 13, 12], [12, 2, 16], [3, 15, 2]], (0.29 - 0.35) / (1 - 0.35)),
        # fifty grant proposals read by two: 20 + 15 agreements
        ([[20, 5], [10, 15]], 0.4),
        ([[5, 0], [0, 5]], 1.0),
        ([[0, 5], [5, 0]], -1.0),
    ],
)
def test_cohens_kappa_of_published_tables(table: list[list[int]], kappa: float) -> None:
    assert cohen_kappa(*labels(table)) == pytest.approx(kappa, abs=1e-12)


def test_cohens_kappa_says_nothing_where_there_is_nothing_to_say() -> None:
    assert cohen_kappa([], []) is None
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None  # chance alone explains it
    with pytest.raises(ValueError, match="1 and 0 labels"):
        cohen_kappa(["a"], [])


@pytest.mark.parametrize(
    ("people", "alpha"),
    [
        # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections A, B and C
        (("0 1 0 0 0 0 0 0 1 0", "1 1 1 0 0 1 0 0 0 0"), 0.095),
        (("a a b b d c c c e d d a", "b a b b b c c c e d d d"), 0.692),
        (
            (
                "1 2 3 3 2 1 4 1 2 . . .",
                "1 2 3 3 2 2 4 1 2 5 . 3",
                ". 3 3 3 2 3 4 2 2 5 1 .",
                "1 2 3 3 2 4 4 1 2 5 1 .",
            ),
            0.743,
        ),
    ],
)
def test_krippendorffs_alpha_of_published_tables(people: tuple[str, ...], alpha: float) -> None:
    assert krippendorff_alpha(units(*people)) == pytest.approx(alpha, abs=5e-4)


def test_krippendorffs_alpha_says_nothing_where_there_is_nothing_to_say() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None  # nobody judged the same
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None


def test_both_are_near_zero_where_people_guess_and_one_where_they_agree() -> None:
    generator = random.Random(0)
    first, second = (generator.choices("abt", k=20_000) for _ in range(2))
    assert cohen_kappa(first, second) == pytest.approx(0, abs=0.02)
    assert krippendorff_alpha(list(zip(first, second, strict=True))) == pytest.approx(0, abs=0.02)
    assert cohen_kappa(first, first) == 1.0
    assert krippendorff_alpha(list(zip(first, first, strict=True))) == pytest.approx(1.0, abs=1e-12)
