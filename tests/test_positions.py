"""Rotary frequencies that depend on length: one set for a run, and no text changes how its neighbours are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from tests.models import VOCABULARY, make_tokenizer, plain_forward
from tether.language.context import TokenContext
from tether.language.first_ratio import first_ratio
from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.sampler import Sampler, SamplingConfig
from tether.pipeline.sft import SFTConfig, fine_tune
from tether.positions import frequency_edge, settle_positions
from tether.rewards.passes import score_all, score_tokens

EDGE = 8
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 4], [5]]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": None,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.1, 1.3, 1.6, 4.0],
    "original_max_position_embeddings": EDGE,
}


def phi3_config() -> Phi3Config:
    return Phi3Config(**SIZES, max_position_embeddings=64, original_max_position_embeddings=EDGE, rope_parameters=LONG)


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(phi3_config())


def phimoe() -> PreTrainedModel:
    scales = {"short_mscale": 1.0, "long_mscale": 1.5}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 64}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, **experts, rope_parameters=LONG | scales))


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=EDGE, rope_parameters=rope))


def make(kind: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return prepare_model(kind())


def drawn(policy: LanguagePolicy, tokens: int) -> tuple[TokenContext, torch.Tensor, Any]:
    samples = Sampler(policy, make_tokenizer(), SamplingConfig(max_new_tokens=tokens), 0).sample(PROMPTS)
    context = TokenContext.from_ids(PROMPTS, samples.response_ids)
    actions = torch.zeros(samples.mask.shape, dtype=torch.long)
    for row, ids in zip(actions, samples.response_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return context, actions, samples


@pytest.mark.parametrize("tokens", [3, 20], ids=["within", "beyond"])
@pytest.mark.parametrize("kind", [phi3, phimoe, dynamic])
def test_the_learner_reads_what_was_sampled_with_the_same_frequencies(
    kind: Callable[[], PreTrainedModel], tokens: int
) -> None:
    policy = LanguagePolicy(make(kind))
    context, actions, samples = drawn(policy, tokens)
    found = first_ratio(policy, context, actions, samples.log_probs, samples.mask)
    assert found.gap < 1e-4
    one = torch.tensor([2])  # the shortest by itself, which no longer neighbour is there for
    alone = first_ratio(policy, context.select(one), actions[one], samples.log_probs[one], samples.mask[one])
    assert alone.gap < 1e-4


@pytest.mark.parametrize("kind", [phi3, phimoe, dynamic])
@pytest.mark.parametrize("longest", [EDGE, EDGE + 1])
def test_the_frequencies_are_those_of_the_longest_sequence(kind: Callable[[], PreTrainedModel], longest: int) -> None:
    ids = [4 + i % 8 for i in range(longest)]
    expected = plain_forward(make(kind), ids)[0]
    settled = make(kind)
    settle_positions([settled], longest)
    torch.testing.assert_close(plain_forward(settled, ids)[0], expected)
    settle_positions([settled], 3)  # shorter ones change nothing any more
    torch.testing.assert_close(plain_forward(settled, ids)[0], expected)


def test_a_model_is_saved_as_it_was_brought() -> None:
    model = make(phi3)
    before = model.config.to_dict()
    settle_positions([model], 60)
    assert model.config.to_dict() == before


def test_a_model_of_one_set_is_left_alone() -> None:
    model = make(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64)))
    before = model.model.rotary_emb.inv_freq
    settle_positions([model], 60)
    assert model.model.rotary_emb.inv_freq is before
    assert frequency_edge(model) is None
    assert frequency_edge(make(phi3)) == EDGE


def test_a_long_text_changes_no_score_of_its_neighbours() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = phi3_config()
        config.num_labels = 1
        model = Phi3ForSequenceClassification(config).eval()
    texts = [[4 + (i + n) % 8 for i in range(n)] for n in (12, 3, 20, 7, 8, 9)]
    alone = torch.cat([score_tokens(model, [ids]) for ids in texts]).detach()
    torch.testing.assert_close(score_all(model, texts), alone, atol=2e-6, rtol=0)
    score_tokens(model, texts).sum().backward()  # with gradients, as in training
    assert model.score.weight.grad is not None


def test_fine_tuning_settles_on_its_longest_text() -> None:
    model = make(phi3)
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "abcdef", "completion": "fedcba"}]
    fine_tune(model, make_tokenizer(), rows, SFTConfig(max_steps=1))
    assert frequency_edge(model) is None
    ids = [4, 5, 6]
    short = plain_forward(make(phi3), ids)[0]
    assert (plain_forward(model, ids)[0] - short).abs().max() > 0.01
