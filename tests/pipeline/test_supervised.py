"""What fine-tuning and reward models share: the plan of batches, the optimizer's step, and settings that cannot be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import make_model
from torch import nn

from tether.errors import UserError
from tether.pipeline.reward_model import RewardModelConfig
from tether.pipeline.sft import SFTConfig
from tether.pipeline.supervised import Optimizer, SupervisedConfig, longest_text, plan_batches


def plan(config: SupervisedConfig, count: int, **options: Any) -> list[tuple[float, list[int]]]:
    batches = plan_batches(count, config, np.random.default_rng(0), **options)
    return [(epoch, chosen.tolist()) for epoch, chosen in batches]


def test_each_pass_has_every_sample_once_in_an_order_of_its_own() -> None:
    batches = plan(SupervisedConfig(epochs=2, batch_size=3), 7)
    assert [epoch for epoch, _ in batches] == pytest.approx([3 / 7, 6 / 7, 1, 10 / 7, 13 / 7, 2])
    first, second = ([i for _, chosen in batches[at : at + 3] for i in chosen] for at in (0, 3))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert plan(SupervisedConfig(max_steps=4, batch_size=3), 7) == batches[:4]


def test_a_batch_is_filled_with_tokens_and_has_at_least_one_sample() -> None:
    lengths = np.array([5, 1, 9, 2, 3, 4])
    batches = [chosen for _, chosen in plan(SupervisedConfig(), 6, lengths=lengths, batch_tokens=6)]
    assert sorted(i for chosen in batches for i in chosen) == list(range(6))
    for chosen, following in zip(batches, [*batches[1:], None], strict=True):
        used = int(lengths[chosen].sum())
        assert used <= 6 or len(chosen) == 1
        assert following is None or used + lengths[following[0]] > 6  # the next would not have fitted in


def test_a_step_is_that_of_adamw_on_clipped_gradients_and_vectors_do_not_decay() -> None:
    model, twin = make_model("gpt2"), make_model("gpt2")
    config = SupervisedConfig(
        learning_rate=0.1, warmup_steps=1, schedule="linear", weight_decay=0.5, max_gradient_norm=0.3, adam_beta1=0.5,
        adam_beta2=0.7, adam_epsilon=1e-3,
    )  # fmt: skip
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        other.grad = parameter.grad.clone()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in twin.parameters() if p.grad is not None))
    said = Optimizer(model, config, steps=10).update(1)
    assert said == {"learning_rate": pytest.approx(0.05), "gradient_norm": pytest.approx(norm, rel=1e-5)}
    nn.utils.clip_grad_norm_(twin.parameters(), 0.3)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        decay = 0.5 if other.ndim >= 2 else 0.0
        plain = torch.optim.AdamW([other], lr=0.05, betas=(0.5, 0.7), eps=1e-3, weight_decay=decay)
        plain.step()
        torch.testing.assert_close(parameter, other)


def test_frozen_parameters_stay_and_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = make_model()
    frozen, *learning = model.parameters()
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, SupervisedConfig(learning_rate=0.1), steps=2)
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)
    learning[0].grad = torch.full_like(learning[0], math.nan)
    with pytest.raises(FloatingPointError, match="norm is nan at step 1: lower learning_rate"):
        optimizer.update(1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for parameter in learning:
        parameter.grad = torch.ones_like(parameter)
    optimizer.update(1)
    same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert same == [True] + [False] * len(learning)


def test_when_the_held_out_loss_is_taken() -> None:
    def steps(every: int) -> list[int]:
        return [step for step in range(1, 8) if SupervisedConfig(eval_every=every).evaluates(step, 7)]

    assert steps(0) == [7]
    assert steps(3) == [3, 6, 7]


def test_the_longest_text() -> None:
    model = make_model()
    assert longest_text(model, None) == 64
    assert longest_text(model, 10) == 10
    model.config.max_position_embeddings = 100_000
    assert longest_text(model, None) == 2048
    with pytest.raises(UserError, match="max_tokens is 100001, expected at most the model's context of 100000"):
        longest_text(model, 100_001)


@pytest.mark.parametrize("config", [SFTConfig, RewardModelConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected 1 or more"),
        ({"max_steps": 0}, "max_steps is 0, expected 1 or more"),
        ({"warmup_steps": -1}, "warmup_steps is -1, expected a finite number of 0 or more"),
        ({"weight_decay": math.nan}, "weight_decay is nan, expected a finite number of 0 or more"),
        ({"learning_rate": math.inf}, "learning_rate is inf, expected a finite number"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0, expected 0 or more and below 1"),
        ({"adam_epsilon": 0.0}, "adam_epsilon is 0.0, expected a finite number above 0"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
        ({"autocast": True, "dtype": "bfloat16"}, "autocast is on and dtype bfloat16"),
    ],
)
def test_settings_that_cannot_be(config: type[SupervisedConfig], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)
