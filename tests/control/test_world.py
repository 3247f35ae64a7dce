"""What a policy does in simulators, as trajectories: checked against worlds whose every number is known beforehand.

N = environments, T = steps of one collection.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from tether.control.environments import Environments, EnvironmentsConfig
from tether.control.normalisation import ObservationNormaliser, RewardScaler
from tether.control.policy import ControlPolicy, NetworkConfig, StateContext
from tether.control.world import ControlCollectConfig, ControlWorld, load_policy
from tether.errors import UserError
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig, Trajectories
from tether.ppo import learner as learner_module
from tether.runs import load_state, save_state
from tether.train import iterate

HERE = __file__
Ends = Sequence[tuple[int, bool]]
"""Of one episode after the other, again and again: its length, and whether it terminates (or is truncated)."""


class Chain(gymnasium.Env[NDArray[Any], Any]):
    """Step t of episode e shows (e, t), is worth 10·e + t, and is told of its success where it terminates."""

    def __init__(self, ends: Ends = ((3, True),), actions: spaces.Space[Any] | None = None, tells: bool = False):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = actions or spaces.Discrete(2)
        self.ends, self.tells, self.episode = ends, tells, 0
        self.received: list[Any] = []

    def shown(self) -> NDArray[Any]:
        return np.array([self.episode, self.time], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.shown(), {}

    def step(self, action: Any) -> Any:
        self.received.append(np.array(action))
        self.time += 1
        length, terminates = self.ends[(self.episode - 1) % len(self.ends)]
        ended = self.time >= length
        info = {"is_success": terminates} if self.tells and ended else {}
        return self.shown(), 10.0 * self.episode + self.time, ended and terminates, ended and not terminates, info


class Pictures(Chain):
    """The same in a corner of an image."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.observation_space = spaces.Box(0, 255, (36, 36, 3), np.uint8)

    def shown(self) -> NDArray[Any]:
        image = np.zeros((36, 36, 3), np.uint8)
        image[0, 0, :2] = self.episode, self.time
        return image


class Unlike(Chain):
    """Its first state is different every time: no function of the seed."""

    resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        type(self).resets += 1
        self.episode = type(self).resets
        return super().reset(seed=seed)


class Mixed(Chain):
    """Episodes whose lengths come from the seed, terminated and truncated in turn; actions count."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        _, info = super().reset(seed=seed)
        self.episode = int(self.np_random.integers(1, 5))
        self.ends = [(int(self.np_random.integers(1, 6)), bool(self.np_random.integers(2)))]
        return self.shown(), info

    def step(self, action: Any) -> Any:
        shown, reward, *rest = super().step(action)
        return shown, reward + float(action), *rest


def mixed() -> gymnasium.Env[Any, Any]:
    return Mixed()


def policy_for(environments: Environments, seed: int = 0) -> ControlPolicy:
    """One that has preferences, and whose critic tells states apart."""
    policy = ControlPolicy(environments.observation_space, environments.action_space, NetworkConfig((8,)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*policy.head.parameters(), *policy.value_head.parameters()]:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def world_of(environments: Environments, gamma: float = 0.99, seed: int = 0, **config: Any) -> ControlWorld:
    return ControlWorld(policy_for(environments), environments, ControlCollectConfig(**config), gamma, seed)


def chains(*ends: Ends, **config: Any) -> ControlWorld:
    return world_of(Environments.of([Chain(e) for e in ends], 0), **config)


def environments_of(env: str, seed: int = 1, count: int = 3, **config: Any) -> Environments:
    return Environments(env, EnvironmentsConfig(count=count, **config), seed)


KINDS: dict[str, dict[str, Any]] = {
    "native": {"env": "CartPole-v1", "vectorization": "native", "max_episode_steps": 7},
    "sync": {"env": "CartPole-v1", "vectorization": "sync", "max_episode_steps": 7},
    "terminating": {"env": "CartPole-v1", "vectorization": "native"},
    "mixed": {"env": f"{HERE}:mixed"},
}


def values_of(world: ControlWorld, *states: Sequence[float]) -> list[float]:
    return world.policy.values(torch.tensor(states, dtype=torch.float32)).tolist()


def states_of(world: ControlWorld, trajectories: Trajectories) -> Tensor:
    context = trajectories.context
    assert isinstance(context, StateContext)
    return context.observations


def steps_seen(world: ControlWorld, other: Environments, trajectories: Trajectories) -> list[Any]:
    """What `other`, new and with the same seed, does on the actions of a world's first collection."""
    other.reset()
    actions = world.policy.to_environment(trajectories.actions.flatten(0, 1))
    actions = actions.reshape(*trajectories.mask.shape, *actions.shape[1:])
    return [copy.deepcopy(other.step(actions[:, t])) for t in range(actions.shape[1])]


# What is in a batch -----------------------------------------------------------------------------------------------


def test_a_known_world_gives_known_trajectories() -> None:
    world = chains([(3, True), (2, False)], [(4, False)], steps=6)
    trajectories = world.collect()
    yes, no = True, False
    assert trajectories.rewards.tolist() == [[11, 12, 13, 21, 22, 31], [11, 12, 13, 14, 21, 22]]
    assert trajectories.terminated.tolist() == [[no, no, yes, no, no, no], [no] * 6]
    assert trajectories.truncated.tolist() == [[no, no, no, no, yes, yes], [no, no, no, yes, no, yes]]
    assert trajectories.mask.all()
    first, second = [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [3, 0]], [[1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert states_of(world, trajectories).tolist() == [first, second]
    assert trajectories.values.tolist() == [
        pytest.approx(values_of(world, *first)), pytest.approx(values_of(world, *second))
    ]  # fmt: skip
    # the state that was cut off at, never the first one of the next episode
    final, running = values_of(world, [2, 2], [3, 1])
    assert trajectories.bootstrap_values[0].tolist() == pytest.approx([0, 0, 0, 0, final, running])
    final, running = values_of(world, [1, 4], [2, 2])
    assert trajectories.bootstrap_values[1].tolist() == pytest.approx([0, 0, 0, final, 0, running])
    assert trajectories.markov
    assert trajectories.reference_log_probs is None


def test_the_next_collection_goes_on_where_the_last_one_ended() -> None:
    world = chains([(5, True)], steps=3)
    collected = [world.collect() for _ in range(3)]
    assert torch.cat([t.rewards for t in collected], 1).tolist() == [[11, 12, 13, 14, 15, 21, 22, 23, 24]]
    assert [t.terminated.any().item() for t in collected] == [False, True, False]
    assert [t.truncated[0, -1].item() for t in collected] == [True, True, True]
    assert states_of(world, collected[1]).tolist() == [[[1, 3], [1, 4], [2, 0]]]


@pytest.mark.parametrize("terminates", [True, False])
def test_a_collection_that_ends_with_an_episode(terminates: bool) -> None:
    world = chains([(2, terminates)], steps=4)
    trajectories = world.collect()
    assert trajectories.terminated.tolist() == [[False, terminates] * 2]
    assert trajectories.truncated.tolist() == [[False, not terminates] * 2]
    first, second = [0.0, 0.0] if terminates else values_of(world, [1, 2], [2, 2])
    assert trajectories.bootstrap_values.tolist() == [pytest.approx([0, first, 0, second])]


@pytest.mark.parametrize("vectorization", ["native", "sync"])
def test_a_time_limit_is_bootstrapped_from_the_state_it_cut_off_at(vectorization: str) -> None:
    settings = KINDS[vectorization]
    world = world_of(environments_of(**settings), steps=30)
    trajectories = world.collect()
    steps = steps_seen(world, environments_of(**settings), trajectories)
    assert torch.equal(trajectories.mask.T, torch.from_numpy(np.stack([s.valid for s in steps])))
    rewards = np.stack([s.rewards * s.valid for s in steps]).T
    assert trajectories.rewards.tolist() == rewards.tolist()
    assert trajectories.terminated.T.tolist() == np.stack([s.terminated & s.valid for s in steps]).tolist()
    limits = np.stack([s.truncated & s.valid for s in steps]).T
    assert limits.sum() > 5
    for n in range(3):
        valid = np.flatnonzero(trajectories.mask[n])
        for t in range(30):
            cut_off = limits[n, t] or (t == valid[-1] and not trajectories.terminated[n, t])
            assert bool(trajectories.truncated[n, t]) == cut_off
            successor = world.policy.values(torch.from_numpy(steps[t].successors[n : n + 1]))
            expected = float(successor) if cut_off else 0.0
            assert float(trajectories.bootstrap_values[n, t]) == pytest.approx(expected, abs=1e-6)


def test_a_step_at_which_a_native_environment_begins_its_episode_is_none() -> None:
    """It follows each end, and shows the final state once more; learning never sees it."""
    world = world_of(environments_of("CartPole-v1"), steps=60)
    trajectories = world.collect()
    ended = world._last_rollout(trajectories).ended.T
    assert ended.sum() > 4
    assert (~trajectories.mask[:, 1:]).tolist() == ended[:, :-1].tolist()
    assert trajectories.mask[:, 0].all()
    absent = ~trajectories.mask
    numbers = ("log_probs", "values", "rewards", "terminated", "truncated", "bootstrap_values")
    assert all(not getattr(trajectories, name)[absent].any() for name in numbers)
    assert world.steps == int(trajectories.mask.sum())


def test_a_native_environment_that_ends_at_the_last_step_but_one_is_not_truncated_by_the_collection() -> None:
    """The last column is no step of its: its last step is the end."""
    world = world_of(environments_of("CartPole-v1", count=1, max_episode_steps=3), steps=4)
    trajectories = world.collect()
    assert trajectories.mask.tolist() == [[True, True, True, False]]
    assert trajectories.truncated.tolist() == [[False, False, True, False]]
    assert world._last_rollout(trajectories).ended.sum() == 1
    after = world.collect()
    assert after.mask.tolist() == [[True, True, True, False]]


KEPT = {
    "native": {"env": "CartPole-v1", "vectorization": "native"},
    "sync": {"env": "CartPole-v1", "vectorization": "sync"},
    "async": {"env": "CartPole-v1", "vectorization": "async"},
    "stacked": {"env": "CartPole-v1", "frame_stack": 2},
    "Atari": {"env": "ALE/Pong-v5", "options": {"img_height": 42, "img_width": 42}},
}


@pytest.mark.parametrize("kind", KEPT)
def test_states_are_those_of_their_step_though_no_array_is_copied(kind: str) -> None:
    """Environments give new arrays at every step; were one used again, a batch would show one state throughout."""
    with environments_of(**KEPT[kind], count=2) as environments, environments_of(**KEPT[kind], count=2) as other:
        world = world_of(environments, steps=25, record=2)
        trajectories = world.collect()
        first = other.reset().copy()
        actions = world.policy.to_environment(trajectories.actions)
        seen = [first, *(other.step(actions[:, t]).observations.copy() for t in range(24))]
    assert np.array_equal(states_of(world, trajectories).numpy(), np.stack(seen, axis=1))
    assert np.array_equal(world._last_rollout(trajectories).shown, np.stack(seen))
    assert len({frame.tobytes() for frame in seen}) > 20


ACTIONS = {
    "discrete": spaces.Discrete(3, start=5),
    "several choices": spaces.MultiDiscrete([2, 3]),
    "continuous": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_the_environments_get_the_actions_that_the_batch_holds(kind: str) -> None:
    space = ACTIONS[kind]
    envs = [Chain([(4, True)], space) for _ in range(2)]
    world = world_of(Environments.of(envs, 0), steps=20)
    trajectories = world.collect()
    for n, env in enumerate(envs):
        assert np.array_equal(np.stack(env.received), world.policy.to_environment(trajectories.actions[n]))
        assert all(space.contains(action) for action in np.stack(env.received))
    assert len(np.unique(trajectories.actions.flatten(0, 1), axis=0)) > 2


@pytest.mark.parametrize("kind", [*ACTIONS, "images"])
def test_log_probs_are_those_of_the_policy_step_by_step_and_the_first_ratio_is_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = [Pictures() if kind == "images" else Chain(actions=ACTIONS[kind]) for _ in range(2)]
    world = world_of(Environments.of(envs, 0), steps=12, normalise_observations=kind != "images")
    trajectories = world.collect()
    states = states_of(world, trajectories)
    assert states.dtype == (torch.uint8 if kind == "images" else torch.float32)
    alone = torch.ones(1, 1, dtype=torch.bool)
    for n in range(2):
        for t in range(12):
            state, action = states[n, t][None, None], trajectories.actions[n, t][None, None]
            with torch.no_grad():
                one = world.policy.evaluate(StateContext(state), action, alone)
            assert float(trajectories.log_probs[n, t]) == pytest.approx(float(one.log_probs), rel=1e-5, abs=1e-5)
            assert float(trajectories.values[n, t]) == pytest.approx(float(one.values), rel=1e-5, abs=1e-5)
    ratios: list[Tensor] = []
    surrogate = learner_module.clipped_surrogate

    def spy(new: Tensor, old: Tensor, *rest: Any) -> Any:
        ratios.append((new.detach() - old).exp())
        return surrogate(new, old, *rest)

    monkeypatch.setattr(learner_module, "clipped_surrogate", spy)
    learner = Learner(world.policy, LearnerConfig(epochs=2, minibatches=3, learning_rate=0.05))
    learner.update(trajectories, *learner.credit(trajectories))
    assert (ratios[0] - 1).abs().max() < 1e-5
    assert (ratios[-1] - 1).abs().max() > 1e-3  # else the check above would say nothing


def test_images_of_a_batch_are_bytes_and_told_by_their_mean() -> None:
    world = world_of(Environments.of([Pictures(ends=[(2, True)])], 0), steps=4)
    trajectories = world.collect()
    states = states_of(world, trajectories)
    assert states.shape == (1, 4, 3, 36, 36)
    assert states[0, :, :2, 0, 0].tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    zeros = torch.zeros(1, 4)
    told = world.episodes(trajectories, zeros, zeros)[1].states
    assert told == [f"3×36×36 numbers, mean {(2 + t) / (3 * 36 * 36):.4g}" for t in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_direct_sums_over_each_episode(kind: str) -> None:
    """A_t = Σ (γλ)^l δ_{t+l} to the end of the episode; V is 0 beyond a termination, V(final state) beyond a cut."""
    gamma, lam = 0.9, 0.7
    world = world_of(environments_of(**KINDS[kind]), steps=40)
    trajectories = world.collect()
    advantages, returns = Learner(world.policy, advantage=AdvantageConfig("gae", gamma, lam, whiten=False)).credit(
        trajectories
    )
    rows = {name: getattr(trajectories, name).double() for name in ("rewards", "values", "bootstrap_values")}
    checked = 0
    for n in range(3):
        steps = np.flatnonzero(trajectories.mask[n]).tolist()
        ends = [t for t in steps if trajectories.terminated[n, t] or trajectories.truncated[n, t]]
        assert ends[-1] == steps[-1]
        for t in steps:
            rest = [s for s in steps if t <= s <= next(end for end in ends if end >= t)]
            values = [float(rows["values"][n, s]) for s in rest]
            beyond = 0.0 if trajectories.terminated[n, rest[-1]] else float(rows["bootstrap_values"][n, rest[-1]])
            deltas = [
                float(rows["rewards"][n, s]) + gamma * v - values[i]
                for i, (s, v) in enumerate(zip(rest, [*values[1:], beyond], strict=True))
            ]
            direct = sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas))
            assert float(advantages[n, t]) == pytest.approx(direct, abs=1e-4)
            assert float(returns[n, t]) == pytest.approx(direct + values[0], abs=1e-4)
            checked += 1
    assert checked == trajectories.mask.sum()


def test_the_seed_of_the_actions_decides_them() -> None:
    batches = [world_of(environments_of("CartPole-v1"), seed=seed, steps=20).collect() for seed in (1, 1, 2)]
    assert torch.equal(batches[0].actions, batches[1].actions)
    assert not torch.equal(batches[0].actions, batches[2].actions)


def test_too_few_steps_for_the_minibatches_are_an_error_that_says_what_to_do() -> None:
    environments = environments_of("CartPole-v1", count=1, max_episode_steps=2)
    world = ControlWorld(policy_for(environments), environments, ControlCollectConfig(steps=3), fewest=3)
    with pytest.raises(UserError, match=r"has 2 steps, expected at least 3.*raise collect\.steps"):
        world.collect()


# Whole episodes ---------------------------------------------------------------------------------------------------


def test_whole_episodes_are_one_to_a_row_and_begin_anew_each_time() -> None:
    world = chains([(3, True)], [(2, False)], [(9, True)], steps=5, whole_episodes=True)
    for _ in range(2):
        trajectories = world.collect()
        episode = [int(state[0, 0]) for state in states_of(world, trajectories)]
        assert trajectories.mask.sum(1).tolist() == [3, 2, 5]
        assert trajectories.mask.tolist() == [[t < n for t in range(5)] for n in (3, 2, 5)]
        assert trajectories.rewards.tolist() == [
            [10 * e + t if t <= n else 0 for t in range(1, 6)] for e, n in zip(episode, (3, 2, 5), strict=True)
        ]
        assert trajectories.terminated.nonzero().tolist() == [[0, 2]]
        assert trajectories.truncated.nonzero().tolist() == [[1, 1], [2, 4]]
        cut = values_of(world, [episode[1], 2], [episode[2], 5])
        assert trajectories.bootstrap_values[1:, [1, 4]].diag().tolist() == pytest.approx(cut)
        metrics = world.metrics(trajectories)
        assert metrics["episodes"] == 3  # the limit ends the third, too
        zeros = torch.zeros(3, 5)
        assert [len(e.actions) for e in world.episodes(trajectories, zeros, zeros)] == [3]
    assert metrics["episode_length"] == pytest.approx(10 / 3)


def test_a_collection_of_whole_episodes_stops_when_all_are_over() -> None:
    assert chains([(3, True)], [(4, True)], steps=1000, whole_episodes=True).collect().mask.shape == (2, 4)


def test_whole_episodes_of_a_native_environment_have_no_gaps() -> None:
    world = world_of(environments_of("CartPole-v1", count=4), steps=25, whole_episodes=True)
    for _ in range(2):
        trajectories = world.collect()
        lengths = trajectories.mask.sum(1)
        assert torch.equal(trajectories.mask, torch.arange(trajectories.mask.shape[1]) < lengths[:, None])
        ended = trajectories.terminated | trajectories.truncated
        assert ended.sum(1).tolist() == [1] * 4
        assert ended[torch.arange(4), lengths - 1].all()
        assert (states_of(world, trajectories)[:, 0].abs() <= 0.05).all()


# Normalisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_observations_are_normalised_by_all_that_were_seen_so_far(kind: str) -> None:
    world = world_of(environments_of(**KINDS[kind]), steps=20, normalise_observations=True)
    trajectories = world.collect()
    other = environments_of(**KINDS[kind])
    plain = ObservationNormaliser(other.observation_space.shape)
    first = other.reset()
    seen = [plain(first)]
    steps = []
    for t in range(20):
        steps.append(other.step(world.policy.to_environment(trajectories.actions[:, t])))
        seen.append(plain(steps[-1].observations))
    assert np.array_equal(states_of(world, trajectories).numpy(), np.stack(seen[:-1], axis=1))
    # people are shown them as they are
    shown = np.stack([first[0], *(step.observations[0] for step in steps[:-1])])
    assert np.array_equal(world._last_rollout(trajectories).shown[:, 0], shown)
    assert world.normaliser is not None
    assert world.normaliser.statistics.count == 3 * 21
    # final states are not learnt from but where the policy saw them, and are normalised as of now
    for n, t in trajectories.truncated.nonzero().tolist():
        final = torch.from_numpy(plain.normalise(steps[t].successors[n : n + 1]))
        expected = float(world.policy.values(final))
        assert float(trajectories.bootstrap_values[n, t]) == pytest.approx(expected, abs=1e-5)
    world.collect()
    assert world.normaliser.statistics.count == 3 * 41


def test_statistics_of_whole_episodes_are_of_what_was_collected_alone() -> None:
    config = {"steps": 5, "whole_episodes": True, "normalise_observations": True, "normalise_rewards": True}
    world = chains([(2, True)], [(9, True)], gamma=0.5, **config)
    for number in (1, 2):
        trajectories = world.collect()
        assert world.normaliser is not None
        assert world.scaler is not None
        assert world.normaliser.statistics.count == number * 7
        assert world.scaler.statistics.count == number * 7
        assert world.scaler.state_dict()["returns"].tolist() == [0.0, 0.0]  # other episodes come next
        assert int(trajectories.mask.sum()) == 7
    # by steps as they were made: both environments', then those of the longer one
    returns: list[float] = []
    for first, second in ((1, 1), (4, 2)):  # the number of each one's episode; the first began two more meanwhile
        one, two = 0.0, 0.0
        for t in range(1, 6):
            one, two = 0.5 * one + 10 * first + t, 0.5 * two + 10 * second + t
            returns += [one, two] if t <= 2 else [two]
    assert float(world.scaler.statistics.variance) == pytest.approx(np.var(returns))


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_scaled_for_learning_and_reported_as_they_are(kind: str) -> None:
    world = world_of(environments_of(**KINDS[kind]), gamma=0.8, steps=40, normalise_rewards=True)
    trajectories = world.collect()
    plain = RewardScaler(3, 0.8)
    steps = steps_seen(world, environments_of(**KINDS[kind]), trajectories)
    scaled = np.stack([plain(s.rewards, s.terminated | s.truncated, s.valid) * s.valid for s in steps], axis=1)
    assert trajectories.rewards.tolist() == scaled.astype(np.float32).tolist()
    raw = np.stack([s.rewards * s.valid for s in steps])
    assert not np.allclose(scaled.T, raw)
    metrics = world.metrics(trajectories)
    assert metrics["reward"] == pytest.approx(scaled[trajectories.mask].mean(), rel=1e-5)
    ends = np.stack([(s.terminated | s.truncated) & s.valid for s in steps])
    totals = []
    for n in range(3):
        begin = 0
        for t in np.flatnonzero(ends[:, n]):
            totals.append(raw[begin : t + 1, n].sum())
            begin = t + 1
    assert metrics["score"] == pytest.approx(np.mean(totals))
    assert metrics["score_std"] == pytest.approx(np.std(totals))
    assert metrics["episodes"] == len(totals)


# A reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_the_kl_to_a_reference_is_taken_from_each_reward_or_left_to_the_loss(placement: Any) -> None:
    environments = environments_of("CartPole-v1", count=2)
    policy, reference = policy_for(environments, 0), policy_for(environments, 1)
    kl = KLController(KLConfig(beta=0.3, placement=placement))
    world = ControlWorld(policy, environments, ControlCollectConfig(steps=30), reference=reference, kl=kl)
    trajectories = world.collect()
    assert trajectories.reference_log_probs is not None
    mask = trajectories.mask
    assert not mask.all()
    logits = reference.head.linear(reference.trunk(states_of(world, trajectories)[mask])).detach()
    expected = torch.distributions.Categorical(logits=logits).log_prob(trajectories.actions[mask])
    assert torch.allclose(trajectories.reference_log_probs[mask], expected, atol=1e-5)
    k1 = trajectories.log_probs[mask] - expected
    assert k1.abs().max() > 0.05
    rewards = 1.0 - 0.3 * k1 if placement == "reward" else torch.ones_like(k1)
    assert torch.allclose(trajectories.rewards[mask], rewards, atol=1e-5)
    assert not trajectories.rewards[~mask].any()
    metrics = world.metrics(trajectories)
    pieces = int((trajectories.terminated | trajectories.truncated).sum())
    assert metrics["kl_k1"] == pytest.approx(float(k1.sum()) / pieces, rel=1e-3)
    zeros = torch.zeros(mask.shape)
    for episode in world.episodes(trajectories, zeros, zeros):
        assert episode.reference_log_probs is not None
        assert len(episode.reference_log_probs) == len(episode.rewards)


def test_a_reference_and_its_beta_belong_together() -> None:
    environments = environments_of("CartPole-v1", count=1)
    policy = policy_for(environments)
    with pytest.raises(ValueError, match="reference and kl belong together"):
        ControlWorld(policy, environments, reference=policy)
    with pytest.raises(ValueError, match="reference and kl belong together"):
        ControlWorld(policy, environments, kl=KLController(KLConfig()))


# What is told -----------------------------------------------------------------------------------------------------


def test_the_score_is_of_the_hundred_episodes_that_ended_last_as_wholes() -> None:
    world = chains([(3, True)], steps=7)
    for _ in range(60):
        metrics = world.metrics(world.collect())
    done = 60 * 7 // 3
    totals = [3 * 10 * e + 6 for e in range(1, done + 1)][-100:]
    assert done > 100
    assert metrics["score"] == pytest.approx(np.mean(totals))
    assert metrics["score_std"] == pytest.approx(np.std(totals))
    assert metrics["episode_length"] == 3
    assert metrics["episodes"] == 3  # of the last batch, steps 413 to 420
    assert metrics["steps"] == 420
    assert metrics["time/steps_per_second_collected"] > 0


def test_before_the_first_episode_has_ended_there_is_no_score() -> None:
    world = chains([(9, True)], steps=4)
    metrics = world.metrics(world.collect())
    assert not {"score", "score_std", "episode_length", "success"} & metrics.keys()
    assert metrics["reward"] == pytest.approx(12.5)


def test_success_is_reported_where_the_environment_speaks_of_it_and_stays_between_its_words() -> None:
    env = Chain([(3, True), (3, False)], tells=True)
    world = world_of(Environments.of([env], 0), steps=2)
    reported = [world.metrics(world.collect()).get("success") for _ in range(6)]
    assert reported == [None, 1.0, 0.5, 0.5, pytest.approx(2 / 3), 0.5]
    silent = chains([(1, True)], steps=2)
    assert "success" not in silent.metrics(silent.collect())


def test_episodes_are_stored_whole_with_the_numbers_of_the_batches_they_were_trained_in() -> None:
    world = chains([(5, True), (2, False)], [(1, True)], steps=3)
    names = ("log_probs", "values", "rewards", "advantages", "returns")
    parts: dict[str, list[float]] = {name: [] for name in names}
    ids: list[int] = []
    stored = []
    for number in range(3):
        trajectories = world.collect()
        numbers = {name: getattr(trajectories, name) for name in names[:3]}
        numbers |= {"advantages": torch.arange(6.0).reshape(2, 3) + 100 * number}
        numbers |= {"returns": torch.arange(6.0).reshape(2, 3) - 100 * number}
        for name in names:
            parts[name] += numbers[name][0].tolist()
        ids += trajectories.actions[0].tolist()
        stored.append(world.episodes(trajectories, numbers["advantages"], numbers["returns"]))
    assert [len(episodes) for episodes in stored] == [0, 1, 1]
    first, second = stored[1][0], stored[2][0]
    for episode, steps in ((first, slice(0, 5)), (second, slice(5, 7))):
        assert {name: getattr(episode, name) for name in names} == {name: parts[name][steps] for name in names}
        assert episode.action_ids == ids[steps]
        assert episode.actions == [str(action) for action in ids[steps]]
        assert episode.details == {"environment": 0}
        assert episode.reference_log_probs is None
    assert first.score == 5 * 10 + 15
    assert second.score == 2 * 20 + 3
    assert first.states == [f"+1.000 +{t}.000" for t in range(5)]
    assert first.prompt == "+1.000 +0.000"
    assert (first.response, first.terminated, first.truncated) == ("5 steps, terminated", True, False)
    assert (second.response, second.terminated, second.truncated) == ("2 steps, cut off by the time limit", False, True)


@pytest.mark.parametrize(("record", "expected"), [(0, set()), (1, {0}), (2, {0, 1}), (9, {0, 1, 2})])
def test_so_many_environments_are_recorded(record: int, expected: set[int]) -> None:
    world = world_of(environments_of(**KINDS["native"]), steps=30, record=record)
    trajectories = world.collect()
    zeros = torch.zeros(trajectories.mask.shape)
    episodes = world.episodes(trajectories, zeros, zeros)
    assert {episode.details["environment"] for episode in episodes} == expected
    assert all(episode.score == len(episode.rewards) == len(episode.states or ()) <= 7 for episode in episodes)


def test_episodes_say_what_else_was_likely_and_what_the_update_saw() -> None:
    environments = environments_of(**KINDS["sync"])
    world = world_of(environments, steps=30, record=2)
    trajectories = world.collect()
    learner = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1))
    learner.update(trajectories, *learner.credit(trajectories))  # alternatives are of before
    episodes = world.episodes(trajectories, *learner.credit(trajectories), learner.last_seen)
    assert len(episodes) > 4
    for episode in episodes:
        assert episode.alternatives is not None
        assert episode.new_log_probs == pytest.approx(episode.log_probs, abs=1e-5)
        assert episode.entropies is not None
        assert episode.clipped == [False] * len(episode.actions)
        columns = (episode.actions, episode.log_probs, episode.entropies, episode.alternatives)
        for action, log_prob, entropy, likeliest in zip(*columns, strict=True):
            assert sorted(text for text, _ in likeliest) == ["0", "1"]
            assert likeliest[0][1] >= likeliest[1][1]
            assert dict(likeliest)[action] == pytest.approx(math.exp(log_prob), abs=1e-5)
            assert entropy == pytest.approx(-sum(p * math.log(p) for _, p in likeliest), abs=1e-4)
    world = world_of(environments_of(**KINDS["sync"]), steps=30, alternatives=0)
    trajectories = world.collect()
    assert world.episodes(trajectories, *learner.credit(trajectories))[0].alternatives is None


def test_episodes_say_which_steps_were_clipped() -> None:
    world = world_of(environments_of(**KINDS["sync"]), steps=30, record=2)
    trajectories = world.collect()
    config = LearnerConfig(epochs=3, minibatches=1, learning_rate=0.05, clip_low=0.01, clip_high=0.01, dual_clip=1.1)
    learner = Learner(world.policy, config)
    learner.update(trajectories, *learner.credit(trajectories))
    seen = learner.last_seen
    assert seen is not None
    stored = [
        step for e in world.episodes(trajectories, *learner.credit(trajectories), seen) for step in e.clipped or ()
    ]
    row_by_row = [step for row in seen.clipped[:2].tolist() for step in row]
    assert sum(stored) > 0
    assert sum(stored) <= sum(row_by_row)
    assert len(stored) > 20


def test_an_episode_that_began_when_less_was_kept_of_each_step_is_not_stored() -> None:
    world = chains([(5, True), (2, False)], steps=3)
    first = world.collect()
    assert world.episodes(first, first.values, first.rewards) == []
    state = world.state_dict()
    other = chains([(5, True), (2, False)], steps=3, alternatives=0)
    other.load_state_dict(state)
    second = other.collect()
    assert other.episodes(second, second.values, second.rewards) == []
    last = other.collect()
    assert [len(episode.actions) for episode in other.episodes(last, last.values, last.rewards)] == [2]


def test_numbers_of_another_batch_are_refused() -> None:
    world = chains([(2, True)], steps=3)
    trajectories = world.collect()
    with pytest.raises(ValueError, match="not the batch that was collected last"):
        world.metrics(trajectories.select(torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="not the batch"):
        chains([(2, True)], steps=3).metrics(trajectories)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"record": -1}, "record is -1, expected 0 or more"),
        ({"alternatives": -1}, "alternatives is -1, expected 0 or more"),
        ({"film_every": -1}, "film_every is -1, expected 0 or more"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlCollectConfig(**changes)


# Going on ---------------------------------------------------------------------------------------------------------


def advance(world: ControlWorld, batches: int) -> list[Any]:
    """Everything that can be seen of the next batches."""
    seen: list[Any] = []
    for _ in range(batches):
        t = world.collect()
        metrics = {name: v for name, v in world.metrics(t).items() if not name.startswith("time/")}
        numbers = [t.actions, t.log_probs, t.values, t.rewards, t.mask, t.bootstrap_values, states_of(world, t)]
        seen += [[n.tolist() for n in numbers], metrics, world.episodes(t, t.values, t.rewards)]
    return seen


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_world_goes_on_as_if_it_had_never_stopped(kind: str, whole: bool, tmp_path: Path) -> None:
    config = {"steps": 9, "record": 2, "normalise_observations": True, "normalise_rewards": True}
    worlds = [world_of(environments_of(**KINDS[kind]), **config, whole_episodes=whole) for _ in range(2)]
    advance(worlds[0], 4)
    save_state(tmp_path, "world", worlds[0].state_dict())
    expected = advance(worlds[0], 4)
    worlds[1].load_state_dict(load_state(tmp_path, "world"))
    assert advance(worlds[1], 4) == expected


def test_a_state_is_not_changed_by_what_comes_after() -> None:
    world = chains([(5, True)], steps=2, normalise_observations=True, normalise_rewards=True)
    for batches in (0, 1, 1):  # before the first reset, then with an episode that has begun
        advance(world, batches)
        state = world.state_dict()
        before = copy.deepcopy(state)
        advance(world, 3)
        assert str(state) == str(before)


def test_a_world_whose_episodes_cannot_go_on_counts_and_records_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> ControlWorld:
        environments = Environments.of([Unlike([(5, True)])], 0)
        return world_of(environments, steps=3, normalise_rewards=True)

    world = make()
    advance(world, 1)
    other = make()
    other.load_state_dict(world.state_dict())
    assert "cannot be resumed, new ones begin" in caplog.text
    assert other.scaler is not None
    assert other.scaler.state_dict()["returns"].tolist() == [0.0]
    assert other.scaler.statistics.count == 3
    told = advance(other, 2)
    episode = told[-1][0]
    assert len(episode.actions) == 5
    assert told[-2]["episode_length"] == 5
    assert told[-2]["score"] == episode.score


@pytest.mark.parametrize("record", [0, 1, 3])
def test_another_number_of_recorded_environments_records_whole_episodes_only(record: int) -> None:
    world = chains([(5, True)], [(4, True)], [(4, False)], steps=3, record=2)
    advance(world, 1)
    other = chains([(5, True)], [(4, True)], [(4, False)], steps=3, record=record)
    other.load_state_dict(world.state_dict())
    episodes = [episode for part in advance(other, 3)[2::3] for episode in part]
    lengths = {n: [len(e.actions) for e in episodes if e.details["environment"] == n] for n in range(3)}
    expected = {0: [5, 5], 1: [4, 4, 4], 2: [4, 4]}  # that of the third which had begun unseen is left out
    assert lengths == {n: found if n < record else [] for n, found in expected.items()}


def test_a_run_that_turns_to_whole_episodes_forgets_what_had_begun() -> None:
    world = chains([(5, True)], steps=3)
    advance(world, 1)
    other = chains([(5, True)], steps=9, whole_episodes=True)
    other.load_state_dict(world.state_dict())
    told = advance(other, 1)
    assert told[1]["episode_length"] == 5
    assert [len(episode.actions) for episode in told[2]] == [5]
    assert told[1]["score"] == told[2][0].score


@pytest.mark.parametrize("field", ["normalise_observations", "normalise_rewards"])
@pytest.mark.parametrize("before", [True, False])
def test_normalisation_cannot_begin_or_end_in_the_midst_of_a_run(field: str, before: bool) -> None:
    world = chains([(2, True)], **{field: before})
    now = str(not before).lower()
    with pytest.raises(UserError, match=f"collect.{field} is {now}, but the run began with {str(before).lower()}"):
        chains([(2, True)], **{field: not before}).load_state_dict(world.state_dict())


@pytest.mark.parametrize("normalise", [False, True])
def test_a_saved_policy_does_the_same(normalise: bool, tmp_path: Path) -> None:
    world = chains([(3, True)], steps=5, normalise_observations=normalise)
    world.collect()
    world.save_policy(tmp_path)
    assert sorted(file.name for file in (tmp_path / "policy").iterdir()) == sorted(
        ["policy.safetensors", *(["observations.safetensors"] if normalise else [])]
    )
    other = policy_for(world.environments, seed=7)
    normaliser = ObservationNormaliser((2,)) if normalise else None
    load_policy(tmp_path, other, normaliser)
    states = np.array([[1, 2], [3, 4]], np.float32)
    seen = [n.normalise(states) if n is not None else states for n in (world.normaliser, normaliser)]
    assert np.array_equal(*seen)
    first, second = (p.values(torch.from_numpy(seen[0])) for p in (world.policy, other))
    assert torch.equal(first, second)


def test_a_policy_that_is_not_there_or_of_another_form(tmp_path: Path) -> None:
    world = chains([(3, True)], steps=5)
    with pytest.raises(UserError, match=r"policy\.safetensors: cannot be read"):
        load_policy(tmp_path, policy_for(world.environments), None)
    world.save_policy(tmp_path)
    wider = ControlPolicy(world.environments.observation_space, world.environments.action_space, NetworkConfig((9,)))
    with pytest.raises(UserError, match="holds another policy than the configuration describes"):
        load_policy(tmp_path, wider, None)
    with pytest.raises(UserError, match=r"observations\.safetensors: cannot be read"):
        load_policy(tmp_path, policy_for(world.environments), ObservationNormaliser((2,)))
    (tmp_path / "policy" / "policy.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match=r"policy\.safetensors: cannot be read"):
        load_policy(tmp_path, policy_for(world.environments), None)


# Learning ---------------------------------------------------------------------------------------------------------


class Side(gymnasium.Env[NDArray[Any], Any]):
    """Shows a number of either sign; worth 1 where the action is on its side, for 10 steps."""

    def __init__(self, continuous: bool) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(-3, 3, (1,), np.float32) if continuous else spaces.Discrete(2)
        self.continuous = continuous

    def _next(self) -> NDArray[Any]:
        self.number = self.np_random.uniform(-1, 1)
        return np.array([self.number], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._next(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        right = action[0] > 0 if self.continuous else action == 1
        reward = float(right == (self.number > 0))
        return self._next(), reward, False, self.time >= 10, {}


@pytest.mark.parametrize("continuous", [False, True])
def test_the_loop_learns(continuous: bool) -> None:
    environments = Environments.of([Side(continuous) for _ in range(8)], 0)
    policy = ControlPolicy(environments.observation_space, environments.action_space, NetworkConfig((16,)))
    world = ControlWorld(policy, environments, ControlCollectConfig(steps=20, normalise_observations=True), 0.5)
    config = LearnerConfig(epochs=4, minibatches=2, learning_rate=0.02)
    learner = Learner(policy, config, AdvantageConfig(gamma=0.5), iterations=25)
    scores = [step.metrics["score"] for step in iterate(world, learner)]
    assert scores[0] < 7
    assert scores[-1] > 8.5
