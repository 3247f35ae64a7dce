"""Puts several samples into one row so that little is padding, and none sees another.

A packed row is told apart by its position ids, which start at 0 again with every sample: transformers builds the
block-diagonal causal mask from them. Not every architecture does, so `check_packing` asks the model itself.
Knows lengths, token ids and targets; nothing of files, losses or optimizers.

B = rows, L = tokens of the longest row.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import UserError

# Rows may be this many times as long as the batch's longest sample. Wider rows hardly hold less padding (with lengths
# like those of GSM8K and 32 samples: 16 % at 1, 7 % at 2, 10 % at 4), but attention costs the square of their width.
ROW_FACTOR = 2


@dataclass(frozen=True)
class TokenizedSamples:
    """Samples of different lengths, end to end in flat arrays so that a million of them stay cheap.

    Attributes:
        token_ids: (tokens,) int64, all samples one after the other.
        is_target: (tokens,) bool, the token is predicted and learned; False for what the model only reads.
        starts: (samples + 1,) int64, sample i is `token_ids[starts[i]:starts[i + 1]]`.
    """

    token_ids: np.ndarray
    is_target: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(samples,) int64: tokens of each sample."""
        return np.diff(self.starts)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """(samples,) int64: tokens of each sample that are learned."""
        return np.diff(np.concatenate([[0], np.cumsum(self.is_target)])[self.starts])

    def select(self, chosen: np.ndarray) -> TokenizedSamples:
        """The samples with these indices, in this order."""
        lengths = self.lengths[chosen]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.starts[chosen] - starts[:-1], lengths) + np.arange(starts[-1])
        return TokenizedSamples(self.token_ids[places], self.is_target[places], starts)

    @classmethod
    def from_lists(cls, token_ids: Sequence[Sequence[int]], is_target: Sequence[Sequence[bool]]) -> TokenizedSamples:
        """From one list of token ids and one list of target flags per sample; the two have equal lengths."""
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in token_ids], dtype=np.int64)]).astype(np.int64)
        flat = np.fromiter((token for ids in token_ids for token in ids), dtype=np.int64, count=int(starts[-1]))
        targets = np.fromiter((flag for flags in is_target for flag in flags), dtype=bool, count=int(starts[-1]))
        # Nothing comes before the first token of a sample, so nothing can predict it.
        targets[starts[:-1][np.diff(starts) > 0]] = False
        return cls(flat, targets, starts)


@dataclass(frozen=True)
class Rows:
    """Samples laid out as a rectangle for one forward pass.

    Attributes:
        token_ids: (B, L) int64; the end of a row is filled with some token of the row, which no sample reads.
        position_ids: (B, L) int64 that start at 0 with every sample.
        is_target: (B, L) bool.
        packed: some row holds more than one sample, so that the model must be given the position ids.
    """

    token_ids: Tensor
    position_ids: Tensor
    is_target: Tensor
    packed: bool


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Spread samples over rows of at most `capacity` tokens by best-fit decreasing (Johnson et al. 1974).

    Returns the sample indices of each row. The same lengths always give the same rows: ties keep the given order.
    A sample longer than `capacity` is a ValueError.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending: the first that is large enough fits best
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample {index} has {length} tokens, more than the {capacity} of a row")
        position = bisect_left(free, (length, 0))
        if position == len(free):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = free.pop(position)
        rows[row].append(index)
        if left > length:
            insort(free, (left - length, row))
    return rows


def lay_out(samples: TokenizedSamples, chosen: np.ndarray, packing: bool, microbatch_tokens: int) -> Iterator[Rows]:
    """The chosen samples as microbatches of at most `microbatch_tokens` tokens, filling included (one row at least).

    Args:
        samples: all samples.
        chosen: (n,) indices into `samples`.
        packing: let samples share rows; otherwise each has one of its own.
        microbatch_tokens: rows times the length of the longest.
    """
    lengths = samples.lengths[chosen]
    if packing:
        rows = best_fit(lengths.tolist(), ROW_FACTOR * int(lengths.max()))
    else:
        rows = [[index] for index in range(len(chosen))]
    row_lengths = [int(lengths[row].sum()) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: -row_lengths[row])
    start = 0
    while start < len(order):
        width = row_lengths[order[start]]
        count = max(1, microbatch_tokens // width)
        group = order[start : start + count]
        yield _rectangle(samples, [chosen[rows[row]] for row in group], width)
        start += count


def _rectangle(samples: TokenizedSamples, rows: Sequence[np.ndarray], width: int) -> Rows:
    token_ids = np.empty((len(rows), width), dtype=np.int64)
    # Position 0 all along the filling makes each of its tokens a sequence of its own: it attends to itself alone.
    position_ids = np.zeros((len(rows), width), dtype=np.int64)
    is_target = np.zeros((len(rows), width), dtype=bool)
    counting = np.arange(width)
    for row, members in enumerate(rows):
        column = 0
        for start, end in zip(samples.starts[members].tolist(), samples.starts[members + 1].tolist(), strict=True):
            stop = column + end - start
            token_ids[row, column:stop] = samples.token_ids[start:end]
            is_target[row, column:stop] = samples.is_target[start:end]
            position_ids[row, column:stop] = counting[: end - start]
            column = stop
        token_ids[row, column:] = token_ids[row, 0]
    packed = any(len(members) > 1 for members in rows)
    return Rows(torch.from_numpy(token_ids), torch.from_numpy(position_ids), torch.from_numpy(is_target), packed)


def check_packing(model: PreTrainedModel) -> None:
    """A UserError says what goes wrong where the model does not keep packed samples apart: see `packing_fault`."""
    fault = packing_fault(model)
    if fault is not None:
        name = type(model).__name__
        raise UserError(
            f"{name} cannot take packed samples ({fault}): set `packing` to False, which gives each sample its own row"
        )


def packing_fault(model: PreTrainedModel) -> str | None:
    """Ask the model whether packed samples stay apart; None where they do, else what goes wrong.

    Two samples share a row. The second's logits must not change when the first's tokens do (nothing leaks), and must be
    those that it gets alone (positions restart). Convolutions, state spaces, alibi and learned positions counted from
    the attention mask fail this: LFM2, Mamba, BLOOM, Falcon with alibi and OPT do, in transformers 5.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "its forward pass takes no position_ids"
    device = model.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first = torch.arange(7, device=device) * 5 % vocabulary
    second = torch.arange(9, device=device) * 3 % vocabulary
    positions = torch.cat([torch.arange(7, device=device), torch.arange(9, device=device)])
    both = torch.stack([torch.cat([first, second]), torch.cat([(first + 1) % vocabulary, second])])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=both, position_ids=positions.expand(2, -1), use_cache=False).logits[:, 7:].float()
        alone = model(input_ids=second[None], use_cache=False).logits[0].float()
    model.train(was_training)
    scale = float(alone.abs().max()) + 1e-12
    leak = float((packed[0] - packed[1]).abs().max()) / scale
    shift = float((packed[0] - alone).abs().max()) / scale
    # Rounding alone may move the logits (another kernel, another order of sums), by no more than this.
    leak_limit, shift_limit = (1e-5, 1e-4) if model.dtype == torch.float32 else (1e-2, 5e-2)
    if not leak <= leak_limit:
        return f"a sample sees the one before it: its logits move by {leak:.1e} of their size"
    if not shift <= shift_limit:
        return f"positions do not restart: logits differ by {shift:.1e} of their size"
    return None
