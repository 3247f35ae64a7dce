"""The README's claims about `tether demo` and `tether prove`, seed by seed: accuracy, share of the gap, seconds.

Run it as `python benchmarks/seeds.py demo prove --seeds 0 1 2 3 4`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tether.pipeline.demo import DemoConfig, demo
from tether.pipeline.prove import ProveConfig, prove


def run_demo(seed: int) -> list[str]:
    """Held-out accuracy before and after PPO, the KL spent, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = demo(DemoConfig(seed=seed, output=str(Path(folder) / "demo")))
    before, after = f"{result.accuracy_before:.1%}", f"{result.accuracy_after:.1%}"
    return [str(seed), before, after, f"{result.kl:.2f}", f"{result.seconds:.0f}"]


def run_prove(seed: int) -> list[str]:
    """Share of the gap closed, exact KL to the optimum, the critic's errors, seconds."""
    proof = prove(ProveConfig(seed=seed))
    error = proof.critic_error
    return [
        str(seed),
        f"{proof.evaluation.gap_closed:.2%}",
        f"{proof.evaluation.kl_to_optimum.mean():.4f}",
        f"{error.visited:.3f}",
        f"{error.uniform:.3f}",
        f"{proof.seconds:.0f}",
    ]


CLAIMS: dict[str, tuple[list[str], Callable[[int], list[str]]]] = {
    "demo": (["seed", "held-out before", "after PPO", "KL, nats", "seconds"], run_demo),
    "prove": (["seed", "gap closed", "KL(π‖π*)", "critic, visited", "critic, all alike", "seconds"], run_prove),
}


def main() -> None:
    """Run what was asked for and print one Markdown table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n", flush=True)
    for claim in arguments.claims:
        header, run = CLAIMS[claim]
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        for seed in arguments.seeds:
            with contextlib.redirect_stdout(io.StringIO()):
                cells = run(seed)
            print("| " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
