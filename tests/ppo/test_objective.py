"""The losses against their formulas, step by step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.ppo.objective import clipped_surrogate, step_weights, value_loss


@given(st.floats(-2, 2), st.floats(-3, 3), st.floats(0, 0.5), st.floats(0, 0.5), st.none() | st.floats(1.1, 4))
@settings(max_examples=200, deadline=None)
def test_clipped_surrogate_is_its_formula(
    log_ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> None:
    old = torch.tensor(-1.0, dtype=torch.float64)
    new = (old + log_ratio).requires_grad_(True)
    loss, was_clipped = clipped_surrogate(new, old, torch.tensor(advantage, dtype=torch.float64), low, high, dual)
    ratio = math.exp(log_ratio)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    assert float(loss.detach()) == pytest.approx(-objective, rel=1e-9, abs=1e-12)
    loss.backward()
    assert new.grad is not None
    if bool(was_clipped):
        assert float(new.grad) == 0
    elif advantage and 1 - low < ratio < 1 + high:
        assert float(new.grad) == pytest.approx(-advantage * ratio)


def test_value_loss_with_and_without_clip() -> None:
    values, old, returns = torch.tensor([1.0, 1.0, 0.2]), torch.zeros(3), torch.tensor([2.0, -2.0, 0.5])
    torch.testing.assert_close(value_loss(values, old, returns, None), torch.tensor([0.5, 4.5, 0.045]))
    torch.testing.assert_close(value_loss(values, old, returns, 0.5), torch.tensor([1.125, 4.5, 0.045]))


def test_token_weights_are_equal_and_sum_to_one() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(step_weights(mask, "step"), mask / 5)


def test_sequence_weights_share_an_episodes_part_among_its_steps() -> None:
    """An episode without a valid step has no part."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[1 / 6] * 3, [1 / 4, 0, 1 / 4], [0, 0, 0]])
    torch.testing.assert_close(step_weights(mask, "episode"), expected)
