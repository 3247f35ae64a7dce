"""Which share of the machine's measured matrix peak and memory bandwidth each phase of PPO reaches.

    python benchmarks/roofline.py                                              # tiny, 15m, 124m in float32 and bfloat16
    python benchmarks/roofline.py --workloads 0.5b --precision bfloat16-weights --device cuda

Peaks are measured again before each round, since a shared machine's speed changes: the fastest matrix product that
torch offers here in the precision at hand, torch's own `a @ b` in float32, and the reading of a large tensor. Medians
over the rounds of the share in each round are shown. What is counted, whatever is really done:

    decode      a step of drawing one token for every response: (time for R tokens − time for 1) ÷ (R − 1). Bytes: all
                weights once, and the keys and values that lie before the token, once. FLOP: 2 for each weight and row,
                and attention.
    reference   its log-probabilities: 2 FLOP for each weight of the trunk and token, 2 for each of the head and
                response token, and attention.
    learning    the whole update, optimizer and all: three times that for each epoch, forward and backward. What is
                computed again is not counted (model FLOP utilisation, Chowdhery et al. 2022, arXiv:2204.02311,
                appendix B), and attention as the causal half of what is counted there.
    optimizer   one step of AdamW by itself: parameter, gradient and both moments read, all but the gradient written,
                against the speed of reading.

Weights, keys and values count with the bytes of the precision at hand; the head on a CPU always with 4, where logits
are float32. A share of bandwidth above 1 means that the processor's caches held what was read.

Exit codes: 0, everything ran; 2, something is missing or was asked wrongly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from control import exit_code, positive
from workloads import (
    PRECISIONS,
    WORKLOADS,
    PhaseMeter,
    Workload,
    check_request,
    load_pyplot,
    machine_line,
    make_ppo,
    matrix_peak,
    memory_bandwidth,
    seconds,
    write_json,
)

from tether.memory import keep_freed_memory


@dataclass(frozen=True)
class Costs:
    """What must be computed and read at the least: FLOP and bytes."""

    workload: Workload
    trunk: int  # weights that multiply every token: all but those of the embeddings and the norms
    head: int
    parameters: int  # that the optimizer moves, tied ones once
    weight_bytes: int  # of each weight of the trunk, each key and each value
    head_bytes: int
    parameter_bytes: int

    @classmethod
    def of(cls, workload: Workload, policy: Any, precision: str) -> Costs:
        """Counted from the model's own parameters."""
        head = policy.model.get_output_embeddings().weight
        outside = {id(head), id(policy.model.get_input_embeddings().weight)}
        matrices = [p for p in policy.model.parameters() if p.ndim == 2 and id(p) not in outside]
        narrow = 4 if precision == "float32" else 2
        trained = sum(p.numel() for p in policy.parameters())
        own = next(policy.model.parameters()).element_size()
        full_head = head.device.type == "cpu"
        return cls(
            workload, sum(p.numel() for p in matrices), head.numel(), trained, narrow, 4 if full_head else narrow, own
        )

    @property
    def read_for_a_step(self) -> float:
        """Bytes: the weights, and the keys and values of the tokens before, which are half drawn on average."""
        w = self.workload
        before = w.prompt_tokens + w.response_tokens / 2
        states = 2 * w.layers * w.key_value_heads * (w.width // w.heads) * w.sequences * before
        return self.weight_bytes * (self.trunk + states) + self.head_bytes * self.head

    @property
    def flop_of_a_step(self) -> float:
        """Attention: 2 FLOP for each channel, for the scores and for the sums of values."""
        w = self.workload
        before = w.prompt_tokens + w.response_tokens / 2
        return w.sequences * (2 * (self.trunk + self.head) + 4 * w.layers * w.width * before)

    @property
    def flop_of_a_reading(self) -> float:
        """One forward pass over all sequences, logits at response tokens alone; each token sees those before it."""
        w = self.workload
        length = w.prompt_tokens + w.response_tokens
        attention = 4 * w.layers * w.width * length * length / 2
        return w.sequences * (2 * self.trunk * length + 2 * self.head * w.response_tokens + attention)

    @property
    def flop_of_learning(self) -> float:
        """Forward, and twice as much backward, in each epoch: 6 FLOP for each weight and token."""
        return 3 * self.workload.epochs * self.flop_of_a_reading

    @property
    def moved_by_the_optimizer(self) -> float:
        """Bytes: 4 tensors read, 3 written."""
        return 7 * self.parameter_bytes * self.parameters


def measure(
    workload: Workload, precision: str, device: str, repeats: int, size: int | None
) -> tuple[dict[str, list[float]], Costs]:
    """Seconds of each phase and the machine's peaks, round by round; the first round warms up and is not kept."""
    world, learner = make_ppo(workload, device, precision)
    meter = PhaseMeter(world, learner, device)
    sampler, prompts = world.sampler, [list(p.token_ids) for p in world.prompts for _ in range(workload.samples)]
    whole, first = sampler.config, replace(sampler.config, max_new_tokens=1)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    found: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(repeats + 1):
        keep("peak", matrix_peak(device, dtype, size))
        keep("plain_peak", matrix_peak(device, torch.float32, size, plain=True))
        keep("bandwidth", memory_bandwidth(device))
        sampler.config = first
        one = seconds(lambda: sampler.sample(prompts), device)
        sampler.config = whole
        trajectories = world.collect()
        keep("decode", (meter.seconds["sampling"][-1] - one) / (workload.response_tokens - 1))
        keep("reference", meter.seconds["reference"][-1])
        advantages, returns = learner.credit(trajectories)
        learner.update(trajectories, advantages, returns)
        keep("learning", meter.seconds["learning"][-1])
        keep("optimizer", optimizer_step(world.policy, learner, device))
    return {name: values[1:] for name, values in found.items()}, Costs.of(workload, world.policy, precision)


def optimizer_step(policy: Any, learner: Any, device: str) -> float:
    """Seconds of one step by itself, with gradients of zero."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    took = seconds(learner.optimizer.step, device)
    learner.optimizer.zero_grad()
    return took


SHARES: dict[str, tuple[str, str, str]] = {
    "decode, of bandwidth": ("decode", "read_for_a_step", "bandwidth"),
    "decode, of peak": ("decode", "flop_of_a_step", "peak"),
    "reference, of peak": ("reference", "flop_of_a_reading", "peak"),
    "learning, of peak": ("learning", "flop_of_learning", "peak"),
    "learning, of float32 a @ b": ("learning", "flop_of_learning", "plain_peak"),
    "optimizer, of bandwidth": ("optimizer", "moved_by_the_optimizer", "bandwidth"),
}
"""Of each share: the phase, what it costs, and what that is held against."""


def row(name: str, precision: str, costs: Costs, found: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the rounds they come from."""

    def share(phase: str, cost: str, limit: str) -> float:
        return median(getattr(costs, cost) / s / most for s, most in zip(found[phase], found[limit], strict=True))

    return {
        "workload": name,
        "precision": precision,
        "shares": {label: share(*parts) for label, parts in SHARES.items()},
        "medians": {key: median(values) for key, values in found.items()},
        "costs": {cost: getattr(costs, cost) for _, cost, _ in SHARES.values()},
        "rounds": found,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "workload": lambda r: r["workload"],
    "precision": lambda r: r["precision"],
    "peak, GFLOP/s": lambda r: f"{r['medians']['peak'] / 1e9:,.0f}",
    "float32 a @ b": lambda r: f"{r['medians']['plain_peak'] / 1e9:,.0f}",
    "read, GB/s": lambda r: f"{r['medians']['bandwidth'] / 1e9:,.1f}",
    "decode step, ms": lambda r: f"{r['medians']['decode'] * 1e3:,.2f}",
    "reference, s": lambda r: f"{r['medians']['reference']:,.3f}",
    "learning, s": lambda r: f"{r['medians']['learning']:,.3f}",
    "optimizer, ms": lambda r: f"{r['medians']['optimizer'] * 1e3:,.2f}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: first the figures, then the shares."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell(r) for cell in COLUMNS.values()) + " |" for r in rows]
    header = ["workload", "precision", *SHARES]
    lines += ["", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in rows:
        lines.append(
            "| " + " | ".join([r["workload"], r["precision"], *(f"{s:.1%}" for s in r["shares"].values())]) + " |"
        )
    return "\n".join(lines)


# of the palette of Okabe and Ito, which everyone can tell apart
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7")


def draw(rows: list[dict[str, Any]], file: str) -> None:
    """A panel for each precision, a group of bars for each workload."""
    plt = load_pyplot()
    precisions = list(dict.fromkeys(r["precision"] for r in rows))
    most = max(len([r for r in rows if r["precision"] == p]) for p in precisions)
    width = max(4.5, 2.4 * most)
    figure, panels = plt.subplots(
        1, len(precisions), figsize=(width * len(precisions), 4.6), squeeze=False, sharey=True
    )
    for panel, precision in zip(panels[0], precisions, strict=True):
        shown = [r for r in rows if r["precision"] == precision]
        for i, (label, colour) in enumerate(zip(SHARES, COLOURS, strict=True)):
            places = [n + (i - (len(SHARES) - 1) / 2) * 0.13 for n in range(len(shown))]
            bars = panel.bar(places, [100 * r["shares"][label] for r in shown], 0.12, color=colour, label=label)
            panel.bar_label(bars, fmt="%.0f", fontsize=7)
        panel.axhline(100, color="black", linewidth=0.8)
        panel.set_xticks(range(len(shown)), [r["workload"] for r in shown])
        panel.set_title(precision)
        panel.grid(visible=False, axis="x")
    panels[0, 0].set_ylabel("share of what this machine can do, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = list(WORKLOADS)
    add("--workloads", nargs="+", choices=names, help="models and batches (default: tiny 15m 124m)")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        help="bfloat16: products alone; bfloat16-weights: weights, too (default: float32 bfloat16)",
    )
    add("--repeats", type=positive, default=5, help="rounds that count (default: 5)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--quick", action="store_true", help="tiny in float32, one round, small peaks: to see that it runs")
    add("--json", metavar="FILE", help="write the figures")
    add("--png", metavar="FILE", help="draw them; needs matplotlib: uv sync --group benchmarks")
    arguments = parser.parse_args()
    arguments.workloads = arguments.workloads or (["tiny"] if arguments.quick else ["tiny", "15m", "124m"])
    arguments.precision = arguments.precision or (["float32"] if arguments.quick else ["float32", "bfloat16"])
    return arguments


def compare(arguments: argparse.Namespace) -> None:
    """Measure everything, print the tables, write the figures and the picture."""
    keep_freed_memory()  # as a run does
    check_request(arguments)
    machine = machine_line(arguments.device)
    print(machine, flush=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.workloads:
        for precision in arguments.precision:
            workload = WORKLOADS[name]
            repeats, size = (1, 256) if arguments.quick else (arguments.repeats, None)
            found, costs = measure(workload, precision, arguments.device, repeats, size)
            rows.append(row(name, precision, costs, found))
            write_json(arguments.json, {"machine": machine, "rows": rows})
            print(f"{name}, {precision}: {found['learning'][-1]:.2f} s of learning in the last round", flush=True)
    print(f"\nMedians of {repeats} rounds.\n\n{table(rows)}")
    if arguments.png:
        draw(rows, arguments.png)


def main() -> int:
    """Exit code."""
    arguments = parse()
    return exit_code("roofline.py", lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
