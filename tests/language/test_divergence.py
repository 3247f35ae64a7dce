"""KL over the whole vocabulary: against its definition, one response at a time, for every kind of reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests.models import KINDS, make_model, make_prompts, make_tokenizer, make_world, perturbed, plain_forward
from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import UserError
from tether.language import divergence
from tether.language.adapters import POLICY, LoRAConfig, adapter_weights, give_adapters, using
from tether.language.divergence import compare, reference_log_probs
from tether.language.head import vocabulary_kl, vocabulary_log_probs
from tether.language.policy import LanguagePolicy
from tether.language.reference import AdapterReference, ModelReference, ReferenceConfig
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.ppo import KLConfig, KLController, Trajectories


def kl(logits: Tensor, reference: Tensor, temperature: float = 1.0, support: int | None = None) -> Tensor:
    kept = None if support is None else torch.full((len(logits),), support)
    drawn = logits.argmax(-1)
    return vocabulary_kl(
        vocabulary_log_probs(logits, temperature, kept, drawn), vocabulary_log_probs(reference, temperature)
    ).double()


def test_the_formula() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    reference = torch.tensor([[1.0, 0.0, 0.5], [3.0, 0.0, 0.0]], dtype=torch.float64)
    p, q = (logits / 0.5).softmax(-1), (reference / 0.5).softmax(-1)
    close = {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(kl(logits, reference, 0.5), (p * (p / q).log()).sum(-1), **close)
    two = p[:, :2] / p[:, :2].sum(-1, keepdim=True)  # top-k of 2: π is renormalised, π_ref is not
    torch.testing.assert_close(kl(logits, reference, 0.5, 2), (two * (two / q[:, :2]).log()).sum(-1), **close)
    drawn = logits.argmax(-1, keepdim=True)
    torch.testing.assert_close(kl(logits, reference, 0.5, 1), -q.gather(-1, drawn).squeeze(-1).log(), **close)


def test_a_token_without_probability_adds_nothing_and_equal_logits_give_zero() -> None:
    logits = torch.tensor([[0.0, -math.inf, 200.0]])
    assert kl(logits, logits).tolist() == [0.0]
    assert kl(torch.tensor([[0.0, 0.0, -300.0]]), torch.tensor([[0.0, 0.0, 300.0]])).item() == pytest.approx(
        300 - math.log(2)
    )


def test_a_reference_may_have_rows_to_spare() -> None:
    torch.manual_seed(0)
    policy = LanguagePolicy(make_model())
    larger = make_model(vocabulary_size=policy.model.config.vocab_size + 8)
    small = policy.model.state_dict()
    for name, weight in larger.state_dict().items():
        weight[: len(small[name])] = small[name]
    larger.get_output_embeddings().weight.data[policy.model.config.vocab_size :] = 0.0
    batch = world_of(policy, ModelReference(larger)).collect()
    assert float(batch.kl_to_reference[batch.mask].max()) < 3.0
    assert bool(batch.kl_to_reference[batch.mask].isfinite().all())


def by_definition(world: LanguageWorld, batch: Trajectories, row: int, reference: Any) -> Tensor:
    """KL at each state of a response that is read alone, from whole distributions in float64."""
    sampling, length = world.sampler.config, int(batch.mask[row].sum())
    start = int(batch.context.starts[row])
    ids = batch.context.tokens[row, : start + length].tolist()
    assert ids[start:] == batch.actions[row, :length].tolist()
    before = torch.arange(length) + start - 1
    with torch.no_grad():
        logits = plain_forward(world.policy.model, ids)[0][before].double() / sampling.temperature
        with reference as model:
            own = plain_forward(model, ids)[0][before].double() / sampling.temperature
    if sampling.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    return torch.special.xlogy(p, p).sum(-1) - (p * own.log_softmax(-1)).sum(-1)


def check(world: LanguageWorld, batch: Trajectories, atol: float = 2e-5) -> None:
    assert batch.kl_to_reference is not None
    for row in range(len(batch)):
        expected = by_definition(world, batch, row, world.reference.as_model())
        found = batch.kl_to_reference[row, : len(expected)].double()
        torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)
    with world.reference.as_model():
        scored = reference_log_probs(world.reference.reader, batch.context, batch.actions, batch.mask)
    torch.testing.assert_close(batch.reference_log_probs, scored, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_state_is_compared_as_defined(kind: str, sampling: dict[str, Any]) -> None:
    world = make_world(kind, SamplingConfig(max_new_tokens=6, **sampling))
    batch = world.collect()
    assert float(batch.kl_to_reference[batch.mask].mean()) > 1e-3
    check(world, batch)


def test_however_few_states_and_logits_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_world(collect=CollectConfig(prompts=6)).collect().kl_to_reference
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 40)
    monkeypatch.setattr(divergence, "TOKENS_AT_ONCE", 20)
    found = make_world(collect=CollectConfig(prompts=6)).collect().kl_to_reference
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}], ids=str)
def test_models_that_do_more_with_their_logits_are_asked_themselves(sampling: dict[str, Any]) -> None:
    world = make_world("gemma3", SamplingConfig(max_new_tokens=6, **sampling), final_logit_softcapping=2.0)
    assert world.policy.reader.head is None
    check(world, world.collect())


def world_of(policy: LanguagePolicy, reference: Any, collect: CollectConfig | None = None) -> LanguageWorld:
    sampler = Sampler(policy, make_tokenizer(), SamplingConfig(max_new_tokens=6))
    kl = KLController(KLConfig())
    whole = make_world()
    collect = collect or CollectConfig(prompts=6)
    return LanguageWorld(policy, reference, sampler, make_prompts(), whole.rewards, kl, collect)


def adapted(targets: tuple[str, ...] = ()) -> PreTrainedModel:
    torch.manual_seed(0)
    model = give_adapters(make_model(), LoRAConfig(rank=3, target_modules=targets))
    for weight in adapter_weights(model, POLICY).values():
        weight.data += 0.1 * torch.randn(weight.shape)
    return model


@pytest.mark.parametrize("trained", [False, True], ids=["base", "adapters"])
@pytest.mark.parametrize("targets", [(), ("q_proj", "lm_head")], ids=["layers", "and the head"])
def test_adapters_are_compared_with_their_base_or_with_what_they_were(targets: tuple[str, ...], trained: bool) -> None:
    model = adapted(targets)
    reference = AdapterReference(model, ReferenceConfig(), trained)
    with torch.no_grad():
        for weight in adapter_weights(model, POLICY).values():
            weight += 0.1
    world = world_of(LanguagePolicy(model), reference)
    batch = world.collect()
    check(world, batch)
    assert float(batch.kl_to_reference[batch.mask].max()) > 1e-3
    with using(model, POLICY):  # the policy is the policy again
        again = world.policy.evaluate(batch.context, batch.actions, batch.mask).log_probs
    torch.testing.assert_close(again[batch.mask], batch.log_probs[batch.mask], atol=1e-5, rtol=1e-4)


def test_a_reference_on_the_disk_is_read_once_an_iteration() -> None:
    model = make_model()
    reference = ModelReference(copy.deepcopy(model), ReferenceConfig(offload="disk"))
    world = world_of(perturbed(LanguagePolicy(model), 0.05), reference)
    check(world, world.collect())
    reads = 0
    read = reference._read

    def count() -> Any:
        nonlocal reads
        reads += 1
        return read()

    reference._read = count  # type: ignore[method-assign]
    world.collect()
    assert reads == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_policy_that_has_not_moved_is_at_a_distance_of_exactly_zero(kind: str) -> None:
    model = make_model(kind)
    world = world_of(LanguagePolicy(model), ModelReference(copy.deepcopy(model)))
    batch = world.collect()
    assert not batch.kl_to_reference[batch.mask].any()
    assert world.metrics(batch)["kl"] == 0.0


def test_only_some_responses_are_compared_spread_over_the_batch_and_the_others_are_not_known() -> None:
    everything = make_world(collect=CollectConfig(prompts=10))
    some = make_world(collect=CollectConfig(prompts=10, kl_responses=4))
    whole, part = everything.collect(), some.collect()
    assert torch.equal(whole.actions, part.actions)
    compared = ~part.kl_to_reference.isnan().any(dim=1)
    assert compared.nonzero().flatten().tolist() == [0, 2, 5, 7]
    torch.testing.assert_close(part.kl_to_reference[compared], whole.kl_to_reference[compared], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(part.reference_log_probs, whole.reference_log_probs, atol=1e-5, rtol=1e-4)
    nats = (whole.kl_to_reference * whole.mask).sum(1)[compared].double()
    metrics = some.metrics(part)
    assert metrics["kl"] == pytest.approx(float(nats.mean()), rel=1e-4)
    assert metrics["kl_error"] == pytest.approx(float(nats.std()) / 2, rel=1e-4)
    assert metrics["kl_per_token"] == pytest.approx(float(nats.sum() / whole.mask[compared].sum()), rel=1e-4)


def test_one_response_has_no_standard_error() -> None:
    world = make_world(collect=CollectConfig(prompts=1))
    metrics = world.metrics(world.collect())
    assert "kl" in metrics
    assert "kl_error" not in metrics


def test_selected_trajectories_keep_what_was_measured() -> None:
    batch = make_world(collect=CollectConfig(prompts=6)).collect()
    rows = torch.tensor([4, 1])
    steps = int(batch.mask[rows].sum(dim=1).max())
    assert torch.equal(batch.select(rows).kl_to_reference, batch.kl_to_reference[rows, :steps])


def test_under_autocast_both_are_rounded_alike() -> None:
    model = make_model()
    world = world_of(LanguagePolicy(model, autocast=True), ModelReference(copy.deepcopy(model)))
    assert world.metrics(world.collect())["kl"] == 0.0


def test_what_is_asked_comes_back_in_its_place() -> None:
    world = make_world(collect=CollectConfig(prompts=6))
    batch = world.collect()
    asked = (batch.context, batch.actions, batch.mask)
    log_probs, kl = compare(world.policy.reader, world.reference, *asked, torch.tensor([5, 0]))
    assert kl.isnan().any(dim=1).tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(log_probs, batch.reference_log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", ["reference", "policy"])
def test_a_model_that_gives_nan_is_named(which: str) -> None:
    world = make_world()
    model = world.reference.model if which == "reference" else world.policy.model
    weight = model.get_output_embeddings().weight
    drawn = world.collect()
    with torch.no_grad():
        weight[0] = math.nan
    arguments = (world._batch.prompts, world._batch.samples, torch.zeros(len(drawn)))
    told = {
        "reference": (UserError, r"row \d+: .*reference are NaN"),
        "policy": (FloatingPointError, "NaN in float32"),
    }
    with pytest.raises(told[which][0], match=told[which][1]):
        world._trajectories(*arguments)
