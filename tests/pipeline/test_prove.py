"""`tether prove`: its numbers are those of the enumerable world, its exit code says whether they suffice."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tether.pipeline.prove as module
from tether.cli import main
from tether.language.enumerable import EnumerableWorld
from tether.language.world import LanguageWorld
from tether.pipeline.prove import LETTERS, RESPONSE_TOKENS, ProveConfig, prove, random_reward
from tether.ppo import Learner

SHORT = ["--iterations", "3", "--responses", "64"]

BETA = ProveConfig().beta


def number(text: str, label: str) -> float:
    found = re.search(rf"^{re.escape(label)}.*?([+-]?\d+\.\d+)(%?)\s*$", text, re.MULTILINE)
    assert found, text
    return float(found[1]) / (100 if found[2] else 1)


def test_a_share_that_is_not_reached_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *SHORT]) == 1
    said = capsys.readouterr().out
    assert "not reached: at least 98% of the gap was to be closed" in said
    assert number(said, "share of the gap closed") < 0.98


def test_a_share_that_is_reached_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *SHORT, "--share", "-10", "--critic-error", "10"]) == 0
    assert "proved: at least" in capsys.readouterr().out


def test_a_critic_that_errs_more_than_it_may_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *SHORT, "--share", "-10", "--critic-error", "0.01"]) == 1
    said = capsys.readouterr().out
    assert "not reached" in said
    assert "and the critic's error to be at most 0.01" in said
    assert number(said, "critic's mean absolute error, prefixes as often") > 0.01


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> list[LanguageWorld]:
    """The worlds that `prove` builds, so that its policy can be looked at afterwards."""
    kept: list[LanguageWorld] = []
    build = module._build

    def keep(*arguments: Any) -> tuple[LanguageWorld, Learner]:
        world, learner = build(*arguments)
        kept.append(world)
        return world, learner

    monkeypatch.setattr(module, "_build", keep)
    return kept


def enumerable(world: LanguageWorld, seed: int) -> tuple[EnumerableWorld, Callable[[int, Sequence[int]], float]]:
    reward = random_reward(seed, world.tokenizer)
    prompts = [(index,) for index in range(len(LETTERS))]
    eos = world.tokenizer.eos_token_id
    return EnumerableWorld(prompts, len(world.tokenizer), eos, RESPONSE_TOKENS, reward, BETA), reward


@torch.no_grad()
def sequence_log_probs(model: PreTrainedModel, prompt: int, responses: list[list[int]]) -> Tensor:
    """(R,) log π(y|x) by plain forward passes over whole responses."""
    result = torch.zeros(len(responses), dtype=torch.float64)
    for length in range(1, RESPONSE_TOKENS + 1):
        rows = [row for row, response in enumerate(responses) if len(response) == length]
        tokens = torch.tensor([[prompt, *responses[row]] for row in rows])
        logits = model(tokens).logits[:, :-1].double()
        result[rows] = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum(dim=(1, 2))
    return result


def test_the_printed_numbers_are_those_of_the_enumerable_world(
    worlds: list[LanguageWorld], capsys: pytest.CaptureFixture[str]
) -> None:
    """Worked out again from the trained policy, response by response, with none of the algebra over prefixes."""
    proof = prove(ProveConfig(seed=3, iterations=4, responses=128, share=0.0))
    said = capsys.readouterr().out
    (world,) = worlds
    truth, reward = enumerable(world, seed=3)
    rows = zip(truth.responses.tolist(), truth.response_lengths.tolist(), strict=True)
    responses = [row[:length] for row, length in rows]
    objective = reference_objective = best = kl = kl_to_best = 0.0
    for prompt in range(len(LETTERS)):
        policy = sequence_log_probs(world.policy.model, prompt, responses)
        start = sequence_log_probs(world.reference.model, prompt, responses)
        scores = torch.tensor([reward(prompt, r) for r in responses], dtype=torch.float64)
        assert float(policy.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        normaliser = torch.logsumexp(start + scores / BETA, dim=0)
        objective += float((policy.exp() * (scores - BETA * (policy - start))).sum()) / 4
        reference_objective += float((start.exp() * scores).sum()) / 4
        best += BETA * float(normaliser) / 4
        kl += float((policy.exp() * (policy - start)).sum()) / 4
        kl_to_best += float((policy.exp() * (policy - (start + scores / BETA - normaliser))).sum()) / 4

    printed = {label: number(said, label) for label in ("J(π_ref)", "J(π) ", "J*", "share", "KL(π‖π*)", "KL(π‖π_ref)")}
    share = (objective - reference_objective) / (best - reference_objective)
    expected = [reference_objective, objective, best, share, kl_to_best, kl]
    for found, value in zip(printed.values(), expected, strict=True):
        assert found == pytest.approx(value, abs=2e-4)
    assert proof.evaluation.gap_closed == pytest.approx(share, abs=1e-4)
    assert kl_to_best == pytest.approx((best - objective) / BETA, abs=1e-3)  # J* − J(π) = β·KL(π‖π*)


def test_the_critics_error_is_that_of_the_values_the_trainer_uses(
    worlds: list[LanguageWorld], capsys: pytest.CaptureFixture[str]
) -> None:
    """Weighted by visits, it is near the mean error of the values in batches that the sampler draws."""
    proof = prove(ProveConfig(iterations=4, responses=256, share=0.0))
    said = capsys.readouterr().out
    label = "critic's mean absolute error, prefixes as often"
    assert number(said, label) == pytest.approx(proof.critic_error.visited, abs=1e-4)
    (world,) = worlds
    truth, _ = enumerable(world, seed=0)
    errors = []
    for _ in range(8):
        batch = world.collect()
        prompts = batch.context.tokens[:, 0]
        for t in range(batch.mask.shape[1]):
            rows = batch.mask[:, t].nonzero().squeeze(-1)
            places = truth.prefix_index(batch.actions[rows, :t])
            exact = proof.evaluation.values[t][prompts[rows], places]
            errors.append((batch.values[rows, t] - exact).abs())
    assert float(torch.cat(errors).mean()) == pytest.approx(proof.critic_error.visited, rel=0.1)


def test_the_seed_decides() -> None:
    first, again, other = (prove(ProveConfig(seed=s, iterations=2, responses=32, share=0.0)) for s in (1, 1, 2))
    assert torch.equal(first.evaluation.objective, again.evaluation.objective)
    assert not torch.equal(first.optimum.objective, other.optimum.objective)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "beta is 0.0"),
        (["--iterations", "0"], "at least 1"),
        (["--critic-error", "-1"], "critic_error is -1.0"),
    ],
)
def test_wrong_input_is_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_ppo_closes_98_percent_of_the_gap() -> None:
    proof = prove(ProveConfig())
    assert proof.passed
    assert proof.evaluation.gap_closed >= 0.98
    assert proof.critic_error.visited < 0.1
