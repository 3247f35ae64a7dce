"""How often one policy's responses are scored above another's, prompt by prompt, with the interval of 95 %.

Run as `python win_rate.py new.jsonl old.jsonl`. Both files are of `tether score`: rows with `prompt` and `score`, of
the same prompts, any number of responses to each.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tether.errors import UserError
from tether.language.rows import load_rows

NORMAL_95 = 1.96  # two-sided 95 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Comparison:
    """What n prompts say; intervals are of 95 %, over prompts, whose responses are not independent.

    Attributes:
        prompts: n.
        win_rate: probability that a response of the new policy has the higher score; equal scores count half.
        win_interval: its interval.
        gain: mean of the new scores less the old.
        gain_interval: its interval.
    """

    prompts: int
    win_rate: float
    win_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]


def compare(new: Mapping[str, Sequence[float]], old: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare scores by prompt: every response of the one with every response of the other to the same prompt."""
    wins, gains = [], []
    for prompt, scores in new.items():
        pairs = [(a, b) for a in scores for b in old[prompt]]
        wins.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
        gains.append(sum(a - b for a, b in pairs) / len(pairs))
    rate, half = mean_with_interval(wins)
    gain, gain_half = mean_with_interval(gains)
    within = (max(0.0, rate - half), min(1.0, rate + half))
    return Comparison(len(wins), rate, within, gain, (gain - gain_half, gain + gain_half))


def mean_with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its interval by the normal approximation; infinite of one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, NORMAL_95 * math.sqrt(variance / len(values))


def read(path: str, column: str) -> dict[str, list[float]]:
    """Scores of each prompt."""
    scores: dict[str, list[float]] = {}
    for number, row in enumerate(load_rows(path, "train"), start=1):
        if "prompt" not in row or not isinstance(row.get(column), int | float):
            raise UserError(f"{path}, row {number}: expected `prompt` and a number in `{column}`: run `tether score`")
        scores.setdefault(str(row["prompt"]), []).append(float(row[column]))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Read both files and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("new", help="scored responses of the policy that should win")
    parser.add_argument("old", help="scored responses of the other")
    parser.add_argument("--column", default="score", help="column with the score")
    options = parser.parse_args(arguments)
    try:
        new, old = read(options.new, options.column), read(options.old, options.column)
        if missing := sorted(new.keys() ^ old.keys()):
            raise UserError(f"{options.new} and {options.old}: {len(missing)} prompts are in one file alone; expected "
                            "responses to the same prompts")  # fmt: skip
    except UserError as error:
        sys.exit(f"error: {error}")
    found = compare(new, old)
    low, high = found.win_interval
    print(f"win rate {found.win_rate:.1%}, 95 % interval {low:.1%} to {high:.1%}, on {found.prompts} prompts")
    low, high = found.gain_interval
    print(f"score {found.gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


if __name__ == "__main__":
    main()
