"""KL estimators against the exact divergence of small categoricals, the penalty, and the controller of β."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tether.ppo import KLConfig, KLController
from tether.ppo.kl import estimate_kl, penalised_rewards


@st.composite
def categoricals(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log p and log q over the same few outcomes, float64."""
    size = draw(st.integers(2, 6))
    logits = st.lists(st.floats(-3, 3), min_size=size, max_size=size)
    return tuple(torch.tensor(draw(logits), dtype=torch.float64).log_softmax(-1) for _ in range(2))  # type: ignore[return-value]


@given(categoricals())
@settings(max_examples=60, deadline=None)
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(pair: tuple[Tensor, Tensor]) -> None:
    log_p, log_q = pair
    exact = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    p = log_p.exp()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * estimate_kl(log_p, log_q, estimator)).sum(), exact)
    assert bool((estimate_kl(log_p, log_q, "k3") >= -1e-15).all())
    torch.testing.assert_close(estimate_kl(log_p, log_q, "k2"), (log_p - log_q) ** 2 / 2)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_near_the_reference_the_second_order_ones_agree_with_the_kl(estimator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, generator=generator, dtype=torch.float64)
    log_q = base.log_softmax(-1)
    log_p = (base + 1e-3 * torch.randn(8, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    assert float((log_p.exp() * estimate_kl(log_p, log_q, estimator)).sum()) == pytest.approx(exact, rel=1e-2)  # type: ignore[arg-type]


def test_k3_keeps_small_differences_in_float32() -> None:
    """e^x − 1 − x would be rounding noise here; expm1 is not."""
    found = estimate_kl(torch.tensor(-1.0), torch.tensor(-1.0 - 1e-3), "k3")
    assert float(found) == pytest.approx(math.exp(-1e-3) - 1 + 1e-3, rel=0.1)


def test_penalised_rewards_put_the_score_at_the_last_valid_step() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 5.0, 5.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = penalised_rewards(torch.tensor([10.0, 20.0]), log_probs, reference, mask, beta=0.1)
    torch.testing.assert_close(found, torch.tensor([[-0.05, 0.0, 10.1], [19.8, 0.0, 0.0]]))


def test_an_episode_without_a_step_cannot_be_rewarded() -> None:
    zeros = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="without a step"):
        penalised_rewards(torch.zeros(2), zeros, zeros, torch.tensor([[True, True], [False, False]]), 0.1)


def test_fixed_beta_stays() -> None:
    controller = KLController(KLConfig(beta=0.2))
    controller.update(kl=100.0, episodes=1000)
    assert controller.beta == 0.2


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 64 / 1000),
        (60.0, 1 + 0.2 * 64 / 1000),
        (5.4, 1 - 0.1 * 64 / 1000),
        (0.0, 1 - 0.2 * 64 / 1000),
    ],
)
def test_adaptive_beta_follows_equation_2_of_ziegler(kl: float, factor: float) -> None:
    controller = KLController(KLConfig(beta=0.2, target=6.0, horizon=1000))
    controller.update(kl, episodes=64)
    assert controller.beta == pytest.approx(0.2 * factor)


def test_controller_state_goes_round() -> None:
    controller = KLController(KLConfig(beta=0.2, target=6.0))
    controller.update(12.0, 500)
    fresh = KLController(KLConfig(beta=0.2, target=6.0))
    fresh.load_state_dict(controller.state_dict())
    assert fresh.beta == controller.beta != 0.2


@pytest.mark.parametrize(
    ("field", "value"), [("beta", -0.1), ("beta", float("nan")), ("target", 0.0), ("target", -1.0), ("horizon", 0)]
)
def test_bad_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is .*expected"):
        KLConfig(**{field: value})
