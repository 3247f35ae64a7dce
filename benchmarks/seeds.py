"""The README's claims about `tether demo` and `tether prove`, seed by seed: accuracy, share of the gap, seconds.

Run it as `python benchmarks/seeds.py demo prove --seeds 0 1 2 3 4`, and with `--threads 2`, `--autocast` for the demo.
`π(4)` is the exact probability of the right answer to "What is 2 + 2?".
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tether.pipeline.demo import DemoConfig, demo
from tether.pipeline.prove import ProveConfig, prove


def run_demo(seed: int, arguments: argparse.Namespace) -> list[str]:
    """Held-out accuracy and π(4) before and after PPO, the KL spent, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "demo")
        result = demo(DemoConfig(seed=seed, output=output, threads=arguments.threads, autocast=arguments.autocast))
    before, after = result.before, result.after
    return [
        str(seed),
        f"{before.accuracy.mean:.1%}",
        f"{after.accuracy.mean:.1%}",
        f"{before.probability:.3f}",
        f"{after.probability:.4f}",
        f"{after.kl:.2f}",
        f"{result.seconds:.0f}",
    ]


def run_prove(seed: int, arguments: argparse.Namespace) -> list[str]:
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


CLAIMS: dict[str, tuple[list[str], Callable[[int, argparse.Namespace], list[str]]]] = {
    "demo": (["seed", "held-out before", "after PPO", "π(4) before", "after PPO", "KL, nats", "seconds"], run_demo),
    "prove": (["seed", "gap closed", "KL(π‖π*)", "critic, visited", "critic, all alike", "seconds"], run_prove),
}


def main() -> None:
    """Run what was asked for and print one Markdown table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, help="of torch in the demo")
    parser.add_argument("--autocast", action="store_true", help="the demo in bfloat16")
    arguments = parser.parse_args()
    threads = arguments.threads or torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}\n", flush=True)
    for claim in arguments.claims:
        header, run = CLAIMS[claim]
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        for seed in arguments.seeds:
            with contextlib.redirect_stdout(io.StringIO()):
                cells = run(seed, arguments)
            print("| " + " | ".join(cells) + " |", flush=True)
        print()


if __name__ == "__main__":
    main()
