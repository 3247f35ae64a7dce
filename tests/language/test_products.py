"""Linear layers through oneDNN, packed and in bfloat16, against their own forward pass and torch's gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import KINDS, make_model
from tests.toy import relative_error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tether.language import products
from tether.language.products import (
    FastConv1D,
    FastEmbedding,
    FastLinear,
    bfloat16_pays,
    bfloat16_products,
    full_product,
    packed_weights,
    use_fast_products,
)

CPU = torch.device("cpu")
MAKE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 160),
    "without bias": lambda: nn.Linear(96, 160, bias=False),
    "conv1d": lambda: Conv1D(160, 96),
}


@pytest.fixture(autouse=True)
def _however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "SMALLEST_PACKED", 0)
    monkeypatch.setattr(products, "NARROW", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Precision of each product that fast layers took upon themselves."""
    asked: list[torch.dtype] = []
    multiply = products._linear

    def note(inputs: Tensor, *rest: Any) -> Tensor:
        asked.append(inputs.dtype)
        return multiply(inputs, *rest)

    monkeypatch.setattr(products, "_linear", note)
    return asked


@pytest.fixture(params=[True, False], ids=["here", "without instructions"])
def bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN can on this processor, and on one that has no instructions for bfloat16."""
    if not request.param:
        monkeypatch.setattr(products, "ONEDNN", frozenset({torch.float32}))


def twins(kind: str) -> tuple[nn.Module, nn.Module]:
    """A layer and one that multiplies fast, of equal weights."""
    torch.manual_seed(0)
    plain = MAKE[kind]()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    return plain, fast


def gradients(layer: nn.Module, inputs: Tensor, weights: Tensor) -> Tensor:
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    (layer(inputs) * weights).sum().backward()
    assert inputs.grad is not None
    found = [inputs.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("kind", MAKE)
def test_values_and_gradients_are_those_of_the_plain_layer(kind: str, calls: list[torch.dtype]) -> None:
    plain, fast = twins(kind)
    inputs, weights = torch.randn(3, 5, 96), torch.randn(3, 5, 160)
    torch.testing.assert_close(fast(inputs), plain(inputs), atol=1e-4, rtol=1e-5)
    assert relative_error(gradients(fast, inputs, weights), gradients(plain, inputs, weights)) < 1e-5
    assert calls == [torch.float32] * 4  # twice forward, two gradients


@pytest.mark.parametrize("kind", MAKE)
def test_packed_weights_give_the_same_for_any_number_of_rows_and_are_let_go(
    kind: str, calls: list[torch.dtype]
) -> None:
    plain, fast = twins(kind)
    with torch.no_grad(), packed_weights([fast], rows=32):
        for rows in (1, 7, 32, 40):
            inputs = torch.randn(rows, 1, 96)
            torch.testing.assert_close(fast(inputs), plain(inputs), atol=1e-4, rtol=1e-5)
    assert fast.packed is None
    next(fast.parameters()).data.zero_()
    with torch.no_grad():
        bias = getattr(fast, "bias", None)
        expected = torch.zeros(160) if bias is None else bias
        assert torch.equal(fast(torch.randn(1, 96))[0], expected)  # not those that were packed
    assert len(calls) == 5


def test_packed_weights_are_let_go_when_drawing_fails() -> None:
    _, fast = twins("linear")
    was_packed = []

    def fail(*_: Any) -> None:
        was_packed.append(fast.packed is not None)
        raise ZeroDivisionError

    fast.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), packed_weights([fast], rows=8):
        fast(torch.randn(1, 96))
    assert was_packed == [True]
    assert fast.packed is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_bfloat16_rounds_the_factors_alone(kind: str, packed: bool, calls: list[torch.dtype], bfloat16: None) -> None:
    plain, fast = twins(kind)
    inputs = torch.randn(6, 96)
    with torch.no_grad():
        rounded = copy.deepcopy(plain)
        for parameter in rounded.parameters():
            if parameter.dim() == 2:
                parameter.copy_(parameter.bfloat16().float())
        expected = rounded(inputs.bfloat16().float())
        with bfloat16_products(CPU), packed_weights([fast] if packed else [], rows=8):
            found = fast(inputs)
    assert found.dtype == torch.float32
    assert calls == [torch.bfloat16]
    torch.testing.assert_close(found, expected, atol=0.05, rtol=2**-7)  # products and the bias are rounded once more
    assert float((found - plain(inputs)).detach().abs().max()) > 1e-3


def test_gradients_in_bfloat16_are_float32_and_near(bfloat16: None) -> None:
    plain, fast = twins("linear")
    inputs, weights = torch.randn(64, 96), torch.randn(64, 160)
    exact = gradients(plain, inputs, weights)
    with bfloat16_products(CPU):
        found = gradients(fast, inputs, weights)
    assert found.dtype == torch.float32
    assert 1e-4 < relative_error(found, exact) < 0.01


def test_outside_the_context_nothing_is_rounded() -> None:
    plain, fast = twins("linear")
    inputs = torch.randn(4, 96)
    with bfloat16_products(CPU), bfloat16_products(CPU, enabled=False):
        torch.testing.assert_close(fast(inputs), plain(inputs), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(fast(inputs), plain(inputs), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gives_full_precision_whatever_the_others_do(dtype: torch.dtype, bfloat16: None) -> None:
    head = nn.Sequential(nn.Linear(96, 160, bias=False).to(dtype))
    use_fast_products(head, head[0])
    inputs = torch.randn(4, 96).to(dtype)
    weight = head[0].weight
    expected = inputs.double() @ weight.double().T
    with bfloat16_products(CPU):
        for found in (head(inputs), _without_gradients(head, inputs), _packed(head, inputs)):
            assert found.dtype == torch.float32
            assert relative_error(found.detach().double(), expected.detach()) < 1e-6
    assert relative_error(full_product(inputs, weight).detach().double(), expected.detach()) < 1e-6


@torch.no_grad()
def _without_gradients(head: nn.Module, inputs: Tensor) -> Tensor:
    found: Tensor = head(inputs)
    return found


@torch.no_grad()
def _packed(head: nn.Module, inputs: Tensor) -> Tensor:
    with packed_weights([head], rows=8):
        found: Tensor = head(inputs)
    return found


def test_small_products_are_left_to_torch(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALLEST", 4 * 96 * 160 + 1)
    monkeypatch.setattr(products, "SMALLEST_PACKED", 96 * 160 + 1)
    _, fast = twins("linear")
    with packed_weights([fast], rows=8):
        fast(torch.randn(4, 96))
    assert calls == []
    fast(torch.randn(5, 96))
    assert calls == [torch.float32]


@pytest.mark.parametrize("kind", MAKE)
def test_gradients_of_narrow_weights_are_left_to_torch(
    kind: str, calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "NARROW", 97)
    plain, fast = twins(kind)
    inputs, weights = torch.randn(3, 5, 96), torch.randn(3, 5, 160)
    assert relative_error(gradients(fast, inputs, weights), gradients(plain, inputs, weights)) < 1e-5
    assert len(calls) == 2  # forward, and the gradient of the inputs


def test_without_onednn_torch_multiplies(calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN", frozenset())
    plain, fast = twins("linear")
    inputs = torch.randn(4, 96)
    with torch.no_grad(), packed_weights([fast], rows=8):
        assert torch.equal(fast(inputs), plain(inputs))
    assert torch.equal(full_product(inputs, fast.weight), inputs @ fast.weight.T)
    assert calls == []


@pytest.mark.parametrize("kind", MAKE)
def test_layers_stored_in_bfloat16_give_what_torch_gives(kind: str, bfloat16: None) -> None:
    plain, fast = (layer.bfloat16() for layer in twins(kind))
    inputs = torch.randn(6, 96).bfloat16()
    with torch.no_grad(), packed_weights([fast], rows=8):
        torch.testing.assert_close(fast(inputs), plain(inputs), atol=0.05, rtol=2**-7)


def test_onednn_is_asked_what_it_multiplies_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's own list says what it was made with, not what torch's libraries may use of it."""
    ones = torch.ones(2, 2)
    for dtype in products.ONEDNN:
        packed = torch.ops.mkldnn._reorder_linear_weight(ones.to(dtype), 2)
        found = torch.ops.mkldnn._linear_pointwise(ones.to(dtype), packed, None, "none", [], "")
        assert torch.equal(found, torch.full((2, 2), 2, dtype=dtype))

    def refuse(*_: Any) -> Tensor:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(products, "_by_onednn", refuse)
    assert not products._onednn_multiplies(torch.bfloat16)


@pytest.mark.parametrize(("seconds", "pays"), [((1.0, 0.5), True), ((1.0, 0.95), False), ((1.0, 1.9), False)])
def test_bfloat16_pays_where_it_is_measured_to_be_faster(
    seconds: tuple[float, float], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the processor's list of instructions says."""
    tried: list[tuple[torch.Size, bool]] = []
    forward = FastLinear.forward

    def note(layer: FastLinear, inputs: Tensor) -> Tensor:
        tried.append((layer.weight.shape, products.low_precision()))
        return forward(layer, inputs)

    def busy(function: Callable[[], Any], device: torch.device) -> float:
        with monkeypatch.context() as any_processor:
            any_processor.setattr(products, "ONEDNN", frozenset())
            function()
        return seconds[tried[-1][1]]

    monkeypatch.setattr(FastLinear, "forward", note)
    monkeypatch.setattr(products, "ONEDNN", frozenset({torch.float32, torch.bfloat16}))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    monkeypatch.setattr(products, "busy_seconds", busy)
    assert bfloat16_pays(make_model("llama")) == pays
    largest = torch.Size([32, 16])  # but for the output layer
    assert set(tried) == {(largest, False), (largest, True)}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_without_instructions_for_bfloat16_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ONEDNN", frozenset({torch.float32}))
    monkeypatch.setattr(products, "busy_seconds", None)
    assert not bfloat16_pays(make_model("llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_of_a_model_is_fast_and_still_what_it_was(kind: str) -> None:
    model = make_model(kind)
    expected = model(input_ids=torch.tensor([[4, 5, 6]])).logits
    names = set(model.state_dict())
    use_fast_products(model)
    for module in model.modules():
        assert type(module) not in (nn.Linear, Conv1D, nn.Embedding)
    assert any(isinstance(module, FastLinear | FastConv1D) for module in model.modules())
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=torch.tensor([[4, 5, 6]])).logits, expected, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(input_ids=torch.tensor([[4, 5, 6]])).logits, expected, atol=1e-5, rtol=1e-4)


# ---- the gradient of embeddings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embeddings_gradient_is_added_to_what_is_there(padding: int | None) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(11, 4, padding_idx=padding)
    fast = copy.deepcopy(plain)
    use_fast_products(fast)
    assert isinstance(fast, FastEmbedding)
    ids, weights = torch.tensor([[3, 5, 5], [0, 10, 3]]), torch.randn(2, 3, 4)
    for _ in range(2):  # at first there is nothing
        for layer in (plain, fast):
            (layer(ids) * weights).sum().backward()
        assert fast.weight.grad is not None
        torch.testing.assert_close(fast.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert torch.equal(fast(ids), plain(ids))


def test_a_frozen_embedding_gets_no_gradient() -> None:
    fast = nn.Embedding(11, 4)
    use_fast_products(fast)
    fast.requires_grad_(False)
    assert not fast(torch.tensor([1])).requires_grad
