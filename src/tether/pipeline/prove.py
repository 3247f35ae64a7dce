"""`tether prove`: PPO in a world whose optimum is known exactly, and how near it comes.

The world is text small enough to list every response. The policy is a small transformer with random weights, which is
also the reference; rewards are random functions of the response, so that nothing but learning can find them. What is
trained is what `tether ppo` trains, by the same code; `tether.language.enumerable` then says the truth about it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tether.language.context import TokenContext
from tether.language.enumerable import CriticError, EnumerableWorld, ExactEvaluation, Optimum
from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.reference import ModelReference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
from tether.rewards import Rewards, RewardsConfig
from tether.train import iterate

LETTERS = "abcd"
EOS = "</s>"
RESPONSE_TOKENS = 4


@dataclass(frozen=True)
class ProveConfig:
    """The proof."""

    seed: int = 0
    """Of the world's rewards, the model's weights and the training."""
    iterations: int = 160
    """Iterations of PPO."""
    responses: int = 1024
    """Responses per iteration."""
    beta: float = 0.5
    """β of the objective E[r] − β·KL(π‖π_ref)."""
    share: float = 0.98
    """Share of the gap between J(π_ref) and J* that must be closed; below it the exit code is 1."""
    critic_error: float = 0.1
    """Mean absolute error that the critic may have, prefixes as often as visited; above it the exit code is 1."""

    def __post_init__(self) -> None:
        for name in ("iterations", "responses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.critic_error >= 0:
            raise ValueError(f"critic_error is {self.critic_error}, expected 0 or more")
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}, expected a number above 0: without a penalty no optimum is known")


@dataclass(frozen=True)
class Proof:
    """What came of it: exact numbers of the trained policy, the optimum, the critic's error, and if they suffice.

    Attributes:
        reported: metrics of one more batch of the trained policy, as a run reports them.
    """

    optimum: Optimum
    evaluation: ExactEvaluation
    critic_error: CriticError
    reported: dict[str, float]
    seconds: float
    passed: bool


def prove(config: ProveConfig) -> Proof:
    """Train in the enumerable world, compare with the truth, and print both."""
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    tokenizer = _tokenizer()
    reward = random_reward(config.seed, tokenizer)
    world, learner = _build(config, tokenizer, reward)
    prompts = [prompt.token_ids for prompt in world.prompts]
    truth = EnumerableWorld(
        prompts,
        len(tokenizer),
        tokenizer.eos_token_id,
        RESPONSE_TOKENS,
        reward,
        config.beta,
    )
    with world.reference.as_model() as reference:
        optimum = truth.optimum(truth.tabulate_log_probs(_log_probs_of(reference)))
    console.print(
        f"[bold]A world with {truth.rewards.numel():,} possible episodes[/bold]: {len(prompts)} prompts, responses "
        f"of up to {RESPONSE_TOKENS} of {len(tokenizer)} tokens, random rewards in (−1, 1), β = {config.beta:g}\n"
    )

    def measure() -> tuple[ExactEvaluation, CriticError]:
        evaluation = truth.evaluate(truth.tabulate_log_probs(_log_probs_of(world.policy.model)), optimum)
        return evaluation, truth.critic_error(truth.tabulate(_values_of(world.policy)), evaluation)

    every = max(1, config.iterations // 8)
    for iteration in iterate(world, learner):
        if iteration.number % every == 0 or iteration.number == config.iterations:
            evaluation, critic_error = measure()
            seconds = time.perf_counter() - started
            console.print(
                f"iteration {iteration.number:>4}/{config.iterations}  J(π) {evaluation.objective.mean():+.4f}  "
                f"gap closed {evaluation.gap_closed:7.2%}  critic's error {critic_error.visited:.3f}  {seconds:3.0f} s",
                soft_wrap=True,
            )
    evaluation, critic_error = measure()
    reported = world.metrics(world.collect())  # of the policy as it now is
    passed = evaluation.gap_closed >= config.share and critic_error.visited <= config.critic_error
    proof = Proof(optimum, evaluation, critic_error, reported, time.perf_counter() - started, passed)
    _show(console, config, proof)
    return proof


def random_reward(seed: int, tokenizer: PreTrainedTokenizerBase) -> Callable[[int, Sequence[int]], float]:
    """r(x, y) = tanh of a sum of random numbers, one per place, token and token before; the prompt is the first."""
    size = len(tokenizer)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    table = torch.randn(RESPONSE_TOKENS, size, size, size, generator=generator, dtype=torch.float64).tolist()

    def reward(prompt: int, response: Sequence[int]) -> float:
        before = [prompt, *response]
        total = sum(table[i][prompt][before[i]][token] for i, token in enumerate(response))
        return math.tanh(total / math.sqrt(len(response)))

    return reward


def _tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = {letter: index for index, letter in enumerate([*LETTERS, EOS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def _model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A GPT-2 of a hundred thousand parameters; its learned positions can tell apart every state of the world.

    Weights are drawn wider than usual, so that the reference prefers some responses to others.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=64,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return prepare_model(GPT2LMHeadModel(config))


def _build(
    config: ProveConfig, tokenizer: PreTrainedTokenizerBase, reward: Callable[[int, Sequence[int]], float]
) -> tuple[LanguageWorld, Learner]:
    def score(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward(LETTERS.index(p), ids) for p, ids in zip(prompts, completion_ids, strict=True)]

    model = _model(tokenizer)
    policy = LanguagePolicy(model)
    kl = KLController(KLConfig(beta=config.beta))
    world = LanguageWorld(
        policy,
        ModelReference(copy.deepcopy(model)),
        Sampler(policy, tokenizer, SamplingConfig(max_new_tokens=RESPONSE_TOKENS, batch_size=4096), config.seed),
        [Prompt(letter, (index,), letter, {}, index + 1) for index, letter in enumerate(LETTERS)],
        Rewards(RewardsConfig(), [score]),
        kl,
        CollectConfig(prompts=config.responses, kl_responses=config.responses),
        config.seed,
    )
    learner = Learner(
        policy,
        LearnerConfig(
            epochs=2,
            minibatches=4,
            learning_rate=1e-3,
            value_learning_rate=3e-3,
            schedule="linear",
            value_coefficient=4.0,
            microbatch_size=65536,
        ),
        AdvantageConfig(lam=1.0),
        kl,
        config.iterations,
        config.seed,
    )
    return world, learner


def _log_probs_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    def log_probs(tokens: Tensor) -> Tensor:
        return torch.log_softmax(model(tokens, logits_to_keep=1).logits[:, -1].float(), dim=-1)

    return log_probs


def _values_of(policy: LanguagePolicy) -> Callable[[Tensor], Tensor]:
    def values(prefixes: Tensor) -> Tensor:
        everywhere = torch.ones_like(prefixes, dtype=torch.bool)
        ends = torch.full((len(prefixes),), prefixes.shape[1])
        nothing_more = torch.zeros(len(prefixes), dtype=torch.long)
        return policy.successor_values(TokenContext(prefixes, everywhere, ends), nothing_more)

    return values


def _show(console: Console, config: ProveConfig, proof: Proof) -> None:
    optimum, evaluation, error = proof.optimum, proof.evaluation, proof.critic_error
    reported, exact = proof.reported, float(evaluation.kl_to_reference.mean())
    table = Table(show_header=False, pad_edge=False, box=None)
    rows = [
        ("J(π_ref)  the reference", f"{optimum.reference_objective.mean():+.4f}"),
        ("J(π)      after PPO", f"{evaluation.objective.mean():+.4f}"),
        ("J*        the best there is", f"{optimum.objective.mean():+.4f}"),
        ("share of the gap closed", f"{evaluation.gap_closed:.2%}"),
        ("KL(π‖π*)  exact, nats per response", f"{evaluation.kl_to_optimum.mean():.4f}"),
        ("KL(π‖π_ref)", f"{exact:.4f}"),
        (f"  as `kl` reports it, ± {reported['kl_error']:.4f}", _against(reported["kl"], exact)),
        (f"  by the drawn tokens alone, `kl_k1`, ± {reported['kl_k1_error']:.4f}", _against(reported["kl_k1"], exact)),
        ("critic's mean absolute error, prefixes as often as visited", f"{error.visited:.4f}"),
        ("critic's mean absolute error, all prefixes alike", f"{error.uniform:.4f}"),
    ]
    for name, number in rows:
        table.add_row(name, number)
    console.print()
    console.print(table)
    verdict = "[bold green]proved[/bold green]" if proof.passed else "[bold red]not reached[/bold red]"
    console.print(
        f"\n{verdict}: at least {config.share:.0%} of the gap was to be closed, and the critic's error to be at most "
        f"{config.critic_error:g}; {proof.seconds:.0f} s"
    )


def _against(found: float, exact: float) -> str:
    """A number and how far it is from the exact one."""
    return f"{found:.4f}  ({found - exact:+.4f})"


__all__ = ["Proof", "ProveConfig", "prove", "random_reward"]
