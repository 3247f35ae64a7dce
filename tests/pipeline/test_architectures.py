"""`tether ppo` on folders of every architecture: trains, saves, resumes, and the policy loads back with transformers.

Text and chat prompts, the numeric verifier and a reward function from a file, on rows in the form of GSM8K.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.models import make_model
from tests.run_folders import assert_same_run, metric_lines, newest_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tether.cli import main
from tether.config import config_from_dict
from tether.pipeline.ppo import PPOConfig, train_ppo
from tether.runs import read_config, read_episodes, read_metrics

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
ROWS = [
    {"question": "Ann sold 48 clips, then half as many. How many?", "answer": "48/2 = 24, 48+24 = 72.\n#### 72"},
    {"question": "What is 7 + 3?", "answer": "#### 10"},
    {"question": "A day has 24 hours. How many have two?", "answer": "2*24 = <<2*24=48>>48\n#### 48"},
    {"question": "Bo had 5 apples and ate 1.", "answer": "5-1 = 4\n#### 4"},
    {"question": "How much is 1,000 + 200?", "answer": "1,000 + 200 = 1,200\n#### 1,200"},
]
END, START = "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWARDS = """
def digits(prompts, completions, completion_ids, answer, question, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == 8
    assert all("#### " in text for text in answer) and not columns.keys() & {"prompts", "completions"}
    chat = not isinstance(prompts[0], str)
    if chat:
        assert all(p[0] == {"role": "system", "content": "Be brief."} for p in prompts)
        assert all(p[1:] == [{"role": "user", "content": q}] for p, q in zip(prompts, question))
        assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
    else:
        assert all(p == "Question: " + q + chr(10) + "Answer:" for p, q in zip(prompts, question))
    texts = [c[0]["content"] if chat else c for c in completions]
    return [sum(map(str.isdigit, text)) / len(ids) for text, ids in zip(texts, completion_ids)]
"""
PROMPTS = {
    ("text", "numeric"): ["--prompts.column", "question"],
    ("text", "file"): ["--prompts.template", "Question: {question}\nAnswer:"],
    ("chat", "numeric"): ["--prompts.column", "messages"],
    ("chat", "file"): ["--prompts.column", "question", "--prompts.chat", "--prompts.system", "Be brief."],
}
USUAL = [("text", "numeric"), ("chat", "file")]


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's special tokens and template; eos is `<|im_end|>`, id 0, and there is no pad."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([row["question"] for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, additional_special_tokens=[START])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Two layers with random weights."""
    size = len(make_tokenizer())
    if architecture == "smollm3":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = SmolLM3Config(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                no_rope_layers=[1, 0],
                max_position_embeddings=256,
                initializer_range=0.4,
                eos_token_id=0,
                pad_token_id=0,
                bos_token_id=None,
            )
            return SmolLM3ForCausalLM(config)
    context = {"n_positions" if architecture == "gpt2" else "max_position_embeddings": 256}
    return make_model(architecture, seed, vocabulary_size=size, **context)


def prepare(folder: Path, architecture: str) -> None:
    build(architecture).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [row | {"messages": [{"role": "user", "content": row["question"]}]} for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "rewards.py").write_text(REWARDS)


def command(folder: Path, run: str, iterations: int, prompts: str, reward: str) -> list[str]:
    functions = "numeric?answer=answer" if reward == "numeric" else f"{folder / 'rewards.py'}:digits"
    return [
        *("ppo", "--model", str(folder / "model"), "--output", str(folder / run)),
        *("--iterations", str(iterations), "--checkpoint-every", "3"),
        *("--prompts.path", str(folder / "rows.jsonl"), *PROMPTS[prompts, reward], "--reward.functions", functions),
        *("--collect.prompts", "4", "--collect.samples-per-prompt", "2", "--sampling.max-new-tokens", "8"),
        *("--learner.epochs", "1", "--learner.minibatches", "2", "--learner.learning-rate", "1e-3"),
    ]


@torch.no_grad()
def log_probs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([token_ids])).logits, dim=-1)


def check(folder: Path, architecture: str, prompts: str, reward: str) -> None:
    """Three iterations by the command, a fourth after resuming; then the policy is read with transformers alone."""
    prepare(folder, architecture)
    assert main(command(folder, "run", 3, prompts, reward)) == 0
    run = folder / "run"
    assert newest_checkpoint(run)[0] == len(metric_lines(run)) == 3
    config = config_from_dict(PPOConfig, read_config(run) | {"iterations": 4}, "config.yaml")
    trained = train_ppo(config, resume=True)
    assert newest_checkpoint(run)[0] == len(metric_lines(run)) == 4
    assert trained.policy == newest_checkpoint(run)[1] / "policy"

    model = AutoModelForCausalLM.from_pretrained(trained.policy)
    tokenizer = AutoTokenizer.from_pretrained(trained.policy)
    assert type(model).__name__ == CLASSES[architecture]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    started = build(architecture).state_dict()
    in_memory = trained.world.policy.model.state_dict()
    assert all(torch.equal(weight, in_memory[name]) for name, weight in model.state_dict().items())
    assert sum(not torch.equal(weight, started[name]) for name, weight in model.state_dict().items()) > 4

    episodes = read_episodes(run, iteration=4)
    assert [metrics["score"] for metrics in read_metrics(run)][3] == pytest.approx(
        sum(episode.score for episode in episodes) / len(episodes), abs=1e-6
    )
    for episode in episodes[:2]:
        ids = tokenizer(episode.prompt, add_special_tokens=False).input_ids + episode.action_ids
        assert tokenizer.decode(episode.action_ids, skip_special_tokens=True) == episode.response
        torch.testing.assert_close(
            log_probs(model, ids), log_probs(trained.world.policy.model, ids), atol=1e-6, rtol=0.0
        )
    if prompts == "chat":
        assert all(e.prompt.endswith(f"{START}assistant\n") for e in episodes)


@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize(("prompts", "reward"), USUAL)
def test_trains_resumes_and_loads_back(architecture: str, prompts: str, reward: str, tmp_path: Path) -> None:
    check(tmp_path, architecture, prompts, reward)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CLASSES)
@pytest.mark.parametrize(("prompts", "reward"), [combination for combination in PROMPTS if combination not in USUAL])
def test_trains_resumes_and_loads_back_the_other_way_round(
    architecture: str, prompts: str, reward: str, tmp_path: Path
) -> None:
    check(tmp_path, architecture, prompts, reward)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_resumed_run_is_one_that_never_stopped(architecture: str, tmp_path: Path) -> None:
    """Tied weights, sliding windows and rotary tables come back from the folder to the last bit."""
    prepare(tmp_path, architecture)
    assert main(command(tmp_path, "whole", 4, "text", "file")) == 0
    assert main(command(tmp_path, "parts", 3, "text", "file")) == 0
    assert main(["ppo", "--resume", str(tmp_path / "parts"), "--iterations", "4"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
