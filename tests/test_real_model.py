"""SmolLM2-135M-Instruct, a real chat model, through what most people do with one: `make test-real`.

What the tiny models of the other tests cannot show: 30 layers of rounding, a vocabulary of 49,152 tokens, a tokenizer
and a chat template that were made elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from tether.cli import main
from tether.language.adapters import LoRAConfig, using
from tether.language.divergence import compare
from tether.language.models import load_causal_lm
from tether.language.prompts import PromptsConfig
from tether.language.reference import ModelReference
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.export import ExportConfig, export
from tether.pipeline.ppo import PPOConfig, Trained, train_ppo
from tether.ppo import LearnerConfig
from tether.rewards import RewardsConfig
from tether.rewards.models import RewardModel
from tether.runs import read_episodes, read_metrics

pytestmark = [pytest.mark.real, pytest.mark.slow]

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "real"
FIRST_RATIO = 1e-4  # distance from 1, of tokens that were drawn, in float32
ROUNDING = 1e-3  # of any log-probability, the unlikeliest too, between two ways of computing it in float32


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One for each core, unless the shell says otherwise."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`model` and the sums, as the example makes them; 540 MB that are gone afterwards."""
    folder = tmp_path_factory.mktemp("real")
    runpy.run_path(str(EXAMPLE / "make_model.py"))["main"](["--output", str(folder / "model")])
    runpy.run_path(str(EXAMPLE / "make_sums.py"))["main"]([str(folder)])
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    """Three iterations of PPO on adapters."""
    config = PPOConfig(
        model=str(folder / "model"),
        output=str(folder / "run"),
        iterations=3,
        autocast=False,
        prompts=PromptsConfig(path=str(folder / "sums.jsonl"), chat=True),
        reward=RewardsConfig(functions=("numeric?partial=-0.5",)),
        sampling=SamplingConfig(max_new_tokens=12),
        collect=CollectConfig(prompts=16, missing_eos_penalty=0.5),
        lora=LoRAConfig(rank=16),
        learner=LearnerConfig(epochs=2, minibatches=2, learning_rate=1e-4),
    )
    return train_ppo(config)


@pytest.fixture(scope="module")
def base(folder: Path) -> PreTrainedModel:
    """The model as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tensor:
    """A chat, one row of token ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    chat = [{"role": "user", "content": "What is 12 + 7?"}, {"role": "assistant", "content": "12 + 7 is 19."}]
    return torch.tensor(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])[None]


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens).logits.log_softmax(-1)


def test_it_knows_the_capital_of_france_and_evaluates_sums(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, sums = str(folder / "model"), folder / "few.jsonl"
    greedy = ["--sampling.temperature", "0", "--sampling.max-new-tokens", "12"]
    asked = ["--prompt", "What is the capital of France?", "--prompts.chat"]
    assert main(["generate", "--model", model, *asked, *greedy]) == 0
    assert "The capital of France is Paris." in capsys.readouterr().out
    sums.write_text("".join((folder / "sums-held-out.jsonl").read_text().splitlines(keepends=True)[:32]))
    data = ["--prompts.path", str(sums), "--prompts.chat", "--reward.functions", "numeric"]
    assert main(["eval", "--model", model, *data, *greedy, "--output", str(folder / "eval.json")]) == 0
    result = json.loads((folder / "eval.json").read_text())
    assert 0.1 < result["result"]["pass_at"]["1"]["mean"] < 0.8  # it knows some: nothing is garbled on the way


def test_three_iterations_of_ppo(trained: Trained) -> None:
    lines = read_metrics(trained.folder)
    assert len(lines) == 3
    assert lines[0]["kl"] == 0
    assert lines[2]["kl"] > 1e-3
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    assert "<|im_start|>user\nAnswer with only the number: " in read_episodes(trained.folder, iteration=1)[0].prompt


def test_the_first_ratio_is_one_with_adapters_that_have_learned(trained: Trained) -> None:
    world = trained.world
    batch = world.collect()
    with torch.no_grad():
        again = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    ratio = (again.log_probs - batch.log_probs).exp()[batch.mask]
    assert len(ratio) > 40
    assert float((ratio - 1).abs().max()) < FIRST_RATIO


def test_with_its_adapters_off_it_is_the_base_to_the_bit(
    trained: Trained, folder: Path, base: PreTrainedModel, tokens: Tensor
) -> None:
    model = trained.world.policy.model
    assert float((log_probs(model, tokens) - log_probs(base, tokens)).abs().max()) > 1e-2
    plain = load_causal_lm(str(folder / "model"))
    reference = ModelReference(plain)  # from here on it multiplies as a policy does
    with using(model, None):
        assert torch.equal(log_probs(model, tokens), log_probs(plain, tokens))
    torch.testing.assert_close(log_probs(plain, tokens), log_probs(base, tokens), atol=ROUNDING, rtol=0)
    batch = trained.world.collect()
    rows = torch.arange(len(batch))
    asked = (batch.context, batch.actions, batch.mask, rows)
    by_base = compare(trained.world.policy.reader, reference, *asked)[0]
    assert batch.reference_log_probs is not None
    assert torch.equal(batch.reference_log_probs[batch.mask], by_base[batch.mask])


def test_exported_it_is_the_policy(
    trained: Trained, folder: Path, tokens: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = export(ExportConfig(model=str(trained.policy), output=str(folder / "exported")))
    plain = AutoModelForCausalLM.from_pretrained(exported).eval()
    assert plain.dtype == torch.float32
    difference = (log_probs(plain, tokens) - log_probs(trained.world.policy.model, tokens)).abs()
    assert float(difference.max()) < ROUNDING
    said = []
    for path in (trained.policy, exported):
        asked = ["--prompt", "Answer with only the number: 12 + 7", "--prompts.chat", "--sampling.temperature", "0"]
        assert main(["generate", "--model", str(path), *asked, "--sampling.max-new-tokens", "12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].strip()


def test_adapters_of_peft_with_a_score_head_are_a_reward_model(folder: Path) -> None:
    """Read as they are and merged by `tether export`, they score as peft's own model does, text by text."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    kinds: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False}
    model = get_peft_model(whole, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, **kinds)).eval()
    model.save_pretrained(folder / "scorer")
    prompts = [[{"role": "user", "content": "What is 12 + 7?"}]] * 3
    completions = [[{"role": "assistant", "content": text}] for text in ("19", "12 + 7 is 19.", "I cannot say")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        read = tokenizer.apply_chat_template(prompt + completion, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model.base_model.model.model(**read).last_hidden_state[0, -1]
            expected.append(float(model.base_model.model.score(hidden)))
    exported = export(ExportConfig(model=str(folder / "scorer"), output=str(folder / "scorer-exported")))
    for path in (folder / "scorer", exported):
        found = RewardModel(path)(prompts=prompts, completions=completions)
        assert found == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.01
