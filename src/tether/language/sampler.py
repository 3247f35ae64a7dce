"""Drawing responses: batched, with a key-value cache, keeping what PPO needs of each token as it is drawn.

It knows token ids and probabilities, and text only to see whether a stop string has appeared.
N = responses, T = response tokens of the longest, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from tether.language.models import end_token_ids
from tether.language.policy import LanguagePolicy, decode_step, keep_likeliest


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn."""

    max_new_tokens: int = 64
    """A response that has not ended after so many tokens is truncated."""
    temperature: float = 1.0
    """Logits are divided by it. 0: the likeliest token is taken (for evaluation; PPO must sample)."""
    top_k: int | None = None
    """Draw from the k likeliest tokens alone."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020)."""
    stop: tuple[str, ...] = ()
    """A response ends, as if by eos, with the token that completes one of these strings; the string stays in it.
    Special tokens are strings here, too: "<|im_end|>"."""
    batch_size: int = 256
    """Responses that are drawn at once; more take turns."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected at least 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and at most 1, or none")
        if any(not text for text in self.stop):
            raise ValueError("stop has an empty string, which every response contains")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")


@dataclass(frozen=True)
class Samples:
    """Responses and what the policy thought while drawing them; tensors are on the CPU.

    Attributes:
        response_ids: N lists of token ids, the eos included where it was drawn.
        texts: N responses as text, without special tokens.
        log_probs: (N, T) of the drawn tokens under the distribution that was sampled; 0 beyond a response's end.
        values: (N, T), V of the state before each token.
        mask: (N, T) bool, the token exists.
        terminated: (N,) bool, ended by eos or a stop string; otherwise the length limit cut it off.
        support: (N, T) how many tokens top-k and top-p left to draw from; None without them.
    """

    response_ids: list[list[int]]
    texts: list[str]
    log_probs: Tensor
    values: Tensor
    mask: Tensor
    terminated: Tensor
    support: Tensor | None

    def select(self, rows: Sequence[int]) -> Samples:
        """These responses, in this order, cut to the longest among them."""
        index = torch.tensor(rows)
        longest = int(self.mask[index].sum(dim=1).max())
        return Samples(
            response_ids=[self.response_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            log_probs=self.log_probs[index, :longest],
            values=self.values[index, :longest],
            mask=self.mask[index, :longest],
            terminated=self.terminated[index],
            support=None if self.support is None else self.support[index, :longest],
        )


class Sampler:
    """Draws responses from a policy with a random generator of its own.

    Args:
        policy: whose model and value head are asked.
        tokenizer: for eos, texts and stop strings.
        config: see `SamplingConfig`.
        seed: of the generator; the same seed draws the same tokens.
    """

    def __init__(
        self, policy: LanguagePolicy, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, seed: int = 0
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.end_ids = torch.tensor(end_token_ids(policy.model, tokenizer))

    @torch.no_grad()
    def sample(self, prompt_ids: Sequence[Sequence[int]]) -> Samples:
        """One response to each prompt; repeat a prompt to have several."""
        if not prompt_ids or not all(len(ids) for ids in prompt_ids):
            raise ValueError("every prompt needs at least one token")
        size = self.config.batch_size
        parts = [self._sample_batch(prompt_ids[i : i + size]) for i in range(0, len(prompt_ids), size)]
        return join_samples(parts)

    def _sample_batch(self, prompt_ids: Sequence[Sequence[int]]) -> Samples:
        count, limit = len(prompt_ids), self.config.max_new_tokens
        tokens = torch.zeros(count, limit, dtype=torch.long)
        log_probs, values = torch.zeros(count, limit), torch.zeros(count, limit)
        support = torch.zeros(count, limit, dtype=torch.long) if self._truncates else None
        lengths = torch.full((count,), limit)
        terminated = torch.zeros(count, dtype=torch.bool)
        decoder = _Decoder(self.policy, prompt_ids)
        active = torch.arange(count)  # rows of the batch that the decoder still computes
        for step in range(limit):
            logits, value = decoder.next()
            # one uniform per response and step, drawn for finished ones too: the draws of a response do not
            # depend on when the others end
            uniforms = torch.rand(count, generator=self.generator, dtype=torch.float64)
            token, log_prob, kept = draw(logits, uniforms[active].to(logits.device), self.config)
            tokens[active, step] = token.cpu()
            log_probs[active, step], values[active, step] = log_prob.cpu(), value.cpu()
            if support is not None and kept is not None:
                support[active, step] = kept.cpu()
            ended = self._ended(tokens, active, step) & ~terminated[active]
            terminated[active[ended]] = True
            lengths[active[ended]] = step + 1
            if bool(terminated[active].all()) or step + 1 == limit:
                break
            alive = ~terminated[active]
            if int(alive.sum()) * 2 <= len(active):  # a smaller batch is worth the copy of the cache
                decoder.keep(alive.nonzero().squeeze(-1))
                active = active[alive]
            decoder.append(tokens[active, step])
        return self._collect(tokens, log_probs, values, support, lengths, terminated)

    @property
    def _truncates(self) -> bool:
        return self.config.temperature > 0 and (self.config.top_k is not None or self.config.top_p is not None)

    def _ended(self, tokens: Tensor, active: Tensor, step: int) -> Tensor:
        """(len(active),) bool: the token just drawn is an end token or completes a stop string."""
        ended = torch.isin(tokens[active, step], self.end_ids)
        if self.config.stop:
            # a token holds at least one byte, so a stop string lies within so many last tokens; one more keeps a
            # tokenizer that strips the leading space of what it decodes from stripping the string's own
            window = max(len(text.encode()) for text in self.config.stop) + 1
            tails = tokens[active, max(0, step + 1 - window) : step + 1]
            texts = self.tokenizer.batch_decode(tails, skip_special_tokens=False)  # "<|im_end|>" may be one of them
            ended |= torch.tensor([any(stop in text for stop in self.config.stop) for text in texts])
        return ended

    def _collect(
        self,
        tokens: Tensor,
        log_probs: Tensor,
        values: Tensor,
        support: Tensor | None,
        lengths: Tensor,
        terminated: Tensor,
    ) -> Samples:
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        response_ids = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return Samples(
            response_ids=response_ids,
            texts=self.tokenizer.batch_decode(response_ids, skip_special_tokens=True),
            log_probs=log_probs[:, :longest].masked_fill(~mask, 0.0),
            values=values[:, :longest].masked_fill(~mask, 0.0),
            mask=mask,
            terminated=terminated,
            support=None if support is None else support[:, :longest],
        )


class _Decoder:
    """The policy's model (and the critic's trunk where it has one) reading a batch of sequences token by token."""

    def __init__(self, policy: LanguagePolicy, prompt_ids: Sequence[Sequence[int]]) -> None:
        self.policy = policy
        longest = max(len(ids) for ids in prompt_ids)
        # flush right, so that every sequence grows in the same column
        self.tokens = torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=policy.device)
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=policy.device)
        self.mask = (torch.arange(longest, device=policy.device) >= longest - lengths[:, None]).long()
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.cache: Any = DynamicCache(config=policy.model.config)
        trunk = policy.value_trunk
        self.value_cache: Any = None if trunk is None else DynamicCache(config=trunk.config)

    def next(self) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of the next token and V (n,) of the state before it."""
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask, "position_ids": self.positions}
        logits, hidden, self.cache = decode_step(self.policy.model, inputs | {"past_key_values": self.cache})
        if self.policy.value_trunk is not None:
            output = self.policy.value_trunk(**inputs, past_key_values=self.value_cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1]
        return logits, self.policy.values_of(hidden)

    def append(self, tokens: Tensor) -> None:
        """The next token (n,) of every sequence."""
        self.tokens = tokens[:, None].to(self.mask.device)
        self.mask = torch.cat([self.mask, torch.ones_like(self.tokens)], dim=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences (indices into the batch) alone."""
        rows = rows.to(self.mask.device)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        for cache in (self.cache, self.value_cache):
            if cache is not None:
                cache.batch_select_indices(rows)


def draw(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens (n,), their log-probabilities (n,) and how many tokens each was drawn from (n,; None: all).

    The inverse of the cumulative distribution at `uniforms` (n,), float64 in [0, 1): exact up to the rounding of a
    float64 sum, and one random number per token.
    """
    if config.temperature == 0:
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        best = logits.argmax(dim=-1)
        return best, log_probs.gather(-1, best[:, None]).squeeze(-1), None
    scaled = logits.float() / config.temperature
    support = support_size(scaled, config.top_k, config.top_p)
    if support is not None:
        scaled = keep_likeliest(scaled, support)
    log_probs = torch.log_softmax(scaled, dim=-1)
    cumulative = log_probs.exp().double().cumsum(dim=-1)
    token = torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    # where rounding lifts u · total to the total itself, the last token with any probability is meant
    last = (log_probs > -torch.inf).long().cumsum(dim=-1).argmax(dim=-1)
    token = torch.minimum(token, last)
    return token, log_probs.gather(-1, token[:, None]).squeeze(-1), support


def support_size(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """(n,) how many of the likeliest tokens remain: at most k, and the fewest that hold p of the probability."""
    if top_k is None and top_p is None:
        return None
    size = torch.full((len(scaled),), scaled.shape[-1], device=scaled.device)
    if top_k is not None:
        size = size.clamp(max=top_k)
    if top_p is not None:
        ordered = scaled.softmax(dim=-1).sort(dim=-1, descending=True).values
        # a token stays if those before it hold less than p
        size = torch.minimum(size, (ordered.cumsum(dim=-1) - ordered < top_p).sum(dim=-1))
    return size


def join_samples(parts: Sequence[Samples]) -> Samples:
    """All of them, one after the other, padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.mask.shape[1] for part in parts)

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(t, (0, longest - t.shape[1])) for t in tensors])

    supports = [part.support for part in parts if part.support is not None]
    return Samples(
        response_ids=[ids for part in parts for ids in part.response_ids],
        texts=[text for part in parts for text in part.texts],
        log_probs=stack([part.log_probs for part in parts]),
        values=stack([part.values for part in parts]),
        mask=stack([part.mask for part in parts]),
        terminated=torch.cat([part.terminated for part in parts]),
        support=stack(supports) if supports else None,
    )
