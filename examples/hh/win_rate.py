"""How often one policy's responses are scored above another's, prompt by prompt, with the interval of 95 %.

Run as `python win_rate.py new.jsonl old.jsonl`. Both files are of `tether score`: rows with `prompt` and `score`, of
the same prompts, any number of responses to each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tether.errors import UserError
from tether.language.rows import load_rows
from tether.pipeline.evaluate import Estimate, estimate, estimate_share
from tether.uncertainty import percent, with_error


@dataclass(frozen=True)
class Comparison:
    """What n prompts say; intervals are of 95 %, over prompts, whose responses are not independent.

    Attributes:
        prompts: n.
        wins: probability that a response of the new policy has the higher score; equal scores count half.
        gain: mean of the new scores less the old.
    """

    prompts: int
    wins: Estimate
    gain: Estimate


def compare(new: Mapping[str, Sequence[float]], old: Mapping[str, Sequence[float]]) -> Comparison:
    """Compare scores by prompt: every response of the one with every response of the other to the same prompt."""
    wins, gains = [], []
    for prompt, scores in new.items():
        pairs = [(a, b) for a in scores for b in old[prompt]]
        wins.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
        gains.append(sum(a - b for a, b in pairs) / len(pairs))
    return Comparison(len(wins), estimate_share(wins, max(map(len, new.values()))), estimate(gains))


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
    assert found.wins.interval is not None  # a share always has one
    print(f"win rate {percent(found.wins.mean, found.wins.interval)} on {found.prompts:,} prompts")
    print(f"score higher by {with_error(found.gain.mean, found.gain.standard_error)}")


if __name__ == "__main__":
    main()
