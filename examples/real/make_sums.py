"""Sums in words, to train on and held out: "Answer with only the number: 12 + 7" and its answer.

    python examples/real/make_sums.py runs/real

writes `sums.jsonl` and `sums-held-out.jsonl` into the folder. A pair of numbers is in one of the two in both orders, so
that 7 + 12 is no hint at 12 + 7.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

LARGEST = 20
HELD_OUT = 0.25  # share of the pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of which sums are held out")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(a, LARGEST + 1)]
    rng.shuffle(pairs)
    cut = round(HELD_OUT * len(pairs))
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("sums-held-out", pairs[:cut]), ("sums", pairs[cut:])):
        rows = [row(*ordered) for pair in part for ordered in sorted({pair, pair[::-1]})]
        rng.shuffle(rows)
        file = options.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
        print(f"{file}: {len(rows)} sums")


def row(a: int, b: int) -> dict[str, str]:
    """One question with its answer."""
    return {"prompt": f"Answer with only the number: {a} + {b}", "answer": str(a + b)}


if __name__ == "__main__":
    main()
