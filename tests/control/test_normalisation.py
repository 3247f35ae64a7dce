"""Running statistics equal those of all rows at once, normalisers follow their definitions, a resumed one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tether.control.normalisation import ObservationNormaliser, RewardScaler, RunningStatistics
from tether.runs.state import load_state, save_state


def rows_of(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(3.0, 2.0, shape)


# statistics


@pytest.mark.parametrize("sizes", [[8] * 25, [1] * 200, [1, 199], [199, 1], [0, 50, 0, 150]], ids=str)
def test_statistics_of_batches_are_those_of_all_rows(sizes: list[int]) -> None:
    rows = rows_of(0, 200, 2, 3)
    statistics = RunningStatistics((2, 3))
    for batch in np.split(rows, np.cumsum(sizes)[:-1]):
        statistics.update(batch)
    assert statistics.count == 200
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance, rows.var(axis=0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_large_mean_does_not_drown_the_variance(dtype: Any) -> None:
    rows = (1e6 + rows_of(0, 1000, 2)).astype(dtype)
    statistics = RunningStatistics((2,))
    for batch in np.split(rows, 125):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.variance, rows.astype(np.float64).var(axis=0), rtol=1e-9)


def test_a_jump_in_the_data_is_followed() -> None:
    rows = np.concatenate([rows_of(0, 8, 1), 1e6 + rows_of(1, 400, 1)])
    statistics = RunningStatistics((1,))
    for batch in np.split(rows, 51):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.variance, rows.var(axis=0), rtol=1e-9)


def test_integers_and_bytes_do_not_overflow() -> None:
    rows = np.full((300, 2), 250, np.uint8)
    statistics = RunningStatistics((2,))
    statistics.update(rows)
    statistics.update(np.full((300, 2), 50, np.uint8))
    assert statistics.mean.tolist() == [150.0, 150.0]
    assert statistics.variance.tolist() == [10_000.0, 10_000.0]


def test_before_the_first_row_mean_is_zero_and_variance_one() -> None:
    statistics = RunningStatistics((2,))
    assert statistics.mean.tolist() == [0.0, 0.0]
    assert statistics.variance.tolist() == [1.0, 1.0]


# observations


def test_observations_are_normalised_by_all_that_were_seen_and_clipped() -> None:
    batches = rows_of(0, 20, 8, 4)
    normaliser = ObservationNormaliser((4,))
    for count, batch in enumerate(batches, start=1):
        found = normaliser(batch)
        seen = batches[:count].reshape(-1, 4)
        expected = (batch - seen.mean(axis=0)) / np.sqrt(seen.var(axis=0) + 1e-8)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert normaliser.normalise(np.array([[1e9, -1e9, 3.0, 3.0]]))[0, :2].tolist() == [10.0, -10.0]


def test_normalise_learns_nothing() -> None:
    normaliser = ObservationNormaliser((4,))
    normaliser(rows_of(0, 8, 4))
    observations = rows_of(1, 8, 4)
    before = observations.copy()
    first = normaliser.normalise(observations)
    normaliser.normalise(1000 * observations)
    assert np.array_equal(normaliser.normalise(observations), first)
    assert np.array_equal(observations, before), "the observations were changed"


def test_a_component_that_never_changes_becomes_zero() -> None:
    normaliser = ObservationNormaliser((2,))
    for value in (0.1, 0.1, 0.1):
        found = normaliser(np.array([[value, 0.0], [value, 1.0], [value, 2.0]], np.float32))
    assert np.abs(found[:, 0]).max() < 1e-6
    assert np.isfinite(found).all()


# rewards


def plain_reward_scaling(
    rewards: NDArray[np.float64], ended: NDArray[np.bool_], valid: NDArray[np.bool_], discount: float
) -> NDArray[np.float64]:
    """The definition, environment by environment: (T, N) rewards over the deviation of every return so far."""
    running, returns = [0.0] * rewards.shape[1], []
    scaled = np.zeros_like(rewards)
    for step in range(len(rewards)):
        for row in range(rewards.shape[1]):
            if valid[step, row]:
                running[row] = discount * running[row] + rewards[step, row]
                returns.append(running[row])
                running[row] = 0.0 if ended[step, row] else running[row]
        scaled[step] = np.clip(rewards[step] / np.sqrt(np.var(returns) + 1e-8), -10, 10)
    return scaled


@pytest.mark.parametrize("some_invalid", [False, True])
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(some_invalid: bool) -> None:
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(5.0, 30.0, (60, 3)), rng.random((60, 3)) < 0.1
    valid = rng.random((60, 3)) < 0.8 if some_invalid else np.ones((60, 3), np.bool_)
    scaler = RewardScaler(3, discount=0.9)
    found = [scaler(r, e, v if some_invalid else None) for r, e, v in zip(rewards, ended, valid, strict=True)]
    np.testing.assert_allclose(found, plain_reward_scaling(rewards, ended, valid, 0.9), rtol=1e-9)


def test_rewards_keep_their_sign_and_stay_within_ten() -> None:
    scaler = RewardScaler(2, discount=0.99)
    nobody = np.zeros(2, np.bool_)
    rewards = np.array([1e-3, -1e-3])
    for _ in range(100):
        scaler(rewards, nobody)
    assert scaler(np.array([50.0, -50.0]), nobody).tolist() == [10.0, -10.0]
    assert (np.sign(scaler(rewards, nobody)) == [1, -1]).all()
    assert rewards.tolist() == [1e-3, -1e-3], "the rewards were changed"


def test_integer_rewards_are_scaled_as_numbers() -> None:
    scaler, same = RewardScaler(2, discount=0.99), RewardScaler(2, discount=0.99)
    nobody = np.zeros(2, np.bool_)
    for rewards in ([1, 3], [2, 2]):
        assert np.array_equal(scaler(np.array(rewards), nobody), same(np.array(rewards, np.float64), nobody))


@pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan")])
def test_an_impossible_discount_is_refused(discount: float) -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        RewardScaler(2, discount)


# resume


def test_normalisers_go_on_from_a_saved_state_to_the_last_bit(tmp_path: Path) -> None:
    normaliser, scaler = ObservationNormaliser((4,)), RewardScaler(8, discount=0.97)
    rng = np.random.default_rng(1)

    def step(observe: ObservationNormaliser, scale: RewardScaler, seed: int) -> list[NDArray[Any]]:
        rows = rows_of(seed, 8, 4)
        return [observe(rows), scale(rows[:, 0], rows[:, 1] > 5)]

    for _ in range(10):
        step(normaliser, scaler, int(rng.integers(100)))
    save_state(tmp_path, "state", {"observations": normaliser.state_dict(), "rewards": scaler.state_dict()})
    state = load_state(tmp_path, "state")
    resumed = ObservationNormaliser((4,)), RewardScaler(8, discount=0.97)
    resumed[0].load_state_dict(state["observations"])
    resumed[1].load_state_dict(state["rewards"])
    assert np.array_equal(resumed[0].normalise(rows_of(0, 8, 4)), normaliser.normalise(rows_of(0, 8, 4)))
    for seed in range(5):
        for one, other in zip(step(normaliser, scaler, seed), step(*resumed, seed), strict=True):
            assert np.array_equal(one, other)


def test_a_state_does_not_change_with_what_it_was_taken_from_or_given_to() -> None:
    normaliser, scaler = ObservationNormaliser((4,)), RewardScaler(4, discount=0.9)
    normaliser(rows_of(0, 8, 4))
    scaler(rows_of(0, 4), np.zeros(4, np.bool_))
    states = normaliser.state_dict(), scaler.state_dict()
    kept = [{name: torch.as_tensor(value).clone() for name, value in state.items()} for state in states]
    other, another = ObservationNormaliser((4,)), RewardScaler(4, discount=0.9)
    other.load_state_dict(states[0])
    another.load_state_dict(states[1])
    for observe, scale in ((normaliser, scaler), (other, another)):
        observe(rows_of(1, 8, 4))
        scale(rows_of(1, 4), np.ones(4, np.bool_))
    for state, before in zip(states, kept, strict=True):
        assert all(torch.equal(torch.as_tensor(value), before[name]) for name, value in state.items())


def test_a_state_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\), expected shape \(4,\)"):
        ObservationNormaliser((4,)).load_state_dict(ObservationNormaliser((3,)).state_dict())
    with pytest.raises(ValueError, match="returns of 2 environments, expected 4"):
        RewardScaler(4, 0.9).load_state_dict(RewardScaler(2, 0.9).state_dict())
