"""A reference reads what a policy said: how likely it finds the tokens, and how far the policy is from it.

KL(π‖π_ref) is summed over the whole vocabulary at each state that was visited, not estimated from the token that was
drawn there. Added up over responses drawn from π it is without bias for the KL of whole responses, and its error is
that of the states alone (Amini et al. 2025, arXiv:2504.10637). It knows tokens and models; nothing of rewards or β.
N = episodes, T = response tokens of the longest, n = response tokens in all, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tether.language.context import TokenContext, spread
from tether.language.head import Head, vocabulary_kl, vocabulary_log_probs
from tether.language.reading import Reader
from tether.language.reference import Reference

TOKENS_AT_ONCE = 16384  # that go through a model, padding included
FEW_TOKENS = 2048  # the same, where logits (n, V) of two models are in memory
LOGITS_AT_ONCE = 2**22  # of each of two models, 16 MiB: few enough for the caches, enough for fast products
FEWEST_AT_ONCE = 64  # tokens: the output layer's weights are cast for each such part where they are not float32


@torch.no_grad()
def compare(
    policy: Reader, reference: Reference, context: TokenContext, actions: Tensor, mask: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the reference, and KL(π‖π_ref) at the states of some responses.

    Args:
        policy: reads as π.
        reference: π_ref.
        context: of the responses.
        actions: (N, T), their tokens.
        mask: (N, T) bool, the token exists.
        rows: (r,) int, responses at whose states the whole vocabulary is compared.

    Returns:
        (N, T) log π_ref of the actions, see `reference_log_probs`; (N, T) KL in nats at the state before each token, π
        being what was sampled from; NaN in responses that are not among `rows`.
    """
    log_probs = torch.zeros(mask.shape, device=mask.device)
    kl = torch.full(mask.shape, torch.nan, device=mask.device)
    head, own_head = policy.head, reference.reader.head
    if head is None or own_head is None:
        for part in in_parts(context.lengths, rows, FEW_TOKENS):
            nats = _kl_by_models(policy, reference, context.select(part), actions[part], mask[part])
            kl[part] = spread(nats, mask[part])
        with reference.as_model():
            return reference_log_probs(reference.reader, context, actions, mask), kl
    parts = list(in_parts(context.lengths, rows, TOKENS_AT_ONCE))
    states = [policy.states(context.select(part), mask[part]) for part in parts]
    others = torch.ones(len(mask), dtype=torch.bool, device=mask.device).index_fill_(0, rows, False)
    with reference.as_model():
        asked = (context.select(others), actions[others], mask[others])
        log_probs[others] = reference_log_probs(reference.reader, *asked)
        for part, hidden in zip(parts, states, strict=True):
            drawn = context.select(part)
            own_hidden = reference.reader.states(drawn, mask[part])
            found = _by_states((head, hidden), (own_head, own_hidden), drawn, actions[part], mask[part])
            log_probs[part], kl[part] = (spread(flat, mask[part]) for flat in found)
    return log_probs, kl


@torch.no_grad()
def reference_log_probs(
    reader: Reader, context: TokenContext, actions: Tensor, mask: Tensor, tokens_at_once: int = TOKENS_AT_ONCE
) -> Tensor:
    """(N, T) log π_ref(a|s) at the sampling temperature, over the whole vocabulary whatever top-k and top-p left."""
    result = torch.zeros(mask.shape, device=mask.device)
    context = replace(context, support=None)
    everyone = torch.arange(len(mask), device=mask.device)
    for part in in_parts(context.lengths, everyone, tokens_at_once):
        reading = reader.read(context.select(part), actions[part], mask[part])
        result[part] = spread(reading.log_probs, mask[part])
    return result


def _by_states(
    policy: tuple[Head, Tensor], reference: tuple[Head, Tensor], context: TokenContext, actions: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log π_ref (n,) and KL (n,) from the output layers of both models and the states (n, H) that they are given."""
    (head, hidden), (own_head, own_hidden) = policy, reference
    support, tokens = None if context.support is None else context.support[mask], actions[mask]
    size = max(FEWEST_AT_ONCE, LOGITS_AT_ONCE // len(head.layer.weight))
    log_probs, kl = (torch.zeros(len(tokens), device=mask.device) for _ in range(2))
    for start in range(0, len(tokens), size):
        some = slice(start, start + size)
        kept = None if support is None else support[some]
        of_policy = vocabulary_log_probs(head.logits(hidden[some]), context.temperature, kept, tokens[some])
        of_reference = vocabulary_log_probs(own_head.logits(own_hidden[some]), context.temperature)
        log_probs[some] = of_reference.gather(-1, tokens[some, None]).squeeze(-1)
        kl[some] = vocabulary_kl(*_of_both(of_policy, of_reference))
    return log_probs, kl


def _kl_by_models(policy: Reader, reference: Reference, context: TokenContext, actions: Tensor, mask: Tensor) -> Tensor:
    """KL (n,) of models that do more with their states than an output layer does, and so are asked themselves."""
    logits = policy.logits(context, mask)
    with reference.as_model():
        own_logits = reference.reader.logits(context, mask)
    support = None if context.support is None else context.support[mask]
    of_policy = vocabulary_log_probs(logits, context.temperature, support, actions[mask])
    return vocabulary_kl(*_of_both(of_policy, vocabulary_log_probs(own_logits, context.temperature)))


def _of_both(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (n, V) of the tokens that both models know: one may have rows to spare for none."""
    size = min(policy.shape[-1], reference.shape[-1])
    return policy[:, :size], reference[:, :size]


def in_parts(lengths: Tensor, rows: Tensor, tokens_at_once: int) -> Iterator[Tensor]:
    """`rows` (r,), indices into `lengths` (N,), longest first, in parts of so many tokens at most."""
    rows = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    start = 0
    while start < len(rows):
        part = rows[start : start + max(1, tokens_at_once // int(lengths[rows[start]]))]
        start += len(part)
        yield part
