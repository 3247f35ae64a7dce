"""The enumerable world: identities of the exact numbers on random worlds, against each other and against sampling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tether.errors import RewardError, UserError
from tether.language.enumerable import EnumerableWorld, ExactEvaluation, Optimum

BUCKETS = 997


def random_policy(vocabulary_size: int, seed: int, sharpness: float = 2.0) -> Callable[[Tensor], Tensor]:
    """A policy that draws its logits from a random table by a hash of the whole prefix, prompt included."""
    table = sharpness * torch.randn(BUCKETS, vocabulary_size, generator=torch.Generator().manual_seed(seed))

    def log_probs(tokens: Tensor) -> Tensor:
        key = torch.zeros(len(tokens), dtype=torch.long)
        for column in tokens.unbind(dim=1):
            key = (key * 31 + column + 1) % BUCKETS
        return table[key].log_softmax(dim=-1)

    return log_probs


@st.composite
def worlds(draw: st.DrawFn) -> tuple[EnumerableWorld, Optimum, ExactEvaluation]:
    size = draw(st.integers(2, 4))
    prompts = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    world = EnumerableWorld(
        [tuple(prompt) for prompt in prompts],
        size,
        eos_token_id=draw(st.integers(0, size - 1)),
        max_new_tokens=draw(st.integers(1, 4)),
        reward=lambda prompt, response: float(torch.randn((), generator=generator)),
        beta=draw(st.floats(0.05, 2.0)),
    )
    optimum = world.optimum(world.tabulate_log_probs(random_policy(size, seed + 1)))
    policy = world.tabulate_log_probs(random_policy(size, seed + 2))
    return world, optimum, world.evaluate(policy, optimum)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_loss_against_the_optimum_is_beta_times_kl_to_it(drawn: tuple) -> None:
    world, optimum, evaluation = drawn
    assert_close(optimum.objective - evaluation.objective, world.beta * evaluation.kl_to_optimum)
    assert_close(optimum.objective.mean() - evaluation.objective.mean(), world.beta * evaluation.kl_to_optimum.mean())


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_the_optimum_is_its_closed_form_and_reaches_its_value(drawn: tuple) -> None:
    world, optimum, _ = drawn
    reference = world.response_log_probs(optimum.reference_log_probs)
    closed_form = world.beta * (reference + world.rewards / world.beta).logsumexp(dim=1)
    assert_close(optimum.objective, closed_form)
    best = world.evaluate(optimum.log_probs, optimum)
    assert_close(best.objective, optimum.objective)
    assert_close(best.response_log_probs, reference + (world.rewards - closed_form[:, None]) / world.beta)
    for exact, best_level in zip(optimum.values, best.values, strict=True):
        assert_close(best_level, exact)
    for advantages in best.advantages:  # Under π* the score and its own KL term cancel at every token.
        assert_close(advantages, torch.zeros_like(advantages))
    if optimum.objective.mean() > optimum.reference_objective.mean():
        assert best.gap_closed == pytest.approx(1.0)


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_root_values_are_the_objective_and_advantages_average_to_zero(drawn: tuple) -> None:
    _, optimum, evaluation = drawn
    assert_close(evaluation.values[0][:, 0], evaluation.objective)
    assert_close(optimum.values[0][:, 0], optimum.objective)
    for log_probs, advantages in zip(evaluation.log_probs, evaluation.advantages, strict=True):
        mean = (log_probs.exp() * advantages).sum(dim=-1)
        assert_close(mean, torch.zeros_like(mean))


@given(worlds())
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_and_reach_counts_the_responses_below(drawn: tuple) -> None:
    world, _, evaluation = drawn
    probabilities = evaluation.response_log_probs.exp()
    assert_close(probabilities.sum(dim=1), torch.ones(len(world.prompts), dtype=torch.float64))
    lengths = world.response_lengths.double()
    assert_close(sum(level.sum(dim=1) for level in evaluation.reach), (probabilities * lengths).sum(dim=1))
    for length, (prefixes, reach) in enumerate(zip(world.prefixes, evaluation.reach, strict=True)):
        below = (world.responses[None, :, :length] == prefixes[:, None, :]).all(dim=-1)  # (n, R)
        below &= (world.response_lengths > length)[None]
        assert_close(reach, probabilities @ below.double().T)


@given(worlds())
@settings(max_examples=30, deadline=None)
def test_every_value_is_the_mean_of_what_follows(drawn: tuple) -> None:
    """V^π of each prefix against a plain sum over the responses below it: score − β·(KL terms from there on)."""
    world, optimum, evaluation = drawn
    policy, reference = evaluation.log_probs, optimum.reference_log_probs
    for prompt in range(len(world.prompts)):
        expected: dict[tuple[int, ...], float] = {}
        responses = zip(world.responses.tolist(), world.response_lengths.tolist(), strict=True)
        for number, (row, length) in enumerate(responses):
            log_ratio, log_prob = 0.0, 0.0
            for t in reversed(range(length)):
                at = int(world.prefix_index(torch.tensor([row[:t]], dtype=torch.long).reshape(1, t)))
                log_prob += float(policy[t][prompt, at, row[t]])
                log_ratio += float(policy[t][prompt, at, row[t]] - reference[t][prompt, at, row[t]])
                outcome = float(world.rewards[prompt, number]) - world.beta * log_ratio
                prefix = tuple(row[:t])
                expected[prefix] = expected.get(prefix, 0.0) + math.exp(log_prob) * outcome
        for prefixes, values in zip(world.prefixes, evaluation.values, strict=True):
            for prefix, value in zip(prefixes.tolist(), values[prompt].tolist(), strict=True):
                assert value == pytest.approx(expected[tuple(prefix)], abs=1e-8)


def test_responses_are_all_there_is() -> None:
    world = EnumerableWorld([(7,)], 3, 1, 3, lambda prompt, response: len(response), beta=1.0)
    expected = set()
    for tokens in itertools.product(range(3), repeat=3):
        end = tokens.index(1) + 1 if 1 in tokens else 3
        expected.add(tokens[:end])
    pairs = list(zip(world.responses.tolist(), world.response_lengths.tolist(), strict=True))
    assert {tuple(row[:length]) for row, length in pairs} == expected
    assert len(pairs) == len(expected)
    assert all(token == -1 for row, length in pairs for token in row[length:])
    assert world.terminated.tolist() == [row[length - 1] == 1 for row, length in pairs]
    assert world.rewards[0].tolist() == [float(length) for _, length in pairs]


def test_each_prefix_is_shown_once_with_its_own_prompt_whatever_the_lengths_and_batches() -> None:
    prompts = [(5, 6), (4,), (4, 4, 4), (8, 9)]
    world = EnumerableWorld(prompts, 3, 0, 3, lambda prompt, response: 0.0, beta=1.0)
    seen: list[tuple[int, ...]] = []

    def value(tokens: Tensor) -> Tensor:
        seen.extend(tuple(row) for row in tokens.tolist())
        return (tokens * 10.0 ** torch.arange(tokens.shape[1] - 1, -1, -1)).sum(dim=1)

    levels = world.tabulate(value, batch_size=3)
    expected = [(*prompt, *prefix) for prompt in prompts for level in world.prefixes for prefix in level.tolist()]
    assert sorted(seen) == sorted(expected)
    for prefixes, level in zip(world.prefixes, levels, strict=True):
        for row, prompt in zip(level, prompts, strict=True):
            for number, prefix in zip(row.tolist(), prefixes.tolist(), strict=True):
                assert number == int("".join(map(str, (*prompt, *prefix))))
        assert world.prefix_index(prefixes).tolist() == list(range(len(prefixes)))
    with pytest.raises(ValueError, match="eos"):
        world.prefix_index(torch.tensor([[1, 0]]))


def test_sampling_agrees_with_the_exact_numbers() -> None:
    size, samples = 4, 40_000
    generator = torch.Generator().manual_seed(0)
    world = EnumerableWorld([(1, 2)], size, 3, 3, lambda prompt, response: response.count(2) - 0.5 * len(response), 0.3)
    policy, reference = random_policy(size, 1), random_policy(size, 2)
    evaluation = world.evaluate(world.tabulate_log_probs(policy), world.optimum(world.tabulate_log_probs(reference)))
    tokens = torch.tensor([[1, 2]]).repeat(samples, 1)
    alive = torch.ones(samples, dtype=torch.bool)
    outcome = torch.zeros(samples, dtype=torch.float64)
    for _ in range(3):
        log_probs = policy(tokens).double()
        action = torch.multinomial(log_probs.exp(), 1, generator=generator)
        term = (log_probs - reference(tokens).double()).gather(1, action).squeeze(1)
        action = action.squeeze(1)
        outcome += alive * ((action == 2).double() - 0.5 - world.beta * term)
        alive &= action != 3
        tokens = torch.cat([tokens, action[:, None]], dim=1)
    standard_error = float(outcome.std()) / math.sqrt(samples)
    assert abs(float(outcome.mean()) - float(evaluation.objective)) < 4 * standard_error


def test_policies_that_never_draw_some_tokens_have_finite_numbers() -> None:
    world = EnumerableWorld([(1,)], 3, 2, 3, lambda prompt, response: response.count(0), beta=0.5)
    optimum = world.optimum(world.tabulate_log_probs(random_policy(3, 3)))

    def greedy(tokens: Tensor) -> Tensor:
        logits = random_policy(3, 4)(tokens)
        return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True), -torch.inf).log_softmax(dim=-1)

    evaluation = world.evaluate(world.tabulate_log_probs(greedy), optimum)
    assert_close(optimum.objective - evaluation.objective, world.beta * evaluation.kl_to_optimum)
    assert_close(evaluation.values[0][:, 0], evaluation.objective)
    assert int((evaluation.response_log_probs == 0).sum()) == 1


def test_gap_closed_is_0_at_the_reference_1_at_the_optimum_and_nan_without_a_gap() -> None:
    world = EnumerableWorld([(1,), (2,)], 3, 2, 2, lambda prompt, response: prompt + response.count(0), beta=0.5)
    reference = world.tabulate_log_probs(random_policy(3, 3))
    optimum = world.optimum(reference)
    start = world.evaluate(reference, optimum)
    assert start.gap_closed == pytest.approx(0.0, abs=1e-12)
    assert_close(start.kl_to_reference, torch.zeros(2, dtype=torch.float64))
    assert_close(start.objective, optimum.reference_objective)
    assert world.evaluate(optimum.log_probs, optimum).gap_closed == pytest.approx(1.0)
    flat = EnumerableWorld([(1,)], 2, 1, 1, lambda prompt, response: 0.0, beta=1.0)
    even = flat.tabulate_log_probs(lambda tokens: torch.full((len(tokens), 2), -math.log(2), dtype=torch.float64))
    assert math.isnan(flat.evaluate(even, flat.optimum(even)).gap_closed)


def test_critic_error_counts_every_prefix_once_or_as_often_as_it_is_visited() -> None:
    world = EnumerableWorld([(1,)], 2, 1, 2, lambda prompt, response: 0.0, beta=1.0)
    policy = world.tabulate_log_probs(lambda tokens: torch.tensor([[0.25, 0.75]]).log().repeat(len(tokens), 1))
    evaluation = world.evaluate(policy, world.optimum(policy))
    critic = [evaluation.values[0] + 1.0, evaluation.values[1] - 3.0]
    error = world.critic_error(critic, evaluation)
    assert error.uniform == pytest.approx(2.0)
    assert error.visited == pytest.approx((1.0 * 1.0 + 0.25 * 3.0) / 1.25)


def test_a_world_of_fifty_thousand_prefixes_is_evaluated_too() -> None:
    world = EnumerableWorld([(i,) for i in range(13)], 6, 5, 6, lambda prompt, response: len(response), beta=0.1)
    assert sum(len(level) for level in world.prefixes) * len(world.prompts) > 50_000
    optimum = world.optimum(world.tabulate_log_probs(random_policy(6, 2)))
    assert world.evaluate(optimum.log_probs, optimum).gap_closed == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary_size": 1}, r"vocabulary_size: found 1, expected 2 or more"),
        ({"eos_token_id": 3}, r"eos_token_id: found 3, expected 0 to 2"),
        ({"max_new_tokens": 0}, r"max_new_tokens: found 0, expected 1 or more"),
        ({"beta": 0.0}, r"beta: found 0.0, expected a positive number"),
        ({"prompts": []}, r"prompts: found none"),
        ({"prompts": [(1,), ()]}, r"an empty one"),
        ({"vocabulary_size": 50, "max_new_tokens": 6}, r"responses, expected at most .*; lower max_new_tokens"),
    ],
)
def test_arguments_out_of_range_are_said_in_one_line(change: dict, message: str) -> None:
    arguments: dict = {"prompts": [(1,)], "vocabulary_size": 3, "eos_token_id": 2, "max_new_tokens": 2, "beta": 1.0}
    with pytest.raises(UserError, match=message) as caught:
        EnumerableWorld(**{**arguments, **change}, reward=lambda prompt, response: 0.0)
    assert "\n" not in str(caught.value)


def test_scores_and_policies_that_are_none_are_said_in_one_line() -> None:
    with pytest.raises(RewardError, match=r"reward of prompt 0, response \[1\]: found nan"):
        EnumerableWorld([(1,)], 2, 1, 2, lambda prompt, response: math.nan, beta=1.0)
    world = EnumerableWorld([(1,)], 2, 1, 2, lambda prompt, response: 0.0, beta=1.0)
    with pytest.raises(UserError, match="sum to 2 after 0 tokens, expected 1; apply log_softmax"):
        world.tabulate_log_probs(lambda tokens: torch.zeros(len(tokens), 2))
    with pytest.raises(UserError, match="sum to nan"):
        world.tabulate_log_probs(lambda tokens: torch.full((len(tokens), 2), math.nan))
    with pytest.raises(UserError, match=r"found shape \(B, 3\)"):
        world.tabulate_log_probs(lambda tokens: torch.zeros(len(tokens), 3))
