"""Does the learner find what the sampler drew as likely as the sampler did, before anything was learned?

Sampler and learner read the same model by two ways: token by token with a cache, and whole sequences at once. PPO's
ratio of new to old probabilities begins at 1 only where both say the same. A model whose positions depend on the length
of a pass, dropout that cannot be turned off, or a layer that remembers in a way of its own break that.
N = episodes, T = response tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tether.errors import UserError
from tether.language.context import TokenContext
from tether.language.decoding import PlainDecoder, SlotDecoder
from tether.language.divergence import TOKENS_AT_ONCE, in_parts
from tether.language.head import action_log_probs
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.sampler import Sampler, Samples

EXACT = 1e-3  # largest |log ratio| that rounding makes in float32
COARSE = 0.1  # and where weights or products have 8 bits of precision; beyond it float32 is asked


@dataclass(frozen=True)
class FirstRatio:
    """The token about which sampler and learner differ most.

    Attributes:
        row: of the batch.
        step: of its response, from 0.
        sampled: log-probability that it was drawn with.
        learned: log-probability that the learner finds.
        limit: the most that the precision of weights and products explains.
        rounding: the difference is larger, and yet is gone in float32.
    """

    row: int
    step: int
    sampled: float
    learned: float
    limit: float
    rounding: bool = False

    @property
    def gap(self) -> float:
        """|log ratio|; infinite where the learner's is not a number."""
        gap = abs(self.learned - self.sampled)
        return gap if gap == gap else float("inf")

    def misfit(self, place: str, token: str, policy: LanguagePolicy) -> str:
        """What is wrong, for the user: `place` is the prompt's, `token` the text of the token."""
        remedy = "use another model" if policy.exact else "take dtype float32 and autocast false"
        return (
            f"{place}: token {self.step + 1} of the response ({token!r}) was drawn with log-probability "
            f"{self.sampled:.6g}, and the learner finds {self.learned:.6g} before its first step: they differ by "
            f"{self.gap:.2g}, expected at most {self.limit:g} in {policy.numbers}; PPO would learn from that "
            f"difference: {remedy}"
        )

    def rounded(self, policy: LanguagePolicy) -> str:
        """What is said where the difference is rounding."""
        return (
            f"sampler and learner differ by up to {self.gap:.2g} in the log-probability of a token; it is the rounding "
            f"of {policy.numbers}, and gone in float32"
        )

    @property
    def fits(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap <= self.limit or self.rounding


@torch.no_grad()
def first_ratio(
    policy: LanguagePolicy, context: TokenContext, actions: Tensor, log_probs: Tensor, mask: Tensor
) -> FirstRatio:
    """Evaluate a batch as the learner does, and find the largest |log ratio| to what the sampler said of it.

    In bfloat16 the largest of some thousand tokens of a real model may be several tenths by rounding alone. Where it is
    beyond the limit, that token is therefore read in float32 both ways: a fault of the model stays, rounding goes.

    Args:
        policy: has learned nothing since the batch was drawn.
        context: of the responses.
        actions: (N, T), their tokens.
        log_probs: (N, T), the sampler's.
        mask: (N, T) bool, the token exists.
    """
    again = torch.zeros_like(log_probs)
    for part in in_parts(context.lengths, torch.arange(len(mask), device=mask.device), TOKENS_AT_ONCE):
        again[part] = policy.evaluate(context.select(part), actions[part], mask[part]).log_probs
    gaps = (again - log_probs).abs().nan_to_num(torch.inf).masked_fill(~mask, 0.0)
    row, step = divmod(int(gaps.argmax()), gaps.shape[1])
    limit = EXACT if policy.exact else COARSE
    found = FirstRatio(row, step, float(log_probs[row, step]), float(again[row, step]), limit)
    if found.fits or policy.exact or not math.isfinite(found.gap):
        return found
    one = torch.tensor([row], device=mask.device)
    asked = (context.select(one), actions[one, : step + 1], mask[one, : step + 1])
    try:
        with _in_float32(policy):
            again_in_float32 = policy.evaluate(*asked).log_probs[0, step]
            rounding = abs(float(again_in_float32) - _decoded(policy, *asked[:2])) <= EXACT
    except (torch.OutOfMemoryError, TypeError):  # no room for it, or weights that are kept in fewer bits
        rounding = float(gaps[mask].mean()) <= COARSE
    return replace(found, rounding=rounding)


def hold_to_first_ratio(
    sampler: Sampler, prompts: Sequence[Prompt], samples: Samples, context: TokenContext, actions: Tensor
) -> FirstRatio:
    """The `first_ratio` of what a sampler drew for prompts, read as `Sampler.read_by_learner` gives it.

    Raises:
        UserError: rounding does not explain it.
    """
    policy = sampler.policy
    found = first_ratio(policy, context, actions, samples.log_probs.to(policy.device), samples.mask.to(policy.device))
    if not found.fits:
        drawn = samples.response_ids[found.row][found.step]
        text = sampler.texts.of_tokens([drawn])[drawn]
        raise UserError(found.misfit(prompts[found.row].place, text, policy))
    return found


def _decoded(policy: LanguagePolicy, context: TokenContext, actions: Tensor) -> float:
    """Log-probability of the last of some tokens (1, T) that are read one by one, as the sampler does."""
    begin, start = int(context.attention_mask[0].long().argmax()), int(context.starts[0])
    kind = SlotDecoder if SlotDecoder.fits(policy) else PlainDecoder
    decoder = kind(policy, [context.tokens[0, begin:start].tolist()], 1, actions.shape[1])
    with policy.precision():
        logits, _ = decoder.admit(1)
        for token in actions[0, :-1]:
            logits, _ = decoder.step(token[None])
    support = None if context.support is None else context.support[:, actions.shape[1] - 1]
    return float(action_log_probs(logits, actions[0, -1:], context.temperature, support)[0])


@contextmanager
def _in_float32(policy: LanguagePolicy) -> Iterator[None]:
    """Within this context the policy's weights and products are float32. TypeError where they cannot be."""
    parameters = [p for p in policy.model.parameters() if p.dtype != torch.float32]
    if not all(p.is_floating_point() for p in parameters):
        raise TypeError("quantized weights")
    kinds, autocast = [p.dtype for p in parameters], policy.autocast
    policy.autocast = False
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, kind in zip(parameters, kinds, strict=True):
            parameter.data = parameter.data.to(kind)  # to the bit what it was
        policy.autocast = autocast
