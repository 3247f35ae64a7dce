"""A run that goes on with other data than it was begun with, and what a saved policy says of itself."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import EOS, make_model, make_tokenizer, token
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from tether.cli import main
from tether.errors import UserError
from tether.language.adapters import LoRAConfig
from tether.language.policy import LanguagePolicy
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.export import ExportConfig, export
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.pipeline.sft import SFTConfig, fine_tune, save_policy
from tether.ppo import LearnerConfig
from tether.rewards import RewardsConfig
from tether.rewards.classifiers import load_classifier
from tether.runs import read_config, read_episodes

END = 2  # `<end>`, a special token that is not the eos


def settings(folder: Path, **options: Any) -> PPOConfig:
    small: dict[str, Any] = {
        "output": str(folder / "run"),
        "iterations": 2,
        "sampling": SamplingConfig(max_new_tokens=3),
        "collect": CollectConfig(prompts=2),
        "learner": LearnerConfig(epochs=1, minibatches=1),
        "reward": RewardsConfig(functions=(f"{folder / 'rewards.py'}:length",)),
    }
    return PPOConfig(**small | options)


def parts(texts: list[str], model: PreTrainedModel | None = None) -> Parts:
    return Parts(model or make_model(), make_tokenizer(), [{"prompt": text, "n": [1]} for text in texts])


@pytest.fixture
def run(tmp_path: Path) -> PPOConfig:
    """A run of two iterations over five prompts, to be gone on with."""
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    config = settings(tmp_path)
    train_ppo(config, parts(FIVE))
    return replace(config, iterations=4)


FIVE = ["ab", "c", "de", "fa", "bc"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (FIVE[:3], "was begun with 5 prompts, and now there are 3"),
        ([*FIVE, "f"], "was begun with 5 prompts, and now there are 6"),
        (["ab", "c", "de", "fa", "bd"], "5 prompts, but not those that the run was begun with"),
        (FIVE[::-1], "5 prompts, but not those that the run was begun with"),
    ],
    ids=["shorter", "longer", "other", "reordered"],
)
def test_other_prompts_are_refused_before_anything_is_written(run: PPOConfig, texts: list[str], said: str) -> None:
    before = {path: path.read_bytes() for path in Path(run.output).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"^prompts: .*{said}.*--new-pass"):
        train_ppo(run, parts(texts), resume=True)
    assert {path: path.read_bytes() for path in Path(run.output).rglob("*") if path.is_file()} == before
    train_ppo(run, parts(FIVE), resume=True)  # and a plain resume goes on


def test_the_same_rows_in_other_tokens_are_refused(run: PPOConfig) -> None:
    other = parts(FIVE)
    vocabulary = json.loads(other.tokenizer.backend_tokenizer.to_str())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    other.tokenizer = type(other.tokenizer)(
        tokenizer_object=other.tokenizer.backend_tokenizer.from_str(json.dumps(vocabulary)), eos_token="<eos>"
    )
    with pytest.raises(UserError, match="other tokens than when the run was begun: tokenizer or chat template"):
        train_ppo(run, other, resume=True)


def test_a_new_pass_visits_the_new_prompts_and_is_asked_for_once(run: PPOConfig) -> None:
    texts = ["a", "b", "e", "f"]
    train_ppo(replace(run, new_pass=True), parts(texts), resume=True)
    visited = [episode.prompt for number in (3, 4) for episode in read_episodes(run.output, iteration=number)]
    assert sorted(visited) == texts
    assert read_config(run.output)["new_pass"] is False
    train_ppo(replace(run, iterations=5), parts(texts), resume=True)
    with pytest.raises(UserError, match="new_pass is set"):
        train_ppo(replace(run, new_pass=True, overwrite=True), parts(texts))


def test_a_reward_that_was_changed_is_told(run: PPOConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train_ppo(replace(run, iterations=3), parts(FIVE), resume=True)
        assert "changed since" not in caplog.text
        file = Path(run.reward.functions[0].partition(":")[0])
        file.write_text(file.read_text().replace("len(c)", "2 * len(c)"))
        train_ppo(run, parts(FIVE), resume=True)
    assert f"reward: {file} has changed since the run was begun" in caplog.text


# --- what a configuration asks a model to return ------------------------------------------------------------------


def mixtral(**asked: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64, eos_token_id=0, pad_token_id=0,
            bos_token_id=None, initializer_range=0.4, **asked,
        )  # fmt: skip
        return MixtralForCausalLM(config)


ASKED: list[dict[str, Any]] = [
    {"output_router_logits": True},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"return_dict": False},
    {"use_cache": False},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: next(iter(asked)))
def test_outputs_that_nobody_reads_are_off_and_the_policy_asks_for_them_as_before(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    mixtral().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "c", "completion": "d"}\n')
    common = ["--model", str(folder), "--prompts.path", str(tmp_path / "p.jsonl"), "--sampling.max-new-tokens", "3"]
    small = ["--collect.prompts", "2", "--learner.minibatches", "1", "--iterations", "1"]
    output = ["--output", str(tmp_path / "run")]
    assert main(["generate", *common]) == 0
    assert main(["ppo", *common, *small, *output, "--reward.functions", "length?per_token=1"]) == 0
    saved = tmp_path / "run/checkpoints/iteration-000001/policy"
    written = json.loads((saved / "config.json").read_text())
    assert {name: written.get(name) for name in asked} == asked
    capsys.readouterr()
    sft = ["--model", str(saved), "--data", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "sft")]
    assert main(["sft", *sft, "--max-steps", "1"]) == 0
    assert "cross-entropy alone, without a term that balances them" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [ASKED[1], ASKED[3]], ids=["output_hidden_states", "return_dict"])
def test_a_reward_model_returns_a_score_whatever_its_configuration_asks_for(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer("<pad>").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    model, _ = load_classifier(str(tmp_path), new_head_seed=0)
    assert model(input_ids=torch.tensor([[4, 5]])).logits.shape == (1, 1)


def test_a_model_with_a_memory_of_its_own_is_refused_at_the_start() -> None:
    config = RwkvConfig(vocab_size=16, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=64)
    with pytest.raises(UserError, match="RwkvForCausalLM cannot be sampled from"):
        Sampler(LanguagePolicy(RwkvForCausalLM(config)), make_tokenizer(), SamplingConfig())


# --- where a response ends ----------------------------------------------------------------------------------------


def ends_elsewhere() -> PreTrainedModel:
    """Its generation_config.json says `<end>`, the tokenizer `<eos>`."""
    model = make_model()
    model.generation_config.eos_token_id = END
    return model


def ends_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


def test_the_policy_says_at_which_tokens_tether_ended(run: PPOConfig) -> None:
    trained = train_ppo(replace(run, overwrite=True), parts(FIVE, ends_elsewhere()))
    assert ends_of(trained.policy) == [EOS, END]


def test_a_stop_that_is_a_token_is_one_of_them(run: PPOConfig, tmp_path: Path) -> None:
    sampling = SamplingConfig(max_new_tokens=3, stop=("<end>", "ab"))
    trained = train_ppo(replace(run, overwrite=True, sampling=sampling), parts(FIVE))
    assert ends_of(trained.policy) == [EOS, END]


def test_a_tuned_model_and_merged_adapters_say_it_too(tmp_path: Path) -> None:
    base, tokenizer = ends_elsewhere(), make_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fine_tune(model, tokenizer, [{"prompt": "a", "completion": "b"}], SFTConfig(max_steps=1, lora=LoRAConfig(rank=1)))
    save_policy(model, tokenizer, tmp_path / "adapters")
    assert GenerationConfig.from_pretrained(tmp_path / "adapters").eos_token_id == [EOS, END]
    assert ends_of(export(ExportConfig(str(tmp_path / "adapters"), str(tmp_path / "whole")))) == [EOS, END]


def test_transformers_ends_where_tether_does(run: PPOConfig) -> None:
    """With a head that always draws the token at which Tether ends."""
    model = ends_elsewhere()
    trained = train_ppo(replace(run, overwrite=True, iterations=1), parts(FIVE, model))
    policy = AutoModelForCausalLM.from_pretrained(trained.policy)
    policy.get_output_embeddings().register_forward_hook(
        lambda *call: call[2].index_fill(-1, torch.tensor([EOS]), 99.0)
    )
    written = policy.generate(torch.tensor([[token("a")]]), max_new_tokens=5, do_sample=False)
    assert written[0].tolist() == [token("a"), EOS]
