"""How varied responses are: what a policy that has found one answer to please its reward loses first.

Knows lists and nothing of models.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def distinct_share(responses: Sequence[Hashable]) -> float:
    """Number of different responses ÷ number of responses; 1 where no two are alike, 0 of none."""
    return len(set(responses)) / len(responses) if responses else 0.0


def repeated_ngrams(responses: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """Share of the n-grams within a response that repeat an earlier one of it, mean over responses.

    1 − distinct n-grams ÷ n-grams (Welleck et al. 2020, seq-rep-n). A response shorter than n has no n-gram and is left
    out; 0 where all are.
    """
    shares = []
    for response in responses:
        grams = [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0
