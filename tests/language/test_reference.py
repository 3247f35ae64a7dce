"""The reference: its log-probabilities wherever its weights are kept, and how it follows the policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_world, perturbed
from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import UserError
from tether.language.adapters import POLICY, REFERENCE, LoRAConfig, adapter_weights, give_adapters
from tether.language.divergence import reference_log_probs
from tether.language.policy import LanguagePolicy
from tether.language.reading import Reader
from tether.language.reference import (
    AdapterReference,
    ModelReference,
    Reference,
    ReferenceConfig,
)
from tether.runs.state import load_state, save_state

BATCH = make_world().collect()
ASKED = (BATCH.context, BATCH.actions, BATCH.mask)


def log_probs_of(reference: Reference) -> Tensor:
    with reference.as_model():
        return reference_log_probs(reference.reader, *ASKED)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adapted(scale: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    return move(give_adapters(make_model(), LoRAConfig(rank=3)), scale)


def move(model: PreTrainedModel, scale: float = 0.1, seed: int = 1) -> PreTrainedModel:
    """What training does to adapters, more or less."""
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(model, POLICY).values():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return model


# ---- where the weights are -----------------------------------------------------------------------------------------


def test_on_the_disk_between_uses_and_the_same_to_the_bit() -> None:
    expected = reference_log_probs(Reader(make_model()), *ASKED)
    reference = ModelReference(make_model(), ReferenceConfig(offload="disk"))
    file = reference._file
    for _ in range(2):
        assert file.stat().st_size == 4 * sum(p.numel() for p in make_model().parameters())
        assert sum(p.numel() for p in reference.model.parameters()) == 0
        assert torch.equal(log_probs_of(reference), expected)
    with reference.as_model() as model:
        assert weights(model).keys() == weights(make_model()).keys()
        assert sum(p.numel() for p in model.parameters()) > 0
    assert sum(p.numel() for p in reference.model.parameters()) == 0
    assert reference.fingerprint == ModelReference(make_model()).fingerprint
    del model, reference
    assert not file.exists()


def test_in_the_memory_of_the_host_between_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is a CPU here, which offers nothing to gain and is refused, but computes the same."""
    monkeypatch.setattr(ModelReference, "_check_offload", lambda self: None)
    policy = LanguagePolicy(perturbed(make_model(), seed=3))
    for options in ({}, {"ema": 0.75}, {"reset_every": 1}):
        away = ModelReference(make_model(), ReferenceConfig(offload="cpu", **options))
        here = ModelReference(make_model(), ReferenceConfig(**options))
        assert sum(p.numel() for p in away.model.parameters()) == 0
        for _ in range(2):
            assert torch.equal(log_probs_of(away), log_probs_of(here))
            away.follow(policy)
            here.follow(policy)
        assert sum(p.numel() for p in away.model.parameters()) == 0
        again = ModelReference(make_model(), ReferenceConfig(offload="cpu", **options))
        again.load_state_dict(away.state_dict())
        assert torch.equal(log_probs_of(again), log_probs_of(here))


def test_there_is_nothing_to_offload_from_a_cpu_to_a_cpu() -> None:
    with pytest.raises(UserError, match=r"reference.offload is cpu, where the run is already"):
        ModelReference(make_model(), ReferenceConfig(offload="cpu"))


def test_its_precision_is_its_own() -> None:
    reference = ModelReference(make_model(), ReferenceConfig(dtype="bfloat16"))
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    exact = reference_log_probs(Reader(make_model()), *ASKED)
    found = log_probs_of(reference)
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).abs().max()) < 0.5


def test_adapters_off_is_the_base_to_the_bit() -> None:
    model = adapted()
    reference = AdapterReference(model)
    expected = reference_log_probs(Reader(make_model()), *ASKED)
    move(model)
    assert torch.equal(log_probs_of(reference), expected)
    assert float((reference_log_probs(Reader(model), *ASKED) - expected)[BATCH.mask].abs().max()) > 0.1
    assert reference.fingerprint == ModelReference(make_model()).fingerprint
    assert not adapter_weights(model, REFERENCE)  # and costs nothing


def test_adapters_that_were_trained_before_belong_to_the_reference() -> None:
    model = adapted(scale=0.1)
    expected = reference_log_probs(Reader(model), *ASKED)
    reference = AdapterReference(model, trained=True)
    move(model, seed=2)
    assert torch.equal(log_probs_of(reference), expected)
    assert reference.fingerprint != ModelReference(make_model()).fingerprint
    other = AdapterReference(adapted(scale=0.2), trained=True)
    assert other.fingerprint != reference.fingerprint


# ---- following -----------------------------------------------------------------------------------------------------


def test_one_that_stands_still_does_not_hear_of_the_policy() -> None:
    reference = ModelReference(make_model())
    reference.follow(LanguagePolicy(perturbed(make_model())))
    assert torch.equal(log_probs_of(reference), reference_log_probs(Reader(make_model()), *ASKED))
    assert reference.state_dict() == {}


def test_the_average_is_the_sum_written_out() -> None:
    """θ_ref after n iterations = dⁿ θ_0 + (1 − d) Σ dⁿ⁻ⁱ θ_i."""
    decay, start = 0.75, weights(make_model())
    reference = ModelReference(make_model(), ReferenceConfig(ema=decay))
    seen = []
    for seed in range(3):
        policy = LanguagePolicy(perturbed(make_model(), 0.1, seed))
        seen.append(weights(policy.model))
        reference.follow(policy)
    for name, found in weights(reference.model).items():
        expected = decay**3 * start[name] + (1 - decay) * sum(
            decay ** (2 - i) * later[name] for i, later in enumerate(seen)
        )
        torch.testing.assert_close(found, expected)


def test_an_average_of_the_same_is_the_same_to_the_bit() -> None:
    reference = ModelReference(make_model(), ReferenceConfig(ema=0.9))
    reference.follow(LanguagePolicy(make_model()))
    assert all(torch.equal(w, weights(make_model())[name]) for name, w in weights(reference.model).items())


def test_a_reset_every_second_iteration() -> None:
    reference = ModelReference(make_model(), ReferenceConfig(reset_every=2))
    policies = [LanguagePolicy(perturbed(make_model(), 0.1, seed)) for seed in range(5)]
    expected = [make_model(), policies[1].model, policies[1].model, policies[3].model, policies[3].model]
    for policy, now in zip(policies, expected, strict=True):
        reference.follow(policy)
        assert all(torch.equal(w, weights(now)[name]) for name, w in weights(reference.model).items())
    for parameter in policies[3].model.parameters():
        parameter.data += 1.0  # learning goes on, in place
    assert torch.equal(weights(reference.model)["lm_head.weight"] + 1.0, weights(policies[3].model)["lm_head.weight"])


def test_adapters_follow_by_their_matrices() -> None:
    model = adapted()
    start = {name: w.detach().clone() for name, w in adapter_weights(model, POLICY).items()}
    reference = AdapterReference(model, ReferenceConfig(ema=0.75))
    assert torch.equal(log_probs_of(reference), reference_log_probs(Reader(make_model()), *ASKED))
    policy = LanguagePolicy(move(model))
    reference.follow(policy)
    twin = adapter_weights(model, REFERENCE)
    for name, weight in adapter_weights(model, POLICY).items():
        expected = 0.75 * start[name] + 0.25 * weight
        torch.testing.assert_close(twin[name.replace(POLICY, REFERENCE)].data, expected.detach())
    assert policy.policy_parameters() == list(model.parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in adapter_weights(model, POLICY).values()
    }


def test_adapters_are_reset() -> None:
    model = adapted()
    reference = AdapterReference(model, ReferenceConfig(reset_every=1))
    policy = LanguagePolicy(move(model))
    reference.follow(policy)
    then = reference_log_probs(Reader(model), *ASKED)
    move(model, seed=5)
    assert torch.equal(log_probs_of(reference), then)


@pytest.mark.parametrize("options", [{"ema": 0.5}, {"reset_every": 2}])
@pytest.mark.parametrize("lora", [False, True])
def test_a_state_brings_back_what_moved_and_is_not_changed_by_what_follows(
    options: dict[str, Any], lora: bool, tmp_path: Path
) -> None:
    def build() -> tuple[Reference, LanguagePolicy]:
        model, config = (adapted() if lora else make_model()), ReferenceConfig(**options)
        reference = AdapterReference(model, config) if lora else ModelReference(make_model(), config)
        return reference, LanguagePolicy(model)

    def learn(policy: LanguagePolicy, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    whole, policy = build()
    for seed in range(3):
        learn(policy, seed)
        whole.follow(policy)
    state = whole.state_dict()
    before, learned = copy.deepcopy(state), copy.deepcopy(weights(policy.model))
    learn(policy, 3)
    whole.follow(policy)
    assert all(torch.equal(w, before["weights"][name]) for name, w in state["weights"].items())
    save_state(tmp_path, "reference", before)
    again, other = build()
    for name, parameter in other.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(learned[name])
    again.load_state_dict(load_state(tmp_path, "reference"))
    learn(other, 3)
    again.follow(other)
    assert torch.equal(log_probs_of(again), log_probs_of(whole))
    assert again.fingerprint == whole.fingerprint == build()[0].fingerprint


def test_nothing_is_saved_of_one_that_has_not_moved_yet() -> None:
    reference = ModelReference(make_model(), ReferenceConfig(reset_every=2))
    reference.follow(LanguagePolicy(perturbed(make_model())))
    assert reference.state_dict() == {"iterations": 1}


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "ema is 1.0, expected 0 or more and below 1"),
        ({"ema": -0.1}, "ema is -0.1"),
        ({"reset_every": 0}, "reset_every is 0, expected at least 1"),
        ({"ema": 0.9, "reset_every": 3}, "one of the two ways"),
        ({"ema": 0.9, "offload": "disk"}, "a reference that follows is kept in memory"),
    ],
)
def test_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceConfig(**options)


def test_an_average_needs_float32() -> None:
    with pytest.raises(UserError, match=r"set reference.dtype float32, or use reference.reset_every"):
        ModelReference(make_model().to(torch.bfloat16), ReferenceConfig(ema=0.9))
    finer = ModelReference(make_model().to(torch.bfloat16), ReferenceConfig(ema=0.9, dtype="float32"))
    finer.follow(LanguagePolicy(perturbed(make_model()).to(torch.bfloat16)))
    assert {p.dtype for p in finer.model.parameters()} == {torch.float32}


def test_a_model_of_another_shape_cannot_follow() -> None:
    reference = ModelReference(make_model("gpt2"), ReferenceConfig(reset_every=1))
    with pytest.raises(UserError, match="a model of another shape"):
        reference.follow(LanguagePolicy(make_model("llama")))
