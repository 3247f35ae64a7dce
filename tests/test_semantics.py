"""The nine points of semantics that must be exact; docs/semantics.md says how each test was seen to fail.

Each test is named after its point and fails when the point is broken. N = episodes, T = steps.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from tests import ranks
from tests.models import (
    EOS,
    KINDS,
    CountingRewards,
    make_model,
    make_prompts,
    make_tokenizer,
    make_world,
    perturbed,
    plain_forward,
)
from tests.toy import TablePolicy, ToyPolicy, gradient, one_step, relative_error, trajectories
from tether.language.context import TokenContext
from tether.language.policy import LanguagePolicy
from tether.language.reference import ModelReference
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig, Trajectories
from tether.ppo.advantages import estimate, gae, whiten
from tether.ppo.kl import estimate_kl
from tether.ppo.trajectories import last_step
from tether.train import iterate

EXACT = 1e-5
"""Relative error of float32 gradients, and distance of a first ratio from 1."""

SAMPLINGS = {
    "plain": SamplingConfig(max_new_tokens=8),
    "temperature": SamplingConfig(max_new_tokens=8, temperature=0.6),
    "hot": SamplingConfig(max_new_tokens=8, temperature=1.7),
    "top_k": SamplingConfig(max_new_tokens=8, temperature=1.3, top_k=4),
    "top_p": SamplingConfig(max_new_tokens=8, temperature=0.8, top_p=0.7),
    "both": SamplingConfig(max_new_tokens=8, temperature=1.3, top_k=5, top_p=0.8),
    "stop": SamplingConfig(max_new_tokens=8, temperature=1.2, stop=("a", "bc")),
}


def lm_batch(kind: str = "llama", **options: Any) -> tuple[LanguageWorld, Trajectories, Tensor, Tensor]:
    """A world, its trajectories with advantages and returns, and then a policy that has moved from them."""
    world = make_world(kind, **options)
    batch = world.collect()
    advantages, returns = estimate(batch, AdvantageConfig())
    world.policy = perturbed(world.policy, scale=0.01, seed=5)
    return world, batch, advantages, returns


# ---- 1: log_probs come from the distribution that was sampled --------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_point_1_first_ratio_is_one(kind: str, sampling: SamplingConfig) -> None:
    world = make_world(kind, sampling, collect=CollectConfig(prompts=6, samples_per_prompt=3))
    batch = world.collect()
    with torch.no_grad():
        new = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    ratio = (new.log_probs - batch.log_probs).exp()[batch.mask]
    assert len(ratio) > 40
    assert float((ratio - 1).abs().max()) < EXACT
    torch.testing.assert_close(new.values, batch.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_point_1_first_ratio_is_one_for_every_architecture(kind: str) -> None:
    world = make_world(kind, SamplingConfig(max_new_tokens=12, temperature=0.9, top_p=0.9))
    batch = world.collect()
    with torch.no_grad():
        new = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    assert float((new.log_probs - batch.log_probs).abs().max()) < EXACT


def test_point_1_the_learner_sees_ratio_one_first() -> None:
    world = make_world(sampling=SAMPLINGS["both"])
    batch = world.collect()
    advantages, returns = estimate(batch, AdvantageConfig())
    metrics = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1)).update(batch, advantages, returns)
    assert abs(metrics["approx_kl"]) < 1e-6
    assert metrics["clip_fraction"] == 0
    assert metrics["policy_loss"] == pytest.approx(-float(advantages[batch.mask].mean()), abs=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_point_1_log_probs_are_those_of_the_truncated_softmax(sampling: SamplingConfig) -> None:
    """Against the definition written down once more: temperature, then the k likeliest, then p of the mass."""
    world = make_world("gpt2", sampling)
    batch = world.collect()
    for row in range(len(batch)):
        prompt, response = split(batch, row)
        logits, _ = plain_forward(world.policy.model, prompt + response)
        for t, action in enumerate(response):
            probabilities = (logits[len(prompt) + t - 1].double() / sampling.temperature).softmax(dim=-1)
            ordered = probabilities.sort(descending=True)
            kept = sampling.top_k or len(probabilities)
            if sampling.top_p is not None:
                kept = min(kept, int((ordered.values.cumsum(0) < sampling.top_p).sum()) + 1)
            assert action in ordered.indices[:kept]
            expected = float((probabilities[action] / ordered.values[:kept].sum()).log())
            assert float(batch.log_probs[row, t]) == pytest.approx(expected, abs=EXACT)


def split(batch: Trajectories, row: int) -> tuple[list[int], list[int]]:
    """Prompt and response ids of one episode."""
    start, length = int(batch.context.starts[row]), int(batch.mask[row].sum())
    tokens = batch.context.tokens[row].tolist()
    return tokens[:start], tokens[start : start + length]


# ---- 2: gradients do not depend on how a batch is cut, padded, packed or spread --------------------------------------


@pytest.mark.parametrize("aggregation", ["step", "episode"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_point_2_microbatch_size(kind: str, aggregation: str) -> None:
    world, batch, advantages, returns = lm_batch(kind)
    config = LearnerConfig(aggregation=aggregation, entropy_coefficient=0.02)
    kl = KLConfig(beta=0.1, placement="loss")
    expected = gradient(world.policy, batch, advantages, returns, replace(config, microbatch_size=10**6), kl)
    for tokens in (1, 23, 40, 100):
        found = gradient(world.policy, batch, advantages, returns, replace(config, microbatch_size=tokens), kl)
        assert relative_error(found, expected) < EXACT, tokens


@pytest.mark.parametrize("aggregation", ["step", "episode"])
def test_point_2_the_loss_is_the_mean_over_valid_steps_written_as_a_loop(aggregation: str) -> None:
    """Σ over valid steps / their number (token), or the mean over episodes of each one's mean (sequence)."""
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=9, seed=2)
    advantages, returns = estimate(batch, AdvantageConfig())
    config = LearnerConfig(aggregation=aggregation, entropy_coefficient=0.1, value_coefficient=0.7)
    found = gradient(policy, batch, advantages, returns, replace(config, microbatch_size=7))
    now = policy.evaluate(batch.context, batch.actions, batch.mask)
    episodes = []
    for row in range(len(batch)):
        steps = []
        for t in batch.mask[row].nonzero().flatten().tolist():
            ratio = (now.log_probs[row, t] - batch.log_probs[row, t]).exp()
            surrogate = torch.min(ratio * advantages[row, t], ratio.clamp(0.8, 1.2) * advantages[row, t])
            error = (now.values[row, t] - returns[row, t]) ** 2 / 2
            steps.append(-surrogate + 0.7 * error - 0.1 * now.entropy[row, t])
        episodes.append(torch.stack(steps))
    loss = torch.cat(episodes).mean() if aggregation == "step" else torch.stack([e.mean() for e in episodes]).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])
    assert relative_error(found, expected) < EXACT


def repadded(context: TokenContext, left: int, right: int) -> TokenContext:
    """The same sequences with that much padding on each side, flush right where there is none at the right."""
    rows, lengths = len(context.tokens), context.lengths
    width = int(lengths.max()) + left + right
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, 16, (rows, width), generator=generator)  # padding may hold anything
    mask = torch.zeros(rows, width, dtype=torch.bool)
    first = torch.full((rows,), left) if right else width - lengths
    for row in range(rows):
        part = slice(int(first[row]), int(first[row] + lengths[row]))
        tokens[row, part] = context.tokens[row][context.attention_mask[row]]
        mask[row, part] = True
    return replace(context, tokens=tokens, attention_mask=mask, starts=context.starts + first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("left", "right"), [(0, 0), (7, 0), (0, 6), (3, 4)])
def test_point_2_padding_side_and_amount(kind: str, left: int, right: int) -> None:
    world, batch, advantages, returns = lm_batch(kind, sampling=SAMPLINGS["both"])
    elsewhere = replace(batch, context=repadded(batch.context, left, right))
    config = LearnerConfig(entropy_coefficient=0.02, microbatch_size=60)
    expected = gradient(world.policy, batch, advantages, returns, config)
    assert relative_error(gradient(world.policy, elsewhere, advantages, returns, config), expected) < EXACT

    def untrimmed(context: TokenContext) -> Tensor:
        policy = copy.deepcopy(world.policy)
        now = policy.evaluate(context, batch.actions, batch.mask)
        (now.log_probs.sum() + now.values.square().sum() + now.entropy.sum()).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    assert relative_error(untrimmed(elsewhere.context), untrimmed(batch.context)) < EXACT


def test_point_2_steps_beyond_the_mask_weigh_nothing() -> None:
    """More columns of steps, holding anything at all, change nothing."""
    policy = ToyPolicy()
    batch = trajectories(policy, seed=4)
    advantages, returns = estimate(batch, AdvantageConfig())
    spoiled = replace(
        batch,
        **{
            name: getattr(batch, name).masked_fill(~batch.mask, torch.nan)
            for name in ("log_probs", "values", "rewards", "reference_log_probs", "bootstrap_values")
        },
        actions=batch.actions.masked_fill(~batch.mask, 3),
    )
    kl = KLConfig(beta=0.1, placement="loss")
    expected = gradient(policy, batch, advantages, returns, kl=kl)
    for found, wanted in zip(estimate(spoiled, AdvantageConfig()), (advantages, returns), strict=True):
        torch.testing.assert_close(found, wanted)
    assert relative_error(gradient(policy, spoiled, advantages, returns, kl=kl), expected) < EXACT
    metrics = [Learner(ToyPolicy(), kl=KLController(kl)).update(b, advantages, returns) for b in (batch, spoiled)]
    assert metrics[0] == metrics[1]
    for estimator in ("rloo", "grpo"):
        config = AdvantageConfig(estimator)
        for found, wanted in zip(estimate(spoiled, config), estimate(batch, config), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("aggregation", ["step", "episode"])
def test_point_2_packing_order(aggregation: str) -> None:
    world, batch, advantages, returns = lm_batch("llama")
    config = LearnerConfig(aggregation=aggregation, microbatch_size=45)
    expected = gradient(world.policy, batch, advantages, returns, config)
    for seed in range(3):
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        found = gradient(world.policy, batch.select(order), advantages[order], returns[order], config)
        assert relative_error(found, expected) < EXACT


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(ranks.run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("aggregation", ranks.AGGREGATIONS)
def test_point_2_number_of_ranks(on_two_ranks: list[dict[str, Any]], aggregation: str) -> None:
    alone = ranks.measure(ranks.whole_batch())
    for found in on_two_ranks:
        for name in (f"gradient/{aggregation}", f"parameters/{aggregation}"):
            assert relative_error(found[name], alone[name]) < EXACT, name
        for name, value in alone[f"metrics/{aggregation}"].items():
            assert found[f"metrics/{aggregation}"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# ---- 3: eos is an action, pad never ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<eos>", "<pad>"])
def test_point_3_eos_is_an_action_and_pad_never(pad: str) -> None:
    """With eos (which is pad, too) inside prompts, each row equals its own sequence evaluated without any padding."""
    world = make_world(collect=CollectConfig(prompts=6, samples_per_prompt=4))
    world.sampler.tokenizer = make_tokenizer(pad)
    assert any(EOS in prompt.token_ids for prompt in world.prompts)
    batch = world.collect()
    samples, beta = world._last_batch(batch).samples, world.kl.beta
    ended = [row for row, ids in enumerate(samples.response_ids) if ids[-1] == EOS]
    assert 3 < len(ended) < len(batch)
    for row, ids in enumerate(samples.response_ids):
        prompt, response = split(batch, row)
        assert response == ids
        assert batch.actions[row, : len(ids)].tolist() == ids
        assert EOS not in ids[:-1]  # the first eos ends the response
        assert batch.mask[row].tolist() == [t < len(ids) for t in range(batch.mask.shape[1])]
        assert int(batch.context.lengths[row]) == len(prompt) + len(ids)
        logits, hidden = plain_forward(world.policy.model, prompt + response)
        reference, _ = plain_forward(world.reference.model, prompt + response)
        before = torch.arange(len(ids)) + len(prompt) - 1
        chosen = torch.tensor(ids)[:, None]
        log_probs = logits[before].log_softmax(-1).gather(-1, chosen).squeeze(-1)
        kl = log_probs - reference[before].log_softmax(-1).gather(-1, chosen).squeeze(-1)
        rewards = -beta * kl
        rewards[-1] += world._last_batch(batch).scores.total[row]
        near = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(batch.log_probs[row, : len(ids)], log_probs, **near)
        torch.testing.assert_close(
            batch.values[row, : len(ids)], world.policy.values_of(hidden[before]).detach(), **near
        )
        torch.testing.assert_close(batch.rewards[row, : len(ids)], rewards, **near)
        assert bool(batch.terminated[row, len(ids) - 1]) == (ids[-1] == EOS)


def test_point_3_eos_gets_credit_and_a_gradient() -> None:
    world, batch, advantages, returns = lm_batch("gpt2", collect=CollectConfig(prompts=6, samples_per_prompt=4))
    at_eos = batch.mask & (batch.actions == EOS)
    assert int(at_eos.sum()) > 3
    assert bool((advantages[at_eos] != 0).all())
    assert bool((returns[at_eos] != 0).all())
    without = replace(batch, mask=batch.mask & ~at_eos)
    whole = gradient(world.policy, batch, advantages, returns)
    assert relative_error(gradient(world.policy, without, advantages, returns), whole) > 1e-3
    only = advantages * at_eos
    assert float(gradient(world.policy, batch, only, batch.values, LearnerConfig(value_coefficient=0.0)).norm()) > 1e-3


def test_point_3_the_reward_sees_the_drawn_eos_and_the_text_does_not() -> None:
    rewards = CountingRewards()
    world = make_world(rewards=rewards, collect=CollectConfig(prompts=6, samples_per_prompt=4))
    world.collect()
    call = rewards.calls[0]
    assert any(ids[-1] == EOS for ids in call["completion_ids"])
    assert not any("<eos>" in text for text in call["completions"])


# ---- 4: terminated is not truncated ----------------------------------------------------------------------------------


def test_point_4_gae_bootstraps_across_truncation_alone() -> None:
    policy = ToyPolicy()
    flags = torch.tensor([[0, 1, 0, 0]], dtype=torch.bool)
    nothing = torch.zeros_like(flags)
    base = replace(
        trajectories(policy, episodes=1, steps=4, gaps=False),
        rewards=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        values=torch.tensor([[0.5, 0.25, -0.5, 1.0]]),
        mask=torch.ones(1, 4, dtype=torch.bool),
        bootstrap_values=torch.tensor([[0.0, 10.0, 0.0, 20.0]]),
        truncated=nothing.clone(),
        terminated=nothing.clone(),
    )
    last = torch.tensor([[0, 0, 0, 1]], dtype=torch.bool)
    gamma, lam = 0.9, 0.8
    ended, _ = gae(replace(base, terminated=flags | last), gamma, lam)
    cut, _ = gae(replace(base, truncated=flags | last), gamma, lam)
    both, _ = gae(replace(base, truncated=flags | last, terminated=flags | last), gamma, lam)
    assert ended[0, 1] == pytest.approx(2.0 - 0.25)
    assert ended[0, 3] == pytest.approx(4.0 - 1.0)
    assert cut[0, 1] == pytest.approx(2.0 + gamma * 10.0 - 0.25)
    assert cut[0, 3] == pytest.approx(4.0 + gamma * 20.0 - 1.0)
    assert ended[0, 0] == pytest.approx(1.0 + gamma * 0.25 - 0.5 + gamma * lam * float(ended[0, 1]))
    torch.testing.assert_close(both, ended)  # an end is an end
    changed = replace(base, rewards=base.rewards + torch.tensor([[0.0, 0.0, 100.0, 100.0]]), truncated=flags | last)
    torch.testing.assert_close(gae(changed, gamma, lam)[0][:, :2], cut[:, :2])  # nothing flows back over either


def test_point_4_language_truncation_is_scored_as_it_is() -> None:
    world = make_world("gpt2", kl=KLConfig(beta=0.0), collect=CollectConfig(prompts=6, samples_per_prompt=4))
    batch = world.collect()
    last = last_step(batch.mask)
    rows = torch.arange(len(batch))
    cut = batch.truncated[rows, last]
    assert bool(cut.any())
    assert bool((~cut).any())
    assert torch.equal(batch.terminated[rows, last], ~cut)
    assert int((batch.terminated | batch.truncated).sum()) == len(batch)
    assert bool((batch.mask.sum(1)[cut] == 8).all())
    assert not bool(batch.bootstrap_values.any())
    scores = torch.tensor(world._last_batch(batch).scores.total)
    torch.testing.assert_close(batch.rewards[rows, last], scores)
    advantages, _ = gae(batch, 1.0, 0.95)
    torch.testing.assert_close(advantages[rows, last], scores - batch.values[rows, last])


def test_point_4_missing_eos_penalty_falls_on_the_cut_off_alone() -> None:
    config = CollectConfig(prompts=6, samples_per_prompt=4, missing_eos_penalty=2.5)
    world = make_world("gpt2", kl=KLConfig(beta=0.0), collect=config)
    batch = world.collect()
    samples, scores = world._last_batch(batch).samples, torch.tensor(world._last_batch(batch).scores.total)
    torch.testing.assert_close(batch.rewards.sum(1), torch.where(samples.terminated, scores, scores - 2.5))


@pytest.mark.parametrize("separate", [False, True])
def test_point_4_bootstrap_when_asked_for_is_the_critics_value_of_the_successor(separate: bool) -> None:
    config = CollectConfig(prompts=6, samples_per_prompt=4, bootstrap_truncated=True)
    world = make_world("llama", kl=KLConfig(beta=0.0), collect=config)
    if separate:
        policy = perturbed(LanguagePolicy(world.policy.model, separate_value_trunk=True), 0.02, seed=3)
        world.policy = world.sampler.policy = policy
    batch = world.collect()
    advantages, _ = gae(batch, 0.9, 0.95)
    for row in range(len(batch)):
        prompt, response = split(batch, row)
        t = len(response) - 1
        if bool(batch.terminated[row, t]):
            assert not bool(batch.bootstrap_values[row].any())
            continue
        if separate:
            trunk = world.policy.value_trunk
            hidden = trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        else:
            _, hidden = plain_forward(world.policy.model, prompt + response)
        expected = float(world.policy.values_of(hidden[-1]).detach())
        assert float(batch.bootstrap_values[row, t]) == pytest.approx(expected, abs=1e-5)
        assert int((batch.bootstrap_values[row] != 0).sum()) == 1
        delta = float(batch.rewards[row, t]) + 0.9 * expected - float(batch.values[row, t])
        assert float(advantages[row, t]) == pytest.approx(delta, abs=1e-5)


# ---- 5: the KL penalty -----------------------------------------------------------------------------------------------


def test_point_5_k1_per_token_in_the_reward_once_and_the_score_at_the_last() -> None:
    world = make_world(sampling=SAMPLINGS["temperature"], kl=KLConfig(beta=0.3))
    batch = world.collect()
    k1 = (batch.log_probs - batch.reference_log_probs) * batch.mask
    expected = -0.3 * k1
    expected[torch.arange(len(batch)), last_step(batch.mask)] += torch.tensor(world._last_batch(batch).scores.total)
    torch.testing.assert_close(batch.rewards, expected)
    assert float(k1.abs().max()) > 0.01
    metrics = Learner(world.policy, kl=world.kl).update(batch, *estimate(batch, AdvantageConfig()))
    assert "kl_loss" not in metrics  # in the reward and nowhere else


def test_point_5_in_the_loss_it_is_not_in_the_reward() -> None:
    kl = KLConfig(beta=0.3, placement="loss")
    world = make_world(kl=kl)
    batch = world.collect()
    assert int((batch.rewards != 0).sum()) <= len(batch)
    torch.testing.assert_close(batch.rewards.sum(1), torch.tensor(world._last_batch(batch).scores.total))
    metrics = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1), kl=world.kl).update(
        batch, *estimate(batch, AdvantageConfig())
    )
    k2 = (batch.log_probs - batch.reference_log_probs).square() / 2
    assert metrics["kl_loss"] == pytest.approx(float(k2[batch.mask].mean()), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_point_5_reference_at_the_sampling_temperature(temperature: float) -> None:
    world = make_world(sampling=SamplingConfig(max_new_tokens=6, temperature=temperature))
    batch = world.collect()
    for row in range(len(batch)):
        prompt, response = split(batch, row)
        logits, _ = plain_forward(world.reference.model, prompt + response)
        before = torch.arange(len(response)) + len(prompt) - 1
        exact = (logits[before] / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(batch.reference_log_probs[row, : len(response)], exact, atol=1e-5, rtol=1e-4)


def test_point_5_the_kl_over_the_whole_vocabulary_is_reported() -> None:
    world = make_world()
    batch = world.collect()
    nats, lengths = [], []
    for row in range(len(batch)):
        prompt, response = split(batch, row)
        before = torch.arange(len(response)) + len(prompt) - 1
        policy, reference = (
            plain_forward(model, prompt + response)[0][before].double().log_softmax(-1)
            for model in (world.policy.model, world.reference.model)
        )
        nats.append(float((policy.exp() * (policy - reference)).sum()))
        lengths.append(len(response))
    metrics = world.metrics(batch)
    assert metrics["kl"] == pytest.approx(np.mean(nats), rel=1e-4)
    of_prompts = [
        np.mean([n for n, g in zip(nats, batch.groups, strict=True) if g == group])
        for group in set(batch.groups.tolist())
    ]
    error = np.std(of_prompts, ddof=1) / len(of_prompts) ** 0.5  # responses to one prompt depend on each other
    assert metrics["kl_error"] == pytest.approx(error, rel=1e-4)
    assert metrics["kl_per_token"] == pytest.approx(sum(nats) / sum(lengths), rel=1e-4)
    k1 = ((batch.log_probs - batch.reference_log_probs) * batch.mask).sum(1)
    assert metrics["kl_k1"] == pytest.approx(float(k1.mean()), rel=1e-5)


REFERENCE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()


def exact_kl_gradient(logits: Tensor) -> Tensor:
    """∇ Σ p (log p − log q), from its definition."""
    logits = logits.clone().requires_grad_(True)
    log_p = logits.log_softmax(-1)
    (log_p.exp() * (log_p - REFERENCE)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_point_5_k2_as_loss_has_the_gradient_of_the_reverse_kl() -> None:
    """In expectation over every action of a categorical; k3 as a loss has another one, k1 has none."""
    start = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64)

    def expected_gradient(estimator: Any) -> Tensor:
        logits = start.clone().requires_grad_(True)
        log_p = logits.log_softmax(-1)
        (log_p.detach().exp() * estimate_kl(log_p, REFERENCE, estimator)).sum().backward()
        assert logits.grad is not None
        return logits.grad

    exact = exact_kl_gradient(start)
    torch.testing.assert_close(expected_gradient("k2"), exact)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64))
    assert relative_error(expected_gradient("k3"), exact) > 0.1


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_point_5_the_learners_gradient_is_beta_times_the_exact_kl_gradient(placement: Any) -> None:
    """A uniform policy that has drawn each action once is its own expectation, so the sum over it is exact."""
    uniform = torch.zeros(4)
    actions = torch.arange(4)
    log_probs = uniform.log_softmax(-1)[:, None]
    reference = REFERENCE.float()[:, None]
    rewards = -0.7 * (log_probs - reference) if placement == "reward" else torch.zeros(4, 1)
    batch = one_step(actions, log_probs=log_probs, reference_log_probs=reference, rewards=rewards)
    advantages, returns = estimate(batch, AdvantageConfig(gamma=1.0, whiten=False))
    found = gradient(TablePolicy(uniform), batch, advantages, returns, kl=KLConfig(beta=0.7, placement=placement))
    assert relative_error(found, 0.7 * exact_kl_gradient(uniform.double())) < EXACT


# ---- 6: whitening ----------------------------------------------------------------------------------------------------


def test_point_6_moments_are_weighted_by_the_mask() -> None:
    values = torch.tensor([[1.0, 2.0, 900.0], [3.0, -700.0, 800.0], [6.0, 8.0, 10.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    found = whiten(values, mask)
    valid = values[mask].double()
    expected = (valid - valid.mean()) / valid.std(correction=0)
    torch.testing.assert_close(found[mask].double(), expected, atol=1e-6, rtol=1e-5)
    assert not bool(found[~mask].any())


def test_point_6_over_all_ranks(on_two_ranks: list[dict[str, Any]]) -> None:
    together = torch.cat([found["advantages"] for found in on_two_ranks])
    alone = ranks.measure(ranks.whole_batch())["advantages"]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert abs(float(together.mean())) < 1e-6
    assert abs(float(on_two_ranks[0]["advantages"].mean())) > 1e-3
    scaled = torch.cat([found["returns of whitened rewards"] for found in on_two_ranks])
    torch.testing.assert_close(scaled, ranks.measure(ranks.whole_batch())["returns of whitened rewards"])


def test_point_6_advantages_are_whitened_returns_never() -> None:
    batch = trajectories(ToyPolicy(), seed=6)
    batch = replace(batch, rewards=batch.rewards * 5 + 3 * batch.mask)
    raw, raw_returns = gae(batch, 1.0, 0.95)
    for choice, wanted in ((None, whiten(raw, batch.mask)), (True, whiten(raw, batch.mask)), (False, raw)):
        advantages, returns = Learner(ToyPolicy(), advantage=AdvantageConfig(whiten=choice)).credit(batch)
        torch.testing.assert_close(advantages, wanted)
        torch.testing.assert_close(returns, raw_returns)
    torch.testing.assert_close(raw_returns, (raw + batch.values) * batch.mask)


def test_point_6_over_the_whole_batch_not_the_minibatch() -> None:
    """The learner takes advantages as they are: twice as large, the policy's gradient is twice as large."""
    policy = ToyPolicy()
    batch = trajectories(policy, seed=7, drift=0.0)
    advantages, returns = estimate(batch, AdvantageConfig())
    config = LearnerConfig(value_coefficient=0.0)
    once = gradient(policy, batch, advantages, returns, config)
    twice = gradient(policy, batch, 2 * advantages + 1.0, returns, config)
    shifted = gradient(policy, batch, torch.ones_like(advantages) * batch.mask, returns, config)
    assert relative_error(twice, 2 * once + shifted) < EXACT


# ---- 7: the value head starts at zero, dropout is off ----------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_point_7_value_head_starts_at_zero(kind: str, separate: bool) -> None:
    policy = LanguagePolicy(make_model(kind), separate_value_trunk=separate)
    context = TokenContext.from_ids([[4, 5], [6]], [[7, 8, 9], [5, EOS]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    assert not bool(policy.evaluate(context, torch.tensor([[7, 8, 9], [5, EOS, 0]]), mask).values.any())
    assert not bool(policy.successor_values(context, mask.sum(1)).any())
    world = make_world(kind)
    world.policy = world.sampler.policy = policy
    assert not bool(world.collect().values.any())


@pytest.mark.parametrize("separate", [False, True])
def test_point_7_dropout_is_off_after_train(separate: bool) -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    world = make_world("gpt2", **dropout)
    if separate:
        world.policy = world.sampler.policy = LanguagePolicy(world.policy.model, separate_value_trunk=True)
    assert world.policy.model.config.resid_pdrop == 0.5
    world.policy.model.train()
    assert world.policy.train() is world.policy
    assert not any(module.training for module in world.policy.modules())
    batch = world.collect()
    first = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    again = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    assert torch.equal(first.log_probs, again.log_probs)
    assert torch.equal(first.values, again.values)
    torch.testing.assert_close(first.log_probs, batch.log_probs, atol=1e-5, rtol=1e-4)


def test_point_7_dropout_is_off_in_the_reference_and_stays_off_while_learning() -> None:
    world = make_world("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    noisy = copy.deepcopy(world.reference.model).train()
    LanguageWorld(
        world.policy, ModelReference(noisy), world.sampler, world.prompts, world.rewards, world.kl, world.config
    )
    assert not any(module.training for module in noisy.modules())
    assert not any(parameter.requires_grad for parameter in noisy.parameters())
    learner = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1), iterations=2)
    for iteration in iterate(world, learner):
        assert abs(iteration.metrics["approx_kl"]) < 1e-6
    assert not any(module.training for module in world.policy.modules())


# ---- 8: every detail is an explicit field ----------------------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "epochs": 2,
    "minibatches": 2,
    "microbatch_size": 5,
    "learning_rate": 2e-3,
    "value_learning_rate": 5e-3,
    "schedule": "linear",
    "warmup_iterations": 3,
    "value_warmup_iterations": 1,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "weight_decay": 0.5,
    "max_gradient_norm": 1e-3,
    "clip_low": 0.01,
    "clip_high": 0.01,
    "dual_clip": 1.05,
    "value_coefficient": 2.0,
    "value_clip": 0.01,
    "entropy_coefficient": 0.5,
    "aggregation": "episode",
    "target_kl": 1e-9,
}
WITHOUT_EFFECT = {"microbatch_size"}


def trained(config: LearnerConfig, iterations: int = 2) -> tuple[ToyPolicy, list[dict[str, float]]]:
    """A toy policy after two updates on the same batch."""
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=12, seed=8)
    learner = Learner(policy, config, iterations=iterations, seed=1)
    advantages, returns = learner.credit(batch)
    return policy, [learner.update(batch, advantages, returns) for _ in range(iterations)]


def vector(policy: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("name", [field.name for field in fields(LearnerConfig)])
def test_point_8_each_field_acts(name: str) -> None:
    base = LearnerConfig(epochs=3, minibatches=3, learning_rate=1e-3)
    assert getattr(base, name) != CHANGED[name]
    plain, changed = vector(trained(base)[0]), vector(trained(replace(base, **{name: CHANGED[name]}))[0])
    if name in WITHOUT_EFFECT:
        torch.testing.assert_close(changed, plain, atol=1e-6, rtol=1e-5)
    else:
        assert float((changed - plain).abs().max()) > 1e-6


@pytest.mark.parametrize("config", [LearnerConfig, AdvantageConfig, KLConfig, SamplingConfig, CollectConfig])
def test_point_8_each_field_has_a_default_and_says_what_it_means(config: type) -> None:
    config()
    body = ast.parse(inspect.getsource(config)).body[0].body
    documented = {
        statement.target.id
        for statement, following in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and len(str(following.value.value)) > 15
    }
    assert documented == {field.name for field in fields(config)}


def test_point_8_adam_gets_its_numbers() -> None:
    config = LearnerConfig(adam_epsilon=3e-4, adam_beta1=0.7, adam_beta2=0.8, weight_decay=0.2)
    for group in Learner(ToyPolicy(), config).optimizer.param_groups:
        assert (group["eps"], group["betas"], group["weight_decay"]) == (3e-4, (0.7, 0.8), 0.2)
    assert LearnerConfig().adam_epsilon == 1e-8


def test_point_8_one_step_of_adam_by_hand() -> None:
    """θ − lr · g / (|g| + ε) at the first step, ε and the clipped gradient included."""
    config = LearnerConfig(epochs=1, minibatches=1, learning_rate=1e-2, adam_epsilon=1e-3, max_gradient_norm=0.05)
    policy = ToyPolicy()
    before = vector(policy)
    batch = trajectories(policy, seed=8)
    learner = Learner(policy, config)
    advantages, returns = learner.credit(batch)
    raw = gradient(policy, batch, advantages, returns)
    metrics = learner.update(batch, advantages, returns)
    assert metrics["gradient_norm"] == pytest.approx(float(raw.norm()), rel=1e-5)
    clipped = raw * 0.05 / float(raw.norm())
    torch.testing.assert_close(vector(policy), before - 1e-2 * clipped / (clipped.abs() + 1e-3), atol=1e-6, rtol=1e-4)


def test_point_8_schedule_and_warmup_reach_the_optimizer() -> None:
    config = LearnerConfig(learning_rate=1.0, value_learning_rate=10.0, schedule="linear", warmup_iterations=1)
    learner = Learner(ToyPolicy(), replace(config, epochs=1, minibatches=1), iterations=5)
    batch = trajectories(ToyPolicy(), seed=8)
    rates = []
    for _ in range(5):
        metrics = learner.update(batch, *learner.credit(batch))
        rates.append(metrics["learning_rate"])
        assert [group["lr"] for group in learner.optimizer.param_groups] == [rates[-1], metrics["value_learning_rate"]]
        assert metrics["value_learning_rate"] == pytest.approx(10 * rates[-1])
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"), [(1, 1.25, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.25, True)]
)
def test_point_8_clip_range_is_asymmetric(advantage: float, ratio: float, moves: bool) -> None:
    """Beyond 1 − ε_low with A < 0 and beyond 1 + ε_high with A > 0 there is no gradient; elsewhere there is."""
    policy = TablePolicy(torch.zeros(4))
    old = torch.log_softmax(torch.zeros(4), -1)[:1, None] - torch.tensor(ratio).log()
    batch = one_step(torch.zeros(1, dtype=torch.long), log_probs=old)
    given = torch.full((1, 1), float(advantage))
    for low, high, clips_low, clips_high in ((0.4, 0.2, True, True), (0.6, 0.3, False, False)):
        config = LearnerConfig(clip_low=low, clip_high=high)
        norm = float(gradient(policy, batch, given, torch.zeros(1, 1), config).norm())
        clipped = (advantage > 0 and ratio > 1 and clips_high) or (advantage < 0 and ratio < 1 and clips_low)
        assert (norm > 0.01) == (not clipped)
    assert moves == (not (advantage > 0 and ratio > 1) and not (advantage < 0 and ratio < 1))


def test_point_8_dual_clip_bounds_the_loss_of_bad_actions() -> None:
    policy = TablePolicy(torch.zeros(4))
    old = torch.full((1, 1), -torch.tensor(4.0 * 5.0).log())  # π_old = 1/20, π = 1/4: ratio 5
    batch = one_step(torch.zeros(1, dtype=torch.long), log_probs=old)
    bad, good = torch.full((1, 1), -2.0), torch.full((1, 1), 2.0)

    def loss(advantages: Tensor, dual_clip: float | None) -> tuple[float, float]:
        config = LearnerConfig(dual_clip=dual_clip, epochs=1, minibatches=1, learning_rate=0.0)
        metrics = Learner(copy.deepcopy(policy), config).update(batch, advantages, torch.zeros(1, 1))
        return metrics["policy_loss"], metrics["gradient_norm"]

    assert loss(bad, None)[0] == pytest.approx(10.0, rel=1e-5)
    assert loss(bad, 3.0) == (pytest.approx(6.0), 0.0)
    assert loss(bad, 6.0)[0] == pytest.approx(10.0, rel=1e-5)
    assert loss(good, 3.0)[0] == pytest.approx(-2.4, rel=1e-5)  # good actions keep the ordinary clip


def test_point_8_value_clip_takes_the_larger_loss() -> None:
    """V = 1, V_old = 0, range 0.5: towards R = 2 the clipped loss ½·1.5² counts, towards R = −2 the plain ½·3²."""
    policy = ToyPolicy()
    with torch.no_grad():
        policy.critic.weight.zero_()
        policy.critic.bias.fill_(1.0)
    batch = one_step(torch.zeros(1, dtype=torch.long))
    for returns, expected in ((2.0, 1.5**2 / 2), (-2.0, 3.0**2 / 2)):
        config = LearnerConfig(value_clip=0.5, epochs=1, minibatches=1, learning_rate=0.0)
        metrics = Learner(policy, config).update(batch, torch.zeros(1, 1), torch.full((1, 1), returns))
        assert metrics["value_loss"] == pytest.approx(expected)


def test_point_8_target_kl_stops_the_batch_before_the_step() -> None:
    base = LearnerConfig(epochs=6, minibatches=1, learning_rate=3e-2)
    _free, every = trained(base, 1)
    assert every[0]["optimizer_steps"] == 6
    assert every[0]["stopped_early"] == 0
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=12, seed=8, drift=0.0)
    learner = Learner(policy, replace(base, target_kl=1e-3))
    metrics = learner.update(batch, *learner.credit(batch))
    assert metrics["stopped_early"] == 1
    assert 1 <= metrics["optimizer_steps"] < 6
    assert metrics["approx_kl"] <= 1e-3  # of the steps that were taken
    same = ToyPolicy()
    short = Learner(same, replace(base, epochs=int(metrics["optimizer_steps"])))
    short.update(batch, *short.credit(batch))
    torch.testing.assert_close(vector(policy), vector(same))


def test_point_8_entropy_bonus_raises_entropy() -> None:
    start = torch.tensor([1.0, 0.0, 0.0, 0.0])

    def entropy_after(coefficient: float) -> float:
        policy = TablePolicy(start)
        config = LearnerConfig(entropy_coefficient=coefficient, epochs=5, minibatches=1, learning_rate=0.05)
        old = start.log_softmax(-1)[:, None]
        Learner(policy, config).update(one_step(torch.arange(4), log_probs=old), torch.zeros(4, 1), torch.zeros(4, 1))
        log_p = policy.logits.detach().log_softmax(-1)
        return float(-(log_p.exp() * log_p).sum())

    assert entropy_after(0.1) > entropy_after(0.0) + 1e-3


def test_point_8_value_warmup_leaves_the_policy_bitwise() -> None:
    world = make_world(kl=KLConfig(beta=0.1, placement="loss"))
    config = LearnerConfig(
        epochs=2,
        minibatches=2,
        learning_rate=1e-3,
        value_warmup_iterations=1,
        weight_decay=0.1,
        entropy_coefficient=0.1,
    )
    learner = Learner(world.policy, config, kl=world.kl, iterations=2)
    before = copy.deepcopy(world.policy.state_dict())
    iterations = iterate(world, learner)
    next(iterations)
    for name, tensor in world.policy.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("value_head")), name
    next(iterations)
    assert not torch.equal(world.policy.state_dict()["model.lm_head.weight"], before["model.lm_head.weight"])


def test_point_8_gradient_clipping_scales_to_the_norm() -> None:
    policy = ToyPolicy()
    batch = trajectories(policy, seed=8)
    learner = Learner(policy, LearnerConfig(epochs=1, minibatches=1, max_gradient_norm=0.01, learning_rate=0.0))
    norms: list[float] = []

    def note(*_: Any) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]).norm()))

    learner.optimizer.register_step_pre_hook(note)
    metrics = learner.update(batch, *learner.credit(batch))
    assert metrics["gradient_norm"] > 0.02
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert all(p.grad is None for p in policy.parameters())  # their memory is let go


# ---- 9: the same seed, the same bits ---------------------------------------------------------------------------------


def start_run(seed: int, iterations: int = 2) -> tuple[LanguageWorld, Learner]:
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.9, top_p=0.95)
    world = make_world("llama", sampling, KLConfig(beta=0.1, target=1.0, horizon=50), CollectConfig(4, 2), seed=3)
    world.generator.manual_seed(seed)
    world.sampler.generator.manual_seed(seed)
    config = LearnerConfig(epochs=2, minibatches=3, learning_rate=1e-3, microbatch_size=64, schedule="linear")
    return world, Learner(world.policy, config, kl=world.kl, iterations=iterations, seed=seed)


def outcome(world: LanguageWorld, learner: Learner) -> list[dict[str, float]]:
    return [
        {name: value for name, value in i.metrics.items() if not name.startswith(("time/", "memory/"))}
        for i in iterate(world, learner)
    ]


def same_bits(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_point_9_same_seed_same_bits() -> None:
    first, second, other = start_run(0), start_run(0), start_run(1)
    torch.manual_seed(1)
    metrics = outcome(*first)
    torch.manual_seed(2)  # the global generator plays no part
    torch.rand(5)
    assert outcome(*second) == metrics
    assert same_bits(first[0].policy, second[0].policy)
    assert outcome(*other) != metrics
    assert not same_bits(first[0].policy, other[0].policy)


def test_point_9_resumed_is_never_having_stopped() -> None:
    """State dictionaries after every iteration, put into fresh objects, give the same bits at the end."""
    whole = start_run(0, iterations=3)
    expected = outcome(*whole)
    found = []
    world, learner = start_run(0, iterations=3)
    for _ in range(3):
        iteration = next(iterate(world, learner))
        found.append({n: v for n, v in iteration.metrics.items() if not n.startswith(("time/", "memory/"))})
        saved = copy.deepcopy((world.state_dict(), learner.state_dict(), world.policy.state_dict()))
        world, learner = start_run(77, iterations=3)
        world.load_state_dict(saved[0])
        learner.load_state_dict(saved[1])
        world.policy.load_state_dict(saved[2])
    assert found == expected
    assert same_bits(world.policy, whole[0].policy)
    assert learner.kl.beta == whole[1].kl.beta != 0.1


def test_point_9_prompts_come_in_an_order_of_the_seed() -> None:
    def rows(seed: int) -> list[int]:
        world = make_world(seed=seed, prompts=make_prompts(6), collect=CollectConfig(prompts=4))
        chosen = []
        for _ in range(3):
            chosen += [prompt.row for prompt in world._last_batch(world.collect()).prompts]
        return chosen

    assert rows(0) == rows(0) != rows(1)
    assert sorted(rows(0)[:6]) == sorted(rows(0)[6:]) == [1, 2, 3, 4, 5, 6]  # each prompt once in every pass
