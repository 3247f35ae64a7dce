"""The frontier that a run is compared with: what the best of n responses of the reference score, and at which KL.

Best-of-n is the plainest way to climb a reward, and its KL is known without training. A run that needs more KL for the
same score pays for something else; a held-out score that falls along this curve says that the reward itself is at fault
and not the training. Drawn once, before the first iteration, without touching any random state of the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from tether.errors import RewardError
from tether.language.policy import LanguagePolicy
from tether.language.sampler import Sampler
from tether.language.world import LanguageWorld
from tether.pipeline.evaluate import estimate, score_responses
from tether.pipeline.generate import Response, sample_responses
from tether.random_states import random_states, set_random_states
from tether.rewards import Rewards
from tether.rewards.judge import Judge
from tether.rewards.models import ModelReward
from tether.rewards.remote import Remote
from tether.runs.folder import FRONTIER_FILE, replace_file

LEARNED = (ModelReward, Judge, Remote)
SAMPLES = 16  # where nothing else is asked for: up to a KL of 1.8 nats, for half as many calls as 32
STREAM = 0x66726F6E74696572  # makes the seed another than that of the run's own generators


@dataclass(frozen=True)
class FrontierConfig:
    """Best-of-n of the reference, drawn once before a run, which its report compares the run with."""

    samples: int | None = None
    """Responses of the reference to each prompt: the curve goes from best-of-1 to best-of-this. 0: none is drawn. None:
    16 where a reward is learned (`reward_model`, `judge`, a remote scorer), otherwise 0."""
    prompts: int = 32
    """How many prompts, chosen at random; of fewer all."""

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 0:
            raise ValueError(f"samples is {self.samples}, expected 0 or more, or none")
        if self.prompts < 1:
            raise ValueError(f"prompts is {self.prompts}, expected at least 1")


def draw_frontier(
    world: LanguageWorld, folder: Path, config: FrontierConfig, seed: int, phase: Callable[[str], None] | None = None
) -> None:
    """Sample the reference, score the responses, and write `frontier.json`; nothing where it is there already.

    Args:
        world: whose reference, prompts and rewards are taken.
        folder: of the run.
        config: see `FrontierConfig`.
        seed: of the run.
        phase: told what is being done, if it is.

    Raises:
        RewardError: a reward function failed; the sampled responses are attached as `error.responses`.
    """
    samples = config.samples
    if samples is None:
        samples = SAMPLES if is_learned(world.rewards) else 0
    if samples == 0 or (folder / FRONTIER_FILE).exists():
        return
    count = min(config.prompts, len(world.prompts))
    if phase is not None:
        phase(
            f"frontier: scoring {count * samples:,} responses of the reference, {samples} to each of {count} prompts "
            "(--frontier.samples 0: none)"
        )
    with _random_states_kept():
        generator = torch.Generator().manual_seed(seed ^ STREAM)
        chosen = [world.prompts[i] for i in torch.randperm(len(world.prompts), generator=generator)[:count].tolist()]
        with world.reference.as_model() as model:
            sampler = Sampler(LanguagePolicy(model), world.tokenizer, world.sampler.config, seed ^ STREAM)
            responses = [response for group in sample_responses(sampler, chosen, samples) for response in group]
        size = world.config.prompts * world.config.samples_per_prompt  # of a call, as in training
        scores = _score(world.rewards, responses, size)
        gold = None if world.gold is None else _score(world.gold, responses, size)
    rows: list[dict[str, Any]] = []
    for index, response in enumerate(responses):
        row = {"prompt": response.prompt.text, "row": response.prompt.row, "response": response.text}
        row |= {"length": len(response.token_ids), "score": scores[index]}
        rows.append(row if gold is None else row | {"gold": gold[index]})
    data = {"prompts": count, "samples": samples, "curve": best_of_n_curve(scores, gold, samples), "responses": rows}
    replace_file(folder / FRONTIER_FILE, (json.dumps(data) + "\n").encode())


def is_learned(rewards: Rewards) -> bool:
    """Whether a model stands behind one of the functions, which may be wrong where it was not trained."""
    return any(isinstance(function.call, LEARNED) for function in rewards.functions.values())


def best_of_n_curve(scores: Sequence[float], gold: Sequence[float] | None, samples: int) -> list[dict[str, Any]]:
    """For n = 1 … `samples`, the KL of best-of-n and what its responses score, with standard errors over prompts.

    Args:
        scores: by which the best is chosen; prompt by prompt, `samples` to each.
        gold: what else they score; None where there is nothing.
        samples: to each prompt.
    """
    by_prompt = [list(scores[start : start + samples]) for start in range(0, len(scores), samples)]
    curve = []
    for n in range(1, samples + 1):
        point: dict[str, Any] = {"n": n, "kl": best_of_n_kl(n)}
        for name, values in (("score", scores), ("gold", gold)):
            if values is None:
                continue
            means = [
                best_of_n(own, list(values[place * samples : (place + 1) * samples]), n)
                for place, own in enumerate(by_prompt)
            ]
            mean = estimate(means)
            point |= {name: mean.mean, f"{name}_standard_error": mean.standard_error}
        curve.append(point)
    return curve


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to what is drawn from, in nats per response: log n − (n − 1)/n (Stiennon et al. 2020).

    Exact where no two responses score alike, otherwise an upper bound (Beirami et al. 2024, theorem 1).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the response that scores best among n drawn from the same distribution as these N ≥ n.

    The mean over all subsets of n of the value of their best response, which is unbiased: the i-th smallest of N scores
    is the largest of C(i − 1, n − 1) out of C(N, n) subsets. Among equal scores each is as likely to be chosen.
    """
    count = len(scores)
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}, expected 1 to {count}")
    order = sorted(range(count), key=lambda index: scores[index])
    subsets = math.comb(count, n)
    total, place = 0.0, 0
    for _, tied in groupby(order, key=lambda index: scores[index]):
        among = list(tied)
        chosen = math.comb(place + len(among), n) - math.comb(place, n)  # subsets whose best is one of these
        total += chosen / subsets * math.fsum(values[index] for index in among) / len(among)
        place += len(among)
    return total


def _score(rewards: Rewards, responses: Sequence[Response], size: int) -> list[float]:
    scores: list[float] = []
    try:
        for start in range(0, len(responses), size):
            scores += score_responses(rewards, responses[start : start + size]).total
    except RewardError as error:
        error.responses = [  # type: ignore[attr-defined]
            {"prompt": response.prompt.text, "response": response.text} for response in responses
        ]
        raise
    return scores


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Global random states are after this context what they were before."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
