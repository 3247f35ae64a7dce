"""Norms in fewer passes: the same numbers and gradients as the module's own, and only where the module is that norm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.models import KINDS, make_model
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tether.language.norms import FastRMSNorm, use_fast_norms


def perturbed_norm(size: int, epsilon: float) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(size, epsilon)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    return norm


def of_input_and_weight(norm: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    inputs = inputs.clone().requires_grad_()
    output = norm(inputs)
    return output, *torch.autograd.grad(output, (inputs, *norm.parameters()), gradient)


@pytest.mark.parametrize("shape", [(5, 16), (3, 7, 16), (2, 3, 4, 16), (1, 1, 16)])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_outputs_and_gradients_are_those_of_the_module(shape: tuple[int, ...], epsilon: float) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    plain = perturbed_norm(16, epsilon)
    fast = copy.deepcopy(plain)
    use_fast_norms(fast)
    assert isinstance(fast, FastRMSNorm)
    for scale in (1e-3, 1.0, 100.0):
        found, expected = (of_input_and_weight(norm, inputs * scale, gradient) for norm in (fast, plain))
        assert torch.equal(found[0], expected[0])
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_gradients_are_right_where_nothing_lies_in_order() -> None:
    plain = perturbed_norm(8, 1e-6)
    fast = copy.deepcopy(plain)
    use_fast_norms(fast)
    inputs = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(2)).permute(2, 1, 0)
    gradient = torch.randn(1, 5, 1, generator=torch.Generator().manual_seed(3)).expand(3, 5, 8)
    for ours, theirs in zip(*(of_input_and_weight(n, inputs, gradient) for n in (fast, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm = perturbed_norm(8, 1e-6).requires_grad_(False)
    use_fast_norms(norm)
    inputs = torch.randn(4, 8, requires_grad=True)
    norm(inputs).sum().backward()
    assert norm.weight.grad is None
    assert inputs.grad is not None


class MeanRMSNorm(LlamaRMSNorm):
    """Not the root mean square, by a little."""

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states) + 1e-3


@pytest.mark.parametrize("norm", [GemmaRMSNorm(8), MeanRMSNorm(8), nn.LayerNorm(8), LlamaRMSNorm(8).bfloat16()])
def test_other_norms_stay_as_they_are(norm: nn.Module) -> None:
    kind = type(norm)
    use_fast_norms(norm)
    assert type(norm) is kind


@pytest.mark.parametrize("kind", KINDS)
def test_models_give_the_same_logits_and_save_the_same_files(kind: str) -> None:
    plain = make_model(kind)
    fast = copy.deepcopy(plain)
    use_fast_norms(fast)
    tokens = torch.arange(12).view(2, 6) + 2
    assert torch.equal(fast(tokens).logits, plain(tokens).logits)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert type(copy.deepcopy(fast)) is type(fast)


def test_the_llamas_norms_are_fast() -> None:
    model = make_model("llama")
    use_fast_norms(model)
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) > 2
    assert all(isinstance(norm, FastRMSNorm) for norm in norms)
