"""Sequences of tokens in which responses stand: what `LanguagePolicy.evaluate` needs to see the states again.

N = episodes, T = response tokens of the longest, L = tokens of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True, repr=False)
class TokenContext:
    """The sequences in which responses stand, and how their tokens were drawn.

    Attributes:
        tokens: (N, L) token ids, prompt and response, padded on either side.
        attention_mask: (N, L) bool, False at padding.
        starts: (N,) column of each response's first token.
        temperature: of the distribution that was sampled.
        support: (N, T) number of tokens that top-k and top-p left to draw from, or None where all were.
    """

    tokens: Tensor
    attention_mask: Tensor
    starts: Tensor
    temperature: float = 1.0
    support: Tensor | None = None

    def __repr__(self) -> str:
        return f"TokenContext({len(self.tokens)} sequences, up to {self.tokens.shape[1]} tokens)"

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each sequence, padding excluded."""
        return self.attention_mask.sum(dim=1)

    def select(self, rows: Tensor) -> TokenContext:
        """These rows, without the columns in which all of them are padded."""
        mask = self.attention_mask[rows]
        used = mask.any(dim=0).nonzero()
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        return replace(
            self,
            tokens=self.tokens[rows, first:last],
            attention_mask=mask[:, first:last],
            starts=self.starts[rows] - first,
            support=None if self.support is None else self.support[rows],
        )

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        temperature: float = 1.0,
        support: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> TokenContext:
        """Sequences set flush left: prompt, response, padding. Padding holds id 0, which nothing ever reads."""
        sequences = [torch.tensor([*p, *r], dtype=torch.long) for p, r in zip(prompts, responses, strict=True)]
        lengths = torch.tensor([len(s) for s in sequences])
        tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        starts = torch.tensor([len(p) for p in prompts])
        return cls(tokens.to(device), mask.to(device), starts.to(device), temperature, support)


def spread(flat: Tensor, mask: Tensor) -> Tensor:
    """(n,) values of the valid steps, in row order, laid out as (N, T) with 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
