"""What adapters cost and save: the demonstration by LoRA against full PPO, and the peak memory of each.

`python benchmarks/lora.py accuracy --seeds 0 1 2` fine-tunes the model of `tether demo` and goes on from the same
weights by full PPO and by LoRA. `python benchmarks/lora.py memory` runs PPO on a GPT-2 of 124 million parameters, drawn
at random, in a process of its own for each way, and prints its largest resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tether.language.adapters import LoRAConfig
from tether.language.reference import ReferenceConfig
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.memory import process_peak
from tether.pipeline import demo
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.pipeline.sft import fine_tune
from tether.ppo import LearnerConfig
from tether.train import Iteration

RANK = 16
LEARNING_RATE = 3e-3  # of the adapters; full PPO takes the demonstration's 5e-4

WAYS: dict[str, dict[str, object]] = {
    "only imports": {},
    "full": {},
    "full, reference on disk": {"reference": ReferenceConfig(offload="disk")},
    "full, reference in bfloat16": {"reference": ReferenceConfig(dtype="bfloat16")},
    "LoRA, rank 16": {"lora": LoRAConfig(rank=RANK)},
    "LoRA, rank 16, average of itself as reference": {
        "lora": LoRAConfig(rank=RANK),
        "reference": ReferenceConfig(ema=0.9),
    },
}


def accuracy(seed: int) -> None:
    """One row: held-out accuracy before PPO, after full PPO, after LoRA; the KL that each spent."""
    config = demo.DemoConfig(seed=seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    seen, held_out = demo.split_problems(config, rng)
    tokenizer = demo.make_tokenizer()
    model = demo.make_model(tokenizer)
    with contextlib.redirect_stdout(io.StringIO()):
        fine_tune(model, tokenizer, demo.sloppy_rows(config, seen, rng), demo.sft_settings(config))
    before, _ = demo.accuracy(model, tokenizer, held_out, seed)
    cells = [str(seed), f"{before:.1%}"]
    for lora in (LoRAConfig(), LoRAConfig(rank=RANK)):
        with tempfile.TemporaryDirectory() as folder:
            settings = demo.ppo_settings(replace(config, output=str(Path(folder) / "run")))
            if lora.rank:
                learner = replace(settings.learner, learning_rate=LEARNING_RATE)
                settings = replace(settings, lora=lora, learner=learner)
            started = time.perf_counter()
            questions = [demo.question(problem) for problem in seen]
            parts = Parts(copy.deepcopy(model), tokenizer, questions)
            trained = train_ppo(settings, parts, progress=False)
            seconds = time.perf_counter() - started
            own = trained.world.policy.policy_parameters()
            parameters = sum(p.numel() for p in own if p.requires_grad)
            after, kl = demo.accuracy(trained.world.policy.model, tokenizer, held_out, seed, trained.world)
            cells += [f"{parameters:,}", f"{after:.1%}", f"{kl:.2f}", f"{seconds:.0f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def largest_memory() -> int:
    """This process's largest resident memory so far, MiB."""
    peak = process_peak()
    assert peak is not None, "resident memory is measured on Linux alone"
    return int(peak)


def memory(way: str, model: str) -> None:
    """Three iterations in this process: its largest memory after two, and after the checkpoint that ends the third."""
    training = 0

    def report(step: Iteration) -> None:
        nonlocal training
        if step.number == 2:
            training = largest_memory()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if way != "only imports":
            config = PPOConfig(
                model=model,
                output=str(folder / "run"),
                iterations=3,
                sampling=SamplingConfig(max_new_tokens=16),
                collect=CollectConfig(prompts=4),
                learner=LearnerConfig(epochs=1, minibatches=1, microbatch_size=32),
                **WAYS[way],  # type: ignore[arg-type]
            )
            questions = [f"What is {number} + {number}?" for number in range(8)]
            parts = Parts(prompts=questions, reward=lambda completions, **_: [len(text) for text in completions])
            train_ppo(config, parts, report=report)
    print(training, largest_memory())


def measure_memory() -> None:
    """One row for each way."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer = demo.make_tokenizer()
        GPT2LMHeadModel(GPT2Config(eos_token_id=tokenizer.eos_token_id)).save_pretrained(name)
        tokenizer.save_pretrained(name)
        print("| MiB above the imports | while training | with a checkpoint |\n|---|---|---|", flush=True)
        imports = 0
        for way in WAYS:
            command = [sys.executable, __file__, "one-memory", way, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            training, peak = map(int, done.stdout.split()[-2:])
            if way == "only imports":
                imports = peak
            else:
                print(f"| {way} | {training - imports:,} | {peak - imports:,} |", flush=True)


def main() -> None:
    """Run what was asked for and print a Markdown table."""
    if sys.argv[1:2] == ["one-memory"]:
        memory(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "memory"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.what == "memory":
        measure_memory()
        return
    header = ["seed", "before PPO"]
    for way in ("full", f"LoRA, rank {RANK}"):
        header += [f"{way}: parameters", "held-out", "KL, nats", "seconds"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    for seed in arguments.seeds:
        accuracy(seed)


if __name__ == "__main__":
    main()
