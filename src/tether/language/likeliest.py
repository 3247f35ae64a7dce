"""The likeliest tokens of a distribution and their probabilities, exactly and without sorting the vocabulary.

It knows logits and what was drawn from them. n = responses, V = vocabulary, k = tokens kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEARCHED_WHOLE = 2048  # a smaller vocabulary is gone through without blocks


def likeliest(logits: Tensor, count: int, width: int = 64) -> tuple[Tensor, Tensor]:
    """The `count` largest of `logits` (n, V), largest first, and where they are: both (n, k), k = min(count, V).

    Of equal ones the first is ahead, as in a stable sort. The largest of each block of `width` is found first: the k
    largest of all lie in the k blocks whose largest are the largest.
    """
    size = logits.shape[-1]
    count = min(count, size)
    if size <= max(SEARCHED_WHOLE, count * width):
        return _take_largest(logits.clone(), count)
    whole = size - size % width
    heads = logits[:, :whole].unflatten(-1, (-1, width)).amax(dim=-1)
    if whole < size:
        heads = torch.cat([heads, logits[:, whole:].amax(dim=-1, keepdim=True)], dim=-1)
    blocks = _take_largest(heads, count)[1].sort(dim=-1).values  # in their order: what is equal stays in its own
    columns = (blocks[:, :, None] * width + torch.arange(width, device=logits.device)).flatten(1)
    within = logits.gather(-1, columns.clamp(max=size - 1)).masked_fill_(columns >= size, -torch.inf)
    values, places = _take_largest(within, count)
    return values, columns.gather(-1, places)


def alternatives(
    logits: Tensor, tokens: Tensor, log_probs: Tensor, support: Tensor | None, temperature: float, count: int
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, likeliest first, and their probabilities under the distribution that was sampled: (n, k).

    Args:
        logits: (n, V), before the temperature.
        tokens: (n,) what was drawn.
        log_probs: (n,) of these under that distribution.
        support: (n,) how many of the likeliest could be drawn; the others have probability 0. None: all could.
        temperature: logits were divided by it; 0 counts as 1, as in the log-probabilities of greedy tokens.
        count: how many to keep.
    """
    values, ids = likeliest(logits, count)
    drawn = logits.gather(-1, tokens[:, None])
    # log π(a) − log π(drawn) is the difference of logits: no other sum over the vocabulary is needed
    probabilities = ((values.float() - drawn.float()) / (temperature or 1.0) + log_probs[:, None]).exp()
    if support is not None:
        beyond = torch.arange(ids.shape[-1], device=ids.device) >= support[:, None]
        probabilities = probabilities.masked_fill(beyond, 0.0)
    return ids, probabilities


def _take_largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and their places, (n, count) each; `values` may be overwritten."""
    first = values.topk(min(count + 1, values.shape[-1]), dim=-1)
    if not bool((first.values[:, 1:] == first.values[:, :-1]).any()):
        return first.values[:, :count], first.indices[:, :count]
    found = []  # `topk` leaves open which of equal ones it takes
    for _ in range(count):
        largest, places = values.max(dim=-1, keepdim=True)  # the first of equal ones
        found.append((largest, places))
        values.scatter_(-1, places, -torch.inf)
    return torch.cat([value for value, _ in found], dim=-1), torch.cat([place for _, place in found], dim=-1)
