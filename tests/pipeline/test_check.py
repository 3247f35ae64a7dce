"""`tether check`: it finds what a run would stumble over, finds nothing on good models, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import EOS, KINDS, make_model, make_overflowing_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import tether
from tether.cli import main
from tether.language.adapters import LoRAConfig
from tether.language.sampler import SamplingConfig
from tether.pipeline import checks
from tether.pipeline.check import Checked, check
from tether.pipeline.ppo import Parts, PPOConfig
from tether.rewards import RewardsConfig

TEMPLATE = "{% for m in messages %}{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}a{% endif %}"
REWARDS = """
def letters(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) + len(text)) for text in texts]

def same(completions, **_):
    return [1.0] * len(completions)

def broken(completions, **_):
    raise KeyError("answer")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound model with a chat template, text and chat prompts, and rewards."""
    tokenizer = make_tokenizer("<pad>")
    tokenizer.chat_template = TEMPLATE
    model = make_model()
    model.generation_config.eos_token_id = [EOS, 2]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = ["ab", "c", "deab", "fa", "bc", "de"]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    chats = [[{"role": "user", "content": text}] for text in texts]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def flags(folder: Path, *more: str, prompts: str = "text", reward: str = "letters") -> list[str]:
    return [
        *("--model", str(folder / "model"), "--prompts.path", str(folder / f"{prompts}.jsonl")),
        *("--reward.functions", f"{folder / 'rewards.py'}:{reward}", "--sampling.max-new-tokens", "8"),
        *("--output", str(folder / "run"), *more),
    ]


def edit(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    found = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prompts", ["text", "chat"])
def test_nothing_is_wrong_with_a_good_model_and_nothing_is_left_behind(
    folder: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    assert main(["check", *flags(folder, prompts=prompts)]) == 0
    assert files(folder) == before
    assert not (folder / "run").exists()
    said = capsys.readouterr().out
    assert "problem " not in said and "warning " not in said  # noqa: PT018 - both are of one output
    for about in ("dtype", "vocabulary", "tokenizer", "bos and eos", "pad", "chat template", "weights", "context"):
        assert f"ok       {about}" in said
    for about in ("memory", "reward", "first ratio", "scores"):
        assert f"ok       {about}" in said
    assert "what the reward gets" in said
    assert "'ab'" in said
    assert f"{4}:a {5}:b" in said


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_any_architecture(kind: str) -> None:
    rows = ["ab", "c", "de"]
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=6))
    parts = Parts(
        make_model(kind), make_tokenizer(), rows, lambda completions, **_: [float(len(c)) for c in completions]
    )
    checked = check(config, parts, show=False)
    assert checked.problems == ()
    assert {found.state for found in checked.findings} == {"ok"}


def no_template(folder: Path) -> list[str]:
    (folder / "model/chat_template.jinja").unlink()
    return flags(folder, prompts="chat")


def raising_template(folder: Path) -> list[str]:
    (folder / "model/chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    return flags(folder, prompts="chat")


def pad_of_text(folder: Path) -> list[str]:
    edit(folder / "model/tokenizer_config.json", pad_token="a")
    return flags(folder)


def no_eos(folder: Path) -> list[str]:
    edit(folder / "model/tokenizer_config.json", eos_token=None)
    return flags(folder)


def nan_weights(folder: Path) -> list[str]:
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0] = math.nan
    save_file(weights, file, {"format": "pt"})
    return flags(folder)


def missing_tensors(folder: Path) -> list[str]:
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    return flags(folder)


def small_embeddings(folder: Path) -> list[str]:
    make_model(vocabulary_size=12).save_pretrained(folder / "model")
    return flags(folder)


def short_context(folder: Path) -> list[str]:
    return flags(folder, "--sampling.max-new-tokens", "62")


def short_context_for_any(folder: Path) -> list[str]:
    return flags(folder, "--sampling.max-new-tokens", "64")


def raising_reward(folder: Path) -> list[str]:
    return flags(folder, reward="broken")


def constant_reward(folder: Path) -> list[str]:
    return flags(folder, reward="same")


def overflow(folder: Path) -> list[str]:
    make_overflowing_model().save_pretrained(folder / "model")
    return flags(folder, "--dtype", "float16")


FAULTS: dict[Callable[[Path], list[str]], str] = {
    no_template: "has no chat template",
    raising_template: "row 1: the tokenizer's chat template refuses the messages: no users here",
    pad_of_text: "the pad token is 'a' (id 4), which is a piece of text, and stands in",
    no_eos: "the tokenizer has no eos token",
    nan_weights: "the weights hold NaN or infinity: ",
    missing_tensors: "1 tensors missing (model.layers.1.mlp.up_proj.weight)",
    small_embeddings: "the tokenizer has token ids up to 15, but the model embeds only 12",
    short_context: "the model's context of 64 less max_new_tokens (62) leaves room for 2",
    short_context_for_any: "leaves no room for a prompt in the model's context of 64",
    raising_reward: "raised KeyError: 'answer'",
    constant_reward: "all 40 responses score 1: a constant reward teaches nothing",
    overflow: "the logits are NaN or infinite in float16",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_a_run_would_stumble_over_is_found(
    fault: Callable[[Path], list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = fault(folder)
    assert main(["check", *words]) == 2
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem ")]
    assert len(problems) == 1
    assert FAULTS[fault] in problems[0]
    assert not (folder / "run").exists()


@pytest.mark.parametrize("fault", [pad_of_text, overflow], ids=lambda fault: fault.__name__)
def test_a_run_heeds_the_same_list(
    fault: Callable[[Path], list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = fault(folder)
    assert main(["ppo", *words, "--collect.prompts", "4"]) == 2
    assert FAULTS[fault] in capsys.readouterr().err


def found(checked: Checked, about: str) -> checks.Finding:
    return next(finding for finding in checked.findings if finding.about == about)


def test_several_problems_are_found_at_once(folder: Path) -> None:
    small_embeddings(folder)
    (folder / "model/chat_template.jinja").unlink()
    config = PPOConfig(
        model=str(folder / "model"),
        prompts=tether.PromptsConfig(path=str(folder / "chat.jsonl")),
        reward=RewardsConfig(functions=("nowhere.py:f",)),
    )
    checked = tether.check(config, show=False)
    assert [finding.about for finding in checked.problems] == ["reward", "vocabulary", "prompts"]
    assert found(checked, "scores").state == "skipped"


def test_what_may_be_meant_is_a_warning(folder: Path) -> None:
    """A turn that ends with a token at which no response does, tensors that are not read, text the tokenizer lacks."""
    edit(folder / "model/generation_config.json", eos_token_id=EOS)
    file = folder / "model/model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": torch.zeros(2)}, file, {"format": "pt"})
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "abZ"}]}))
    config = PPOConfig(
        model=str(folder / "model"),
        prompts=tether.PromptsConfig(path=str(folder / "chat.jsonl")),
        reward=RewardsConfig(functions=(f"{folder / 'rewards.py'}:letters",)),
        sampling=SamplingConfig(max_new_tokens=4),
    )
    checked = tether.check(config, show=False)
    assert checked.problems == ()
    assert "ends a turn with '<end>', at which no response ends" in found(checked, "chat template").text
    assert "1 tensors that LlamaForCausalLM does not know (model.extra.weight)" in found(checked, "weights").text
    assert "'abZ" in found(checked, "tokenizer").text
    assert [finding.state for finding in checked.findings].count("warning") == 3


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE.partition("{% if add_generation_prompt")[0], "writes nothing that begins an answer"),
        ("hello{% if add_generation_prompt %}!{% endif %}", "row 1 and .*row 2 differ, and it renders them alike"),
    ],
)
def test_a_template_that_does_not_tell_is_a_warning(template: str, message: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompts = [{"messages": [{"role": "user", "content": text}]} for text in ("ab", "c")]
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=4))
    parts = Parts(model, tokenizer, prompts, lambda completions, **_: [float(len(str(c))) for c in completions])
    finding = found(check(config, parts, show=False), "chat template")
    assert finding.state == "warning"
    assert re.search(message, finding.text)


def test_a_folder_that_holds_a_run_is_told_and_left_as_it_is(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}")
    config = PPOConfig(output=str(run), sampling=SamplingConfig(max_new_tokens=4))
    parts = Parts(make_model(), make_tokenizer(), ["ab"], lambda completions, **_: [float(len(c)) for c in completions])
    before = files(run)
    assert "holds a run already" in found(check(config, parts, show=False), "output").text
    assert files(run) == before
    fresh = check(replace(config, overwrite=True), parts, show=False)
    assert all(finding.about != "output" for finding in fresh.findings)


def test_memory_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(make_model(), make_tokenizer(), ["ab"], lambda completions, **_: [float(len(c)) for c in completions])
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=4))
    fixed, passing = checks.memory_needed(config, parts.model, 2)
    weights = sum(p.numel() * 4 for p in parts.model.parameters())
    assert fixed == 4 * weights  # the reference, gradients, two moments
    for free, state in ((fixed - 1, "problem"), (fixed + passing - 1, "warning"), (fixed + passing, "ok")):
        monkeypatch.setattr(checks, "free_memory", lambda device, free=free: free)
        assert found(check(config, parts, show=False), "memory").state == state


def test_a_model_in_memory_is_left_as_it_is() -> None:
    """New adapters go into a copy, and a run can begin with the model afterwards."""
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=4), lora=LoRAConfig(rank=1))
    parts = Parts(model, make_tokenizer(), ["ab"], lambda completions, **_: [float(len(c)) for c in completions])
    assert check(config, parts, show=False).problems == ()
    assert [name for name, _ in model.named_parameters()] == names
