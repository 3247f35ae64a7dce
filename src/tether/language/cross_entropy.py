"""The loss of supervised fine-tuning: cross-entropy on target tokens, summed over any cut of a batch into passes.

Knows samples and models; nothing of optimizers, schedules or files.

B = rows of a pass, L = tokens of its longest row, K = columns that some row learns from, V = vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.language.packing import Rows, TokenizedSamples, lay_out


@dataclass(frozen=True)
class Passes:
    """How a batch goes through the model; changes speed and memory, not the gradient.

    Attributes:
        packing: short samples share rows.
        microbatch_tokens: tokens (padding included) of one pass.
        autocast: matrix products in bfloat16, which does round.
    """

    packing: bool = True
    microbatch_tokens: int = 8192
    autocast: bool = False


def accumulate_gradients(
    model: PreTrainedModel, samples: TokenizedSamples, chosen: np.ndarray, passes: Passes
) -> float:
    """Leave the gradient of the chosen samples' loss in `.grad`; returns the loss, in nats per target token.

    The loss is a sum over the batch's target tokens divided by their number: every token weighs the same.
    """
    model.zero_grad(set_to_none=True)
    targets = int(samples.target_counts[chosen].sum())
    total = torch.zeros((), device=model.device)
    for rows in lay_out(samples, chosen, passes.packing, passes.microbatch_tokens):
        loss = summed_loss(model, rows, passes.autocast) / targets
        loss.backward()
        total += loss.detach()
    return float(total)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, samples: TokenizedSamples, batch_size: int, passes: Passes) -> float:
    """Nats per target token over all samples, `batch_size` of them laid out at a time."""
    total = 0.0
    for start in range(0, len(samples), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(samples)))
        for rows in lay_out(samples, chosen, passes.packing, passes.microbatch_tokens):
            total += float(summed_loss(model, rows, passes.autocast))
    return total / int(samples.is_target.sum())


def summed_loss(model: PreTrainedModel, rows: Rows, autocast: bool = False) -> Tensor:
    """Cross-entropy summed over the rows' target tokens, a float32 scalar; logits exist at columns of targets only."""
    device = model.device
    predicted = rows.is_target[:, 1:]  # (B, L - 1): column t predicts token t + 1
    columns = predicted.any(dim=0).nonzero().squeeze(-1)  # (K,)
    learned = predicted[:, columns]  # (B, K)
    labels = rows.token_ids[:, 1:][:, columns][learned].to(device)
    inputs = {"input_ids": rows.token_ids.to(device)}
    if rows.packed:
        # Without a cache and an attention mask, transformers reads where samples begin from the positions.
        inputs["position_ids"] = rows.position_ids.to(device)
    chooses = "logits_to_keep" in inspect.signature(model.forward).parameters
    if chooses:
        inputs["logits_to_keep"] = columns.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = model(**inputs, use_cache=False).logits  # (B, K, V), or (B, L, V) from a model that cannot choose
    if not chooses:
        logits = logits[:, columns.to(device)]
    return nn.functional.cross_entropy(logits[learned.to(device)].float(), labels, reduction="sum")
