"""Reward models that other programs saved: without a pad, as adapters, as encoders, of classes that are not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import EOS, make_model, make_tokenizer, token
from tokenizers import processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
    XLNetConfig,
)

from tether.cli import main
from tether.errors import RewardError, UserError
from tether.language.adapters import LoRAConfig, give_adapters
from tether.language.models import load_causal_lm, load_trainable
from tether.language.preferences import Preference
from tether.pipeline.comparisons import tokenize_pairs
from tether.pipeline.score import ScoreConfig, score
from tether.rewards.classifiers import load_classifier
from tether.rewards.models import RewardModel
from tether.rewards.passes import score_tokens

ENDED = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<eos>{% endfor %}"
ASKED = [{"role": "user", "content": "b"}]
ANSWERS = ["a", "bcd", "fffffe"]


def classifier_of(config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config).eval()


def llama_config(**options: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 16, "max_position_embeddings": 32, "num_labels": 1, "initializer_range": 0.4}
    return LlamaConfig(**{**sizes, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": None} | options)


def alone(model: Any, token_ids: list[list[int]]) -> list[float]:
    """What transformers says of each text by itself."""
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([ids])).logits) for ids in token_ids]


@pytest.mark.parametrize(
    ("kind", "pad"), [("llama", None), ("llama", "<eos>"), ("llama", "<pad>"), ("llama", "a"), ("gpt2", None)]
)
def test_a_model_that_names_no_pad_is_read_at_the_last_token(kind: str, pad: str | None, tmp_path: Path) -> None:
    """Whatever the tokenizer pads with, eos or a token of the texts: in company as alone, score and training."""
    config = llama_config()
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4, "num_labels": 1}
        config = GPT2Config(vocab_size=16, eos_token_id=EOS, bos_token_id=None, pad_token_id=None, **sizes)
    model, tokenizer = classifier_of(config), make_tokenizer(pad)
    tokenizer.chat_template = ENDED
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chats = tokenizer.apply_chat_template([[*ASKED, {"role": "assistant", "content": a}] for a in ANSWERS])["input_ids"]
    assert all(ids[-1] == EOS for ids in chats)
    reward = RewardModel(tmp_path)
    together = reward.score([ASKED] * 3, ANSWERS)
    assert together == pytest.approx(alone(model, chats), abs=1e-5)
    assert len({round(score, 3) for score in together}) == 3
    texts = [[token(t) for t in f"b{answer}"] + [EOS] for answer in ANSWERS]
    assert reward.score(["b"] * 3, ANSWERS) == pytest.approx(alone(model, texts), abs=1e-5)
    trained, _ = load_classifier(str(tmp_path), new_head_seed=0)
    assert score_tokens(trained, chats).tolist() == pytest.approx(together, abs=1e-5)
    assert trained.config.pad_token_id is None  # as it was before the pass


@pytest.mark.parametrize("pad", [EOS, -1, 15])
def test_a_pad_that_the_configuration_names_is_kept(pad: int, tmp_path: Path) -> None:
    model, tokenizer = classifier_of(llama_config(pad_token_id=pad)), make_tokenizer("<eos>")
    tokenizer.chat_template = ENDED
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chats = tokenizer.apply_chat_template([[*ASKED, {"role": "assistant", "content": a}] for a in ANSWERS])["input_ids"]
    assert RewardModel(tmp_path).score([ASKED] * 3, ANSWERS) == pytest.approx(alone(model, chats), abs=1e-5)


def adapters_of_a_reward_model(folder: Path, **options: Any) -> Any:
    """`folder`/rm, adapters with a head, and the model itself."""
    make_model().save_pretrained(folder / "base")
    make_tokenizer("<pad>").save_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    if "labels" in options:
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=options.pop("labels"))
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"} | options)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "rm")
    make_tokenizer("<pad>").save_pretrained(folder / "rm")
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["score"]}, {"use_dora": True}])
def test_a_reward_model_of_adapters_is_read_and_exported(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapters_of_a_reward_model(tmp_path, **options)
    expected = alone(model, [[token(t) for t in f"b{answer}"] + [EOS] for answer in ANSWERS])
    for folder in ("rm", "plain", "again"):
        assert RewardModel(tmp_path / folder).score(["b"] * 3, ANSWERS) == pytest.approx(expected, abs=1e-4)
        if folder != "again":
            next_folder = {"rm": "plain", "plain": "again"}[folder]
            assert main(["export", "--model", str(tmp_path / folder), "--output", str(tmp_path / next_folder)]) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForSequenceClassification"


def test_adapters_of_the_other_kind_are_named(tmp_path: Path) -> None:
    adapters_of_a_reward_model(tmp_path)
    for load in (
        lambda: load_causal_lm(str(tmp_path / "rm")),
        lambda: load_trainable(str(tmp_path / "rm"), LoRAConfig(2)),
    ):
        with pytest.raises(UserError, match=r"rm: adapters of a classifier, .* expected those of a language model"):
            load()
    policy = give_adapters(make_model(), LoRAConfig(rank=2))
    policy.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=r"policy: adapters of a language model; expected a reward model"):
        RewardModel(tmp_path / "policy")
    adapters_of_a_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(UserError, match="a classifier of 2 labels"):
        RewardModel(tmp_path / "two" / "rm")


def encoder(name: str, folder: Path, **options: Any) -> Any:
    """An encoder, saved beside a tokenizer with special tokens at both ends of a text."""
    tokenizer = make_tokenizer("<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A <eos>", special_tokens=[("<end>", 2), ("<eos>", EOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        cls_token="<end>",
        sep_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 16, "num_labels": 1, "initializer_range": 0.4, "pad_token_id": 1}
    model = classifier_of(CONFIG_MAPPING[name](**{**sizes, "max_position_embeddings": 12} | options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


ENDS = {"cls_token_id": 2, "sep_token_id": EOS, "bos_token_id": 2, "eos_token_id": EOS}
ENCODERS = {"bert": {}, "deberta-v2": {}, "modernbert": ENDS, "roberta": {"max_position_embeddings": 14}}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_that_is_cut_keeps_its_special_tokens(name: str, tmp_path: Path) -> None:
    """At the first of which an encoder reads its score; RoBERTa has two positions fewer than its configuration says."""
    model = encoder(name, tmp_path, **ENCODERS[name])
    answer = "abcdefabcdefabcdef"
    expected = [2, *(token(t) for t in answer[-10:]), EOS]
    reward = RewardModel(tmp_path, truncate=True)
    assert reward.tokens(["b"], [answer]) == [[expected]]
    assert reward.score(["b"], [answer]) == pytest.approx(alone(model, [expected]), abs=1e-5)
    pairs = tokenize_pairs([Preference("b", answer, "a", row=1)], reward.tokenizers[0], 12, "truncate")
    assert (pairs.chosen, pairs.rejected) == ([expected], [[2, token("b"), token("a"), EOS]])
    with pytest.raises(RewardError, match=r"the reward model .* is 12: shorten them"):
        RewardModel(tmp_path).score(["b"], [answer])


def test_a_model_that_reads_padding_is_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = XLNetConfig(vocab_size=16, d_model=16, n_layer=1, n_head=2, d_inner=32, initializer_range=0.4)
        config.num_labels = 1
        classifier_of(config).save_pretrained(tmp_path)
    make_tokenizer("<pad>").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"the scores of XLNetForSequenceClassification depend on the texts beside them"
    ):
        RewardModel(tmp_path)


def test_heads_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    """A head of another class, which a new one would replace; and more of a head than the class computes."""
    make_tokenizer("<pad>").save_pretrained(tmp_path)
    config = llama_config(num_labels=1)
    LlamaForTokenClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a reward model \(LlamaForTokenClassification\)"):
        RewardModel(tmp_path)
    with pytest.raises(UserError, match=r"head of another kind \(LlamaForTokenClassification\), which a new one would"):
        load_classifier(str(tmp_path), new_head_seed=0)
    classifier_of(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"score.bias": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"the weights hold score.bias, which LlamaForSequenceClassification has no place"
    ):
        RewardModel(tmp_path)
    with pytest.raises(
        UserError, match=r"a classifier, such as a reward model \(LlamaForSeq.*expected a language model"
    ):
        load_causal_lm(str(tmp_path))


def test_conversations_in_a_file_to_score_hold_their_question_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("<pad>")
    tokenizer.chat_template = ENDED
    classifier_of(llama_config()).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    said = {"role": "assistant", "content": "a"}
    rows = [{"prompt": ASKED, "response": [said]}, {"prompt": ASKED, "response": [*ASKED, said]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ScoreConfig(str(tmp_path / "rm"), str(tmp_path / "rows.jsonl"), output=str(tmp_path / "scores.jsonl"))
    first, second = score(config, show=False)
    assert first == second
