"""Credit against its definitions, written as plain loops in float64."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import ToyContext, ToyPolicy, trajectories
from torch import Tensor

from tether.ppo import AdvantageConfig, Trajectories
from tether.ppo.advantages import estimate, gae, group_advantages, rewards_to_go, scale_and_clip, whiten


@st.composite
def batches(draw: st.DrawFn) -> Trajectories:
    """Any rewards and values, masks with gaps anywhere, ends of both kinds in the middle of a row."""
    rows, steps = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def flags(probability: float) -> Tensor:
        return torch.rand(rows, steps, generator=generator) < probability

    def normal() -> Tensor:
        return torch.randn(rows, steps, generator=generator, dtype=torch.float64)

    return Trajectories(
        actions=torch.zeros(rows, steps, dtype=torch.long),
        log_probs=normal(),
        values=normal(),
        rewards=normal(),
        mask=flags(draw(st.sampled_from([0.0, 0.5, 0.8, 1.0]))),
        terminated=flags(draw(st.sampled_from([0.0, 0.2, 1.0]))),
        truncated=flags(draw(st.sampled_from([0.0, 0.2, 1.0]))),
        bootstrap_values=normal(),
        context=ToyContext(torch.zeros(rows, steps, 1), torch.full((rows,), steps)),
    )


def direct_gae(batch: Trajectories, row: int, gamma: float, lam: float) -> list[float]:
    """Σ_l (γλ)^l δ_{t+l} for each valid step, each sum on its own (O(T²)), from equation 16 of Schulman et al."""
    steps = batch.mask[row].nonzero().flatten().tolist()
    rewards, values = batch.rewards[row].tolist(), batch.values[row].tolist()
    result = [0.0] * batch.mask.shape[1]
    for i, start in enumerate(steps):
        total, weight = 0.0, 1.0
        for j in range(i, len(steps)):
            t = steps[j]
            if batch.terminated[row, t]:
                successor = 0.0
            elif batch.truncated[row, t]:
                successor = float(batch.bootstrap_values[row, t])
            else:
                successor = values[steps[j + 1]] if j + 1 < len(steps) else 0.0
            total += weight * (rewards[t] + gamma * successor - values[t])
            weight *= gamma * lam
            if batch.terminated[row, t] or batch.truncated[row, t]:
                break
        result[start] = total
    return result


UNIT = st.floats(0.0, 1.0) | st.sampled_from([0.0, 0.95, 1.0])


@given(batches(), UNIT, UNIT)
@settings(max_examples=150, deadline=None)
def test_gae_is_the_direct_sum(batch: Trajectories, gamma: float, lam: float) -> None:
    advantages, returns = gae(batch, gamma, lam)
    expected = torch.tensor([direct_gae(batch, row, gamma, lam) for row in range(len(batch))], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(returns, (expected + batch.values) * batch.mask, atol=1e-10, rtol=1e-10)


@given(batches(), UNIT)
@settings(max_examples=50, deadline=None)
def test_rewards_to_go_is_the_discounted_sum(batch: Trajectories, gamma: float) -> None:
    no_critic = replace(batch, values=torch.zeros_like(batch.values))
    expected = torch.tensor([direct_gae(no_critic, row, gamma, 1.0) for row in range(len(batch))], dtype=torch.float64)
    torch.testing.assert_close(rewards_to_go(batch, gamma), expected, atol=1e-10, rtol=1e-10)


def test_lambda_one_gives_returns_that_do_not_depend_on_the_critic_and_lambda_zero_one_step() -> None:
    batch = trajectories(ToyPolicy(), seed=1)
    other = replace(batch, values=batch.values + torch.randn(batch.values.shape) * batch.mask)
    torch.testing.assert_close(gae(batch, 0.9, 1.0)[1], gae(other, 0.9, 1.0)[1])
    changed = replace(batch, rewards=batch.rewards * (torch.arange(batch.mask.shape[1]) < 2))
    torch.testing.assert_close(gae(batch, 0.9, 0.0)[0][:, :2], gae(changed, 0.9, 0.0)[0][:, :2])


@given(batches(), UNIT, UNIT, UNIT)
@settings(max_examples=50, deadline=None)
def test_the_critic_has_a_lambda_of_its_own(batch: Trajectories, gamma: float, lam: float, value_lam: float) -> None:
    config = AdvantageConfig(gamma=gamma, lam=lam, whiten=False, value_lam=value_lam)
    advantages, returns = estimate(batch, config)
    assert torch.equal(advantages, gae(batch, gamma, lam)[0])
    assert torch.equal(returns, gae(batch, gamma, value_lam)[1])


def test_value_lambda_one_makes_the_targets_the_observed_returns() -> None:
    """Whatever the critic says, while the policy's advantages still depend on it."""
    batch = trajectories(ToyPolicy(), seed=1)
    advantages, returns = estimate(batch, AdvantageConfig(lam=0.5, value_lam=1.0))
    torch.testing.assert_close(returns, rewards_to_go(batch, 1.0))
    assert not torch.allclose(returns, estimate(batch, AdvantageConfig(lam=0.5))[1])
    assert torch.equal(advantages, estimate(batch, AdvantageConfig(lam=0.5))[0])


def lengths_of_episodes(batch: Trajectories, row: int) -> dict[int, int]:
    """For each valid step, how many valid steps its episode has in this row: a plain walk from end to end."""
    lengths: dict[int, int] = {}
    episode: list[int] = []
    for t in batch.mask[row].nonzero().flatten().tolist():
        episode.append(t)
        if batch.terminated[row, t] or batch.truncated[row, t]:
            lengths |= dict.fromkeys(episode, len(episode))
            episode = []
    return lengths | dict.fromkeys(episode, len(episode))


@given(batches(), UNIT, st.floats(0.05, 4.0))
@settings(max_examples=100, deadline=None)
def test_length_adaptive_lambda_is_vapos_in_each_episode(batch: Trajectories, gamma: float, alpha: float) -> None:
    """λ = 1 − 1/(α·l), and 0 where that is negative, also for several episodes in a row and steps left out."""
    config = AdvantageConfig(gamma=gamma, lam=0.123, whiten=False, length_adaptive=alpha)
    advantages, returns = estimate(batch, config)
    expected = torch.zeros_like(batch.values)
    for row in range(len(batch)):
        for t, length in lengths_of_episodes(batch, row).items():
            expected[row, t] = direct_gae(batch, row, gamma, max(0.0, 1 - 1 / (alpha * length)))[t]
    torch.testing.assert_close(advantages, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(returns, (expected + batch.values) * batch.mask, atol=1e-10, rtol=1e-10)
    apart = estimate(batch, replace(config, value_lam=1.0))
    assert torch.equal(apart[0], advantages)
    assert torch.equal(apart[1], gae(batch, gamma, 1.0)[1])


def test_vapos_example() -> None:
    """α = 0.05: 100 steps have λ = 0.8, 1,000 have 0.98, and 20 or fewer 0."""
    steps = torch.arange(1000)
    for length, lam in ((10, 0.0), (20, 0.0), (100, 0.8), (1000, 0.98)):
        mask = (steps < length)[None]
        zeros, ends = torch.zeros(1, 1000), (steps == length - 1)[None]
        context = ToyContext(torch.zeros(1, 1000, 1), torch.tensor([length]))
        batch = Trajectories(
            zeros.long(), zeros, zeros, ends.float(), mask, ends, torch.zeros_like(mask), zeros, context
        )  # fmt: skip
        advantages, _ = estimate(batch, AdvantageConfig(whiten=False, length_adaptive=0.05))
        assert advantages[0, length - 2].item() == pytest.approx(lam)
        assert advantages[0, length - 3].item() == pytest.approx(lam**2)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_whitened_rewards_are_those_of_a_plain_loop(estimator: Any) -> None:
    """(r − mean) / std + mean over valid steps, std without Bessel's correction, before everything else."""
    batch = trajectories(ToyPolicy(), seed=4)
    batch = replace(batch, rewards=(batch.rewards * 7 + 2).masked_fill(~batch.mask, math.nan))
    rewards = batch.rewards[batch.mask].tolist()
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    by_hand = batch.rewards.clone()
    for row, t in batch.mask.nonzero().tolist():
        by_hand[row, t] = (float(batch.rewards[row, t]) - mean) / deviation + mean
    off = AdvantageConfig(estimator)
    found = estimate(batch, replace(off, whiten_rewards=True))
    for ours, theirs in zip(found, estimate(replace(batch, rewards=by_hand), off), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], estimate(batch, off)[1])


def test_whitened_rewards_have_variance_one_and_their_old_mean() -> None:
    batch = trajectories(ToyPolicy(), seed=4)
    rewards = batch.rewards * 7 + 2
    whitened = whiten(rewards, batch.mask, shift_mean=False)
    assert float(whitened[batch.mask].mean()) == pytest.approx(float(rewards[batch.mask].mean()), rel=1e-5)
    assert float(whitened[batch.mask].var(correction=0)) == pytest.approx(1.0, rel=1e-5)
    assert not bool(whitened[~batch.mask].any())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_group_baselines_are_plain_loops(normalise: bool, seed: int) -> None:
    groups = torch.tensor([4, 1, 4, 4, 1, 7, 7, 1, 1])
    batch = replace(trajectories(ToyPolicy(), episodes=9, seed=seed), groups=groups)
    totals = [float(batch.rewards[row][batch.mask[row]].double().sum()) for row in range(9)]
    found = group_advantages(batch, normalise)
    for row in range(9):
        members = [totals[i] for i in range(9) if groups[i] == groups[row]]
        others = [totals[i] for i in range(9) if groups[i] == groups[row] and i != row]
        if normalise:
            mean = sum(members) / len(members)
            spread = (sum((m - mean) ** 2 for m in members) / (len(members) - 1)) ** 0.5
            expected = (totals[row] - mean) / (spread + 1e-4)
        else:
            expected = totals[row] - sum(others) / len(others)
        valid = found[row][batch.mask[row]]
        torch.testing.assert_close(valid, torch.full_like(valid, expected), atol=1e-5, rtol=1e-4)
        assert not bool(found[row][~batch.mask[row]].any())


def test_grpo_of_equal_rewards_is_zero_not_noise() -> None:
    batch = trajectories(ToyPolicy(), episodes=4, gaps=False)
    equal = replace(batch, rewards=batch.mask / batch.mask.sum(1, keepdim=True), groups=torch.tensor([0, 0, 1, 1]))
    assert float(group_advantages(equal, normalise=True).abs().max()) < 1e-2


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
@pytest.mark.parametrize("groups", [None, torch.tensor([0, 0, 0, 1])])
def test_a_group_of_one_has_no_baseline(estimator: str, groups: Tensor | None) -> None:
    batch = replace(trajectories(ToyPolicy(), episodes=4), groups=groups)
    with pytest.raises(ValueError, match="at least 2 episodes from each start"):
        estimate(batch, AdvantageConfig(estimator))


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_groups_are_whitened_only_when_asked(estimator: str) -> None:
    batch = trajectories(ToyPolicy(), seed=2)
    raw = group_advantages(batch, estimator == "grpo")
    torch.testing.assert_close(estimate(batch, AdvantageConfig(estimator))[0], raw)
    torch.testing.assert_close(estimate(batch, AdvantageConfig(estimator, whiten=True))[0], whiten(raw, batch.mask))
    torch.testing.assert_close(estimate(batch, AdvantageConfig(estimator, gamma=0.9))[1], rewards_to_go(batch, 0.9))


def test_whitening_a_single_step_or_constant_stays_finite() -> None:
    mask = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[5.0, 9.0]]), mask).tolist() == [[0.0, 0.0]]
    assert bool(whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool)).isfinite().all())


def test_scale_then_clip() -> None:
    scores = torch.tensor([-4.0, 0.5, 3.0])
    assert scale_and_clip(scores, 2.0, 5.0).tolist() == [-5.0, 1.0, 5.0]
    assert scale_and_clip(scores, 2.0, None).tolist() == [-8.0, 1.0, 6.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", 1.1), ("gamma", -0.1), ("lam", 2.0), ("lam", math.nan), ("value_lam", 1.5), ("value_lam", math.nan)],
)
def test_bad_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*expected a number from 0 to 1"):
        AdvantageConfig(**{name: value})


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"length_adaptive is .*expected a finite number above 0"):
        AdvantageConfig(length_adaptive=alpha)


@pytest.mark.parametrize("name", ["value_lam", "length_adaptive"])
def test_group_baselines_have_no_lambda_to_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 1.0, but estimator rloo has no λ"):
        AdvantageConfig("rloo", **{name: 1.0})  # type: ignore[arg-type]
