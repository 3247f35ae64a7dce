"""Log-probabilities of chosen tokens from hidden states, without ever holding the logits of the whole vocabulary.

The output layer is walked tile by tile over the vocabulary, and once more for the gradients; of the tiles so many are
kept as a fixed budget holds, and the logits of all others are computed again: memory does not grow with tokens ×
vocabulary. `action_log_probs`, which takes whole logits, is the definition that the tests hold this to. Logits are
float32 whatever the precision of the trunk: rounded to bfloat16 they make the probabilities of drawing and of training
differ (MiniMax-M1, arXiv:2506.13585, section 3.2). The products for the gradients are in the precision of all others.

n = tokens, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.errors import UserError, reason
from tether.language.products import GradientOf, full_product, low_precision, product

TILE = 2**20  # logits of one tile: few enough for the caches, enough for fast products
KEPT = 2**24  # weights eᶻ kept for the gradients, at most, 64 MiB: computing logits again is a quarter of the work
PROBE = 100.0  # size of the logits at which a head is tried; caps on logits are at 15 to 50


@dataclass(frozen=True)
class Head:
    """The output layer of a causal LM whose logits are `scale` · (weight · hidden + bias).

    Attributes:
        layer: with weight (V, H) and perhaps a bias (V,).
        scale: a number.
    """

    layer: nn.Linear
    scale: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel) -> Head | None:
        """The model's, or None where it does more to its logits, or to its output layer, than a factor says.

        The model is asked: one token goes through it, and the hidden state before the output layer is replaced by one
        so large that a cap on the logits would show.
        """
        layer: Any = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or layer.weight.is_meta:
            return None
        weight = layer.weight
        hidden = torch.arange(weight.shape[1], device=weight.device).sin().to(weight.dtype)[None, None]
        plain = nn.functional.linear(hidden, weight, layer.bias)
        hidden *= PROBE / plain.abs().max()
        plain = nn.functional.linear(hidden, weight, layer.bias).double().flatten()
        handle = layer.register_forward_pre_hook(lambda *_: (hidden,))
        try:
            token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
            asked = {"input_ids": token, "attention_mask": torch.ones_like(token)}  # 0 may be the id of padding
            logits = model(**asked, use_cache=False).logits.double().flatten()
        except Exception as error:  # of whatever model this is
            raise UserError(
                f"{type(model).__name__} cannot read a token as a language model ({reason(error)})"
            ) from error
        finally:
            handle.remove()
        if plain.shape != logits.shape:
            return None
        scale = float(logits @ plain / (plain @ plain))
        precise = layer.weight.dtype == torch.float32
        off = float((logits - scale * plain).abs().max())
        if not off <= (1e-5 if precise else 1e-2) * float(logits.abs().max()):
            return None
        return cls(layer, 1.0 if abs(scale - 1.0) < (1e-6 if precise else 1e-2) else scale)

    def log_probs(self, hidden: Tensor, actions: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log π (n,) of `actions` (n,) and the entropy (n,) of softmax(logits / temperature), float32, differentiable.

        Args:
            hidden: (n, H), of any precision.
            actions: (n,) token ids.
            temperature: of the distribution.
        """
        weight = self._weight(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            result: tuple[Tensor, Tensor] = _LogProbs.apply(
                hidden,
                weight,
                self.layer.bias,
                actions,
                self.scale / temperature,
                KEPT if torch.is_grad_enabled() else 0,
            )
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 of hidden states (n, H), without gradients."""
        weight = self._weight(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            return _logits(hidden, weight, self.layer.bias, slice(None), self.scale)

    def _weight(self, device: str) -> Tensor:
        """(V, H), on CUDA in the precision of autocast: to be asked before that is turned off."""
        weight = self.layer.weight
        if device == "cuda" and torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
        return weight


class _LogProbs(torch.autograd.Function):
    """Softmax over z = scale · (W h + b), tile by tile: the running maximum m, Σ eᶻ⁻ᵐ and Σ eᶻ⁻ᵐ(z − m).

    log π(a) = z_a − L and H = L − Σ π z, with L = log Σ eᶻ (Milakov and Gimelshein 2018 have the running sums). Their
    gradients: ∂ log π(a) / ∂z = 1_a − π and ∂H / ∂z = −π (log π + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, actions: Tensor, scale: float, budget: int
    ) -> tuple[Tensor, Tensor]:
        maximum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        total, weighted, chosen = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
        ctx.kept = []  # eᶻ⁻ᵐ of the first tiles, and m as it then was
        for tile in _tiles(hidden, weight):
            logits = _logits(hidden, weight, bias, tile, scale)
            rows, columns = _inside(actions, tile)
            chosen[rows] = logits[rows, columns]
            higher = torch.maximum(maximum, logits.amax(dim=1))
            fall = torch.where(total > 0, maximum - higher, 0.0)  # −inf − −inf before the first tile
            factor = fall.exp()
            logits -= higher[:, None]
            weights = logits.exp()
            if (budget := budget - weights.numel()) >= 0:
                ctx.kept.append((weights, higher))
            weighted = factor * (weighted + total * fall) + torch.linalg.vecdot(weights, logits)
            total = factor * total + weights.sum(dim=1)
            maximum = higher
        log_total = maximum + total.log()
        entropy = total.log() - weighted / total
        ctx.save_for_backward(hidden, weight, bias, actions, log_total, entropy)
        ctx.scale = scale
        ctx.factor = torch.bfloat16 if low_precision() else weight.dtype  # of the products for the gradients
        ctx.set_materialize_grads(False)
        return chosen - log_total, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, actions, log_total, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.zeros(hidden.shape, device=hidden.device) if needs_hidden else None
        for_weight = GradientOf(weight) if needs_weight else None
        for_bias = torch.empty_like(bias) if needs_bias else None
        factor = hidden.to(ctx.factor)
        for number, tile in enumerate(_tiles(hidden, weight)):
            if number < len(ctx.kept):
                weights, reached = ctx.kept[number]
                beyond = reached - log_total  # log π − log weights
            else:
                weights = _logits(hidden, weight, bias, tile, ctx.scale).sub_(log_total[:, None]).exp_()
                beyond = torch.zeros_like(log_total)
            slope: Tensor | float = 0.0  # of π
            if of_entropy is not None:
                # where a weight has become 0, so has π, and the logarithm does not matter
                log_probs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log_().add_(beyond[:, None])
                slope = log_probs.add_(entropy[:, None]).mul_(-of_entropy[:, None])
            if of_log_probs is not None:
                slope = slope - of_log_probs[:, None]
            gradient = weights * (slope * (ctx.scale * beyond.exp())[:, None])
            if of_log_probs is not None:
                rows, columns = _inside(actions, tile)
                gradient[rows, columns] += ctx.scale * of_log_probs[rows]
            if for_bias is not None:
                for_bias[tile] = gradient.sum(dim=0)
            gradient = gradient.to(ctx.factor)
            if for_hidden is not None:
                for_hidden += product(gradient, weight[tile].to(ctx.factor).T)
            if for_weight is not None:
                for_weight.set(tile, product(gradient.T, factor.T))
        return (
            None if for_hidden is None else for_hidden.to(hidden.dtype),
            None if for_weight is None else for_weight.rest(),
            for_bias,
            None,
            None,
            None,
        )


def _tiles(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Ranges of the vocabulary, of so many tokens that a tile of logits has about `TILE` entries."""
    size = max(64, TILE // max(1, len(hidden)))
    for start in range(0, len(weight), size):
        yield slice(start, min(start + size, len(weight)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tile: slice, scale: float) -> Tensor:
    """(n, tokens of the tile) logits in float32."""
    logits = full_product(hidden, weight[tile])
    if bias is not None:
        logits += bias[tile]
    return logits if scale == 1.0 else logits.mul_(scale)


def _inside(actions: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Which of `actions` (n,) lie in the tile, and in which of its columns."""
    rows = ((actions >= tile.start) & (actions < tile.stop)).nonzero().squeeze(-1)
    return rows, actions[rows] - tile.start


def action_log_probs(
    logits: Tensor, actions: Tensor, temperature: float, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each action (n,) and entropy (n,) of softmax(logits / temperature), in float32.

    With `support` (n,) only so many of the likeliest tokens share the probability, the action always being one of them:
    the distribution that top-k and top-p left at sampling time, which keeps the action possible while π moves.
    """
    log_probs = vocabulary_log_probs(logits, temperature, support, actions)
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    return log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy


def vocabulary_log_probs(
    logits: Tensor, temperature: float, support: Tensor | None = None, actions: Tensor | None = None
) -> Tensor:
    """(n, V) log-probabilities of softmax(logits / temperature), in float32; for the others see `action_log_probs`."""
    scaled = logits.float()
    if temperature != 1:
        scaled = scaled / temperature
    if support is not None:
        scaled = keep_likeliest(scaled, support, actions)
    return torch.log_softmax(scaled, dim=-1)


def vocabulary_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(π‖π_ref) (n,) in nats of two distributions over the vocabulary, by their log-probabilities (n, V)."""
    probabilities = log_probs.exp()
    difference = (log_probs - reference_log_probs).masked_fill_(probabilities == 0, 0.0)  # 0 · −∞ would not be 0
    return torch.linalg.vecdot(probabilities, difference).clamp_(min=0.0)


def keep_likeliest(logits: Tensor, support: Tensor, actions: Tensor | None = None) -> Tensor:
    """(n, V) logits, −inf but for the `support` (n,) largest of each row and for `actions` (n,) where given."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(logits.shape[-1], device=logits.device).expand_as(order)
    )
    kept = rank < support[:, None]
    if actions is not None:
        # an action that has fallen out takes the place of the last: no jump where two tokens change places, be it by
        # learning or by rounding alone
        missing = ~kept.gather(-1, actions[:, None])
        kept = kept & ~(missing & (rank == support[:, None] - 1))
        kept = kept.scatter(-1, actions[:, None], True)
    return logits.masked_fill(~kept, -torch.inf)
