"""The learner: state, schedules, errors, metrics, and that it learns."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.toy import TablePolicy, ToyContext, ToyPolicy, one_step, trajectories

from tether.ppo import AdvantageConfig, Evaluation, KLConfig, KLController, Learner, LearnerConfig
from tether.ppo.advantages import rewards_to_go
from tether.ppo.learner import explained_variance, schedule_factor


def bits(policy: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
        ("constant", 3, [0.25, 0.5, 0.75, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 0.5]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_schedules(schedule: str, warmup: int, expected: list[float]) -> None:
    assert [schedule_factor(i, 4, warmup, schedule) for i in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_end_at_zero_and_never_stop_before(schedule: str) -> None:
    factors = [schedule_factor(i, 10, 2, schedule) for i in range(11)]
    assert all(factor > 0 for factor in factors[:10])
    assert factors[10] == pytest.approx(0)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_state_goes_round_bit_for_bit(stop_after: int) -> None:
    config = LearnerConfig(epochs=2, minibatches=3, learning_rate=1e-2, schedule="cosine", weight_decay=0.1)
    kl = KLConfig(beta=0.1, target=0.3, horizon=20, placement="loss")

    def start(policy: ToyPolicy) -> Learner:
        return Learner(policy, config, kl=KLController(kl), iterations=4, seed=5)

    def turn(learner: Learner) -> dict[str, float]:
        batch = trajectories(ToyPolicy(), episodes=9, seed=learner.iteration)
        return learner.update(batch, *learner.credit(batch))

    whole = start(ToyPolicy())
    expected = [turn(whole) for _ in range(4)]
    first = start(ToyPolicy())
    found = [turn(first) for _ in range(stop_after)]
    state, parameters = copy.deepcopy((first.state_dict(), first.policy.state_dict()))
    turn(first)  # what happens after the save does not matter
    policy = ToyPolicy(seed=9)
    policy.load_state_dict(parameters)
    second = start(policy)
    second.load_state_dict(state)
    assert second.iteration == stop_after
    found += [turn(second) for _ in range(4 - stop_after)]
    assert found == expected
    assert torch.equal(bits(policy), bits(whole.policy))


def test_state_holds_what_a_file_can_hold() -> None:
    """Nested dictionaries with text keys, of tensors and plain numbers: what `tether.runs.state` writes."""
    learner = Learner(ToyPolicy())
    batch = trajectories(ToyPolicy())
    learner.update(batch, *learner.credit(batch))

    def check(value: Any) -> None:
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            for inner in value.values():
                check(inner)
        else:
            assert isinstance(value, torch.Tensor | int | float | str | bool | None)

    check(learner.state_dict())


def test_more_minibatches_than_episodes_is_an_error_before_anything_happens() -> None:
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=3)
    learner = Learner(policy, LearnerConfig(minibatches=4))
    with pytest.raises(ValueError, match="3 episodes cannot be cut into 4 minibatches; lower minibatches"):
        learner.update(batch, *learner.credit(batch))
    assert learner.iteration == 0
    assert not learner.updating
    assert torch.equal(bits(policy), bits(ToyPolicy()))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_raises_and_leaves_the_parameters(bad: float) -> None:
    policy = ToyPolicy()
    before = bits(policy)
    batch = trajectories(policy)
    learner = Learner(policy, LearnerConfig(minibatches=1))
    advantages, returns = learner.credit(batch)
    advantages[0, 0] = bad
    with pytest.raises(FloatingPointError, match="iteration 1: lower the learning rate"):
        learner.update(batch, advantages, returns)
    assert torch.equal(bits(policy), before)
    assert learner.updating
    assert learner.iteration == 0


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_without_a_limit_the_gradient_is_checked_too(limit: float) -> None:
    policy = ToyPolicy()
    batch = trajectories(policy)
    learner = Learner(policy, LearnerConfig(max_gradient_norm=limit))
    advantages, returns = learner.credit(batch)
    with pytest.raises(FloatingPointError):
        learner.update(batch, advantages * math.nan, returns)


def test_each_epoch_visits_each_episode_once() -> None:
    """The order comes from the learner's own generator."""
    visits: list[int] = []

    class Watched(ToyPolicy):
        def evaluate(self, context: Any, actions: Any, mask: Any) -> Any:
            visits.extend(context.observations[:, 0, 0].tolist())
            return super().evaluate(context, actions, mask)

    policy = Watched()
    batch = trajectories(policy, episodes=10)
    every = sorted(batch.context.observations[:, 0, 0].tolist())
    visits.clear()
    Learner(policy, LearnerConfig(epochs=2, minibatches=3)).update(batch, batch.rewards, batch.rewards)
    assert sorted(visits[:10]) == sorted(visits[10:]) == pytest.approx(every)
    assert visits[:10] != visits[10:]


def test_microbatches_keep_to_the_budget() -> None:
    sizes: list[tuple[int, int]] = []

    class Watched(ToyPolicy):
        def evaluate(self, context: Any, actions: Any, mask: Any) -> Any:
            sizes.append((len(mask), int(context.lengths.max())))
            return super().evaluate(context, actions, mask)

    policy = Watched()
    batch = trajectories(policy, episodes=20, steps=9)
    sizes.clear()
    Learner(policy, LearnerConfig(epochs=1, minibatches=1, microbatch_size=18)).update(
        batch, batch.rewards, batch.rewards
    )
    assert all(rows == 1 or rows * longest <= 18 for rows, longest in sizes)
    assert sum(rows for rows, _ in sizes) == 20
    assert len(sizes) < 20


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_with_a_group_baseline_the_critic_is_not_trained(estimator: Any) -> None:
    policy = ToyPolicy()
    batch = trajectories(policy)
    learner = Learner(policy, LearnerConfig(learning_rate=1e-2, value_warmup_iterations=3), AdvantageConfig(estimator))
    metrics = learner.update(batch, *learner.credit(batch))
    fresh = ToyPolicy()
    assert torch.equal(policy.critic.weight, fresh.critic.weight)
    assert not torch.equal(policy.actor.weight, fresh.actor.weight)
    assert "value_loss" not in metrics
    assert "explained_variance" not in metrics


def test_value_pretraining_fits_the_observed_returns_while_policy_and_beta_stand_still() -> None:
    """VC-PPO's: with λ = 1 the critic's targets do not move with it, and its loss falls to that of least squares."""
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=12)
    kl = KLController(KLConfig(beta=0.1, target=0.01, horizon=20))
    config = LearnerConfig(learning_rate=5e-2, epochs=20, minibatches=1, value_warmup_iterations=20)
    learner = Learner(policy, config, AdvantageConfig(lam=0.9, value_lam=1.0), kl, iterations=21)
    frozen = [p.detach().clone() for p in policy.policy_parameters()]
    targets = rewards_to_go(batch, 1.0)
    for _ in range(20):
        values = policy.evaluate(batch.context, batch.actions, batch.mask).values.detach()
        batch = replace(batch, values=values)
        advantages, returns = learner.credit(batch)
        torch.testing.assert_close(returns, targets)
        metrics = learner.update(batch, advantages, returns)
        assert all(torch.equal(p, q) for p, q in zip(policy.policy_parameters(), frozen, strict=True))
        assert kl.beta == 0.1
    features = policy.trunk(batch.context.observations).tanh()[batch.mask].detach()
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
    best = torch.linalg.lstsq(features, targets[batch.mask][:, None]).solution
    floor = float((features @ best - targets[batch.mask][:, None]).square().mean()) / 2
    assert metrics["value_loss"] == pytest.approx(floor, rel=1e-3)
    spread = float(targets[batch.mask].var(correction=0))
    assert metrics["explained_variance"] == pytest.approx(1 - 2 * floor / spread, abs=1e-3)
    learner.update(batch, *learner.credit(batch))
    assert kl.beta != 0.1
    assert not any(torch.equal(p, q) for p, q in zip(policy.policy_parameters(), frozen, strict=True))


def test_frozen_parameters_stay() -> None:
    policy = ToyPolicy()
    policy.trunk.requires_grad_(False)
    batch = trajectories(policy)
    learner = Learner(policy, LearnerConfig(learning_rate=1e-2, weight_decay=0.1))
    learner.update(batch, *learner.credit(batch))
    assert torch.equal(policy.trunk.weight, ToyPolicy().trunk.weight)


def test_explained_variance() -> None:
    mask = torch.tensor([[1, 1, 1, 0]], dtype=torch.bool)
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns + 5.0, returns, mask) == pytest.approx(1.0)  # a constant error is not variance
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask))


def test_metrics_are_means_over_the_minibatches() -> None:
    policy = ToyPolicy()
    batch = trajectories(policy, episodes=8, drift=0.3)
    learner = Learner(policy, LearnerConfig(epochs=1, minibatches=1, learning_rate=0.0))
    advantages, returns = learner.credit(batch)
    metrics = learner.update(batch, advantages, returns)
    now = policy.evaluate(batch.context, batch.actions, batch.mask)
    log_ratio = (now.log_probs - batch.log_probs).detach()[batch.mask]
    assert metrics["approx_kl"] == pytest.approx(float((log_ratio.exp() - 1 - log_ratio).mean()), rel=1e-4)
    assert metrics["entropy"] == pytest.approx(float(now.entropy[batch.mask].mean().detach()), rel=1e-5)
    assert metrics["value_loss"] == pytest.approx(
        float(((now.values - returns)[batch.mask] ** 2).mean().detach()) / 2, rel=1e-5
    )
    outside = ((log_ratio.exp() > 1.2) & (advantages[batch.mask] > 0)) | (
        (log_ratio.exp() < 0.8) & (advantages[batch.mask] < 0)
    )
    assert metrics["clip_fraction"] == pytest.approx(float(outside.float().mean()), abs=1e-6)
    assert metrics["clip_fraction"] > 0


def test_adaptive_beta_is_told_nats_per_episode() -> None:
    batch = trajectories(ToyPolicy(), episodes=8)
    kl = KLController(KLConfig(beta=0.2, target=0.5, horizon=40))
    assert batch.reference_log_probs is not None
    measured = float(((batch.log_probs - batch.reference_log_probs) * batch.mask).sum()) / 8
    metrics = Learner(ToyPolicy(), kl=kl).update(batch, batch.rewards, batch.rewards)
    assert metrics["beta"] == 0.2  # the one that the batch was collected under
    error = min(max(measured / 0.5 - 1, -0.2), 0.2)
    assert kl.beta == pytest.approx(0.2 * (1 + error * 8 / 40))


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_it_learns_the_best_of_four_actions(estimator: Any) -> None:
    policy = TablePolicy(torch.zeros(4))
    worth = torch.tensor([0.0, 1.0, 0.2, -1.0])
    config = LearnerConfig(learning_rate=0.1, epochs=4, minibatches=1)
    learner = Learner(policy, config, AdvantageConfig(estimator), iterations=20)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        log_p = policy.logits.detach().log_softmax(-1)
        actions = torch.multinomial(log_p.exp(), 32, replacement=True, generator=generator)
        batch = one_step(
            actions, log_probs=log_p[actions][:, None], rewards=worth[actions][:, None], groups=torch.arange(32) // 4
        )
        learner.update(batch, *learner.credit(batch))
    assert float(policy.logits.detach().softmax(-1)[1]) > 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("minibatches", 0),
        ("microbatch_size", 0),
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("value_learning_rate", 0.0),
        ("adam_epsilon", 0.0),
        ("adam_beta1", 1.0),
        ("adam_beta2", 1.5),
        ("max_gradient_norm", -1.0),
        ("clip_low", -0.1),
        ("dual_clip", 1.0),
        ("value_clip", 0.0),
        ("entropy_coefficient", -0.1),
        ("target_kl", -1.0),
    ],
)
def test_bad_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        replace(LearnerConfig(), **{field: value})


class Listening(ToyPolicy):
    """Keeps what it said of each step, by the step's own observation."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[tuple[float, ...], tuple[float, float, float]] = {}

    def evaluate(self, context: ToyContext, actions: torch.Tensor, mask: torch.Tensor) -> Evaluation:
        evaluation = super().evaluate(context, actions, mask)
        numbers = torch.stack([evaluation.log_probs, evaluation.values, evaluation.entropy], dim=-1).detach()
        states = context.observations[:, : mask.shape[1]]
        for state, said in zip(states[mask].tolist(), numbers[mask].tolist(), strict=True):
            self.said[tuple(state)] = tuple(said)
        return evaluation


def told(seen: Evaluation) -> torch.Tensor:
    return torch.stack([seen.log_probs, seen.values, seen.entropy], dim=-1)


@pytest.mark.parametrize("target_kl", [None, 1e9, 0.05, 1e-3])
@pytest.mark.parametrize("microbatch_size", [8192, 9])
def test_last_seen_is_what_the_update_saw_last(microbatch_size: int, target_kl: float | None) -> None:
    batch = trajectories(ToyPolicy(), episodes=9)
    policy = Listening()
    rates = {"learning_rate": 0.05, "microbatch_size": microbatch_size, "target_kl": target_kl}
    learner = Learner(policy, LearnerConfig(epochs=3, minibatches=4, **rates))  # type: ignore[arg-type]
    assert learner.last_seen is None
    metrics = learner.update(batch, *learner.credit(batch))
    assert metrics["stopped_early"] == (target_kl is not None and target_kl < 1)  # 1e-3: at the first minibatch
    assert learner.last_seen is not None
    found = told(learner.last_seen)
    for row, step in batch.mask.nonzero().tolist():
        said = policy.said.get(tuple(batch.context.observations[row, step].tolist()))
        assert said is None or found[row, step].tolist() == list(said)
        assert (said is None) == bool(found[row, step].isnan().all())
    assert bool(found[~batch.mask].isnan().all())
    assert bool(found[batch.mask].isfinite().all()) == (target_kl != 1e-3)


@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("microbatch_size", [8192, 9])
def test_last_seen_says_which_gradients_were_clipped_away(
    microbatch_size: int, dual_clip: float | None, markov: bool
) -> None:
    """As equation 7 of Schulman et al. 2017 and equation 5 of Ye et al. 2020 have it, of the numbers that were seen."""
    policy = ToyPolicy(seed=2)
    batch = replace(trajectories(policy, episodes=40, drift=1.5), markov=markov)
    config = LearnerConfig(
        epochs=2, minibatches=2, learning_rate=0.05, microbatch_size=microbatch_size, dual_clip=dual_clip, clip_low=0.1
    )
    learner = Learner(policy, config)
    advantages, returns = learner.credit(batch)
    learner.update(batch, advantages, returns)
    seen = learner.last_seen
    assert seen is not None
    ratio = (seen.log_probs - batch.log_probs).exp()
    expected = ((ratio > 1.2) & (advantages > 0)) | ((ratio < 0.9) & (advantages < 0))
    by_dual = torch.zeros_like(expected) if dual_clip is None else (ratio > dual_clip) & (advantages < 0)
    assert torch.equal(seen.clipped, (expected | by_dual) & batch.mask)
    assert bool(seen.clipped.any())
    assert bool((by_dual & batch.mask).any()) == (dual_clip is not None)


def test_a_step_that_the_update_never_saw_was_not_clipped() -> None:
    batch = trajectories(ToyPolicy(), episodes=9)
    learner = Learner(ToyPolicy(seed=1), LearnerConfig(epochs=1, minibatches=4, target_kl=1e-9))
    learner.update(batch, *learner.credit(batch))
    assert learner.last_seen is not None
    never = learner.last_seen.log_probs.isnan() & batch.mask
    assert bool(never.any())
    assert not bool(learner.last_seen.clipped[never].any())


def test_last_seen_of_steps_that_stand_alone_lies_as_the_trajectories_do() -> None:
    """One epoch of one minibatch sees all steps with the parameters as they were before."""
    policy = ToyPolicy(seed=3)
    batch = replace(trajectories(policy, episodes=6, drift=0.0), markov=True)
    learner = Learner(policy, LearnerConfig(epochs=1, minibatches=1))
    learner.update(batch, *learner.credit(batch))
    assert learner.last_seen is not None
    assert torch.allclose(learner.last_seen.log_probs[batch.mask], batch.log_probs[batch.mask], atol=1e-6)
    assert torch.allclose(learner.last_seen.values[batch.mask], batch.values[batch.mask], atol=1e-6)
    assert bool(told(learner.last_seen)[~batch.mask].isnan().all())
