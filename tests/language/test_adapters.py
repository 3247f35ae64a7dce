"""Low-rank adapters in a model: what is computed, what is trained, what a folder of them holds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import KINDS, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tether.errors import UserError
from tether.language.adapters import (
    POLICY,
    LoRAConfig,
    adapter_weights,
    base_of,
    copy_adapters,
    describe_adapters,
    give_adapters,
    is_adapter,
    merge_adapters,
    read_adapters,
    save_model,
    using,
)

TOKENS = torch.randint(3, 16, (3, 11), generator=torch.Generator().manual_seed(0))


def adapted(kind: str = "llama", config: LoRAConfig | None = None, scale: float = 0.03) -> PreTrainedModel:
    """A model whose adapters have been trained a while."""
    torch.manual_seed(0)
    model = give_adapters(make_model(kind), config or LoRAConfig(rank=3))
    move(model, scale)
    return model


def move(model: PreTrainedModel, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(model, POLICY).values():
        weight.data += scale * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def log_probs(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits.log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_alone_are_trained(kind: str) -> None:
    model, base = give_adapters(make_model(kind), LoRAConfig(rank=3)), make_model(kind)
    assert torch.equal(log_probs(model), log_probs(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_weights(model, POLICY))
    assert all(is_adapter(name) for name in trained)
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_adapters_a_model_is_its_base_to_the_bit(kind: str) -> None:
    model, base = adapted(kind), make_model(kind)
    assert float((log_probs(model) - log_probs(base)).abs().max()) > 0.1
    with using(model, None):
        assert torch.equal(log_probs(model), log_probs(base))
    assert float((log_probs(model) - log_probs(base)).abs().max()) > 0.1
    assert all(weight.requires_grad for weight in adapter_weights(model, POLICY).values())


def test_every_linear_layer_but_the_head_has_an_adapter_of_the_rank_unless_layers_are_named() -> None:
    def layers(config: LoRAConfig) -> dict[str, int]:
        model = give_adapters(make_model(), config)
        return {n.split(".lora_A")[0]: len(w) for n, w in adapter_weights(model, POLICY).items() if ".lora_A" in n}

    everywhere = layers(LoRAConfig(rank=3))
    assert {name.rpartition(".")[2] for name in everywhere} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert set(everywhere.values()) == {3}
    some = layers(LoRAConfig(rank=5, target_modules=("q_proj", "up_proj")))
    assert {name.rpartition(".")[2] for name in some} == {"q_proj", "up_proj"}
    assert set(some.values()) == {5}


def test_the_layer_adds_alpha_by_rank_times_b_a_x() -> None:
    model = adapted(config=LoRAConfig(rank=4, alpha=12.0, target_modules=("up_proj",)))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    a, b = layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight
    x = torch.randn(5, a.shape[1])
    expected = x @ layer.base_layer.weight.T + 12.0 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_the_model_is_plain_and_says_the_same(kind: str) -> None:
    model = adapted(kind).double()  # float32 rounds by 2e-5, and otherwise on other processors
    expected = log_probs(model)
    merged = merge_adapters(model)
    assert dict(merged.named_parameters()).keys() == dict(make_model(kind).named_parameters()).keys()
    assert all(parameter.requires_grad for parameter in merged.parameters())
    # 2e-14 at most on 20 seeds; norms are float32 all the same, where one rounding may fall otherwise
    assert float((log_probs(merged) - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_of_adapters_is_pefts_and_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    make_model(kind).save_pretrained(tmp_path / "base")
    model = adapted(kind)
    model.peft_config[POLICY].base_model_name_or_path = str(tmp_path / "base")
    save_model(model, tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    assert base_of(str(tmp_path / "adapters")) == str(tmp_path / "base")
    again = read_adapters(make_model(kind), str(tmp_path / "adapters"))
    assert torch.equal(log_probs(again), log_probs(model))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    by_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    torch.testing.assert_close(log_probs(by_peft), log_probs(model))


def test_the_adapters_of_peft_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True, init_lora_weights=False)
    theirs = peft.get_peft_model(make_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = read_adapters(make_model(), str(tmp_path))
    torch.testing.assert_close(log_probs(ours), log_probs(theirs))
    assert all(weight.requires_grad for weight in adapter_weights(ours, POLICY).values())


def test_adapters_are_float32_in_a_model_that_is_not() -> None:
    model = give_adapters(make_model().to(torch.bfloat16), LoRAConfig(rank=2))
    assert {weight.dtype for weight in adapter_weights(model, POLICY).values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if not is_adapter(name)} == {torch.bfloat16}


def test_the_folder_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    """The names of layers stand in a set of peft; here they are sorted."""
    save_model(adapted(), tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert len(targets) == 14


def test_a_frozen_twin_stays_behind() -> None:
    model = adapted()
    start = log_probs(model)
    copy_adapters(model)
    move(model, 0.3, seed=2)
    moved = log_probs(model)
    assert not torch.equal(moved, start)
    with using(model, "reference"):
        assert torch.equal(log_probs(model), start)
    assert torch.equal(log_probs(model), moved)
    assert not any(weight.requires_grad for weight in adapter_weights(model, "reference").values())


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_layers_that_are_not_there_are_named_beside_those_that_are() -> None:
    message = r"target_modules: the name of no layer ends in c_attn; .* end in down_proj, gate_proj, .*, v_proj"
    for targets in (("c_attn",), ("q_proj", "c_attn")):
        with pytest.raises(UserError, match=message):
            give_adapters(make_model(), LoRAConfig(rank=2, target_modules=targets))
    with pytest.raises(
        UserError, match=r"lora: no adapters for this model \(ValueError: Target module .* not supported"
    ):
        give_adapters(make_model(), LoRAConfig(rank=2, target_modules=("input_layernorm",)))


def test_a_model_has_adapters_once() -> None:
    with pytest.raises(UserError, match="has adapters already"):
        give_adapters(adapted(), LoRAConfig(rank=2))


def test_a_head_that_shares_its_weight_with_the_embeddings_has_none() -> None:
    """Merged into the one, they would change the other."""
    with pytest.raises(
        UserError, match=r"target_modules: adapters on the embeddings or the output head of a model that"
    ):
        give_adapters(make_model("gpt2"), LoRAConfig(rank=2, target_modules=("lm_head",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "rank is -1, expected 1 or more"),
        ({"rank": 2, "alpha": 0.0}, "alpha is 0.0, expected a number above 0"),
        ({"target_modules": ("q_proj",)}, "target_modules is set, but rank is 0"),
    ],
)
def test_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def spoil(folder: Path, what: str) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    if what == "gone":
        file.unlink()
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif what == "missing":
        save_file({n: w for n, w in weights.items() if n != name}, file)
    elif what == "unknown":
        save_file(weights | {"base_model.model.other.lora_A.weight": torch.zeros(2, 2)}, file)
    elif what == "shape":
        save_file(weights | {name: torch.zeros(2, 2)}, file)
    else:
        save_file(weights | {name: weights[name] * torch.nan}, file)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "has no adapter_model.safetensors"),
        ("cut", "adapter_model.safetensors: damaged or cut short"),
        ("missing", "another model: 1 tensors missing, 0 unknown"),
        ("unknown", "another model: 0 tensors missing, 1 unknown"),
        ("shape", "adapters of another model .*size mismatch"),
        ("nan", "the weights hold NaN or infinity"),
    ],
)
def test_a_spoiled_folder(what: str, message: str, tmp_path: Path) -> None:
    save_model(adapted(), tmp_path)
    spoil(tmp_path, what)
    with pytest.raises(UserError, match=message):
        read_adapters(make_model(), str(tmp_path))


def test_a_configuration_that_says_nothing_of_a_base(tmp_path: Path) -> None:
    save_model(adapted(), tmp_path)
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path is '', expected the folder"):
        base_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match=r"adapter_config.json: no configuration of adapters"):
        base_of(str(tmp_path))
    with pytest.raises(UserError, match="no adapters that peft knows"):
        read_adapters(make_model(), str(tmp_path))


def test_a_copy_of_the_model_keeps_its_adapters() -> None:
    model = adapted()
    assert torch.equal(log_probs(copy.deepcopy(model)), log_probs(model))


# ---- what others train beside matrices of low rank ---------------------------------------------------------------

QV = ["q_proj", "v_proj"]
TRAINED_ON = {
    "embeddings whole": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "norm whole": ("llama", {"modules_to_save": ["norm"]}),
    "rows of embeddings": ("llama", {"trainable_token_indices": [3, 4, 5]}),
    "dora": ("llama", {"use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "tied embeddings whole": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
    "biases of its own": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
}
REFUSED = {
    "biases of the model": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all"), r"bias of the model"),
    "head whole": ("llama", peft.LoraConfig(r=2, target_modules=QV, modules_to_save=["lm_head"]), "an output head of"),
    "tied rows": ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3]), "output head"),
    "ia3": ("llama", peft.IA3Config(target_modules=QV, feedforward_modules=[]), "kind IA3, expected LORA"),
    "loha": ("llama", peft.LoHaConfig(r=2, target_modules=QV), "kind LOHA, expected LORA"),
    "no bias": ("llama", peft.LoraConfig(r=2, target_modules=QV, lora_bias=True), "could never be merged"),
    "alora": ("llama", peft.LoraConfig(r=2, target_modules=QV, alora_invocation_tokens=[3]), "alora_invocation_tokens"),
    "prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "no adapters for this"),
}


def theirs(model: PreTrainedModel, config: peft.PeftConfig, folder: Path) -> torch.Tensor:
    """A folder of adapters that peft made and somebody trained, and what the model says with them."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return log_probs(adapted)


@pytest.mark.parametrize("name", TRAINED_ON)
def test_all_that_adapters_train_has_a_twin_and_is_saved(name: str, tmp_path: Path) -> None:
    kind, options = TRAINED_ON[name]
    start = theirs(make_model(kind), peft.LoraConfig(**{"r": 2, "target_modules": QV} | options), tmp_path / "theirs")
    model = give_adapters(make_model(kind), LoRAConfig(rank=2), str(tmp_path / "theirs"))
    torch.testing.assert_close(log_probs(model), start)
    start = log_probs(model)
    copy_adapters(model)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_weights(model, POLICY))
    move(model, 0.3, seed=2)
    moved = log_probs(model)
    assert float((moved - start).abs().max()) > 0.1
    with using(model, "reference"):
        assert torch.equal(log_probs(model), start)
    if name != "pissa":  # which takes from the weights what it starts with
        with using(model, None):
            assert torch.equal(log_probs(model), log_probs(make_model(kind)))
    assert torch.equal(log_probs(model), moved)
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model.peft_config[POLICY].base_model_name_or_path = "base"
    save_model(model, tmp_path / "ours")
    torch.testing.assert_close(log_probs(read_adapters(make_model(kind), str(tmp_path / "ours"))), moved)


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_a_reference_could_not_follow_are_refused(name: str, tmp_path: Path) -> None:
    kind, config, message = REFUSED[name]
    theirs(make_model(kind), config, tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        give_adapters(make_model(kind), LoRAConfig(rank=2), str(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


MERGED = {
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "head whole": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [3, 4]},
    "on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("name", MERGED)
def test_merged_and_saved_it_says_what_peft_says(name: str, tied: bool, tmp_path: Path) -> None:
    """Embeddings and head that shared a weight no longer do where adapters changed one of them."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": QV} | MERGED[name])
    expected = theirs(make_model(tie_word_embeddings=tied), config, tmp_path / "theirs")
    merged = merge_adapters(read_adapters(make_model(tie_word_embeddings=tied), str(tmp_path / "theirs")))
    merged.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    for model in (merged, again):
        torch.testing.assert_close(log_probs(model), expected, atol=1e-3, rtol=0)
    assert again.config.tie_word_embeddings == (tied and name == "rows")


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [16, 17]}])
def test_a_vocabulary_that_was_enlarged_before(options: dict, tied: bool, tmp_path: Path) -> None:
    base, larger = (make_model(tie_word_embeddings=tied) for _ in range(2))
    base.save_pretrained(tmp_path / "base")
    larger.resize_token_embeddings(20)
    larger.name_or_path = str(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=QV, base_model_name_or_path=str(tmp_path / "base"), **options)
    expected = theirs(larger, config, tmp_path / "theirs")
    ours = read_adapters(base, str(tmp_path / "theirs"))
    ours.name_or_path = str(tmp_path / "base")
    ours.peft_config[POLICY].base_model_name_or_path = str(tmp_path / "base")
    torch.testing.assert_close(log_probs(ours), expected)
    assert ours.get_output_embeddings().weight.shape[0] == 20
    save_model(ours, tmp_path / "ours")
    again = read_adapters(make_model(tie_word_embeddings=tied), str(tmp_path / "ours"))
    torch.testing.assert_close(log_probs(again), expected)


# ---- mixtures of experts -----------------------------------------------------------------------------------------

SIZE = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 4}),
    "gpt_oss": (transformers.GptOssConfig, {"num_local_experts": 4, "head_dim": 8}),
    "phimoe": (transformers.PhimoeConfig, {"num_local_experts": 4}),
}
WITHOUT = {"gpt_oss", "phimoe"}  # peft reaches none of their experts by the names of layers


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_merged_and_says_what_is_adapted(name: str, tmp_path: Path) -> None:
    kind, options = EXPERTS[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(kind(**SIZE | options)).eval()
    start = log_probs(base)
    model = give_adapters(base, LoRAConfig(rank=2))
    assert torch.equal(log_probs(model), start)
    said = describe_adapters(model)
    assert said.startswith("rank 2 on q_proj, k_proj, v_proj, o_proj")
    assert ("none on" in said) == (name in WITHOUT)
    assert "experts.gate_up_proj" in (said.partition("none on")[2] if name in WITHOUT else said)
    copy_adapters(model)
    move(model, 0.1)
    moved = log_probs(model)
    with using(model, "reference"):
        assert torch.equal(log_probs(model), start)
    merge_adapters(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("peft" in type(module).__module__ for module in model.modules())
    torch.testing.assert_close(log_probs(again), moved, atol=1e-3, rtol=0)
