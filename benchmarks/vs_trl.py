"""Whole iterations of PPO: Tether against TRL 1.12.0, the last release with a PPO trainer (`trl.experimental.ppo`).

    python benchmarks/vs_trl.py                              # tiny, 15m and 124m, float32 and bfloat16
    python benchmarks/vs_trl.py --quick                      # tiny, one counted iteration
    python benchmarks/vs_trl.py --contestants tether         # Tether alone: installs nothing

Each run is a process of its own, and the contestants take turns. The first iteration of a run warms up and is not
counted. An iteration is everything from one to the next: drawing responses, scoring them, the reference, advantages, 16
optimizer steps, metrics. TRL lives in an environment of its own, benchmarks/.peers/trl, made with uv where missing.

    tether            the library from Python: `LanguageWorld`, `Learner`, `iterate`; the critic is a head on the policy
    tether-separate   the same with a trunk of its own for the critic, as TRL has it (`separate_value_trunk`)
    tether-compiled   the first with `--compile`, where it is named; compiling falls into the iteration not counted
    trl               `PPOTrainer`, without gradient checkpointing, which is fastest
    trl-checkpointing with it (`--trl-checkpointing`), which saves memory

Equal for all: weights, prompts, lengths (no end of sequence or padding is ever drawn), temperature 1, 4 epochs of 4
minibatches with an optimizer step each, learning rate, clip ranges of policy and value, λ, β, value coefficient, AdamW
(fused), no clipping of gradients, which TRL's loop does not do. The script counts optimizer steps, tokens drawn and
tokens trained on in every iteration and fails where they differ. TRL draws and scores all responses in one batch
(`local_rollout_forward_batch_size`). Its `per_device_train_batch_size` is the whole batch and its
`gradient_accumulation_steps` 1: with more it would take an optimizer step only once in so many minibatches.

Not equal: TRL's reward is a module, here a model of one layer of width 8, and Tether's a Python function, for which the
responses are decoded to text; Tether reports more metrics. Precision: "float32" is that throughout, "bfloat16" is
autocast over weights in float32. With transformers 5, `PPOConfig.bf16` and `gradient_checkpointing` change nothing in
this trainer, whose loop is its own: Accelerate hears of neither. So TRL gets autocast in the way that
`accelerate launch --mixed_precision bf16` gives it, and checkpointing by a call on its models. Its autocast covers the
update alone; it draws and scores in float32 even so. "bfloat16-weights" holds policy, critic and reference in bfloat16
without autocast, for GPUs.

Peak: of the process's resident memory, imports included; with `--device cuda` of what torch allocated there. TRL keeps
the logits of all drawn tokens at once, which for the workload 0.5b are 160 GB in float32.

Exit codes: 0, everything ran; 1, a run failed, and what it said is shown; 2, something is missing or was asked wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from control import FailedError, MissingError, exit_code, positive, spread
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
    peak_bytes,
    synchronise,
    write_json,
)

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers" / "trl"
PACKAGES = {"trl": "1.12.0", "datasets": "", "pandas": "", "accelerate": ""}  # besides the torch and transformers here
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Task:
    """One run."""

    contestant: str
    workload: str
    precision: str
    device: str
    iterations: int

    @property
    def shape(self) -> Workload:
        """Of the model and the batch."""
        return WORKLOADS[self.workload]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.precision == "bfloat16-weights" else torch.float32


class Meter:
    """Seconds of each iteration and of its phases, and what was counted in it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.iterations: list[dict[str, float]] = []
        self.counts: list[dict[str, int]] = []

    def now(self) -> float:
        """The clock, once the device has done its work."""
        synchronise(self.device)
        return time.perf_counter()

    def begin(self) -> None:
        """An iteration begins."""
        self.counted: Counter[str] = Counter()
        self.began = self.now()

    def end(self, generation: float, learning: float) -> None:
        """It ends, and the next begins."""
        total = self.now() - self.began
        self.iterations.append({"seconds": total, "generation": generation, "learning": learning})
        self.counts.append(dict(sorted(self.counted.items())))
        self.begin()


# --- what runs in a process of its own ---


def run_tether(task: Task, meter: Meter) -> None:
    """The library as `tether ppo` uses it."""
    from tether.language.policy import LanguagePolicy
    from tether.language.prompts import Prompt
    from tether.language.reference import ModelReference
    from tether.language.sampler import Sampler, SamplingConfig
    from tether.language.world import CollectConfig, LanguageWorld
    from tether.memory import keep_freed_memory
    from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
    from tether.rewards import Rewards, RewardsConfig
    from tether.train import iterate

    keep_freed_memory()
    shape = task.shape
    model = make_model(shape, task.dtype, task.device)
    reference = ModelReference(copy.deepcopy(model))
    policy = LanguagePolicy(
        model,
        separate_value_trunk=task.contestant == "tether-separate",
        autocast=task.precision == "bfloat16",
        compiled=task.contestant == "tether-compiled",
    )
    tokenizer = make_tokenizer(shape.vocabulary + 1)
    tokenizer.eos_token = str(shape.vocabulary)  # an id that the model has no logit for
    texts = [" ".join(map(str, ids)) for ids in make_prompts(shape)]
    prompts = [Prompt(text, tuple(map(int, text.split())), text, {}, row) for row, text in enumerate(texts, start=1)]
    sampling = SamplingConfig(max_new_tokens=shape.response_tokens, batch_size=shape.sequences)
    rewards = Rewards(RewardsConfig(), [lambda completion_ids, **_: [float(ids[0] % 2) for ids in completion_ids]])
    kl = KLController(KLConfig(beta=0.05))
    collect = CollectConfig(prompts=shape.prompts, samples_per_prompt=shape.samples)
    world = LanguageWorld(policy, reference, Sampler(policy, tokenizer, sampling), prompts, rewards, kl, collect)
    config = LearnerConfig(
        epochs=shape.epochs,
        minibatches=shape.minibatches,
        learning_rate=LEARNING_RATE,
        value_coefficient=0.1,
        value_clip=0.2,
        max_gradient_norm=0.0,
    )
    learner = Learner(policy, config, AdvantageConfig(gamma=1.0, lam=0.95), kl, task.iterations)
    evaluate = policy.evaluate

    def counted(context: Any, actions: Any, mask: Any) -> Any:
        if torch.is_grad_enabled():
            meter.counted["tokens trained on"] += int(mask.sum())
        return evaluate(context, actions, mask)

    policy.evaluate = counted  # type: ignore[method-assign]
    learner.optimizer.register_step_post_hook(lambda *_: meter.counted.update({"optimizer steps": 1}))
    meter.begin()
    for step in iterate(world, learner):
        meter.counted["tokens drawn"] += int(step.trajectories.mask.sum())
        meter.end(step.metrics["time/sampling"], step.metrics["time/learning"])


def run_trl(task: Task, meter: Meter) -> None:
    """TRL's trainer, with the clock put around what it calls."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if task.precision == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # what `accelerate launch --mixed_precision bf16` sets
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    shape = task.shape
    model = make_model(shape, task.dtype, task.device)

    def scorer(**changes: int) -> Any:
        config = copy.deepcopy(model.config)
        config.update({"num_labels": 1, **changes})
        return AutoModelForSequenceClassification.from_config(config).to(task.device, task.dtype)

    value = scorer()
    value.base_model.load_state_dict(model.base_model.state_dict())
    one_layer = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8}
    reward = scorer(**one_layer, num_attention_heads=1, num_key_value_heads=1)
    if task.contestant == "trl-checkpointing":
        for trained in (model, value):
            trained.gradient_checkpointing_enable()
    # padding and end have ids that the models have no logit for
    tokenizer = make_tokenizer(shape.vocabulary + 2)
    tokenizer.pad_token, tokenizer.eos_token = str(shape.vocabulary), str(shape.vocabulary + 1)

    learning_began = 0.0
    generation = 0.0

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal learning_began
            meter.end(generation, meter.now() - learning_began)
            learning_began = 0.0

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir="output",
            per_device_train_batch_size=shape.sequences,
            gradient_accumulation_steps=1,
            num_mini_batches=shape.minibatches,
            num_ppo_epochs=shape.epochs,
            total_episodes=task.iterations * shape.sequences,
            local_rollout_forward_batch_size=shape.sequences,
            response_length=shape.response_tokens,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            kl_coef=0.05,
            vf_coef=0.1,
            cliprange=0.2,
            cliprange_value=0.2,
            gamma=1.0,
            lam=0.95,
            bf16=task.precision == "bfloat16",
            gradient_checkpointing=task.contestant == "trl-checkpointing",
            use_cpu=task.device == "cpu",
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": make_prompts(shape) * shape.samples}),
        callbacks=[Timed()],
    )
    if (trainer.accelerator.mixed_precision == "bf16") != (task.precision == "bfloat16"):
        raise RuntimeError(f"mixed precision is {trainer.accelerator.mixed_precision}, asked for {task.precision}")
    draw, forward, accumulate = ppo_trainer.batch_generation, ppo_trainer.forward, trainer.accelerator.accumulate

    def real_tokens(sequences: Any) -> int:
        return int((sequences[:, shape.prompt_tokens :] < shape.vocabulary).sum())

    def timed_draw(*arguments: Any) -> Any:
        nonlocal generation
        began = meter.now()
        drawn = draw(*arguments)
        generation = meter.now() - began
        meter.counted["tokens drawn"] += real_tokens(drawn[0])
        return drawn

    def counted_forward(module: Any, sequences: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            meter.counted["tokens trained on"] += real_tokens(sequences)
        return forward(module, sequences, *arguments)

    def marked_accumulate(*models: Any) -> Any:
        nonlocal learning_began
        learning_began = learning_began or meter.now()
        return accumulate(*models)

    ppo_trainer.batch_generation, ppo_trainer.forward = timed_draw, counted_forward
    trainer.accelerator.accumulate = marked_accumulate
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: meter.counted.update({"optimizer steps": 1}))
    trainer.train()


def work(task: Task) -> None:
    """Do one run in the current folder and leave `result.json` there; what it prints goes into `printed`."""
    meter = Meter(task.device)
    run: Callable[[Task, Meter], None] = run_trl if task.contestant.startswith("trl") else run_tether
    with open("printed", "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        run(task, meter)
    result = {"iterations": meter.iterations, "counts": meter.counts, "peak_bytes": peak_bytes(task.device)}
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


# --- TRL's environment ---


def installed(python: Path) -> dict[str, str]:
    """Versions of what matters in an environment.

    Raises:
        MissingError: one of these packages is not there, or TRL is of another release.
    """
    names = ("torch", "transformers", *PACKAGES)
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except OSError as error:
        raise MissingError(f"{python}: cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise MissingError(f"{python}: {error.stderr.strip().splitlines()[-1]}; it needs {', '.join(names)}") from error
    versions: dict[str, str] = json.loads(done.stdout)
    if versions["trl"] != PACKAGES["trl"]:
        raise MissingError(f"{python}: trl is {versions['trl']}, expected {PACKAGES['trl']}")
    return versions


def make_peer() -> Path:
    """The Python of `benchmarks/.peers/trl`, made where it is missing: torch and transformers as here."""
    python = PEERS / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    same = {name: version(name) for name in ("torch", "transformers")}
    with contextlib.suppress(MissingError):
        if same.items() <= installed(python).items():
            return python
    uv = shutil.which("uv") or str(HERE.parent / ".uv" / "bin" / "uv")
    if not Path(uv).exists():
        raise MissingError("uv not found: run `make sync` in the repository, or name an environment with --trl-python")
    print(f"installing TRL {PACKAGES['trl']} into {PEERS} ...", flush=True)
    backend = ["--torch-backend", "cpu"] if "+cpu" in same["torch"] else []
    pins = [f"{name}=={number.partition('+')[0]}" for name, number in same.items()]
    packages = [*pins, *(f"{name}=={number}" if number else name for name, number in PACKAGES.items())]
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(PEERS)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *backend, *packages],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise MissingError(f"{' '.join(command)}\n{error.stderr.strip()}") from error
    return python


# --- the comparison ---


@dataclass(frozen=True)
class Result:
    """One run; `iterations` holds the counted ones."""

    contestant: str
    workload: str
    precision: str
    round: int
    iterations: list[dict[str, float]]
    counts: dict[str, int]  # of each iteration
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Median of an iteration."""
        return median(i["seconds"] for i in self.iterations)


def run_once(task: Task, number: int, python: Path) -> Result:
    """One run in a process of its own and a folder that goes with it.

    Raises:
        FailedError: it ended with an error, or did other work in one iteration than in another.
    """
    what = f"{task.contestant}, {task.workload}, {task.precision}"
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), str(Path(__file__).resolve()), WORKER, json.dumps(asdict(task))]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise FailedError(f"{what}, ended with code {done.returncode}:\n{done.stderr.strip()}")
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    counts = result["counts"]
    if len(counts) != task.iterations or any(count != counts[0] for count in counts):
        raise FailedError(f"{what}: expected {task.iterations} iterations that do the same, found {counts}")
    return Result(
        task.contestant, task.workload, task.precision, number, result["iterations"][1:], counts[0],
        result["peak_bytes"],
    )  # fmt: skip


def check_same_work(results: Sequence[Result]) -> None:
    """Raise FailedError where contestants did not do the same in an iteration."""
    for result in results:
        first = next(r for r in results if r.workload == result.workload)
        if result.counts != first.counts:
            raise FailedError(
                f"{result.workload}: {first.contestant} did {first.counts} in an iteration, "
                f"{result.contestant} did {result.counts}"
            )


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each workload, precision and contestant; ratios are of runs of the same round."""
    rows = []
    for workload, precision, contestant in dict.fromkeys((r.workload, r.precision, r.contestant) for r in results):
        peers = {r.round: r for r in results if (r.workload, r.precision, r.contestant) == (workload, precision, "trl")}
        runs = [r for r in results if (r.workload, r.precision, r.contestant) == (workload, precision, contestant)]
        pairs = [(peers[r.round], r) for r in runs if r.round in peers and contestant != "trl"]
        row: dict[str, Any] = {"workload": workload, "precision": precision, "contestant": contestant}
        for name in ("seconds", "generation", "learning"):
            row[name] = [i[name] for r in runs for i in r.iterations]
        row["peak_bytes"] = max(r.peak_bytes for r in runs)
        row["trl_seconds_over_its"] = [peer.seconds / own.seconds for peer, own in pairs]
        row["its_peak_over_trl"] = [own.peak_bytes / peer.peak_bytes for peer, own in pairs]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    header = [
        "workload", "precision", "contestant", "seconds per iteration", "of which generation", "learning",
        "TRL ÷ it", "peak, GB", "it ÷ TRL",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [
            row["workload"],
            row["precision"],
            row["contestant"],
            spread(row["seconds"], ".3g"),
            f"{median(row['generation']):.3g}",
            f"{median(row['learning']):.3g}",
            spread(row["trl_seconds_over_its"], ".2f") if row["trl_seconds_over_its"] else "",
            f"{row['peak_bytes'] / 1e9:.2f}",
            spread(row["its_peak_over_trl"], ".2f") if row["its_peak_over_trl"] else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> None:
    """Run everything, print the table, write the figures and the picture.

    Raises:
        MissingError: something that is needed is not there.
        FailedError: a run ended with an error, or contestants did not do the same.
    """
    check_request(arguments)
    contestants = arguments.contestants + ["trl-checkpointing"] * arguments.trl_checkpointing
    machine, pythons = machine_line(arguments.device, ("tether", "torch", "transformers")), {}
    if any(c.startswith("trl") for c in contestants):
        python = Path(arguments.trl_python).absolute() if arguments.trl_python else make_peer()
        versions = installed(python)
        machine += f"; TRL's: {', '.join(f'{name} {number}' for name, number in versions.items())}"
        pythons = dict.fromkeys(("trl", "trl-checkpointing"), python)
    print(f"{machine}\n", flush=True)

    results: list[Result] = []
    for name in arguments.workloads:
        for precision in arguments.precision:
            for number in range(arguments.repeats):
                for contestant in contestants:
                    task = Task(contestant, name, precision, arguments.device, arguments.iterations)
                    result = run_once(task, number, pythons.get(contestant, Path(sys.executable)))
                    results.append(result)
                    check_same_work(results)
                    if result is next(r for r in results if r.workload == name):
                        did = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
                        print(f"{name}: every iteration of every contestant is to do what this one did: {did}")
                    print(
                        f"{name:5} {precision:16} {contestant:17} {result.seconds:8.3f} s per iteration, "
                        f"peak {result.peak_bytes / 1e9:.2f} GB",
                        flush=True,
                    )
                rows = summarise(results)
                write_json(
                    arguments.json,
                    {
                        "machine": machine,
                        "workloads": {name: asdict(WORKLOADS[name]) for name in arguments.workloads},
                        "results": [asdict(r) for r in results],
                        "summary": rows,
                    },
                )
    print(f"\nMedian (least–greatest) of {arguments.repeats} × {arguments.iterations - 1} iterations.\n\n{table(rows)}")
    if arguments.json:
        print(f"\nfigures: {arguments.json}")
    if arguments.png:
        draw(rows, arguments.png)
        print(f"picture: {arguments.png}")


COLOURS = {"generation": "#56B4E9", "scoring and the rest": "#BBBBBB", "learning": "#0072B2"}  # Okabe and Ito


def draw(rows: Sequence[dict[str, Any]], file: str) -> None:
    """For each workload and precision the seconds of an iteration by phase, and below the peaks."""
    plt = load_pyplot()
    groups = list(dict.fromkeys((row["workload"], row["precision"]) for row in rows))
    figure, panels = plt.subplots(2, len(groups), figsize=(1.5 + 3.2 * len(groups), 6.5), squeeze=False)
    for column, group in enumerate(groups):
        of_group = [row for row in rows if (row["workload"], row["precision"]) == group]
        names = [row["contestant"] for row in of_group]
        whole, generation, learning = (
            [median(row[name]) for row in of_group] for name in ("seconds", "generation", "learning")
        )
        rest = [w - g - t for w, g, t in zip(whole, generation, learning, strict=True)]
        bottom = [0.0] * len(names)
        seconds, memory = panels[:, column]
        for (label, colour), part in zip(COLOURS.items(), (generation, rest, learning), strict=True):
            seconds.bar(names, part, bottom=bottom, color=colour, label=label)
            bottom = [b + p for b, p in zip(bottom, part, strict=True)]
        bars = seconds.bar(names, whole, color="none")
        seconds.bar_label(bars, [f"{w:.3g} s" for w in whole])
        peaks = [row["peak_bytes"] / 1e9 for row in of_group]
        memory.bar_label(memory.bar(names, peaks, color="#009E73"), [f"{p:.2f} GB" for p in peaks])
        seconds.set_title(f"{group[0]}, {group[1]}")
        for panel in (seconds, memory):
            panel.margins(y=0.12)
            panel.set_axisbelow(True)
            panel.grid(axis="x", visible=False)
            panel.tick_params(axis="x", rotation=25)
    panels[0, 0].set_ylabel("seconds per iteration, median")
    panels[1, 0].set_ylabel("peak memory, GB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(file)
    plt.close(figure)


# --- the command ---

WORKER = "--worker"  # not for users: how the benchmark starts a run of its own


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--workloads", nargs="+", choices=list(WORKLOADS), default=["tiny", "15m", "124m"], help="see workloads.py")
    add(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["float32", "bfloat16"],
        help="one or several (default: float32 bfloat16)",
    )
    names = ["tether", "tether-separate", "trl", "tether-compiled"]
    add(
        "--contestants",
        nargs="+",
        choices=names,
        default=names[:3],
        help="in the order of turns (default: the first three)",
    )
    add("--trl-checkpointing", action="store_true", help="run TRL with gradient checkpointing, too")
    add("--iterations", type=positive, default=6, help="of each run, the first not counted (default: 6)")
    add("--repeats", type=positive, default=1, help="turns of each contestant (default: 1)")
    add("--quick", action="store_true", help="tiny alone, 2 iterations, one turn: to see that everything runs")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add(
        "--trl-python",
        metavar="PATH",
        help=f"Python of an environment with trl {PACKAGES['trl']} (default: benchmarks/.peers/trl, made with uv)",
    )
    add("--json", metavar="FILE", help="write all figures, after each turn")
    add("--png", metavar="FILE", help="draw them")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.workloads, arguments.iterations, arguments.repeats = ["tiny"], 2, 1
    if arguments.iterations < 2:
        parser.error("--iterations: the first is not counted, expected at least 2")
    return arguments


def main() -> int:
    """Exit code."""
    if sys.argv[1:2] == [WORKER]:
        work(Task(**json.loads(sys.argv[2])))
        return 0
    arguments = parse()
    return exit_code("vs_trl.py", lambda: compare(arguments))


if __name__ == "__main__":
    sys.exit(main())
