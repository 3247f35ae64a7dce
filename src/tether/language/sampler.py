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
from transformers import PreTrainedTokenizerBase

from tether.episode import short_repr
from tether.language.context import TokenContext
from tether.language.decoding import Decoder, PlainDecoder, SlotDecoder, check_decoding
from tether.language.head import keep_likeliest
from tether.language.likeliest import alternatives
from tether.language.models import end_token_ids
from tether.language.policy import LanguagePolicy
from tether.language.products import packed_weights
from tether.language.texts import Texts
from tether.positions import settle_positions

WITHIN = 64  # tokens before a window, so that it need not begin within a character
AT_ONCE = 8  # prompts wait until one in so many places is free


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
    Special tokens are strings here, too: "<|im_end|>"; like eos these are not part of the text."""
    batch_size: int = 256
    """Responses that are drawn at once; when one has ended, the next takes its place."""
    alternatives: int = 5
    """In training, so many of the likeliest tokens of each step are stored with the episode. 0: none."""

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
        if self.alternatives < 0:
            raise ValueError(f"alternatives is {self.alternatives}, expected 0 or more")


@dataclass(frozen=True, repr=False)
class Samples:
    """Responses and what the policy thought while drawing them; tensors are on the CPU.

    Attributes:
        response_ids: N lists of token ids, the eos included where it was drawn.
        texts: N responses as text, less what begins or ends one (see `Texts`).
        log_probs: (N, T) of the drawn tokens under the distribution that was sampled; 0 beyond a response's end.
        values: (N, T), V of the state before each token.
        mask: (N, T) bool, the token exists.
        terminated: (N,) bool, ended by eos or a stop string; otherwise the length limit cut it off.
        support: (N, T) how many tokens top-k and top-p left to draw from; None without them.
        likeliest: (N, T, k) the likeliest tokens of each step, likeliest first; None where they were not asked for.
        likeliest_probabilities: (N, T, k) of these under the distribution that was sampled, which gives 0 to what
            top-k and top-p left out.
    """

    response_ids: list[list[int]]
    texts: list[str]
    log_probs: Tensor
    values: Tensor
    mask: Tensor
    terminated: Tensor
    support: Tensor | None
    likeliest: Tensor | None = None
    likeliest_probabilities: Tensor | None = None

    def __repr__(self) -> str:
        first = f", the first {short_repr(self.texts[0])}" if self.texts else ""
        return (
            f"Samples({len(self.texts)} responses, {int(self.mask.sum())} tokens, {int(self.terminated.sum())} "
            f"terminated{first})"
        )

    def select(self, rows: Sequence[int]) -> Samples:
        """These responses, in this order, cut to the longest among them."""
        index = torch.tensor(rows)
        longest = int(self.mask[index].sum(dim=1).max())
        stepwise: dict[str, Any] = {}
        for name in _STEPWISE:
            tensor = getattr(self, name)
            stepwise[name] = None if tensor is None else tensor[index, :longest]
        return Samples(
            response_ids=[self.response_ids[row] for row in rows],
            texts=[self.texts[row] for row in rows],
            terminated=self.terminated[index],
            **stepwise,
        )


_STEPWISE = ("log_probs", "values", "mask", "support", "likeliest", "likeliest_probabilities")


class NotANumberError(FloatingPointError):
    """The model gives no probabilities, but NaN.

    Attributes:
        index: of the prompt among those that were sampled from.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Sampler:
    """Draws responses from a policy with a random generator of its own.

    Args:
        policy: whose model and value head are asked.
        tokenizer: for eos, texts and stop strings.
        config: see `SamplingConfig`.
        seed: of the generator; the same seed draws the same tokens.

    Raises:
        UserError: the model cannot be sampled from.
    """

    def __init__(
        self, policy: LanguagePolicy, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig, seed: int = 0
    ) -> None:
        self.policy = policy
        self.tokenizer = tokenizer
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        check_decoding(policy.model)
        added = tokenizer.added_tokens_encoder
        stops = {added[text] for text in config.stop if text in added}
        ends = sorted({*end_token_ids(policy.model, tokenizer), *stops})
        self.end_ids = torch.tensor(ends)
        self.texts = Texts(tokenizer, ends, config.stop)

    def read_by_learner(self, prompt_ids: Sequence[Sequence[int]], samples: Samples) -> tuple[TokenContext, Tensor]:
        """What was drawn as the policy evaluates it, on its device: the context of N responses, their (N, T) tokens."""
        device, ids = self.policy.device, samples.response_ids
        support = None if samples.support is None else samples.support.to(device)
        context = TokenContext.from_ids(prompt_ids, ids, self.config.temperature, support, device)
        actions = torch.zeros(samples.mask.shape, dtype=torch.long)
        for row, own in zip(actions, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        return context, actions.to(device)

    @torch.no_grad()
    def sample(self, prompt_ids: Sequence[Sequence[int]], alternatives: bool = False) -> Samples:
        """One response to each prompt; repeat a prompt to have several, side by side: it is read once then.

        Args:
            prompt_ids: token ids of each prompt.
            alternatives: keep the likeliest tokens of each step, as many as the configuration says.

        Raises:
            NotANumberError: of a prompt, the logits or the value of its response are NaN.
        """
        if not prompt_ids or not all(len(ids) for ids in prompt_ids):
            raise ValueError("every prompt needs at least one token")
        settle_positions(self.policy.models(), max(map(len, prompt_ids)) + self.config.max_new_tokens)
        drawn = _Drawn(len(prompt_ids), self.config.max_new_tokens, self._truncates, self.generator)
        drawn.alternatives = self.config.alternatives if alternatives else 0
        with self.policy.precision(), packed_weights(self.policy.models(), self._rows(prompt_ids)):
            self._draw_all(drawn, prompt_ids)
        return self._samples(drawn)

    def _draw_all(self, drawn: _Drawn, prompt_ids: Sequence[Sequence[int]]) -> None:
        decoder = self._decoder(prompt_ids)
        active = torch.zeros(0, dtype=torch.long)  # the response that each row of the decoder belongs to
        begun = 0
        while decoder.waiting or len(active):
            room = min(decoder.room, len(decoder.waiting))
            # a few prompts at a time are read almost as fast as one
            if room and (room >= decoder.capacity // AT_ONCE or room == len(decoder.waiting) or not len(active)):
                fresh = torch.arange(begun, begun + room)
                begun += room
                logits, values = decoder.admit(room)
                self._take(drawn, fresh, logits, values)
                active = torch.cat([active, fresh])
            else:
                logits, values = decoder.step(drawn.last(active).to(self.policy.device))
                self._take(drawn, active, logits, values)
            alive = ~drawn.over[active]
            if not bool(alive.all()):
                active = active[decoder.keep(alive)]

    def _decoder(self, prompt_ids: Sequence[Sequence[int]]) -> Decoder:
        kind = SlotDecoder if SlotDecoder.fits(self.policy) else PlainDecoder
        return kind(self.policy, prompt_ids, self._rows(prompt_ids), self.config.max_new_tokens)

    def _rows(self, prompt_ids: Sequence[Sequence[int]]) -> int:
        return min(self.config.batch_size, len(prompt_ids))

    def _take(self, drawn: _Drawn, rows: Tensor, logits: Tensor, values: Tensor) -> None:
        """Draw the next token of each of these responses."""
        steps = drawn.lengths[rows]
        # one uniform per response and step, whatever else is drawn beside it
        uniforms = drawn.uniforms[rows, steps].to(logits.device)
        tokens, log_probs, support = draw(logits, uniforms, self.config)
        drawn.tokens[rows, steps] = tokens.cpu()
        drawn.log_probs[rows, steps], drawn.values[rows, steps] = log_probs.cpu(), values.cpu()
        self._check(drawn, rows, steps)
        if drawn.support is not None and support is not None:
            drawn.support[rows, steps] = support.cpu()
        if drawn.alternatives:
            known = (tokens, log_probs, support, self.config.temperature)
            drawn.keep(rows, steps, *alternatives(logits, *known, drawn.alternatives))
        drawn.lengths[rows] += 1
        drawn.terminated[rows] = self._ended(drawn, rows)
        drawn.over[rows] = drawn.terminated[rows] | (drawn.lengths[rows] == self.config.max_new_tokens)

    def _check(self, drawn: _Drawn, rows: Tensor, steps: Tensor) -> None:
        """NaN or +inf among the logits, or all of them −inf, make the log-probability of whatever is drawn NaN."""
        for name, numbers in (("logits", drawn.log_probs), ("values of the critic", drawn.values)):
            if (broken := numbers[rows, steps].isnan()).any():
                place = int(broken.nonzero()[0])
                where = f"at token {int(steps[place]) + 1} of the response"
                remedy = "look at its weights" if self.policy.exact else "take dtype float32, or look at its weights"
                raise NotANumberError(
                    int(rows[place]),
                    f"the {name} are NaN or infinite in {self.policy.numbers}, {where}: "
                    f"numbers overflow in the model; {remedy}",
                )

    @property
    def _truncates(self) -> bool:
        return self.config.temperature > 0 and (self.config.top_k is not None or self.config.top_p is not None)

    def _ended(self, drawn: _Drawn, rows: Tensor) -> Tensor:
        """(len(rows),) bool: the token drawn last is an end token or completes a stop string."""
        ended = torch.isin(drawn.last(rows), self.end_ids)
        if self.config.stop:
            # a token holds at least one byte, so a stop string lies within so many last tokens
            window = max(len(text.encode()) for text in self.config.stop)
            places = zip(rows.tolist(), drawn.lengths[rows].tolist(), strict=True)
            responses = [drawn.tokens[row, max(0, n - window - WITHIN) : n].tolist() for row, n in places]
            texts = self.texts.tails(responses, window)  # with special tokens: "<|im_end|>" may be one of them
            ended |= torch.tensor([any(stop in text for stop in self.config.stop) for text in texts])
        return ended

    def _samples(self, drawn: _Drawn) -> Samples:
        longest = int(drawn.lengths.max())
        mask = torch.arange(longest) < drawn.lengths[:, None]
        response_ids = [row[:n] for row, n in zip(drawn.tokens.tolist(), drawn.lengths.tolist(), strict=True)]
        return Samples(
            response_ids=response_ids,
            texts=self.texts.responses(response_ids),
            log_probs=drawn.log_probs[:, :longest].contiguous(),
            values=drawn.values[:, :longest].contiguous(),
            mask=mask,
            terminated=drawn.terminated,
            support=None if drawn.support is None else drawn.support[:, :longest].contiguous(),
            likeliest=None if drawn.likeliest is None else drawn.likeliest[:, :longest],
            likeliest_probabilities=None if drawn.probabilities is None else drawn.probabilities[:, :longest],
        )


class _Drawn:
    """What has been drawn so far of N responses of at most T tokens; 0 beyond the end of each."""

    def __init__(self, count: int, limit: int, truncates: bool, generator: torch.Generator) -> None:
        self.uniforms = torch.rand(limit, count, generator=generator, dtype=torch.float64).T
        self.tokens = torch.zeros(count, limit, dtype=torch.long)
        self.log_probs, self.values = torch.zeros(count, limit), torch.zeros(count, limit)
        self.support = torch.zeros(count, limit, dtype=torch.long) if truncates else None
        self.lengths = torch.zeros(count, dtype=torch.long)
        self.terminated = torch.zeros(count, dtype=torch.bool)
        self.over = torch.zeros(count, dtype=torch.bool)  # terminated, or at the limit
        self.alternatives = 0  # likeliest tokens that are kept of each step
        self.likeliest: Tensor | None = None
        self.probabilities: Tensor | None = None

    def keep(self, rows: Tensor, steps: Tensor, likeliest: Tensor, probabilities: Tensor) -> None:
        """Note the likeliest tokens (len(rows), k) of these steps of these responses, and their probabilities."""
        if self.likeliest is None or self.probabilities is None:
            shape = (*self.tokens.shape, likeliest.shape[1])
            self.likeliest, self.probabilities = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
        self.likeliest[rows, steps] = likeliest.int().cpu()
        self.probabilities[rows, steps] = probabilities.cpu()

    def last(self, rows: Tensor) -> Tensor:
        """The token drawn last of each of these responses."""
        return self.tokens[rows, self.lengths[rows] - 1]


def draw(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens (n,), their log-probabilities (n,) and how many tokens each was drawn from (n,; None: all).

    The inverse of the cumulative distribution at `uniforms` (n,), float64 in [0, 1): exact up to the rounding of a
    float32 sum, and one random number per token.
    """
    if config.temperature == 0:
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        best = logits.argmax(dim=-1)
        return best, log_probs.gather(-1, best[:, None]).squeeze(-1), None
    scaled = logits.float()
    if config.temperature != 1:
        scaled = scaled / config.temperature
    support = support_size(scaled, config.top_k, config.top_p)
    if support is not None:
        scaled = keep_likeliest(scaled, support)
    weights = torch.softmax(scaled, dim=-1)  # of sum 1 up to rounding
    token, total = invert_by_blocks(weights, uniforms)
    if not bool(weights.gather(-1, token).all()):  # rounding has led between two tokens, onto one without probability
        token, total = invert(weights, uniforms)
    log_prob = weights.gather(-1, token).double().log() - total.log()
    return token.squeeze(-1), log_prob.squeeze(-1).float(), support


def invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Token (n, 1) at which the sums of `weights` (n, V) reach `uniforms` (n,) of their total, and the total (n, 1)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # where rounding lifts u · total to the total itself, the last token with any probability is meant
    last = (weights > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return torch.minimum(token, last), total


def invert_by_blocks(weights: Tensor, uniforms: Tensor, width: int = 128) -> tuple[Tensor, Tensor]:
    """`invert` in a tenth of the time: first the block of `width` tokens is found, then the token in it.

    Where rounding puts the point behind its block's last token with any weight, a token without weight may be returned.
    """
    size = weights.shape[-1]
    whole = size - size % width
    blocks = weights[:, :whole].unflatten(-1, (-1, width)).sum(dim=-1)
    if whole < size:
        blocks = torch.cat([blocks, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    cumulative = blocks.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = uniforms[:, None] * total
    block = torch.searchsorted(cumulative, point, right=True).clamp_(max=blocks.shape[-1] - 1)
    point = point - (cumulative.gather(-1, block) - blocks.gather(-1, block))
    columns = (block * width + torch.arange(width, device=weights.device)).clamp_(max=size - 1)
    inside = weights.gather(-1, columns).cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(inside, point, right=True).clamp_(max=width - 1)
    return columns.gather(-1, place), total


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

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        if not there:
            return None
        padding = (0, 0) * (there[0].dim() - 2)
        return torch.cat([torch.nn.functional.pad(t, (*padding, 0, longest - t.shape[1])) for t in there])

    stepwise: dict[str, Any] = {name: stack([getattr(part, name) for part in parts]) for name in _STEPWISE}
    return Samples(
        response_ids=[ids for part in parts for ids in part.response_ids],
        texts=[text for part in parts for text in part.texts],
        terminated=torch.cat([part.terminated for part in parts]),
        **stepwise,
    )
