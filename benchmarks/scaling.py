"""How time and peak memory of one PPO iteration grow: with response length, vocabulary, prompts, samples per prompt.

    python benchmarks/scaling.py                        # half an hour on two idle cores
    python benchmarks/scaling.py --only vocabulary      # one variable
    python benchmarks/scaling.py --only learner         # only the learner's memory per token, by vocabulary

One variable changes at a time, from a base point: a Llama of 4.8 million parameters without its embeddings (6 layers,
width 256; output and input rows tied), vocabulary 8,192, 8 prompts of 32 tokens, one response of 128 tokens to each,
one epoch of 4 minibatches. `samples` keeps 16 responses of 32 tokens and divides them among prompts of 512 tokens:
what falls is the reading of prompts, which samples of one prompt share. Every point is a process of its own. It draws
responses, asks the reference and learns, once to warm up and then `--repeats` times; the medians of the latter are
shown. Memory is each phase's peak above that of the process when it had made policy, reference and optimizer (moments
included) and done nothing else: resident memory on a CPU (Linux alone), torch's tensors on a GPU.

Time is fitted as nᵖ by least squares of the logarithms over the upper half of the points, memory as a straight line
over all of them. `learner` holds all tokens of an iteration in one pass and measures the learner's peak for several
numbers of tokens and several vocabularies: the line's slope, in bytes per token (prompts included), should be the same
for all; what depends on the vocabulary alone (gradients and tiles of logits) is in its constant.

Exit codes: 0, everything ran; 1, a point failed (no memory, most likely); 2, something is missing or asked wrongly.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np
from control import FailedError, exit_code, positive
from workloads import (
    PRECISIONS,
    PhaseMeter,
    Workload,
    check_request,
    load_pyplot,
    machine_line,
    make_ppo,
    write_json,
)  # fmt: skip

from tether.memory import keep_freed_memory

PHASES = ("sampling", "reference", "learning")
BASE = Workload(8192, 6, 256, 4, 4, 704, prompts=8, samples=1, prompt_tokens=32, response_tokens=128, epochs=1)
QUICK = Workload(64, 1, 16, 2, 2, 32, prompts=4, samples=1, prompt_tokens=4, response_tokens=8, epochs=1)
ONE_PASS = 2**40  # a microbatch size that holds any minibatch whole
M_MMAP_THRESHOLD = -3  # of mallopt(3)


@dataclass(frozen=True)
class Variable:
    """What is changed, and what memory is set against: tokens of an iteration, or the variable itself."""

    name: str
    title: str
    values: tuple[int, ...]
    change: Callable[[Workload, int], Workload]
    per: str = "token"

    def amount(self, workload: Workload, value: int) -> int:
        """The x of the line that is fitted to memory."""
        return tokens(workload) if self.per == "token" else value


def tokens(workload: Workload) -> int:
    """Of all sequences of an iteration, prompts included."""
    return workload.sequences * (workload.prompt_tokens + workload.response_tokens)


def with_samples(base: Workload, samples: int) -> Workload:
    """16 responses to long prompts, `samples` to each."""
    long = replace(base, prompt_tokens=16 * base.prompt_tokens, response_tokens=base.prompt_tokens)
    return replace(long, samples=samples, prompts=2 * base.prompts // samples)


def variables(quick: bool) -> list[Variable]:
    """The four, with their ranges."""
    lengths = (4, 8, 16) if quick else (64, 128, 256, 512, 1024, 2048)
    words = (64, 128) if quick else (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    prompts = (4, 8) if quick else (4, 8, 16, 32, 64)
    samples = (1, 4) if quick else (1, 2, 4, 8, 16)
    return [
        Variable("response", "response length, tokens", lengths, lambda w, n: replace(w, response_tokens=n)),
        Variable("vocabulary", "vocabulary, words", words, lambda w, n: replace(w, vocabulary=n), per="word"),
        Variable("prompts", "prompts", prompts, lambda w, n: replace(w, prompts=n)),
        Variable("samples", "samples per prompt", samples, with_samples, per="sample"),
    ]


# --- what runs in a process of its own ---


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Median seconds and peak bytes above the start of each phase of a workload's iterations."""
    if not task["exact_memory"]:
        keep_freed_memory()  # as a run does
    elif (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**17)  # what is freed is given back at once: slower, and resident is what is in use
    workload = Workload(**task["workload"])
    world, learner = make_ppo(workload, task["device"], task["precision"], microbatch_size=task["microbatch_size"])
    meter = PhaseMeter(world, learner, task["device"])
    for _ in range(task["warmup"] + task["repeats"]):
        trajectories = world.collect()
        advantages, returns = learner.credit(trajectories)
        learner.update(trajectories, advantages, returns)
        del trajectories, advantages, returns
    first = task["warmup"]
    return {
        "seconds": {phase: median(values[first:]) for phase, values in meter.seconds.items()},
        "bytes": {phase: median(values[first:]) - meter.base for phase, values in meter.bytes.items()},
    }


def answer(connection: Connection, task: dict[str, Any]) -> None:
    """Send what `measure` found; an error ends the process, and the other side reads that nothing came."""
    connection.send(measure(task))
    connection.close()


def in_own_process(task: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process that has done nothing before but import. Raises FailedError where it gives no result."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server looks there for what it is to import
    context.set_forkserver_preload(["workloads", "tether.language.world"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, task))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        code = f"code {process.exitcode}" + " (out of memory?)" * (process.exitcode == -9)
        raise FailedError(f"{task['workload']}: its process ended with {code}") from error
    finally:
        process.join()


# --- fits ---


def growth(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of y ~ xᵖ: slope of the logarithms, by least squares, over the upper half of the points (2 at least)."""
    upper = slice(min(len(x) // 2, len(x) - 2), None)
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Slope, constant and R² of a straight line by least squares; R² is None where y does not change at all."""
    slope, constant = np.polyfit(x, y, 1)
    residual = np.square(np.polyval([slope, constant], x) - np.asarray(y)).sum()
    spread = np.square(np.asarray(y) - np.mean(y)).sum()
    return {"slope": float(slope), "constant": float(constant), "r2": float(1 - residual / spread) if spread else None}


def sweep(variable: Variable, arguments: argparse.Namespace) -> dict[str, Any]:
    """All points of one variable, printed as they come, and the fits."""
    base = QUICK if arguments.quick else BASE
    header = [f"{phase} {unit}" for unit in ("s", "MiB") for phase in PHASES]
    print(f"\n{variable.title}\n\n| {variable.name} | " + " | ".join(header) + " |\n|" + "---|" * 7, flush=True)
    points = []
    for value in variable.values:
        workload = variable.change(base, value)
        task = {"workload": asdict(workload), "device": arguments.device, "precision": arguments.precision,
                "microbatch_size": 8192, "warmup": 1, "repeats": arguments.repeats, "exact_memory": False}  # fmt: skip
        point = in_own_process(task) | {"value": value, "amount": variable.amount(workload, value)}
        points.append(point)
        cells = [f"{point['seconds'][p]:.3f}" for p in PHASES] + [f"{point['bytes'][p] / 2**20:,.1f}" for p in PHASES]
        print(f"| {value:,} | " + " | ".join(cells) + " |", flush=True)
    fits = {}
    for phase in PHASES:
        time = growth([p["value"] for p in points], [p["seconds"][phase] for p in points])
        memory = line([p["amount"] for p in points], [p["bytes"][phase] for p in points])
        fits[phase] = {"exponent": time, "memory": memory}
        said = [f"bytes per {variable.per} {memory['slope']:,.0f}"]
        said += [] if memory["r2"] is None else [f"R² {memory['r2']:.4f}"]
        print(f"{'' if phase != PHASES[0] else chr(10)}{phase:9}  time ~ n^{time:.2f}   {'  '.join(said)}")
    return {"variable": variable.name, "title": variable.title, "per": variable.per, "points": points, "fits": fits}


def learner_slopes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The learner's peak against tokens in one pass, for each vocabulary."""
    base = replace(QUICK if arguments.quick else BASE, minibatches=1)
    sequences = (4, 8) if arguments.quick else (8, 16, 24, 32)
    words = (64, 128) if arguments.quick else (1024, 8192, 32_768, 131_072)
    print("\nThe learner's peak, all tokens in one pass, MiB\n")
    counts = [tokens(replace(base, prompts=n)) for n in sequences]
    print("| vocabulary | " + " | ".join(f"{n:,} tokens" for n in counts) + " | bytes per token | constant, MiB | R² |")
    print("|" + "---|" * (len(counts) + 4), flush=True)
    rows = []
    for vocabulary in words:
        peaks = []
        for prompts in sequences:
            workload = replace(base, vocabulary=vocabulary, prompts=prompts)
            task = {"workload": asdict(workload), "device": arguments.device, "precision": arguments.precision,
                    "microbatch_size": ONE_PASS, "warmup": 0, "repeats": 1, "exact_memory": True}  # fmt: skip
            peaks.append(in_own_process(task)["bytes"]["learning"])
        fit = line(counts, peaks)
        rows.append({"vocabulary": vocabulary, "tokens": counts, "bytes": peaks, **fit})
        cells = [f"{peak / 2**20:,.1f}" for peak in peaks] + [f"{fit['slope']:,.0f}", f"{fit['constant'] / 2**20:,.1f}"]
        cells.append("" if fit["r2"] is None else f"{fit['r2']:.5f}")
        print(f"| {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)
    slopes = [row["slope"] for row in rows]
    print(f"\nSlopes: the greatest ÷ the least {max(slopes) / min(slopes):.3f} over vocabularies of", end=" ")
    print(f"{words[0]:,} to {words[-1]:,}; a slope with one float32 of each word in it would grow by")
    print(f"{4 * (words[-1] - words[0]):,} bytes per token")
    return rows


# --- the picture ---

# of the palette of Okabe and Ito, which everyone can tell apart
COLOURS = {"sampling": "#0072B2", "reference": "#009E73", "learning": "#D55E00"}
VOCABULARY_COLOURS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00")


def draw(report: dict[str, Any], file: str) -> None:
    """Time above memory, a column for each variable; the learner's lines stand in the last."""
    plt = load_pyplot()
    sweeps, slopes = report["sweeps"], report["learner"]
    columns = len(sweeps) + bool(slopes)
    figure, panels = plt.subplots(2, columns, figsize=(3.9 * columns, 7.4), squeeze=False)
    for (above, below), data in zip(panels.T, sweeps, strict=False):
        x = [point["value"] for point in data["points"]]
        for phase, colour in COLOURS.items():
            fit = data["fits"][phase]
            seconds = [point["seconds"][phase] for point in data["points"]]
            mebibytes = [max(point["bytes"][phase] / 2**20, 0.1) for point in data["points"]]
            above.plot(x, seconds, "o-", color=colour, label=f"{phase}, n^{fit['exponent']:.2f}")
            below.plot(x, mebibytes, "o-", color=colour, label=phase)
        for panel in (above, below):
            panel.set(xscale="log", yscale="log", xlabel=data["title"])
            panel.set_xticks(x, [f"{n // 1024}k" if n >= 1024 else str(n) for n in x], rotation=45)
            panel.xaxis.minorticks_off()
            panel.legend(fontsize=8)
    for row in panels[:, : len(sweeps)] if sweeps else ():  # one scale for all
        low, high = (choose(end for panel in row for end in panel.get_ylim()) for choose in (min, max))
        for panel in row:
            panel.set_ylim(low, high)
    panels[0, 0].set_ylabel("seconds of an iteration")
    panels[1, 0].set_ylabel("peak above policy, reference\nand optimizer, MiB")
    if slopes:
        above, below = panels[:, -1]
        for row, colour in zip(slopes, VOCABULARY_COLOURS, strict=False):
            name = f"{row['vocabulary']:,} words"
            above.plot(row["tokens"], [b / 2**20 for b in row["bytes"]], "o-", color=colour, label=name)
            below.bar(f"{row['vocabulary']:,}", row["slope"] / 1024, color=colour)
        above.set(xlabel="tokens in one pass", ylabel="learner's peak, MiB", xlim=(0, None), ylim=(0, None))
        above.legend(fontsize=8, title="vocabulary", title_fontsize=8)
        below.set(xlabel="vocabulary", ylabel="learner's peak: KiB per token")
    figure.savefig(file)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = [variable.name for variable in variables(quick=False)] + ["learner"]
    add("--only", nargs="+", choices=names, default=names, help="what to measure (default: everything)")
    add("--repeats", type=positive, default=3, help="iterations that count, of each point (default: 3)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--precision", choices=PRECISIONS, default="float32", help="bfloat16: of products alone (default: float32)")
    add("--quick", action="store_true", help="tiny models and few points, to see that it runs")
    add("--json", metavar="FILE", help="write the figures")
    add("--png", metavar="FILE", help="draw them; needs matplotlib: uv sync --group benchmarks")
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    """Measure everything, write the figures and the picture."""
    report: dict[str, Any] = {"precision": arguments.precision, "sweeps": [], "learner": []}
    check_request(arguments)
    report["machine"] = machine_line(arguments.device)
    print(f"{report['machine']}; {arguments.precision}", flush=True)
    for variable in variables(arguments.quick):
        if variable.name in arguments.only:
            report["sweeps"].append(sweep(variable, arguments))
            write_json(arguments.json, report)
    if "learner" in arguments.only:
        report["learner"] = learner_slopes(arguments)
    write_json(arguments.json, report)
    if arguments.png:
        draw(report, arguments.png)


def main() -> int:
    """Exit code."""
    arguments = parse()
    return exit_code("scaling.py", lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
