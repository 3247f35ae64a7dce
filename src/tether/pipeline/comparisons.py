"""Comparisons in tokens, and the loss from which a reward model learns: σ of a difference of scores, by Bradley–Terry.

How a batch is cut into passes changes speed and memory, never the gradient. Knows nothing of files, optimizers or runs.
n = comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import said
from tether.errors import UserError
from tether.language.preferences import Preference
from tether.pipeline.supervised import fate_of
from tether.rewards.passes import encode, passes, score_all, score_tokens, shortened


def preference_loss(chosen: Tensor, rejected: Tensor, margins: Tensor, ties: Tensor, centring: float = 0.0) -> Tensor:
    """Loss (n,) of each comparison, in nats.

    −log σ(r_c − r_r − m) with the margin m (Bradley and Terry 1952; margins: Touvron et al. 2023, equation 2); of ties
    −½ log σ(d) − ½ log σ(−d) with d = r_c − r_r; and centring·(r_c + r_r)² (Eisenstein et al. 2023).

    Args:
        chosen: (n,) scores r_c.
        rejected: (n,) scores r_r.
        margins: (n,) 0 or more; not used in ties.
        ties: (n,) bool.
        centring: coefficient.
    """
    difference = chosen - rejected
    won = -logsigmoid(difference - margins)
    tied = -0.5 * logsigmoid(difference) - 0.5 * logsigmoid(-difference)
    return torch.where(ties, tied, won) + centring * (chosen + rejected) ** 2


@dataclass(frozen=True)
class TokenizedPairs:
    """n comparisons in tokens, each response with its prompt, and what became of those that were too long.

    Attributes:
        chosen: (n,) lists of token ids.
        rejected: (n,).
        chosen_lengths: (n,) tokens of the response alone.
        rejected_lengths: (n,).
        margins: (n,) float32.
        ties: (n,) bool.
    """

    chosen: list[list[int]]
    rejected: list[list[int]]
    chosen_lengths: list[int]
    rejected_lengths: list[int]
    margins: Tensor
    ties: Tensor
    skipped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.chosen)

    def lengths(self, chosen: Sequence[int] | None = None) -> list[int]:
        """Tokens of the longer side of each pair."""
        indices = range(len(self)) if chosen is None else chosen
        return [max(len(self.chosen[i]), len(self.rejected[i])) for i in indices]


def tokenize_pairs(
    pairs: Sequence[Preference],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    overlong: Literal["error", "skip", "truncate"] = "error",
    origin: str = "preferences",
) -> TokenizedPairs:
    """Tokenize comparisons as a reward model reads them.

    Raises:
        UserError: a pair is too long, its messages cannot be rendered, or none is left.
    """
    names = [f"{origin}, row {pair.row}" for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    both = [
        encode(tokenizer, prompts, [pair.chosen for pair in pairs], names),
        encode(tokenizer, prompts, [pair.rejected for pair in pairs], names),
    ]
    kept, skipped, truncated = [], 0, 0
    for index, name in enumerate(names):
        fate = fate_of(name, max(len(side[index]) for side in both), max_tokens, overlong)
        if fate == "skip":
            skipped += 1
            continue
        if fate == "truncate":
            truncated += 1
            for side in both:
                side[index] = shortened(tokenizer, side[index], max_tokens)
        kept.append(index)
    if not kept:
        raise UserError(f"{origin}: all {skipped} comparisons are longer than {max_tokens} tokens: raise `max_tokens`")
    return TokenizedPairs(
        [both[0][i] for i in kept],
        [both[1][i] for i in kept],
        _response_lengths([pairs[i].chosen for i in kept], tokenizer),
        _response_lengths([pairs[i].rejected for i in kept], tokenizer),
        torch.tensor([pairs[i].margin for i in kept], dtype=torch.float32),
        torch.tensor([pairs[i].tie for i in kept], dtype=torch.bool),
        skipped,
        truncated,
    )


def _response_lengths(responses: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    texts = [r if isinstance(r, str) else "\n".join(map(said, r)) for r in responses]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def accumulate_gradients(
    model: PreTrainedModel,
    pairs: TokenizedPairs,
    chosen: Sequence[int],
    microbatch_tokens: int,
    centring: float = 0.0,
    autocast: bool = False,
) -> tuple[float, Tensor]:
    """Leave the gradient of the mean loss of the chosen pairs in `.grad`.

    Both responses of a pair go through the model in the same pass; pairs of about equal lengths share one.

    Args:
        model: of which the gradient is taken.
        pairs: the comparisons.
        chosen: (n,) indices of those in the batch.
        microbatch_tokens: tokens (padding included) that go through the model at once.
        centring: see `preference_loss`.
        autocast: compute matrix products in bfloat16.

    Returns:
        The loss in nats per pair, and the scores (2, n) of the chosen and the rejected responses.
    """
    model.zero_grad(set_to_none=True)
    total = 0.0
    scores = torch.zeros(2, len(chosen))
    for places in passes(pairs.lengths(chosen), microbatch_tokens // 2):
        indices = [int(chosen[place]) for place in places]
        ids = [pairs.chosen[i] for i in indices] + [pairs.rejected[i] for i in indices]
        both = score_tokens(model, ids, autocast).reshape(2, len(indices))
        margins, ties = pairs.margins[indices].to(both.device), pairs.ties[indices].to(both.device)
        loss = preference_loss(both[0], both[1], margins, ties, centring).sum() / len(chosen)
        loss.backward()
        total += float(loss.detach())
        scores[:, torch.tensor(places)] = both.detach().cpu()
    return total, scores


def score_pairs(model: PreTrainedModel, pairs: TokenizedPairs, microbatch_tokens: int) -> Tensor:
    """Raw scores (2, n) of the chosen and the rejected responses."""
    return score_all(model, [*pairs.chosen, *pairs.rejected], microbatch_tokens).reshape(2, len(pairs))
