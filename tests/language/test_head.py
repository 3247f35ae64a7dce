"""Log-probabilities by tiles over the vocabulary against whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import make_model
from tests.toy import relative_error
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.language import head as head_module
from tether.language.head import Head, action_log_probs
from tether.language.products import GradientOf
from tether.language.reading import output_head

TOKENS, WIDTH, VOCABULARY = 13, 24, 301  # no multiple of a tile


def make_layer(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    nn.init.normal_(layer.weight)
    return layer


def outcome(layer: nn.Linear, found: tuple[Tensor, Tensor], hidden: Tensor, weigh: tuple[float, float]) -> list[Tensor]:
    """Both results, and the gradients of a weighted sum of them."""
    layer.zero_grad()
    hidden.grad = None
    weights = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(1))
    (found[0] * weights[0] * weigh[0] + found[1] * weights[1] * weigh[1]).sum().backward()
    gradients = [hidden.grad, *(p.grad for p in layer.parameters())]
    return [*(part.detach() for part in found), *(g.clone() for g in gradients if g is not None)]


@pytest.mark.parametrize("weigh", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)], ids=["log-probs", "entropy", "both"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kept", [0, TOKENS * 250, 10**9], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize("tile", [1, TOKENS * 100, 10**9])
def test_tiles_give_what_whole_logits_give(
    tile: int, kept: int, scale: float, bias: bool, weigh: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "TILE", tile)
    monkeypatch.setattr(head_module, "KEPT", kept)
    layer, hidden = make_layer(bias), torch.randn(TOKENS, WIDTH).requires_grad_()
    actions = torch.randint(0, VOCABULARY, (TOKENS,))
    actions[:2] = torch.tensor([0, VOCABULARY - 1])
    expected = outcome(layer, action_log_probs(layer(hidden) * scale, actions, 0.7, None), hidden, weigh)
    found = outcome(layer, Head(layer, scale).log_probs(hidden, actions, 0.7), hidden, weigh)
    assert len(found) == len(expected) == (5 if bias else 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kept", [0, 10**9], ids=["none kept", "all kept"])
def test_tokens_that_are_all_but_impossible_have_finite_gradients(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "TILE", TOKENS * 64)
    monkeypatch.setattr(head_module, "KEPT", kept)
    layer, hidden = make_layer(True), (100 * torch.randn(TOKENS, WIDTH)).requires_grad_()  # logits of some thousands
    actions = torch.arange(TOKENS)
    expected = outcome(layer, action_log_probs(layer(hidden), actions, 1.0, None), hidden, (1.0, 1.0))
    found = outcome(layer, Head(layer, 1.0).log_probs(hidden, actions, 1.0), hidden, (1.0, 1.0))
    assert float(expected[0].min()) < -1000
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kept", [0, 3, 4])
def test_as_many_tiles_are_kept_as_the_budget_holds_and_the_others_are_computed_again(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = TOKENS * 64
    monkeypatch.setattr(head_module, "TILE", tile)
    monkeypatch.setattr(head_module, "KEPT", kept * tile)
    computed = []
    logits = head_module._logits

    def counted(*arguments: Any) -> Tensor:
        computed.append(arguments[3])
        return logits(*arguments)

    monkeypatch.setattr(head_module, "_logits", counted)
    layer, actions = make_layer(False), torch.arange(TOKENS)
    found = Head(layer, 1.0).log_probs(torch.randn(TOKENS, WIDTH), actions, 1.0)
    tiles = list(computed)
    found[0].sum().backward()
    assert computed[len(tiles) :] == tiles[kept:]
    assert len(tiles) > 4


def test_gradients_of_one_output_alone() -> None:
    layer, hidden = make_layer(False), torch.randn(TOKENS, WIDTH).requires_grad_()
    actions = torch.arange(TOKENS)
    for which in (0, 1):
        expected = torch.autograd.grad(action_log_probs(layer(hidden), actions, 1.0, None)[which].sum(), hidden)[0]
        found = torch.autograd.grad(Head(layer, 1.0).log_probs(hidden, actions, 1.0)[which].sum(), hidden)[0]
        assert relative_error(found, expected) < 1e-5


def test_a_certain_token_has_log_prob_and_entropy_zero_and_an_impossible_one_is_finite() -> None:
    layer = nn.Linear(1, 200, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[7] = 1e4
    log_probs, entropy = Head(layer, 1.0).log_probs(torch.ones(2, 1), torch.tensor([7, 8]), 1.0)
    assert log_probs.tolist() == [0.0, -1e4]
    assert entropy.tolist() == [0.0, 0.0]


def test_gradients_add_up_over_passes_and_with_an_embedding_tied_to_the_head() -> None:
    """Where the gradient of the weights is written straight into `.grad`, passes and uses still add up."""
    layer, actions = make_layer(False), torch.arange(TOKENS)
    ids, hidden = torch.tensor([5, 5, 300]), torch.randn(TOKENS, WIDTH)
    plain = torch.zeros_like(layer.weight)
    for _ in range(2):
        weight = layer.weight.detach().clone().requires_grad_()
        loss = action_log_probs(hidden @ weight.T, actions, 1.0, None)[0].sum() + weight[ids].square().sum()
        plain += torch.autograd.grad(loss, weight)[0]
        (Head(layer, 1.0).log_probs(hidden, actions, 1.0)[0].sum() + layer.weight[ids].square().sum()).backward()
    assert layer.weight.grad is not None
    assert relative_error(layer.weight.grad, plain) < 1e-5


def test_weights_that_are_computed_from_others_get_their_gradient_through_autograd() -> None:
    leaf = torch.randn(5, 3, requires_grad=True)
    gradient = GradientOf(leaf * 2)
    gradient.set(slice(0, 5), torch.ones(5, 3))
    rest = gradient.rest()
    assert rest is not None
    assert torch.equal(rest, torch.ones(5, 3))
    assert leaf.grad is None


def test_a_frozen_head_passes_the_gradient_on_and_gets_none() -> None:
    layer, hidden = make_layer(True), torch.randn(TOKENS, WIDTH).requires_grad_()
    layer.requires_grad_(False)
    Head(layer, 1.0).log_probs(hidden, torch.arange(TOKENS), 1.0)[0].sum().backward()
    assert hidden.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_hidden_states_in_bfloat16_get_their_gradient_in_bfloat16() -> None:
    layer, hidden = make_layer(False), torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    log_probs, _ = Head(layer, 1.0).log_probs(hidden, torch.arange(TOKENS), 1.0)
    log_probs.sum().backward()
    assert log_probs.dtype == torch.float32
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    exact = action_log_probs(layer(hidden.float()), torch.arange(TOKENS), 1.0, None)[0]
    assert relative_error(log_probs.detach(), exact.detach()) < 1e-5  # the logits are not rounded


# ---- which heads these are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gpt_neox", "mistral", "gemma3"])
def test_a_plain_head_is_found(kind: str) -> None:
    model = make_model(kind)
    found = Head.of(model)
    assert found is not None
    assert found.layer is output_head(model)
    assert found.scale == 1.0


def scaled(model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The model with something done to its logits."""
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed  # type: ignore[method-assign]
    return model


def test_a_factor_on_the_logits_is_found() -> None:
    found = Head.of(scaled(make_model(), lambda logits: logits / 16))
    assert found is not None
    assert found.scale == pytest.approx(1 / 16, rel=1e-6)


def test_a_cap_on_the_logits_is_not_taken_for_a_plain_head() -> None:
    assert Head.of(scaled(make_model(), lambda logits: 30 * (logits / 30).tanh())) is None


def test_a_head_with_an_adapter_is_not_plain() -> None:
    model = make_model()
    model.set_output_embeddings(nn.Sequential(output_head(model)))
    assert Head.of(model) is None
