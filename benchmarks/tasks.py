"""PPO on tasks of reasoning-gym: held-out score of a small model before and after, task by task.

For each task a GPT-2 of some 0.4 million parameters is made and fine-tuned on the task's own problems, with a share of
the answers wrong by a little, so that it knows the form of an answer and, at best, what is likelier right than wrong.
Then PPO, `tether ppo --task reasoning_gym:NAME` from Python, learns from the task's verifier alone. Both policies
answer the same problems of another seed, sampled; a problem that training has seen does not count.

Run it as `OMP_NUM_THREADS=1 python benchmarks/tasks.py`, or with the names of some tasks.
"""

from __future__ import annotations

import argparse
import platform
import random
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from tether.language.models import prepare_model
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.evaluate import Estimate, EvalConfig, estimate, evaluate
from tether.pipeline.ppo import PPOConfig, train_ppo
from tether.pipeline.sft import SFTConfig, fine_tune, save_policy
from tether.ppo import AdvantageConfig, KLConfig, LearnerConfig
from tether.rewards.tasks import ProblemsConfig, Task
from tether.runs import read_metrics

EOS, UNKNOWN = "</s>", "<unk>"
HELD_OUT = 1000
BATCH = 128  # answers in each step of fine-tuning


@dataclass(frozen=True)
class Exercise:
    """A task, how hard, and what its prompts always say: each of `pieces` is one token, all else goes by letters.

    `problems` are for fine-tuning and for PPO: fewer where there are so few that none would be left to hold out.
    """

    options: dict[str, Any]
    pieces: tuple[str, ...]
    answer_tokens: int
    problems: int = 6000


EXERCISES = {
    "chain_sum": Exercise(
        {"min_terms": 3, "max_terms": 3, "max_digits": 1},
        ("State the final answer to the following arithmetic problem: ", " + ", " - ", " ="),
        4,
        problems=2000,
    ),
    "spell_backward": Exercise(
        {"min_word_len": 4, "max_word_len": 6}, ("Spell this word backward (example: sun -> nus): ",), 8
    ),
    "letter_counting": Exercise(
        {"min_words": 2, "max_words": 3},
        ('How many times does the letter "', '" appear in the text: "', '"?'),
        3,
    ),
    "leg_counting": Exercise(
        {"min_animals": 1, "max_animals": 2, "max_instances": 4},
        (
            "Your task is to count how many legs there are in total when given a list of animals.\n\n"
            "Now, how many legs are there in total if you have ",
            "?\n",
        ),
        4,
    ),
}


def make_tokenizer(exercise: Exercise) -> PreTrainedTokenizerBase:
    """Letters, and the exercise's pieces."""
    vocabulary = [EOS, UNKNOWN, *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    backend = Tokenizer(WordLevel({text: index for index, text in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS, unk_token=UNKNOWN)
    tokenizer.add_tokens(list(exercise.pieces))
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2, its weights drawn from torch's global generator."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=96,
        n_embd=128,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return prepare_model(GPT2LMHeadModel(config))


def spoilt(answer: str, rng: random.Random) -> str:
    """A wrong answer near the right one: a number off by one or two, a text with two neighbouring letters swapped."""
    if answer.lstrip("-").isdigit():
        return str(int(answer) + rng.choice((-2, -1, 1, 2)))
    places = [i for i in range(len(answer) - 1) if answer[i] != answer[i + 1]]
    i = rng.choice(places)
    return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]


def sloppy_rows(task: Task, count: int, wrong: float, rng: random.Random) -> list[dict[str, str]]:
    """Problems with answers, `wrong` of them spoilt."""
    rows = []
    for row in rng.choices(task.rows, k=count):
        answer = spoilt(row["answer"], rng) if rng.random() < wrong else row["answer"]
        rows.append({"prompt": row["prompt"], "completion": answer})
    return rows


def held_out(policy: Path, name: str, exercise: Exercise, seen: set[str], seed: int) -> tuple[Estimate, int]:
    """Score of one sampled answer to each problem of another seed that training has not seen, and how many."""
    config = EvalConfig(
        model=str(policy),
        task=f"reasoning_gym:{name}",
        seed=seed,
        problems=ProblemsConfig(HELD_OUT, seed=seed + 1000, options=exercise.options),
        sampling=SamplingConfig(max_new_tokens=exercise.answer_tokens, batch_size=500),
    )
    prompts = [row["prompt"] for row in Task(config.task, config.problems).rows]
    scores = [found["score"] for found in evaluate(config, show=False).per_prompt]
    new = [score for prompt, score in zip(prompts, scores, strict=True) if prompt not in seen]
    return estimate(new), len(new)


def run(name: str, exercise: Exercise, steps: int, wrong: float, iterations: int, seed: int) -> list[str]:
    """One row of the table."""
    began = time.perf_counter()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    problems = ProblemsConfig(exercise.problems, seed=seed, options=exercise.options)
    task = Task(f"reasoning_gym:{name}", problems)
    seen = {row["prompt"] for row in task.rows}
    tokenizer = make_tokenizer(exercise)
    model = make_model(tokenizer)
    settings = SFTConfig(
        learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.98, batch_size=BATCH, warmup_steps=50, seed=seed,
        microbatch_tokens=16384,
    )  # fmt: skip
    fine_tune(model, tokenizer, sloppy_rows(task, steps * BATCH, wrong, rng), settings)
    tuned = time.perf_counter()
    print(f"{name}: fine-tuned in {tuned - began:.0f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        save_policy(model, tokenizer, start)
        before, count = held_out(start, name, exercise, seen, seed)
        trained = train_ppo(
            PPOConfig(
                model=str(start),
                task=task.name,
                problems=problems,
                output=str(Path(folder) / "run"),
                iterations=iterations,
                checkpoint_every=iterations,
                seed=seed,
                sampling=SamplingConfig(max_new_tokens=exercise.answer_tokens, batch_size=512),
                collect=CollectConfig(prompts=512),
                kl=KLConfig(beta=0.02),
                advantage=AdvantageConfig(lam=1.0),
                learner=LearnerConfig(
                    epochs=2, learning_rate=3e-4, value_learning_rate=3e-3, schedule="linear", value_coefficient=0.1,
                    microbatch_size=16384,
                ),
            ),
            progress=False,
        )  # fmt: skip
        after, _ = held_out(trained.policy, name, exercise, seen, seed)
        kl = read_metrics(trained.folder)[-1]["kl"]
    parameters = sum(p.numel() for p in model.parameters())
    ended = time.perf_counter()
    return [
        name, str(exercise.options), f"{parameters:,}", str(count), shown(before), shown(after), f"{kl:.2f}",
        f"{tuned - began:.0f} + {ended - tuned:.0f}",
    ]  # fmt: skip


def shown(found: Estimate) -> str:
    """Share of right answers and its standard error."""
    return f"{found.mean:.1%} ± {found.standard_error:.1%}"


HEADER = ("task", "options", "parameters", "held-out problems", "before", "after PPO", "KL, nats", "seconds, SFT + PPO")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(EXERCISES)}; none given: all")
    parser.add_argument("--steps", type=int, default=800, help="of fine-tuning")
    parser.add_argument("--wrong", type=float, default=0.4, help="share of wrong answers in fine-tuning")
    parser.add_argument("--iterations", type=int, default=30, help="of PPO")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if unknown := set(given.tasks) - EXERCISES.keys():
        parser.error(f"no task {', '.join(sorted(unknown))}; expected of: {', '.join(EXERCISES)}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n", flush=True)
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for name in given.tasks or EXERCISES:
        cells = run(name, EXERCISES[name], given.steps, given.wrong, given.iterations, given.seed)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
