"""How far people agree, beyond what chance would give: Cohen's kappa of two, Krippendorff's alpha of any number.

Knows labels that are equal or not (nominal); nothing of pairs or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """κ = (p_o − p_e) / (1 − p_e) of two people who labelled the same things (Cohen 1960).

    p_o is the share of equal labels, p_e what chance would give with each one's own frequencies. None where there is
    nothing to compare, or where both always gave one and the same label, as chance alone then explains all.
    """
    count = len(first)
    if count != len(second):
        raise ValueError(f"{count} and {len(second)} labels, expected as many of both")
    if count == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    left, right = Counter(first), Counter(second)
    expected = sum(left[label] * right[label] for label in left) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """α = 1 − D_o / D_e of any number of people, of whom each may have left things out (Krippendorff 2011, nominal).

    Args:
        units: for each thing, the labels that it was given; one alone is passed over, as it agrees with nobody.

    Returns:
        None where no thing has two labels, or all labels are the same, so that no disagreement was to be expected.
    """
    labels: Counter[Hashable] = Counter()  # n_c, the labels that can be paired
    agreeing = 0.0  # Σ_c o_cc of the coincidence matrix
    for unit in units:
        if len(unit) < 2:
            continue
        counts = Counter(unit)
        labels.update(counts)
        agreeing += sum(count * (count - 1) for count in counts.values()) / (len(unit) - 1)
    total = labels.total()
    by_chance = sum(count * (count - 1) for count in labels.values())
    expected = total * (total - 1) - by_chance
    if expected == 0:
        return None
    return 1 - (total - 1) * (total - agreeing) / expected
