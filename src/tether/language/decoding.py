"""A causal LM (and the critic's trunk) reading a batch of sequences token by token, with a key-value cache.

Two decoders give the same numbers. `PlainDecoder` is the definition: transformers' own cache, one batch after another.
`SlotDecoder` is the fast one: keys and values lie in buffers that are made once, a row that has ended leaves at once, a
waiting prompt takes its place, and prompts are read many at a time, those that are alike once.

n = rows that are read, B = slots, H = heads, D = size of a head, L = columns of the cache, V = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tether.errors import UserError, reason
from tether.language.policy import LanguagePolicy
from tether.language.reading import decode_step

SLACK = 64  # columns of a buffer beyond the longest sequence; it is tidied once in so many steps


@torch.no_grad()
def check_decoding(model: PreTrainedModel) -> None:
    """Ask a model for two tokens and one more, as the decoders do.

    Raises:
        UserError: it keeps what it has read in a form of its own, as Mamba, RWKV and MiniMax do in transformers 5.
    """
    try:
        cache: Any = DynamicCache(config=model.config)
        for columns in (2, 3):
            tokens = torch.zeros(2, 2 if columns == 2 else 1, dtype=torch.long, device=model.device)
            inputs = _inputs(tokens, torch.zeros(2, dtype=torch.long), columns)
            _, _, cache = decode_step(model, inputs | {"past_key_values": cache})
            if not isinstance(cache, DynamicCache):
                raise TypeError(f"its cache is {type(cache).__name__}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model raises whatever it likes for a cache that it does not know
        raise UserError(
            f"{type(model).__name__} cannot be sampled from: it keeps what it has read in a form of its own, not in "
            f"the cache of transformers ({reason(error)}); use a model of another architecture"
        ) from error


class Decoder(ABC):
    """Rows of sequences that grow by one token at each step.

    Args:
        policy: whose model and critic read.
        prompt_ids: prompts in the order in which they will be admitted, one for each response.
        capacity: the most rows at once.
        most_tokens: the most that are drawn after a prompt.

    Attributes:
        waiting: prompts that have not been admitted.
        rows: sequences that grow now.
    """

    def __init__(
        self, policy: LanguagePolicy, prompt_ids: Sequence[Sequence[int]], capacity: int, most_tokens: int
    ) -> None:
        self.policy = policy
        self.capacity = capacity
        self.longest_prompt, self.most_tokens = max(map(len, prompt_ids)), most_tokens
        self.waiting = deque(tuple(ids) for ids in prompt_ids)
        self.rows = 0

    @property
    @abstractmethod
    def room(self) -> int:
        """How many rows may be admitted now."""

    @abstractmethod
    def admit(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` prompts in new rows, after those that there are.

        Returns:
            Logits (count, V) of the first tokens of the new rows and V (count,) of the states before them.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read the next token (n,) of every row; returns logits (n, V) of those that follow and V (n,) before them."""

    @abstractmethod
    def keep(self, alive: Tensor) -> Tensor:
        """Let go of the rows where `alive` (n,) is False; returns, for each row that stays, which one it was."""

    def _read(self, inputs: dict[str, Any], caches: _Caches) -> tuple[Tensor, Tensor]:
        logits, hidden, _ = decode_step(self.policy.model, inputs | {"past_key_values": caches.policy})
        if self.policy.value_trunk is not None:
            output = self.policy.value_trunk(**inputs, past_key_values=caches.critic, use_cache=True)
            hidden = output.last_hidden_state[:, -1]
        return logits, self.policy.values_of(hidden)


class _Caches:
    """One cache for the policy, one for the critic's own trunk where it has one."""

    def __init__(self, policy: LanguagePolicy, make: Any) -> None:
        self.policy = make(policy.model)
        self.critic = None if policy.value_trunk is None else make(policy.value_trunk)

    def all(self) -> list[Any]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]


@dataclass(frozen=True)
class _Prompts:
    """Prompts that have been read: the number of each, where it begins in `columns` columns, its states and logits."""

    number: dict[tuple[int, ...], int]
    columns: int
    starts: Tensor  # (p,)
    caches: _Caches
    logits: Tensor  # (p, V)
    values: Tensor  # (p,)


def _padded(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts set flush right (m, L), so that all grow in the same column, and the columns (m,) where they begin."""
    longest = max(len(ids) for ids in prompt_ids)
    tokens = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    return tokens, torch.tensor([longest - len(ids) for ids in prompt_ids])


def _inputs(tokens: Tensor, starts: Tensor, end: int) -> dict[str, Any]:
    """What a forward pass needs to read `tokens` (n, q) into the columns before `end`, rows beginning at `starts`.

    Where all rows begin at column 0 there is no padding, and attention is fastest without a mask.
    """
    padded = bool(starts.any())
    starts = starts.to(tokens.device)[:, None]
    columns = torch.arange(end, device=tokens.device)
    positions = (columns[end - tokens.shape[1] :] - starts).clamp(min=0)
    inputs: dict[str, Any] = {"input_ids": tokens, "position_ids": positions}
    if padded:
        inputs["attention_mask"] = (columns >= starts).long()
    return inputs


class PlainDecoder(Decoder):
    """Batch after batch, with the cache that transformers makes for the model: right for every architecture."""

    @property
    def room(self) -> int:
        """All or nothing."""
        return 0 if self.rows else self.capacity

    def admit(self, count: int) -> tuple[Tensor, Tensor]:
        """Read a new batch."""
        self._caches = _Caches(self.policy, lambda model: DynamicCache(config=model.config))
        tokens, self._starts = _padded([self.waiting.popleft() for _ in range(count)], self.policy.device)
        self.rows, self._end = tokens.shape
        return self._read(_inputs(tokens, self._starts, self._end), self._caches)

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One more column."""
        self._end += 1
        return self._read(_inputs(tokens[:, None], self._starts, self._end), self._caches)

    def keep(self, alive: Tensor) -> Tensor:
        """The others are copied together."""
        kept = alive.nonzero().squeeze(-1)
        self.rows, self._starts = len(kept), self._starts[kept]
        if self.rows:
            for cache in self._caches.all():
                cache.reorder_cache(kept.to(self.policy.device))
        return kept


class SlotDecoder(Decoder):
    """Buffers made once. All rows end in the same column; a row that leaves is overwritten by one from the end.

    A prompt that is admitted later is set flush right against the column in which the others end. Columns that no row
    needs any more are taken off in front when the end of the buffers is reached.
    """

    def __init__(
        self, policy: LanguagePolicy, prompt_ids: Sequence[Sequence[int]], capacity: int, most_tokens: int
    ) -> None:
        super().__init__(policy, prompt_ids, capacity, most_tokens)
        self._columns = self.longest_prompt + most_tokens + SLACK
        self._caches = _Caches(policy, lambda model: _SlotCache(model, capacity, self._columns))
        self._starts = torch.zeros(capacity, dtype=torch.long)
        self._end = self.longest_prompt
        self._ahead: _Prompts | None = None

    @staticmethod
    def fits(policy: LanguagePolicy) -> bool:
        """Whether all that the policy remembers of the past are keys and values of attention."""
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        return all(
            type(layer) in kinds for model in policy.models() for layer in DynamicCache(config=model.config).layers
        )

    @property
    def room(self) -> int:
        """The slots that are free."""
        return self.capacity - self.rows

    def admit(self, count: int) -> tuple[Tensor, Tensor]:
        """Copy states of prompts to the slots of their responses; prompts are read ahead, as many as there are slots.

        A weight is fetched from memory once for all of them, which for a few prompts takes as long as for one.
        """
        parts = []
        while count:
            if self._ahead is None or self.waiting[0] not in self._ahead.number:
                self._ahead = self._read_ahead()
            which: list[int] = []
            while len(which) < count and self.waiting and self.waiting[0] in self._ahead.number:
                which.append(self._ahead.number[self.waiting.popleft()])
            parts.append(self._place(self._ahead, torch.tensor(which)))
            count -= len(which)
        if not self.waiting:
            self._ahead = None
        return torch.cat([logits for logits, _ in parts]), torch.cat([values for _, values in parts])

    def _read_ahead(self) -> _Prompts:
        """The next distinct prompts."""
        self._ahead = None  # its memory first
        distinct = list(islice(dict.fromkeys(self.waiting), self.capacity))
        tokens, starts = _padded(distinct, self.policy.device)
        caches = _Caches(self.policy, lambda model: _whole_cache(model))
        logits, values = self._read(_inputs(tokens, starts, tokens.shape[1]), caches)
        number = {ids: index for index, ids in enumerate(distinct)}
        return _Prompts(number, tokens.shape[1], starts, caches, logits, values)

    def _place(self, prompts: _Prompts, which: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the next slots with the prompts of these numbers."""
        slots = slice(self.rows, self.rows + len(which))
        self._starts[slots] = self._end - prompts.columns + prompts.starts[which]
        which = which.to(self.policy.device)
        for cache, source in zip(self._caches.all(), prompts.caches.all(), strict=True):
            cache.write(slots, self._end, source, which)
        self.rows = slots.stop
        return prompts.logits[which], prompts.values[which]

    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One more column."""
        if self._end == self._columns:
            self._tidy()
        starts = self._starts[: self.rows]
        first = int(starts.min())
        for cache in self._caches.all():
            cache.show(self.rows, first, self._end)
        self._end += 1
        return self._read(_inputs(tokens[:, None], starts - first, self._end - first), self._caches)

    def keep(self, alive: Tensor) -> Tensor:
        """Rows from the end are copied over those that leave."""
        order = torch.arange(self.rows)
        self.rows = int(alive.sum())
        holes = (~alive[: self.rows]).nonzero().squeeze(-1)
        if len(holes):
            movers = alive[self.rows :].nonzero().squeeze(-1) + self.rows
            order[holes], self._starts[holes] = movers, self._starts[movers]
            for cache in self._caches.all():
                cache.move(movers.to(self.policy.device), holes.to(self.policy.device), self._end)
        return order[: self.rows]

    def _tidy(self) -> None:
        """Take off columns in front of every row's beginning, but leave the longest prompt its room."""
        off = min(int(self._starts[: self.rows].min()), self._end - self.longest_prompt)
        for cache in self._caches.all():
            cache.shift(self.rows, off, self._end)
        self._starts -= off
        self._end -= off


class _SlotLayer(DynamicLayer):
    """Keys and values (B, H, L, D) of one layer, of which attention sees the rows and columns in use."""

    def __init__(self, capacity: int, columns: int) -> None:
        super().__init__()
        self.capacity, self.columns = capacity, columns
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.shown, self.first, self.end = 0, 0, 0

    def make(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers, made in the shape that the first states ask for."""
        if self.buffers is None:
            keys_buffer, values_buffer = (
                state.new_zeros(self.capacity, state.shape[1], self.columns, state.shape[3]) for state in (keys, values)
            )
            self.buffers = (keys_buffer, values_buffer)
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return self.buffers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of one more column; returns all that attention may see."""
        buffers = self.make(key_states, value_states)
        end = self.end + key_states.shape[2]
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[: self.shown, :, self.end : end] = states
        keys, values = (buffer[: self.shown, :, self.first : end] for buffer in buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Columns that are there before the next."""
        return self.end - self.first


class _SlotCache(Cache):
    """The buffers of all layers."""

    def __init__(self, model: PreTrainedModel, capacity: int, columns: int) -> None:
        count = len(DynamicCache(config=model.config).layers)
        self.slots = [_SlotLayer(capacity, columns) for _ in range(count)]
        super().__init__(layers=list(self.slots))

    def show(self, rows: int, first: int, end: int) -> None:
        """What the next step sees: rows from 0, columns from `first`; it writes into column `end`."""
        for layer in self.slots:
            layer.shown, layer.first, layer.end = rows, first, end

    def write(self, rows: slice, end: int, source: Cache, which: Tensor) -> None:
        """Copy the sequences `which` (m,) of `source` into `rows`, flush right against column `end`."""
        for layer, read in zip(self.slots, source.layers, strict=True):
            states: Any = (read.keys, read.values)
            for buffer, state in zip(layer.make(*states), states, strict=True):
                buffer[rows, :, end - state.shape[2] : end] = state[which]

    def move(self, origin: Tensor, to: Tensor, end: int) -> None:
        """Copy rows over others, up to column `end`."""
        for buffer in self._all():
            buffer[to, :, :end] = buffer[origin, :, :end]

    def shift(self, rows: int, off: int, end: int) -> None:
        """Move all columns up to `end` to the left by `off`."""
        for buffer in self._all():
            buffer[:rows, :, : end - off] = buffer[:rows, :, off:end].clone()

    def _all(self) -> list[Tensor]:
        return [buffer for layer in self.slots for buffer in layer.buffers or ()]


def _whole_cache(model: PreTrainedModel) -> Cache:
    """A cache that keeps every column, also those that a sliding window will not look at again."""
    return Cache(layers=[DynamicLayer() for _ in DynamicCache(config=model.config).layers])
