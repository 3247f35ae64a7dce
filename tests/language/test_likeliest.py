"""The likeliest tokens: those of a plain stable sort, with the probabilities of a plain softmax."""

from __future__ import annotations

import pytest
import torch

from tether.language.likeliest import alternatives, likeliest
from tether.language.sampler import SamplingConfig, draw


def hostile(rows: int, size: int, seed: int) -> list[torch.Tensor]:
    """Logits that are all different, coarse ones with many equal, all equal, and nearly all impossible."""
    normal = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    rare = torch.full_like(normal, -torch.inf)
    rare[:, -1] = 0.0
    return [normal, (normal * 2).round(), torch.zeros_like(normal), normal.sort().values, rare, normal.bfloat16()]


@pytest.mark.parametrize("size", [3, 64, 2048, 2049, 8191, 50_257])
@pytest.mark.parametrize("count", [1, 5, 17])
def test_the_same_tokens_in_the_same_order_as_a_stable_sort(size: int, count: int) -> None:
    for logits in hostile(4, size, seed=size + count):
        before = logits.clone()
        values, ids = likeliest(logits, count)
        expected = logits.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :count])
        finite = values > -torch.inf  # of impossible tokens none is ahead of another
        assert torch.equal(ids[finite], expected.indices[:, :count][finite])
        assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(temperature=1.7, top_k=3),
        SamplingConfig(top_p=0.3),
        SamplingConfig(temperature=0.9, top_k=40, top_p=0.95),
        SamplingConfig(temperature=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [50, 5000])
def test_probabilities_are_those_of_the_distribution_that_was_sampled(config: SamplingConfig, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(16, size, generator=generator)
    tokens, log_probs, support = draw(logits, torch.rand(16, generator=generator, dtype=torch.float64), config)
    ids, found = alternatives(logits, tokens, log_probs, support, config.temperature, 6)
    expected = (logits.double() / (config.temperature or 1.0)).softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights = expected.values
    if support is not None:
        weights = weights * (torch.arange(size) < support[:, None])
    weights = weights / weights.sum(dim=-1, keepdim=True)
    assert torch.equal(ids, expected.indices[:, :6])
    torch.testing.assert_close(found.double(), weights[:, :6], rtol=1e-4, atol=1e-9)
    is_drawn = ids == tokens[:, None]
    torch.testing.assert_close(found[is_drawn], log_probs[is_drawn.any(dim=-1)].exp())
