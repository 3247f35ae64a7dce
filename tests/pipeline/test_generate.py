"""Responses of a policy: what is written, that their log-probabilities are the model's, and what bad input says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from tether.errors import UserError
from tether.language.prompts import PromptsConfig
from tether.language.sampler import SamplingConfig
from tether.pipeline.generate import GenerateConfig, generate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}f{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": p, "answer": i} for i, p in enumerate(["ab", "c", "deab"])]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def config(folder: Path, **options: Any) -> GenerateConfig:
    options = {"sampling": SamplingConfig(max_new_tokens=6), "seed": 1} | options
    if "prompt" not in options:
        options["prompts"] = PromptsConfig(str(folder / "prompts.jsonl"))
    return GenerateConfig(model=str(folder / "model"), **options)


def test_each_response_is_a_line_with_the_columns_of_its_prompt(folder: Path) -> None:
    output = folder / "new" / "responses.jsonl"
    sampling = SamplingConfig(max_new_tokens=12)
    responses = generate(config(folder, samples=4, sampling=sampling, output=str(output)))
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["ab"] * 4 + ["c"] * 4 + ["deab"] * 4
    assert [line["answer"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    assert [line["response"] for line in lines] == [response.text for response in responses]
    assert {line["terminated"] for line in lines} == {True, False}
    assert all(line["terminated"] == (r.token_ids[-1] == 0) for line, r in zip(lines, responses, strict=True))


def test_log_prob_is_that_of_the_whole_response_under_the_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for response in generate(config(folder, output=str(folder / "r.jsonl"))):
        ids = torch.tensor([[*response.prompt.token_ids, *response.token_ids]])
        with torch.no_grad():
            log_probs = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        assert response.log_prob == pytest.approx(float(log_probs[-len(response.token_ids) :].sum()), abs=1e-4)


def test_the_seed_decides_and_the_number_of_prompts_at_once_does_not_matter_for_greedy(folder: Path) -> None:
    def texts(**options: Any) -> list[str]:
        return [r.text for r in generate(config(folder, **options))]

    assert texts(samples=8) == texts(samples=8)
    assert texts(samples=8) != texts(samples=8, seed=2)
    greedy = [texts(sampling=SamplingConfig(max_new_tokens=6, temperature=0, batch_size=n)) for n in (1, 2, 100)]
    assert greedy[0] == greedy[1] == greedy[2]


def test_one_prompt_is_printed_with_its_response(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    response = generate(config(folder, prompt="[abc]"))[0]
    out = capsys.readouterr().out
    assert "[abc]" in out
    assert response.text in out
    assert f"{response.log_prob:.2f}" in out


def test_a_chat_is_printed_as_turns_and_with_raw_as_the_model_reads_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = PromptsConfig(chat=True, system="ab")
    generate(config(folder, prompt="cd", prompts=chat))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["system: ab", "user: cd"]
    assert lines[3].startswith("assistant: ")
    generate(config(folder, prompt="cd", prompts=chat, raw=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "abcdf"
    with pytest.raises(ValueError, match="raw is about what is printed"):
        config(folder, raw=True, output="x.jsonl")


def test_one_prompt_goes_through_the_chat_template_with_chat(folder: Path) -> None:
    prompts = PromptsConfig(chat=True, system="a")
    prompt = generate(config(folder, prompt="bc", prompts=prompts))[0].prompt
    assert prompt.text == "abcf"
    assert prompt.source == [{"role": "system", "content": "a"}, {"role": "user", "content": "bc"}]


def test_a_file_is_replaced_only_when_asked(folder: Path) -> None:
    output = folder / "r.jsonl"
    output.write_text("precious")
    with pytest.raises(UserError, match="already there"):
        generate(config(folder, output=str(output)))
    assert output.read_text() == "precious"
    generate(config(folder, output=str(output), overwrite=True))
    assert len(output.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None, "prompts": PromptsConfig()}, "--prompt"),
        ({"prompt": "a" * 60}, "60 tokens.*context of 64"),
        ({"prompt": "a", "prompts": PromptsConfig(system="s")}, "chat"),
        ({"output": "/dev/null/x.jsonl"}, "/dev/null/x.jsonl"),
    ],
)
def test_wrong_input_is_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(config(folder, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"prompt": "a", "prompts": PromptsConfig("x.jsonl")}, "both set"),
        ({"prompt": " "}, "empty"),
        ({"prompt": "a", "prompts": PromptsConfig(template="{a}")}, "template"),
    ],
)
def test_settings_that_contradict_each_other_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**options)
