"""The claims of `examples/rlhf` by seed: reward model and Bayes rate, PPO and best-of-16, and a reward that is fooled.

Run it as `python benchmarks/rlhf.py --seeds 0 1 2`; a seed takes some minutes. `--collect` reads runs that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tether

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "rlhf" / "run.sh"
LAST = 10  # iterations over which the end of a run is averaged


def run(folder: Path, seed: int) -> None:
    """The whole road of one seed; what it prints goes to a file beside the folder."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        subprocess.run(["sh", SCRIPT, folder, str(seed)], env=environment, stdout=log, stderr=log, check=True)
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[Any]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judged(folder: Path, name: str) -> list[str]:
    """Accuracy of a reward model on held-out comparisons, its interval, the Bayes rate of the same, the difference."""
    held_out = read(folder / name / "evaluation.json")["held_out"]
    rows = read_lines(folder / "comparisons_held_out.jsonl")
    bayes = sum(row["bayes"] for row in rows) / len(rows)
    low, high = held_out["interval"]
    accuracy = held_out["accuracy"]
    return [f"{accuracy:.1%}", f"{low:.1%} to {high:.1%}", f"{bayes:.1%}", f"{100 * (bayes - accuracy):.1f} points"]


def improved(folder: Path) -> list[str]:
    """True utility and KL of SFT, best-of-16 and PPO on held-out prompts, and PPO less best-of-16, paired by prompt."""
    table = read(folder / "comparison.json")

    def shown(name: str, key: str) -> str:
        return "{:.2f} ± {:.2f}".format(*table[name][key])

    best = next(name for name in table if name.startswith("best of"))
    utilities = [shown(name, "worth") for name in ("start", best, "PPO", "difference")]
    return [*utilities, shown("PPO", "kl"), f"{table[best]['kl'][0]:.2f}"]


def fooled(folder: Path) -> list[str]:
    """Proxy and truth of the run against the small reward model, when its alarm is raised, and the KL at the end."""
    metrics = tether.read_metrics(folder / "fooled")

    def shown(rows: list[dict[str, Any]]) -> str:
        proxy, truth = (math.fsum(row[key] for row in rows) / len(rows) for key in ("score", "gold"))
        return f"{proxy:+.2f}, {truth:+.2f}"

    best = max(range(len(metrics)), key=lambda i: metrics[i]["gold"])
    file = folder / "fooled" / "alarms.jsonl"
    alarms = read_lines(file) if file.exists() else []
    raised = next((f"iteration {row['iteration']}" for row in alarms if row["kind"] == "gap"), "never")
    last = metrics[-LAST:]
    kl = math.fsum(row["kl_k1"] for row in last) / len(last)
    return [
        shown(metrics[:1]),
        f"{shown(metrics[best : best + 1])} (iteration {best + 1})",
        shown(last),
        f"{kl:.0f}",
        raised,
    ]


TABLES = {
    "reward model": (["accuracy", "95 % interval", "Bayes rate", "short of it by"], lambda f: judged(f, "reward")),
    "small reward model": (
        ["accuracy", "95 % interval", "Bayes rate", "short of it by"],
        lambda f: judged(f, "small_reward"),
    ),
    "true utility on held-out orders": (
        ["SFT", "best of 16", "PPO", "PPO − best of 16", "KL of PPO", "KL of best of 16, at most"],
        improved,
    ),
    "PPO against the small reward model: proxy, true utility": (
        ["first iteration", "where the truth is highest", f"last {LAST}", "KL there, nats", "alarm raised"],
        fooled,
    ),
}


def main() -> None:
    """Run the seeds and print one Markdown table for each claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/rlhf"), help="folder for the runs of all seeds")
    parser.add_argument("--collect", action="store_true", help="only read what is there")
    arguments = parser.parse_args()
    folders = {seed: arguments.output / f"seed-{seed}" for seed in arguments.seeds}
    if not arguments.collect:
        for seed, folder in folders.items():
            run(folder, seed)
            print(f"seed {seed}: {read(folder / 'seconds.json'):.0f} s", file=sys.stderr, flush=True)
    for title, (header, cells) in TABLES.items():
        print(f"### {title}\n\n| seed | {' | '.join(header)} |\n{'|---' * (len(header) + 1)}|")
        for seed, folder in folders.items():
            print(f"| {seed} | {' | '.join(cells(folder))} |")
        print()


if __name__ == "__main__":
    main()
