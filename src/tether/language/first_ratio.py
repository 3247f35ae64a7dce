"""Does the learner find what the sampler drew as likely as the sampler did, before anything was learned?

Sampler and learner read the same model by two ways: token by token with a cache, and whole sequences at once. PPO's
ratio of new to old probabilities begins at 1 only where both say the same. A model whose positions depend on the length
of a pass, dropout that cannot be turned off, or a layer that remembers in a way of its own break that.
N = episodes, T = response tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tether.language.context import TokenContext
from tether.language.divergence import TOKENS_AT_ONCE, in_parts
from tether.language.policy import LanguagePolicy

EXACT = 1e-3  # largest |log ratio| that rounding makes in float32
COARSE = 0.1  # and where weights or products have 8 bits of precision


@dataclass(frozen=True)
class FirstRatio:
    """The token about which sampler and learner differ most.

    Attributes:
        row: of the batch.
        step: of its response, from 0.
        sampled: log-probability that it was drawn with.
        learned: log-probability that the learner finds.
        limit: the most that rounding explains.
    """

    row: int
    step: int
    sampled: float
    learned: float
    limit: float

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

    @property
    def fits(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap <= self.limit


@torch.no_grad()
def first_ratio(
    policy: LanguagePolicy, context: TokenContext, actions: Tensor, log_probs: Tensor, mask: Tensor
) -> FirstRatio:
    """Evaluate a batch as the learner does, and find the largest |log ratio| to what the sampler said of it.

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
    return FirstRatio(row, step, float(log_probs[row, step]), float(again[row, step]), limit)
