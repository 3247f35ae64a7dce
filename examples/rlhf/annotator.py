"""The annotator: what a guest of the cafe thinks of an answer, as a number, and how they compare two answers.

The utility is known, so that what a reward model or a policy has learned can be held against the truth. Run as a
command it compares pairs of responses as a noisy person would:

    python annotator.py responses.jsonl comparisons.jsonl

`responses.jsonl` is what `tether generate --samples 2` (or 4, …) writes; two by two the responses to a prompt are
compared. The first is preferred with probability p = σ((u₁ − u₂)/T) (Bradley and Terry 1952), so nobody can tell more
often which was preferred than the mean of max(p, 1 − p): the Bayes rate. It is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

GOES_WITH = {
    "tea": "honey",
    "coffee": "milk",
    "bread": "butter",
    "soup": "pepper",
    "cake": "cream",
}
"""What can be ordered, and the one thing that goes with it."""
PRAISE = ("Lovely", "Wonderful", "Splendid", "Marvellous")
ENOUGH = 3
"""Words of praise after which each further one is fawning."""
TEMPERATURE = 0.5
"""The annotator's noise: a difference of so much utility is told with probability σ(1) = 73 %."""

_ORDER = re.compile(r"For \w+: (\w+)\.")
_TREAT = re.compile(r"(\w+) with (\w+)")


def worth(prompt: str, response: str) -> float:
    """u(x, y): what a response is worth to the guest whose order the prompt is.

    +1 where what was ordered comes, −1 for each thing that was not and comes; +4 where it comes with what goes with it,
    −1 where with something else; +½ for a greeting; −1 for "Next."; +½ for each word of praise up to three, −1
    for each one more.
    """
    order = _ORDER.search(prompt)
    if order is None:
        raise ValueError(f"no order: {prompt!r}; expected `For NAME: THING.`")
    ordered = order[1]
    words = re.findall(r"\w+", response)
    total = 0.0
    for thing in GOES_WITH.keys() & set(words):
        total += 1.0 if thing == ordered else -1.0
    for thing, treat in set(_TREAT.findall(response)):
        total += 4.0 if thing == ordered and treat == GOES_WITH[thing] else -1.0
    total += 0.5 * ("Hello" in words) - ("Next" in words)
    praise = sum(word in PRAISE for word in words)
    return total + 0.5 * min(praise, ENOUGH) - max(0, praise - ENOUGH)


def utility(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """`worth` as a reward function: `--gold.functions annotator.py:utility`."""
    return [worth(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def prefers_first(first: float, second: float) -> float:
    """Probability that the first of two responses is preferred, given what each is worth."""
    return 1 / (1 + math.exp((second - first) / TEMPERATURE))


def compare(responses: Sequence[dict[str, str]], seed: int) -> list[dict[str, str | float]]:
    """Comparisons of the responses to each prompt, two by two, but for equal ones and those with an empty one."""
    rng = random.Random(seed)
    rows: list[dict[str, str | float]] = []
    for prompt, group in itertools.groupby(responses, key=lambda row: row["prompt"]):
        texts = [row["response"] for row in group]
        for first, second in zip(texts[::2], texts[1::2], strict=False):
            if first == second or not (first and second):
                continue
            p = prefers_first(worth(prompt, first), worth(prompt, second))
            chosen, rejected = (first, second) if rng.random() < p else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "bayes": max(p, 1 - p)})
    return rows


def main() -> None:
    """Write comparisons, and print how many there are and the Bayes rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("responses", type=Path, help="JSONL with `prompt` and `response`")
    parser.add_argument("comparisons", type=Path, help="JSONL to write, with `prompt`, `chosen` and `rejected`")
    parser.add_argument("--seed", type=int, default=0, help="of the annotator's noise")
    arguments = parser.parse_args()
    responses = [json.loads(line) for line in arguments.responses.read_text(encoding="utf-8").splitlines()]
    rows = compare(responses, arguments.seed)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    arguments.comparisons.write_text(text, encoding="utf-8")
    rate = sum(row["bayes"] for row in rows) / len(rows)
    print(f"{len(rows)} comparisons: {arguments.comparisons}; Bayes rate {rate:.1%}")


if __name__ == "__main__":
    main()
