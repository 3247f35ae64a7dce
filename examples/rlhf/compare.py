"""PPO and best-of-n of the model that it began with, by the annotator's utility, each with its KL.

    python compare.py --reference sft/policy --samples sft_scored.jsonl --policy ppo_scored.jsonl

The files are what `tether score` wrote of what `tether generate` wrote: responses to the same prompts, with `score`.
Standard errors are those of the mean over prompts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from annotator import worth
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, Any]


def by_prompt(path: Path) -> dict[str, list[Row]]:
    """The rows of a file, the responses to each prompt together."""
    groups: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault(row["prompt"], []).append(row | {"worth": worth(row["prompt"], row["response"])})
    return groups


def means(groups: dict[str, list[Row]], key: str) -> dict[str, float]:
    """Of each prompt, the mean over its responses."""
    return {prompt: sum(row[key] for row in rows) / len(rows) for prompt, rows in groups.items()}


def estimate(values: Sequence[float]) -> tuple[float, float]:
    """Mean over prompts and its standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std() / len(numbers) ** 0.5)


def best_of(groups: dict[str, list[Row]], n: int) -> dict[str, list[Row]]:
    """Of each n responses to a prompt the one with the highest score."""
    return {
        prompt: [max(rows[start : start + n], key=lambda row: row["score"]) for start in range(0, len(rows) - n + 1, n)]
        for prompt, rows in groups.items()
    }


@torch.inference_mode()
def reference_log_probs(folder: str, rows: Sequence[Row]) -> list[float]:
    """The log π_ref(y|x) of each response, its eos included where it ended by itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = prompt + tokenizer(row["response"]).input_ids + [tokenizer.eos_token_id] * row["terminated"]
        log_probs = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        taken = log_probs.gather(1, torch.tensor(ids)[1:, None])
        found.append(float(taken[len(prompt) - 1 :].sum()))
    return found


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="folder of the model that PPO began with")
    parser.add_argument("--samples", type=Path, required=True, help="its responses, scored")
    parser.add_argument("--policy", type=Path, required=True, help="those of the policy, scored")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()
    samples, policy = by_prompt(arguments.samples), by_prompt(arguments.policy)
    rows = [row for group in policy.values() for row in group]
    for row, log_prob in zip(rows, reference_log_probs(arguments.reference, rows), strict=True):
        row["kl"] = row["log_prob"] - log_prob
    n = arguments.n
    best = best_of(samples, n)
    contestants = {"start": samples, f"best of {n}": best, "PPO": policy}
    table = {
        name: {key: estimate(list(means(groups, key).values())) for key in ("worth", "score")}
        for name, groups in contestants.items()
    }
    table["PPO"]["kl"] = estimate(list(means(policy, "kl").values()))
    table[f"best of {n}"]["kl"] = (math.log(n) - (n - 1) / n, 0.0)
    table["start"]["kl"] = (0.0, 0.0)
    mine, theirs = means(policy, "worth"), means(best, "worth")
    table["difference"] = {"worth": estimate([mine[prompt] - theirs[prompt] for prompt in theirs])}
    print(f"{'':12}{'utility':>15}{'score':>15}{'KL, nats':>15}")
    for name in contestants:
        print(f"{name:12}" + "".join(f"{value:8.3f} ± {error:.3f}" for value, error in table[name].values()))
    print("PPO less best of {}, prompt by prompt: {:+.3f} ± {:.3f}".format(n, *table["difference"]["worth"]))
    print(f"± is one standard error; the KL of best of {n} is the most that it can be, log {n} − {n - 1}/{n}.")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
