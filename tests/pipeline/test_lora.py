"""PPO of adapters: runs, checkpoints and what is made of them, against a model that is trained whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.models import make_model, make_tokenizer
from tests.run_folders import assert_same_run, newest_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from tether.errors import UserError
from tether.language.adapters import LoRAConfig, adapter_weights, is_adapter, using
from tether.language.divergence import compare
from tether.language.models import load_causal_lm, load_tokenizer
from tether.language.reference import AdapterReference, ModelReference, ReferenceConfig
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.evaluate import EvalConfig, evaluate
from tether.pipeline.export import ExportConfig, export
from tether.pipeline.generate import GenerateConfig, generate
from tether.pipeline.opening_language import describe_model
from tether.pipeline.ppo import Parts, PPOConfig, build_ppo, train_ppo
from tether.pipeline.sft import SFTConfig, fine_tune, sft
from tether.ppo import AdvantageConfig, LearnerConfig, Trajectories
from tether.runs import read_metrics
from tether.train import iterate

TEXTS = ["ab", "c", "deab", "fa"]
TOKENS = torch.randint(3, 16, (3, 11), generator=torch.Generator().manual_seed(0))


def letters_a(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") - 0.25 * len(text) for text in completions]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(base: str, folder: Path, **options: Any) -> PPOConfig:
    standard: dict[str, Any] = {
        "model": base,
        "output": str(folder / "run"),
        "iterations": 4,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=5),
        "collect": CollectConfig(prompts=4),
        "learner": LearnerConfig(epochs=2, minibatches=2, learning_rate=3e-3),
        "lora": LoRAConfig(rank=4),
    }
    return PPOConfig(**standard | options)


def parts(**options: Any) -> Parts:
    return Parts(prompts=TEXTS, reward=letters_a, **options)


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.log_softmax(-1)


def names_of(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_adapters_learn_and_the_base_stays_as_it_was(base: str, tmp_path: Path) -> None:
    learner = LearnerConfig(learning_rate=1e-2, epochs=2, minibatches=2)
    config = settings(base, tmp_path, iterations=30, collect=CollectConfig(prompts=32), learner=learner)
    trained = train_ppo(config, parts())
    scores = [line["score"] for line in read_metrics(trained.folder)]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.5
    model = trained.world.policy.model
    plain = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if not is_adapter(name)}
    assert all(torch.equal(p, plain[name]) for name, p in make_model().named_parameters())
    with using(model, None):
        assert torch.equal(log_probs(model), log_probs(make_model()))


def test_the_first_iteration_is_that_of_full_training(base: str, tmp_path: Path) -> None:
    """New adapters change nothing: the same responses, rewards and KL, from which then different weights learn."""
    first = [
        next(iterate(*build_ppo(settings(base, tmp_path, lora=LoRAConfig(rank)), parts()))).trajectories
        for rank in (0, 4)
    ]
    assert torch.equal(first[0].actions, first[1].actions)
    assert torch.equal(first[0].rewards, first[1].rewards)
    assert torch.equal(first[0].reference_log_probs, first[1].reference_log_probs)


def by(reference: ModelReference, world: LanguageWorld, batch: Trajectories) -> Tensor:
    """The log-probabilities of a reference, as a world asks for them."""
    rows = torch.arange(len(batch))
    return compare(world.policy.reader, reference, batch.context, batch.actions, batch.mask, rows)[0]


def test_the_kl_is_to_the_base(base: str, tmp_path: Path) -> None:
    world, learner = build_ppo(settings(base, tmp_path), parts())
    assert isinstance(world.reference, AdapterReference)
    fixed = ModelReference(make_model())
    for step in iterate(world, learner):
        batch = step.trajectories
        expected = by(fixed, world, batch)
        assert torch.equal(batch.reference_log_probs, expected)
    assert step.metrics["kl"] > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": ReferenceConfig(ema=0.5)},
        {"reference": ReferenceConfig(reset_every=3)},
        {"separate_value_trunk": True},
        {"lora": LoRAConfig(rank=0), "reference": ReferenceConfig(ema=0.5)},
        {"lora": LoRAConfig(rank=0), "reference": ReferenceConfig(reset_every=3)},
        {"lora": LoRAConfig(rank=0), "reference": ReferenceConfig(offload="disk", dtype="bfloat16")},
        {"dtype": "bfloat16"},
    ],
    ids=["lora", "lora ema", "lora reset", "lora critic", "ema", "reset", "disk", "lora bfloat16"],
)
def test_resumed_as_if_it_had_never_stopped(options: dict[str, Any], base: str, tmp_path: Path) -> None:
    config = settings(base, tmp_path, **options)
    whole = train_ppo(config, parts())
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)


@pytest.fixture(scope="module")
def whole_layers(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Adapters of another program's, which trained embeddings and norm whole."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "norm"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("reference", [ReferenceConfig(), ReferenceConfig(ema=0.5)], ids=["still", "ema"])
def test_layers_trained_whole_go_on_and_are_the_reference(
    reference: ReferenceConfig, whole_layers: str, tmp_path: Path
) -> None:
    """The KL of the first batch is 0; what is resumed is what was saved."""
    config = settings(whole_layers, tmp_path, reference=reference, iterations=2, checkpoint_every=1)
    world, _ = build_ppo(config, parts())
    assert "trained whole: embed_tokens, input_layernorm, post_attention_layernorm, norm;" in describe_model(
        world.policy.model
    )
    whole = train_ppo(config, parts())
    assert read_metrics(whole.folder)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=1), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)
    policy = newest_checkpoint(whole.folder)[1] / "policy"
    started = load_file(Path(whole_layers, "adapter_model.safetensors"))
    ended = load_file(policy / "adapter_model.safetensors")
    moved = {name.split(".")[-2] for name, weight in ended.items() if not torch.equal(weight, started[name])}
    assert moved >= {"embed_tokens", "norm", "lora_A", "lora_B"}
    torch.testing.assert_close(log_probs(load_causal_lm(str(policy))), log_probs(whole.world.policy.model))


def test_a_reference_that_follows_lowers_the_kl_from_the_second_iteration_on(base: str, tmp_path: Path) -> None:
    def kl(reference: ReferenceConfig, rank: int) -> list[float]:
        config = settings(base, tmp_path, lora=LoRAConfig(rank), reference=reference, iterations=3)
        return [step.metrics["kl"] for step in iterate(*build_ppo(config, parts()))]

    for rank in (0, 4):
        still, reset = kl(ReferenceConfig(), rank), kl(ReferenceConfig(reset_every=1), rank)
        assert reset[0] == still[0]
        assert all(value < 1e-9 for value in reset)
        assert still[1] > 1e-5
        assert 1e-9 < kl(ReferenceConfig(ema=0.9), rank)[1] < still[1]


def test_a_reference_follows_once_where_collecting_fails_and_is_tried_again(base: str, tmp_path: Path) -> None:
    config = settings(base, tmp_path, reference=ReferenceConfig(ema=0.5))
    world, learner = build_ppo(config, parts())
    learner.iterations = 1
    next(iterate(world, learner))
    good, world.rewards = world.rewards, None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        world.collect()
    world.rewards = good
    world.collect()
    assert world.reference.state_dict()["iterations"] == 1


def test_a_critic_of_its_own_shares_the_frozen_weights(base: str, tmp_path: Path) -> None:
    config = settings(base, tmp_path, separate_value_trunk=True)
    trained = train_ppo(config, parts())
    policy = trained.world.policy
    ids = {id(parameter) for parameter in policy.model.parameters()}
    shared = {n for n, p in policy.value_trunk.named_parameters() if id(p) in ids}
    own = {n for n, p in policy.value_trunk.named_parameters() if id(p) not in ids}
    assert own == {n for n, p in policy.value_trunk.named_parameters() if is_adapter(n)}
    assert shared
    kept = names_of(newest_checkpoint(trained.folder)[1] / "critic.safetensors")
    assert {name.removeprefix("value_trunk.") for name in kept if "head" not in name} == own


def test_a_model_in_memory_is_trained_in_place(base: str, tmp_path: Path) -> None:
    def given() -> Parts:
        return parts(model=make_model(), tokenizer=make_tokenizer())

    config, first = settings(base, tmp_path), given()
    trained = train_ppo(replace(config, iterations=2), first)
    assert trained.world.policy.model is first.model
    second = given()
    assert train_ppo(config, second, resume=True).world.policy.model is second.model
    whole = train_ppo(settings(base, tmp_path / "whole"), given())
    assert_same_run(tmp_path / "run", whole.folder)
    with pytest.raises(UserError, match="the model has adapters already"):
        train_ppo(config, second, resume=True)


# ---- what is left --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of trained adapters, and the model in memory."""
    trained = train_ppo(settings(base, tmp_path_factory.mktemp("trained")), parts())
    return trained.policy, trained.world.policy.model


def test_a_checkpoint_holds_adapters_and_the_name_of_their_base(base: str, policy: tuple[Path, Any]) -> None:
    folder, model = policy
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert not (folder / "model.safetensors").exists()
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == sum(w.numel() for w in adapter_weights(model, "default").values())


def test_commands_take_a_folder_of_adapters_for_the_policy(policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = policy
    assert load_tokenizer(str(folder)).get_vocab() == make_tokenizer().get_vocab()
    loaded = load_causal_lm(str(folder))
    torch.testing.assert_close(log_probs(loaded), log_probs(model), atol=1e-5, rtol=0)
    assert float((log_probs(loaded) - log_probs(make_model())).abs().max()) > 1e-3
    sampling = SamplingConfig(max_new_tokens=4)
    responses = generate(GenerateConfig(model=str(folder), prompt="ab", sampling=sampling, samples=3))
    assert len(responses) == 3
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    (tmp_path / "rewards.py").write_text("def score(completions, **_):\n    return [1.0 for _ in completions]\n")
    config = EvalConfig(model=str(folder), sampling=sampling)
    config = replace(config, prompts=replace(config.prompts, path=str(tmp_path / "prompts.jsonl")))
    config = replace(config, reward=replace(config.reward, functions=(f"{tmp_path}/rewards.py:score",)))
    assert evaluate(config).score.mean == 1.0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_exported_it_is_one_plain_folder(dtype: Any, policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = policy
    output = export(ExportConfig(model=str(folder), output=str(tmp_path / "new" / "exported"), dtype=dtype))
    assert not (output / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(output).eval()
    assert not hasattr(plain, "peft_config")
    assert plain.dtype == (torch.float32 if dtype is None else torch.bfloat16)
    difference = float((log_probs(plain.float()) - log_probs(model)).abs().max())
    assert difference < (1e-5 if dtype is None else 0.5)
    assert load_tokenizer(str(output)).get_vocab() == make_tokenizer().get_vocab()


def test_an_export_keeps_the_precision_of_the_base(tmp_path: Path) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    output = export(ExportConfig(model=str(tmp_path / "model"), output=str(tmp_path / "exported")))
    first, second = load_file(tmp_path / "model/model.safetensors"), load_file(output / "model.safetensors")
    assert {weight.dtype for weight in second.values()} == {torch.bfloat16}
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_an_export_replaces_nothing_unless_asked(base: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.txt").write_text("old")
    config = ExportConfig(model=base, output=str(tmp_path / "there"))
    with pytest.raises(UserError, match="there: the folder is already there; name another, or set --overwrite"):
        export(config)
    assert (export(replace(config, overwrite=True)) / "model.safetensors").is_file()
    assert not (tmp_path / "there" / "old.txt").exists()
    with pytest.raises(UserError, match="the model that is to be exported lies there"):
        export(ExportConfig(model=base, output=base, overwrite=True))
    with pytest.raises(UserError, match="no output given"):
        export(ExportConfig(model=base))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: a file, expected a folder"):
        export(ExportConfig(model=base, output=str(tmp_path / "file")))


def test_an_export_that_overflows_is_refused(tmp_path: Path) -> None:
    model = make_model()
    model.lm_head.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"dtype is float16, in which lm_head.weight overflows"):
        export(ExportConfig(model=str(tmp_path / "model"), output=str(tmp_path / "out"), dtype="float16"))
    assert not (tmp_path / "out").exists()


# ---- training that goes on from adapters ---------------------------------------------------------------------------


def test_adapters_trained_before_go_on_and_are_the_reference(policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = policy
    config = settings(str(folder), tmp_path)
    world, learner = build_ppo(config, parts())
    step = next(iterate(world, learner))
    batch = step.trajectories
    assert step.metrics["kl"] < 1e-9
    expected = by(ModelReference(model), world, batch)
    assert torch.equal(batch.reference_log_probs, expected)
    whole = train_ppo(config, parts())
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert json.loads((whole.policy / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)


def test_without_a_rank_they_are_merged_and_all_is_trained(policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = policy
    world, learner = build_ppo(settings(str(folder), tmp_path, lora=LoRAConfig()), parts())
    assert all(parameter.requires_grad for parameter in world.policy.model.parameters())
    torch.testing.assert_close(log_probs(world.policy.model), log_probs(model), atol=1e-5, rtol=0)
    assert next(iterate(world, learner)).metrics["kl"] < 1e-9


def test_another_model_may_be_the_reference(base: str, policy: tuple[Path, Any], tmp_path: Path) -> None:
    config = settings(base, tmp_path, reference=ReferenceConfig(str(policy[0]), offload="disk"))
    world, learner = build_ppo(config, parts())
    batch = next(iterate(world, learner)).trajectories
    expected = by(ModelReference(load_causal_lm(str(policy[0]))), world, batch)
    assert torch.equal(batch.reference_log_probs, expected)


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_another_rank_than_that_of_the_folder_is_refused(policy: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora.rank is 2, but the adapters in .*policy have rank 4"):
        build_ppo(settings(str(policy[0]), tmp_path, lora=LoRAConfig(rank=2)), parts())


def test_a_run_goes_on_with_the_base_that_it_began_with(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = settings(str(tmp_path / "model"), tmp_path)
    train_ppo(replace(config, iterations=2), parts())
    make_model(seed=5).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="begun with another reference"):
        train_ppo(config, parts(), resume=True)


def test_a_base_that_is_gone_is_named(base: str, policy: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    for file in policy[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes().replace(base.encode(), b"/gone"))
    with pytest.raises(UserError, match=r"policy: adapters, whose base model cannot be loaded: /gone: no such folder"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": ReferenceConfig(offload="disk")}, "reference.offload is disk, but with lora.rank"),
        ({"reference": ReferenceConfig(dtype="bfloat16")}, "reference.dtype is bfloat16, but with lora.rank"),
        ({"reference": ReferenceConfig("other", ema=0.9)}, "such a reference cannot follow the adapters"),
        (
            {"lora": LoRAConfig(), "quantization": "4bit"},
            "quantization is 4bit, in which adapters alone can be trained",
        ),
        (
            {"value_model": "judge", "advantage": AdvantageConfig("rloo"), "collect": CollectConfig(4, 2)},
            "value_model is set, but advantage.estimator rloo trains no critic",
        ),
    ],
)
def test_settings_that_contradict_each_other(options: dict[str, Any], message: str, base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(base, tmp_path, **options)


def test_quantization_needs_a_gpu_and_bitsandbytes(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="quantization is 4bit, which needs a CUDA device; found device cpu"):
        build_ppo(settings(base, tmp_path, quantization="4bit"), parts())
    monkeypatch.setattr("tether.language.models.choose_device", lambda device: device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="quantization is 8bit, which needs bitsandbytes; install it"):
        load_causal_lm(base, device="cuda", quantization="8bit")


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantization_asks_transformers_for_it(kind: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.update(options)
        return make_model(), {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": set()}

    monkeypatch.setattr("tether.language.models.choose_device", lambda device: device)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("tether.language.models.AutoModelForCausalLM.from_pretrained", from_pretrained)
    load_causal_lm(base, "bfloat16", "cuda", quantization=kind)
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.load_in_8bit) == (kind == "4bit", kind == "8bit")
    assert asked["device_map"] == {"": "cuda"}
    assert asked["dtype"] == torch.bfloat16
    if kind == "4bit":
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == torch.bfloat16


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": t, "completion": "a" * (1 + i)}) + "\n" for i, t in enumerate(TEXTS)))
    return str(file)


def tuning(base: str, rows: str, folder: Path, **options: Any) -> SFTConfig:
    standard: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 20, "lora": LoRAConfig(rank=4)}
    return SFTConfig(model=base, data=rows, output=str(folder), **standard | options)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"packing": False, "autocast": True}])
def test_fine_tuning_leaves_adapters_that_ppo_goes_on_with(
    options: dict[str, Any], base: str, rows: str, tmp_path: Path
) -> None:
    losses: list[dict[str, float]] = []
    folder = sft(tuning(base, rows, tmp_path / "sft", **options), losses.append)
    assert losses[-1]["loss"] < losses[1]["loss"] - 0.3
    assert {file.name for file in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (folder / "model.safetensors").exists()
    trained = train_ppo(settings(str(folder), tmp_path, iterations=1), parts())
    assert read_metrics(trained.folder)[0]["kl"] < 1e-9
    plain = dict(load_causal_lm(base).named_parameters())
    now = trained.world.policy.model.named_parameters()
    assert all(torch.equal(p, plain[n.replace(".base_layer", "")]) for n, p in now if not is_adapter(n))


def test_fine_tuning_goes_on_with_adapters_and_is_the_same_each_time(base: str, rows: str, tmp_path: Path) -> None:
    first = sft(tuning(base, rows, tmp_path / "first"))
    again = sft(tuning(base, rows, tmp_path / "again"))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, again)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    seen: list[dict[str, float]] = []
    sft(tuning(str(first), rows, tmp_path / "second", learning_rate=0.0, max_steps=1), seen.append)
    last: list[dict[str, float]] = []
    sft(tuning(base, rows, tmp_path / "third", max_steps=21, schedule="constant"), last.append)
    assert seen[-1]["loss"] < 0.5 * last[1]["loss"]
    with pytest.raises(ValueError, match="quantization is 8bit, in which adapters alone can be trained"):
        tuning(base, rows, tmp_path, lora=LoRAConfig(), quantization="8bit")


def test_fine_tuning_in_memory_gives_the_model_adapters() -> None:
    model = make_model()
    given = [{"prompt": text, "completion": "aa"} for text in TEXTS]
    fine_tune(model, make_tokenizer(), given, SFTConfig(learning_rate=1e-2, max_steps=3, lora=LoRAConfig(rank=2)))
    assert all(bool(weight.abs().max() > 0) for weight in adapter_weights(model, "default").values())
