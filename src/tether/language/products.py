"""Matrix products of linear layers: on the CPU through oneDNN, and in bfloat16 where asked for.

In float32 torch asks its BLAS, which on many processors leaves the widest vector units idle, and which is slow where a
matrix has few rows, as when tokens are drawn. oneDNN, which torch brings along and uses for bfloat16 itself, is
neither, and takes weights laid out once for many products. The layers stay what they are to everyone else: `nn.Linear`
and transformers' `Conv1D`, whose own forward pass is the definition that the tests hold this to.

`bfloat16_products` rounds what is multiplied in linear layers and nothing else: activations, attention and norms stay
float32, which on a CPU costs no more than `torch.autocast` does, where they are bfloat16 too. What oneDNN cannot
multiply on the processor at hand, torch's own product does.

n = rows of an input, K = its features, M = features of the output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tether.devices import busy_seconds


def _by_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN can multiply this type here. Tries it."""
    if not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(2, 2, dtype=dtype)
    try:
        _by_onednn(ones, torch.ops.mkldnn._reorder_linear_weight(ones, 2), None)
    except RuntimeError:  # of bfloat16 where there are no instructions for it
        return False
    return True


ONEDNN = frozenset(filter(_onednn_multiplies, (torch.float32, torch.bfloat16)))  # the types that it multiplies here
SMALLEST = 2**20  # n·K·M below which calling oneDNN costs more than it saves
NARROW = 192  # factors shared by a transposed input: below, oneDNN spends more on laying it out than it saves
TRIED_ROWS, TRIED_SIZE = 1024, 2**28  # n, and n·K·M at most, of the products that are timed
ROUNDS = 7  # of which the fastest counts: what else the machine does makes others slower
PAYS = 0.9  # of the time that float32 takes, at most, for bfloat16 to be worth its rounding
PACKED_FOR = 8  # rows, at least: a layout for fewer is slow for all others
SMALLEST_PACKED = 2**14  # weights below which packing them saves nothing


def use_fast_products(model: nn.Module, head: nn.Module | None = None) -> None:
    """Let the linear layers of a model multiply by oneDNN where they stand on the CPU.

    What comes out of `head`, if it is such a layer, is float32 from then on, whatever the precision of the others.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
        elif type(module) is Conv1D:
            module.__class__ = FastConv1D
        elif type(module) is nn.Embedding:
            module.__class__ = FastEmbedding
        if module is head and isinstance(module, _Fast):
            module.full_precision = True


_low = False  # whether products are to be in bfloat16


@contextmanager
def bfloat16_products(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """Within this context linear layers multiply in bfloat16: on CUDA by `torch.autocast`, else the fast ones alone."""
    global _low
    if device.type == "cuda":
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            yield
        return
    before, _low = _low, enabled
    try:
        yield
    finally:
        _low = before


def low_precision() -> bool:
    """Whether `bfloat16_products` holds, elsewhere than on CUDA."""
    return _low


def bfloat16_pays(model: PreTrainedModel) -> bool:
    """Whether products in bfloat16 take clearly less time here than in float32.

    Measures, in a fraction of a second, a layer as large as the model's largest, output layer excluded, forward and
    backward: a processor may have instructions for bfloat16 and be slower with them.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    sizes = [layer.weight.shape for layer in layers if layer is not model.get_output_embeddings()]
    outputs, features = max(sizes, key=math.prod)
    device = model.device
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and torch.bfloat16 not in ONEDNN):
        return False
    layer = nn.utils.skip_init(FastLinear, features, outputs, bias=False, device=device)  # draws no random numbers
    nn.init.ones_(layer.weight)
    rows = max(PACKED_FOR, min(TRIED_ROWS, TRIED_SIZE // (features * outputs)))
    inputs = torch.ones(rows, features, device=device, requires_grad=True)

    def multiply(low: bool) -> None:
        with bfloat16_products(device, low):
            layer(inputs).sum().backward()

    times: dict[bool, list[float]] = {False: [], True: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other keep the processor busy, too
    try:
        for _ in range(1 + ROUNDS):
            for low, taken in times.items():
                taken.append(busy_seconds(functools.partial(multiply, low), device))
    finally:
        torch.set_num_threads(threads)
    in_float32, in_bfloat16 = (min(taken[1:]) for taken in times.values())  # the first sets up what lasts
    return in_bfloat16 < PAYS * in_float32


@contextmanager
def packed_weights(models: Sequence[nn.Module], rows: int) -> Iterator[None]:
    """Within this context the weights stand still, and fast layers keep a copy of theirs laid out for `rows` rows.

    Under `bfloat16_products` the copies are bfloat16.
    """
    layers = [module for model in models for module in model.modules() if isinstance(module, _Fast)]
    try:
        for layer in layers:
            layer.pack(max(rows, PACKED_FOR))
        yield
    finally:
        for layer in layers:
            layer.packed = None


class _Fast(nn.Module):
    """What both kinds of layers share."""

    packed: Tensor | None = None
    full_precision = False

    def matrix(self) -> Tensor:
        """(M, K) weights."""
        raise NotImplementedError

    def pack(self, rows: int) -> None:
        """Lay the weights out for products without gradients."""
        weight = self.matrix().detach()
        if weight.numel() < SMALLEST_PACKED or weight.device.type != "cpu":
            return
        stored = weight.dtype
        if self.full_precision:
            weight = weight.float()
        elif _low:
            weight = weight.bfloat16()
        if weight.dtype in ONEDNN:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        elif weight.dtype != stored:
            self.packed = weight.contiguous()  # rounded once, not for every product

    def multiply(self, inputs: Tensor, bias: Tensor | None) -> Tensor | None:
        """Inputs · weightᵀ + bias, or None where torch's own product is the better one."""
        weight = self.matrix()
        shape = (*inputs.shape[:-1], weight.shape[0])
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self.packed is not None:
            bias = None if bias is None else bias.to(self.packed.dtype)
            result = _linear(rows.to(self.packed.dtype), self.packed, bias)
            return result.to(torch.float32 if self.full_precision else inputs.dtype).view(shape)
        if self.full_precision and (torch.is_autocast_enabled(weight.device.type) or weight.dtype != torch.float32):
            with torch.autocast(weight.device.type, enabled=False):
                result = full_product(rows, weight) if not torch.is_grad_enabled() else rows.float() @ weight.float().T
            return (result if bias is None else result + bias.float()).view(shape)
        small = rows.numel() * len(weight) < SMALLEST
        if small or weight.dtype != torch.float32 or not _suits_onednn(inputs):
            return None
        fast: Tensor = _Product.apply(rows, weight, bias, _low and not self.full_precision)
        return fast.view(shape)


class FastLinear(_Fast, nn.Linear):
    """`nn.Linear`, multiplied by oneDNN."""

    def matrix(self) -> Tensor:
        """(M, K) weights, as they are stored."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """(…, K) → (…, M)."""
        product = self.multiply(input, self.bias)
        return super().forward(input) if product is None else product


class FastConv1D(_Fast, Conv1D):
    """transformers' `Conv1D`, a linear layer whose weights are stored as (K, M)."""

    weight: Tensor
    bias: Tensor

    def matrix(self) -> Tensor:
        """(M, K) weights, a view."""
        return self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, M)."""
        product = self.multiply(x, self.bias)
        return super().forward(x) if product is None else product


class _Product(torch.autograd.Function):
    """inputs (n, K) · weightᵀ (K, M) + bias (M,), and the same products for the gradients; float32 in and out.

    With `low`, factors and products are rounded to bfloat16, the sums in between are not.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, low: bool) -> Tensor:
        if low:
            inputs, weight = inputs.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(inputs, weight)
        if not low:
            return _linear(inputs, weight, bias)
        product = _linear(inputs, weight)
        return product.float() if bias is None else product + bias  # which is float32, and so is the sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_bias = gradient.sum(dim=0) if ctx.needs_input_grad[2] else None
        gradient = gradient.to(inputs.dtype)
        of_inputs = product(gradient, weight.T).float() if ctx.needs_input_grad[0] else None
        of_weight = product(gradient.T, inputs.T).float() if ctx.needs_input_grad[1] else None
        return of_inputs, of_weight, of_bias, None


class FastEmbedding(nn.Embedding):
    """`nn.Embedding`, whose gradient is added to where that of the output layer, tied to it, lies already."""

    def forward(self, input: Tensor) -> Tensor:
        """(…,) ids → (…, H)."""
        plain = self.max_norm is not None or self.scale_grad_by_freq or self.sparse or torch.compiler.is_compiling()
        if plain or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        rows: Tensor = _Rows.apply(self.weight, input, self.padding_idx)
        return rows


class _Rows(torch.autograd.Function):
    """Rows of a matrix (V, H)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding = padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        weight, ids = ctx.saved_tensors
        flat, rows = ids.flatten(), gradient.reshape(-1, gradient.shape[-1]).to(weight.dtype)
        if ctx.padding is not None:
            rows = rows.masked_fill((flat == ctx.padding)[:, None], 0.0)
        of_weight = GradientOf(weight)
        of_weight.add(flat, rows)
        return of_weight.rest(), None, None


class GradientOf:
    """The gradient of a matrix as large as the vocabulary, put together in `.grad`, where it ends.

    Autograd would make such a matrix for each use of the weights and add them up, which costs more than the products do
    where input and output layer are tied. So these weights want `backward`; to `torch.autograd.grad` they seem unused.
    Weights that are computed from others get theirs through autograd all the same.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.fresh = not weight.is_leaf or weight.grad is None
        self.total: Tensor = torch.empty_like(weight) if self.fresh else weight.grad  # type: ignore[assignment]

    def set(self, rows: slice, values: Tensor) -> None:
        """The gradient of these rows; to be called once for each row."""
        if self.fresh:
            self.total[rows] = values
        else:
            self.total[rows] += values

    def add(self, rows: Tensor, values: Tensor) -> None:
        """The gradient of these rows (n,), some of which may be the same, instead."""
        if self.fresh:
            self.total.zero_()
        self.total.index_add_(0, rows, values)

    def rest(self) -> Tensor | None:
        """What autograd has still to put in place."""
        if not self.weight.is_leaf:
            return self.total
        self.weight.grad = self.total
        return None


def product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Inputs (n, K) · weightᵀ (K, M), without gradients, by the faster library; both strided as they like."""
    if not _suits_onednn(inputs) or (len(weight) < NARROW and not inputs.is_contiguous()):
        return inputs @ weight.T
    return _linear(inputs, weight)


def full_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """Inputs (n, K) · weightᵀ (K, M) in float32 whatever the precision of the weights, without gradients.

    On CUDA bfloat16 stays bfloat16 on its way in; what comes out is not rounded.
    """
    if weight.dtype != torch.float32 and weight.device.type == "cuda":
        return torch.mm(inputs.to(weight.dtype), weight.T, out_dtype=torch.float32)
    return product(inputs.float(), weight.float())


def _suits_onednn(inputs: Tensor) -> bool:
    suits = torch.float32 in ONEDNN and inputs.device.type == "cpu" and inputs.dtype == torch.float32
    return suits and not torch.is_autocast_enabled("cpu")


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Inputs (n, K) · weightᵀ (K, M) + bias (M,) in the type of the weights, on the CPU: by oneDNN where it can."""
    if torch.compiler.is_compiling():
        return _compiled_linear(inputs, weight, bias)
    if weight.dtype in ONEDNN:
        return _by_onednn(inputs, weight, bias)
    return nn.functional.linear(inputs, weight, bias)


@torch.library.custom_op("tether::product", mutates_args=())
def _compiled_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_linear` where torch.compile shall not look inside: oneDNN's call wants weights that never change there."""
    return _linear(inputs, weight, bias)


@_compiled_linear.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weight.shape[0])  # `len` would make constants of them
