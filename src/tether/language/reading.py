"""A causal LM reads sequences: hidden states, log-probabilities and entropies at the tokens of the responses.

Sequences of different lengths share rows where the model keeps them apart, so that hardly any padding is computed.
It knows tokens and models; nothing of values, rewards or of how responses are drawn.
N = episodes, T = response tokens of the longest, L = tokens of the longest sequence, n = response tokens in all,
H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.language.context import TokenContext
from tether.language.head import Head, action_log_probs
from tether.language.layers import LearningLayers
from tether.language.norms import use_fast_norms
from tether.language.packing import ROW_FACTOR, best_fit, packing_fault
from tether.language.products import bfloat16_products, use_fast_products

# Packing costs the masks that packed rows need, and a moment in Python: worth it from this share of a batch being
# padding, and from so many tokens of it.
PADDED_SHARE, PADDED_TOKENS = 0.1, 512


@dataclass(frozen=True)
class Reading:
    """What a model says of the tokens of the responses, in row order.

    Attributes:
        log_probs: (n,) of each, float32.
        entropy: (n,) of the distributions that they come from, in nats.
        hidden: (n, H), the states before them.
    """

    log_probs: Tensor
    entropy: Tensor
    hidden: Tensor


class Reader:
    """Reads with a model, by the fastest way that the model allows.

    Args:
        model: its linear layers and norms run as in `tether.language.products` and `norms` from then on.
        checkpointing: compute activations again in the backward pass instead of keeping them.
        compiled: run the layers through `torch.compile` where gradients are wanted.
    """

    def __init__(self, model: PreTrainedModel, checkpointing: bool = False, compiled: bool = False) -> None:
        self.model = model
        self.layers = LearningLayers(model, checkpointing, compiled)
        use_fast_products(model, output_head(model))
        use_fast_norms(model)
        self.head = Head.of(model)

    @cached_property
    def packs(self) -> bool:
        """Whether sequences may share a row."""
        with bfloat16_products(self.model.device, enabled=False):
            return packing_fault(self.model) is None

    def layout(self, context: TokenContext) -> Layout:
        """How the sequences go through the model."""
        return packed_layout(context) if wasteful(context) and self.packs else plain_layout(context)

    def read(self, context: TokenContext, actions: Tensor, mask: Tensor, layout: Layout | None = None) -> Reading:
        """Log-probabilities and entropies of `actions` (N, T) where `mask` (N, T) is True, differentiable."""
        layout = layout or self.layout(context)
        rows, steps = mask.nonzero(as_tuple=True)
        places = layout.before(context, rows, steps)
        tokens = actions[rows, steps]
        if self.head is not None and context.support is None:
            hidden = self.hidden_at(layout, places)
            log_probs, entropy = self.head.log_probs(hidden, tokens, context.temperature)
        else:
            logits, hidden = self.logits_at(layout, places)
            support = None if context.support is None else context.support[rows, steps]
            log_probs, entropy = action_log_probs(logits, tokens, context.temperature, support)
        return Reading(log_probs, entropy, hidden)

    def states(self, context: TokenContext, mask: Tensor) -> Tensor:
        """(n, H) states before the tokens of the responses, those where `mask` (N, T) is True."""
        layout = self.layout(context)
        return self.hidden_at(layout, layout.before(context, *mask.nonzero(as_tuple=True)))

    def logits(self, context: TokenContext, mask: Tensor) -> Tensor:
        """(n, V) logits of the tokens of the responses, those where `mask` (N, T) is True."""
        layout = self.layout(context)
        return self.logits_at(layout, layout.before(context, *mask.nonzero(as_tuple=True)))[0]

    def hidden_at(self, layout: Layout, places: tuple[Tensor, Tensor]) -> Tensor:
        """(n, H) states at these places, which the output layer would turn into logits; it is not asked."""
        seen: list[Tensor] = []

        def choose_none(hidden: Tensor) -> Tensor:
            seen.append(hidden[places])
            return hidden[:0]

        self._forward(layout, choose_none)
        return seen[0]

    def logits_at(self, layout: Layout, places: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(n, V) logits at these places alone, and the states (n, H) that they come from."""
        seen: list[Tensor] = []

        def choose(hidden: Tensor) -> Tensor:
            seen.append(hidden[places])
            return seen[0]

        return self._forward(layout, choose).logits, seen[0]

    def _forward(self, layout: Layout, choose: Callable[[Tensor], Tensor]) -> Any:
        with head_reads(self.model, choose), self.layers.in_use():
            return self.model(**layout.inputs, use_cache=False)


@dataclass(frozen=True)
class Layout:
    """Sequences as they go through a model.

    Attributes:
        inputs: keyword arguments of a transformers forward pass.
        rows: (N,) the row that holds each sequence.
        shift: (N,) columns by which it has moved to the right of where its context has it.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    shift: Tensor

    def before(self, context: TokenContext, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the states (n,) that predict these response tokens: one to the left of each."""
        return self.rows[rows], context.starts[rows] + steps - 1 + self.shift[rows]


def plain_layout(context: TokenContext) -> Layout:
    """Each sequence has a row of its own.

    Padding on the right alone needs no mask, for no token sees what stands to its right; attention is fastest then.
    """
    mask = context.attention_mask
    inputs = {"input_ids": context.tokens}
    if not bool(mask[:, 0].all()):
        inputs["attention_mask"] = mask.long()
        inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    rows = torch.arange(len(mask), device=mask.device)
    return Layout(inputs, rows, torch.zeros_like(rows))


def packed_layout(context: TokenContext) -> Layout:
    """Sequences share rows, told apart by positions that begin at 0 with each (see `tether.language.packing`)."""
    mask, device = context.attention_mask, context.tokens.device
    lengths = context.lengths.tolist()
    rows = best_fit(lengths, ROW_FACTOR * max(lengths))
    width = max(sum(lengths[sequence] for sequence in members) for members in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.zeros(len(rows), width, dtype=torch.long)  # each token of the filling is a sequence of its own
    row_of, column_of = [0] * len(lengths), [0] * len(lengths)
    flat = context.tokens[mask].split(lengths)
    for row, members in enumerate(rows):
        column = 0
        for sequence in members:
            end = column + lengths[sequence]
            tokens[row, column:end] = flat[sequence]
            positions[row, column:end] = torch.arange(lengths[sequence])
            row_of[sequence], column_of[sequence] = row, column
            column = end
    first = mask.long().argmax(dim=1)
    inputs = {"input_ids": tokens.to(device), "position_ids": positions.to(device)}
    return Layout(inputs, torch.tensor(row_of, device=device), torch.tensor(column_of, device=device) - first)


def wasteful(context: TokenContext) -> bool:
    """Whether so much of the context is padding that packing is worth it."""
    columns = context.attention_mask.numel()
    return columns - int(context.attention_mask.sum()) >= max(PADDED_TOKENS, PADDED_SHARE * columns)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into logits. Raises TypeError where it is no linear layer."""
    head: Any = model.get_output_embeddings()
    if not isinstance(getattr(head, "base_layer", head), nn.Linear):  # the first where it has an adapter
        raise TypeError(f"{type(model).__name__} has no linear output layer, expected a causal language model")
    return head


@contextmanager
def head_reads(model: PreTrainedModel, choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within this context the output layer of `model` reads only what `choose` returns of the hidden states (N, L, H).

    Whatever the model does to its logits afterwards (scaling, capping) is done to the chosen ones, so that this holds
    for every architecture.
    """
    handle = output_head(model).register_forward_pre_hook(lambda _, arguments: (choose(arguments[0]),))
    try:
        yield
    finally:
        handle.remove()


def decode_step(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Logits (N, V) and hidden states (N, H) of the last column, and the cache, grown by the columns of `inputs`."""
    seen: list[Tensor] = []

    def last(hidden: Tensor) -> Tensor:
        seen.append(hidden[:, -1])
        return seen[0]

    with head_reads(model, last):
        output = model(**inputs, use_cache=True)
    return output.logits, seen[0], output.past_key_values
