"""Norms by the root mean square (Zhang and Sennrich 2019) in fewer passes over memory, forward and backward.

transformers writes them as eight elementwise operations, whose gradients are a dozen more; in a small model they cost a
tenth of an update. The module's own forward pass is the definition that the tests hold this to.

H = hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

PROBE_ROWS = 3  # of the input at which a module is tried


def use_fast_norms(model: nn.Module) -> None:
    """Let the norms of a model that are w · x / √(mean x² + ε), and nothing more, run as `RMSNorm` on the CPU.

    A module is asked: a small input goes through it, and what comes out decides.
    """
    for module in model.modules():
        if not isinstance(module, FastRMSNorm) and _is_rms_norm(module):
            module.__class__ = _fast(type(module))


class FastRMSNorm(nn.Module):
    """What a norm's class becomes; everything but its forward pass is its own."""

    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(…, H) → (…, H)."""
        weight = self.weight
        exact = hidden_states.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
        if not exact or torch.compiler.is_compiling():
            plain: Tensor = super().forward(hidden_states)
            return plain
        result: Tensor = _RMSNorm.apply(hidden_states, weight, _epsilon(self))
        return result


class _RMSNorm(torch.autograd.Function):
    """y = w · x · s with s = (mean x² + ε)^−½; ∂/∂x of Σ g · y = s · (g · w − x · s² · mean(g · w · x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        scale = x.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()  # to the bit what transformers computes
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        by_input = (gradient.contiguous() * x).view(-1, x.shape[-1])
        of_weight = (scale.view(1, -1) @ by_input)[0] if ctx.needs_input_grad[1] else None
        inner = (by_input @ weight).view(scale.shape)
        of_input = torch.mul(gradient, weight, out=by_input.view(x.shape))
        of_input.addcmul_(x, inner.mul_(scale).mul_(scale).div_(-x.shape[-1])).mul_(scale)
        return of_input, of_weight, None


_kinds: dict[type[nn.Module], type[nn.Module]] = {}


def _fast(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (FastRMSNorm, kind), {"__module__": kind.__module__})
    return _kinds[kind]


def _epsilon(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or 0.0)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether the module is this norm: one vector of weights, one input, and the values that the formula says."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if "RMSNorm" not in type(module).__name__ or len(parameters) != 1 or weight is None or weight.dim() != 1:
        return False
    if weight.is_meta or weight.dtype != torch.float32 or len(inspect.signature(module.forward).parameters) != 1:
        return False
    rows = torch.arange(PROBE_ROWS * len(weight), device=weight.device).view(PROBE_ROWS, -1).sin()
    rows *= torch.tensor([1e-3, 1.0, 30.0], device=weight.device)[:, None]  # ε shows in the first
    expected = rows * (rows.square().mean(-1, keepdim=True) + _epsilon(module)).rsqrt() * weight
    return torch.allclose(module(rows), expected, rtol=1e-5, atol=1e-7)
