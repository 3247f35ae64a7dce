"""Supervised fine-tuning: what is a target, that packing and microbatches change nothing, what lands in the folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import EOS, KINDS, make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from tether.config import config_from_dict, config_to_dict
from tether.errors import UserError
from tether.language.cross_entropy import Passes, accumulate_gradients, mean_loss
from tether.language.layers import checkpointed_layers
from tether.language.packing import TokenizedSamples, best_fit, check_packing
from tether.language.prompts import PromptsConfig, load_prompts
from tether.pipeline import sft as sft_module
from tether.pipeline.samples import RowFormat, tokenize_rows
from tether.pipeline.sft import SFTConfig, fine_tune, sft
from tether.runs.folder import read_metrics

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Like Qwen3's: what the assistant thought is shown in the last turn only.
FORGETFUL = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if loop.last and m.role == 'assistant' %}!{% endif %}")
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "fed"},
]


def chat_tokenizer(template: str | None = CHATML, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """Character by character, with the tokens of ChatML, and one merge (a + b) that can cross a boundary."""
    special = ["<|start|>", "<|end|>", "</s>"]
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {text: i for i, text in enumerate([*special, *characters, "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("a", "b")]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, additional_special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def targets(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any) -> tuple[str, str]:
    """A row's whole sample and its target tokens, as text."""
    samples = tokenize_rows([row], tokenizer, RowFormat(**options), 1000).samples
    return tokenizer.decode(samples.token_ids), tokenizer.decode(samples.token_ids[samples.is_target])


def random_samples(vocabulary: int, lengths: list[int], seed: int = 0) -> TokenizedSamples:
    generator = np.random.default_rng(seed)
    ids = [generator.integers(0, vocabulary, length).tolist() for length in lengths]
    flags = [[*(generator.random(length - 1) < 0.6).tolist(), True] for length in lengths]
    return TokenizedSamples.from_lists(ids, flags)


def gradients(model: Any, samples: TokenizedSamples, passes: Passes) -> tuple[float, torch.Tensor]:
    loss = accumulate_gradients(model, samples, np.arange(len(samples)), passes)
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ---- what is a target ----


def test_only_the_completion_and_its_eos_are_learned() -> None:
    whole, learned = targets(chat_tokenizer(), {"prompt": "What is a?", "completion": " it is b"})
    assert whole == "What is a? it is b<|end|>"
    assert learned == " it is b<|end|>"


def test_a_completion_that_is_a_whole_conversation_has_its_question_read_once() -> None:
    before, answer = [{"role": "user", "content": "What is a?"}], {"role": "assistant", "content": "b"}
    tokenizer = chat_tokenizer()
    once = targets(tokenizer, {"prompt": before, "completion": [answer]})
    assert targets(tokenizer, {"prompt": before, "completion": [*before, answer]}) == once
    other = [{"role": "user", "content": "What is c?"}, answer]
    with pytest.raises(UserError, match="row 1, column `completion` begins with a message of the user"):
        targets(tokenizer, {"prompt": before, "completion": other})
    with pytest.raises(UserError, match="holds the prompt's messages and no answer"):
        targets(tokenizer, {"prompt": before, "completion": before})


def test_a_completion_that_begins_with_its_prompt_is_told(caplog: pytest.LogCaptureFixture) -> None:
    targets(chat_tokenizer(), {"prompt": "a", "completion": "a b"})  # a word may well be said again
    assert not caplog.messages
    targets(chat_tokenizer(), {"prompt": "What is a?", "completion": "What is a? b"})
    assert "row 1: `completion` begins with the prompt (1 of 1 rows do)" in caplog.text


def test_an_eos_that_the_completion_ends_with_is_not_doubled() -> None:
    assert targets(chat_tokenizer(), {"prompt": "a", "completion": "b<|end|>"})[1] == "b<|end|>"


def test_an_empty_completion_learns_to_end() -> None:
    assert targets(chat_tokenizer(), {"prompt": "a", "completion": ""}) == ("a<|end|>", "<|end|>")


def test_text_is_learned_whole_but_for_its_first_token() -> None:
    assert targets(chat_tokenizer(), {"text": "hello"}) == ("hello<|end|>", "ello<|end|>")


def test_a_merge_across_the_boundary_leaves_the_prompt_as_generation_reads_it(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    row = {"prompt": "xa", "completion": "by"}
    assert len(tokenizer("xaby").input_ids) == 3  # x, ab, y
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    prompt = load_prompts(PromptsConfig(str(tmp_path / "p.jsonl")), tokenizer, None, 1)[0]
    samples = tokenize_rows([row], tokenizer, RowFormat(), 100).samples
    assert tuple(samples.token_ids[: len(prompt.token_ids)]) == prompt.token_ids
    assert tokenizer.decode(samples.token_ids[samples.is_target]) == "by<|end|>"


def test_a_template_makes_the_prompt_of_columns() -> None:
    row = {"question": "1+1", "answer": " 2"}
    whole, learned = targets(chat_tokenizer(), row, template="Q: {question}\nA:", completion_column="answer")
    assert (whole, learned) == ("Q: 1+1\nA: 2<|end|>", " 2<|end|>")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_turn_of_the_assistant_is_learned_up_to_its_eos(template: str) -> None:
    whole, learned = targets(chat_tokenizer(template), {"messages": CHAT})
    assert learned == "cd<|end|>fed<|end|>"
    assert whole.endswith("<|start|>assistant\nfed<|end|>")  # the line break after the last eos is never generated


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL])
def test_of_prompt_and_completion_in_messages_the_completion_is_learned(template: str) -> None:
    mark = "!" if template == FORGETFUL else ""
    assert targets(chat_tokenizer(template), {"prompt": CHAT[:3], "completion": CHAT[3:]})[1] == f"fed{mark}<|end|>"


def test_text_columns_go_through_the_chat_template_with_chat_and_system() -> None:
    whole, learned = targets(chat_tokenizer(), {"prompt": "a", "completion": "b"}, chat=True, system="be brief")
    assert whole.startswith("<|start|>system\nbe brief<|end|>\n<|start|>user\na<|end|>")
    assert learned == "b<|end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_where_the_template_writes_no_eos_the_last_turn_learns_its_end_and_eos(template: str) -> None:
    learned = targets(chat_tokenizer(template, eos="</s>"), {"messages": CHAT[:2]})[1]
    assert learned == "cd<|end|>\n</s>"


def test_eos_just_outside_the_marked_tokens_is_learned_too() -> None:
    template = MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert targets(chat_tokenizer(template), {"messages": CHAT})[1] == "cd<|end|>fed<|end|>"


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"messages": CHAT}, {"template_of_chat": FORGETFUL}, ("row 1, message 2", "generation")),
        ({"messages": CHAT}, {"template_of_chat": None}, ("row 1", "chat template")),
        ({"messages": CHAT}, {"template_of_chat": "{{ raise_exception('no\nway') }}"}, ("row 1", "refuses", "no way")),
        ({"messages": CHAT[:1]}, {}, ("row 1", "assistant")),
        ({"messages": CHAT[1:2]}, {}, ("row 1", "first message")),
        ({"messages": []}, {}, ("row 1", "at least one")),
        ({"messages": "hi"}, {}, ("row 1", "str", "list of messages")),
        ({"messages": [{"role": "user"}]}, {}, ("row 1, message 1", "content")),
        ({"prompt": "a", "completion": 4}, {}, ("row 1", "completion", "int")),
        ({"prompt": "a", "completion": None}, {}, ("row 1", "completion", "empty")),
        ({"prompt": "a", "completion": "b"}, {"system": "s"}, ("row 1", "chat")),
        ({"prompt": "a", "completion": "b"}, {"template": "{nope}"}, ("row 1", "nope", "completion, prompt")),
        ({"text": 3}, {}, ("row 1", "text", "int")),
        ({"question": "a"}, {}, ("row 1", "question", "`messages`")),
        ({"text": "a"}, {"kind": "messages"}, ("row 1", "messages")),
    ],
)
def test_a_row_that_cannot_be_read_is_named_in_one_line(
    row: dict[str, Any], options: dict[str, Any], words: tuple[str, ...]
) -> None:
    tokenizer = chat_tokenizer(options.pop("template_of_chat", CHATML))
    with pytest.raises(UserError) as caught:
        tokenize_rows([row], tokenizer, RowFormat(**options), 100, origin="data.jsonl")
    message = str(caught.value)
    assert message.startswith("data.jsonl, row 1")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_overlong_rows_stop_are_skipped_or_cut() -> None:
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "x", "completion": "yz"}, {"prompt": "xx", "completion": "y" * 20}]
    with pytest.raises(UserError, match="row 2: 23 tokens, expected at most 10"):
        tokenize_rows(rows, tokenizer, RowFormat(), 10)
    skipped = tokenize_rows(rows, tokenizer, RowFormat(), 10, "skip")
    assert (len(skipped.samples), skipped.skipped) == (1, 1)
    cut = tokenize_rows(rows, tokenizer, RowFormat(), 10, "truncate")
    assert cut.samples.lengths.tolist() == [4, 10]
    assert cut.truncated == 1
    assert tokenizer.eos_token_id not in cut.samples.token_ids[4:]
    with pytest.raises(UserError, match="row 1: nothing to learn in its first 10 tokens"):
        tokenize_rows([{"prompt": "x" * 20, "completion": "y"}], tokenizer, RowFormat(), 10, "truncate")
    with pytest.raises(UserError, match="all 1 rows are longer"):
        tokenize_rows(rows[1:], tokenizer, RowFormat(), 10, "skip")


# ---- packing ----


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 60))
def test_best_fit_places_every_sample_once_within_the_capacity(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # Two rows that are at most half full would have been one.
    assert sum(2 * sum(lengths[i] for i in row) <= capacity for row in rows) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unpacked_samples_have_the_same_loss_and_gradient(kind: str) -> None:
    model = make_model(kind)
    check_packing(model)
    samples = random_samples(16, [9, 3, 14, 2, 7, 7, 11, 4])
    loss, gradient = gradients(model, samples, Passes(packing=True))
    plain_loss, plain_gradient = gradients(model, samples, Passes(packing=False))
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert float((gradient - plain_gradient).norm() / plain_gradient.norm()) < 1e-5


def test_loss_is_that_of_each_sample_by_itself() -> None:
    model = make_model("llama")
    samples = random_samples(16, [9, 3, 14, 2])
    total = 0.0
    for i in range(len(samples)):
        part = slice(samples.starts[i], samples.starts[i + 1])
        ids = torch.from_numpy(samples.token_ids[part])[None]
        labels = torch.where(torch.from_numpy(samples.is_target[part])[None], ids, -100)
        count = int((labels != -100).sum())
        total += float(model(input_ids=ids, labels=labels).loss.detach()) * count
    assert mean_loss(model, samples, 3, Passes()) == pytest.approx(total / samples.is_target.sum(), rel=1e-5)


def test_an_architecture_that_mixes_packed_samples_is_refused() -> None:
    config = OPTConfig(vocab_size=60, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    config.word_embed_proj_dim = 16
    model = OPTForCausalLM(config)
    with pytest.raises(UserError, match=r"OPTForCausalLM cannot take packed samples.*set `packing` to False"):
        check_packing(model)
    samples = random_samples(60, [5, 3, 8])
    assert np.isfinite(mean_loss(model.eval(), samples, 3, Passes(packing=False)))


@pytest.mark.parametrize("packing", [True, False])
def test_microbatches_do_not_change_the_gradient(packing: bool) -> None:
    model = make_model("llama")
    samples = random_samples(16, [9, 3, 14, 2, 7, 7, 11, 4])
    loss, whole = gradients(model, samples, Passes(packing, microbatch_tokens=10_000))
    for tokens in (1, 20, 40):
        part_loss, part = gradients(model, samples, Passes(packing, microbatch_tokens=tokens))
        assert part_loss == pytest.approx(loss, rel=1e-5)
        assert float((part - whole).norm() / whole.norm()) < 1e-5


def test_checkpointed_layers_run_twice_and_give_the_same_gradient_without_dropout() -> None:
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    samples = random_samples(16, [9, 3, 14])
    plain = gradients(model, samples, Passes())[1]
    calls: list[int] = []
    handle = model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with checkpointed_layers(model):
        again = gradients(model, samples, Passes())[1]
    assert len(calls) == 2
    assert torch.allclose(plain, again, rtol=1e-5, atol=1e-7)
    gradients(model, samples, Passes())
    assert len(calls) == 3  # outside the context layers are what they were
    handle.remove()


def test_autocast_rounds_the_loss_and_leaves_gradients_in_float32() -> None:
    model, samples = make_model(), random_samples(16, [9, 3, 14])
    loss, _ = gradients(model, samples, Passes())
    rounded, gradient = gradients(model, samples, Passes(autocast=True))
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    assert gradient.dtype == torch.float32


# ---- training ----

ROWS = [{"prompt": p, "completion": c} for p, c in (("a", "bc"), ("b", "ca"), ("c", "ab"), ("d", "ef"), ("abcde", "f"))]
QUICK = SFTConfig(epochs=8, batch_size=2, learning_rate=1e-2, warmup_steps=2, seed=3)


def test_the_model_learns_the_responses_and_reports_each_step() -> None:
    model, reports = make_model(), []
    result = fine_tune(model, make_tokenizer(), ROWS, QUICK, reports.append, eval_rows=ROWS[:2])
    assert result.steps == 24
    assert [r["step"] for r in reports] == list(range(25))
    assert reports[0]["samples"] == 5
    assert reports[0]["target_tokens"] == 14
    assert result.eval_loss == reports[-1]["eval_loss"] < 0.3 * reports[0]["eval_loss"]
    assert reports[-1]["epoch"] == 8
    assert reports[1]["learning_rate"] < reports[3]["learning_rate"] > reports[24]["learning_rate"]
    assert not model.training


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = make_model()
        fine_tune(model, make_tokenizer(), ROWS, SFTConfig(epochs=3, batch_size=2, learning_rate=1e-2, seed=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_max_steps_goes_round_the_data_and_batches_can_be_filled_with_tokens() -> None:
    reports: list[dict[str, float]] = []
    config = SFTConfig(max_steps=7, batch_tokens=9)
    result = fine_tune(make_model(), make_tokenizer(), ROWS, config, reports.append)
    assert result.steps == 7
    assert reports[-1]["epoch"] > 1
    assert all(r["tokens"] <= 9 for r in reports[1:])


def test_a_share_of_the_rows_can_be_held_out() -> None:
    reports: list[dict[str, float]] = []
    fine_tune(make_model(), make_tokenizer(), ROWS * 4, SFTConfig(eval_fraction=0.25, max_steps=1), reports.append)
    assert (reports[0]["samples"], reports[0]["eval_samples"]) == (15, 5)


def test_a_training_that_diverges_says_so_and_keeps_finite_parameters() -> None:
    model = make_model()
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fine_tune(model, make_tokenizer(), ROWS, SFTConfig(max_steps=50, learning_rate=1e38, max_gradient_norm=0))


def test_every_field_survives_yaml_and_bad_values_are_named() -> None:
    assert config_from_dict(SFTConfig, config_to_dict(QUICK), "x.yaml") == QUICK
    for field, value in [
        ("epochs", 0),
        ("learning_rate", -1.0),
        ("eval_fraction", 1.0),
        ("adam_epsilon", 0.0),
        ("batch_tokens", 0),
    ]:
        with pytest.raises(UserError, match=field):
            config_from_dict(SFTConfig, {field: value}, "x.yaml")


def test_samples_longer_than_the_context_cannot_be_asked_for() -> None:
    with pytest.raises(UserError, match="max_tokens is 65, expected at most the model's context of 64"):
        fine_tune(make_model(), make_tokenizer(), ROWS, SFTConfig(max_tokens=65))


# ---- the run's folder ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return tmp_path


def run_config(folder: Path, **options: Any) -> SFTConfig:
    paths = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "output": str(folder / "run")}
    return SFTConfig(**paths | {"max_steps": 3, "learning_rate": 1e-2} | options)


def test_the_folder_holds_configuration_metrics_and_a_plain_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = sft(run_config(folder, eval_fraction=0.2), show=True)
    assert "4 samples" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    assert tokenizer.eos_token_id == EOS
    assert not torch.equal(model.lm_head.weight, make_model().lm_head.weight)
    assert list(policy.glob("*.safetensors"))
    assert [line["iteration"] for line in read_metrics(folder / "run")] == [0, 1, 2, 3]
    again = sft(run_config(folder, eval_fraction=0.2, output=str(folder / "again")))
    assert (again / "model.safetensors").read_bytes() == (policy / "model.safetensors").read_bytes()


def test_a_run_is_not_overwritten_unless_asked(folder: Path) -> None:
    sft(run_config(folder))
    with pytest.raises(UserError, match="run"):
        sft(run_config(folder))
    sft(run_config(folder, overwrite=True))


def test_ctrl_c_saves_the_model_as_it_stands(folder: Path) -> None:
    def stop(metrics: dict[str, float]) -> None:
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sft(run_config(folder), report=stop)
    saved = AutoModelForCausalLM.from_pretrained(folder / "run" / "policy")
    assert not torch.equal(saved.lm_head.weight, make_model().lm_head.weight)
    assert len(read_metrics(folder / "run")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": ""}, "--output"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_tokens": 3}, r"data.jsonl, row 1: 4 tokens"),
        ({"rows": RowFormat(kind="text")}, r"data.jsonl, row 1.*`text`"),
    ],
)
def test_wrong_input_leaves_no_folder_behind(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sft(run_config(folder, **options))
    assert not (folder / "run").exists()


def test_the_model_given_in_memory_is_the_one_that_changes() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    fine_tune(model, make_tokenizer(), ROWS, SFTConfig(max_steps=1, learning_rate=1e-2))
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- which answers of a conversation ----

# Own words for what published templates do: no thoughts in earlier turns; eos at the very end alone; another end of the
# last answer; an answer that begins otherwise than generation would
QWEN3 = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<t></t>{% endif %}{{ m.content }}"
)
PHI3 = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
GPT_OSS = CHATML.replace("<|end|>", "{% if m.role == 'assistant' and loop.last %}</s>{% else %}<|end|>{% endif %}", 1)
OPENED = CHATML.replace("assistant\n", "assistant\n<t>")


def learned_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    """What each sample of a row reads and what it learns."""
    samples = tokenize_rows([row], tokenizer, RowFormat(**options), 1000).samples
    parts = [slice(start, end) for start, end in zip(samples.starts[:-1], samples.starts[1:], strict=True)]
    return [
        (
            tokenizer.decode(samples.token_ids[part][~samples.is_target[part]]),
            tokenizer.decode(samples.token_ids[part][samples.is_target[part]]),
        )
        for part in parts
    ]


@pytest.mark.parametrize(
    ("template", "eos", "first", "second"),
    [
        (CHATML, "<|end|>", "cd<|end|>", "fed<|end|>"),
        (MARKED, "<|end|>", "cd<|end|>", "fed<|end|>"),
        (FORGETFUL, "<|end|>", "cd!<|end|>", "fed!<|end|>"),
        (QWEN3, "<|end|>", "<t></t>cd<|end|>", "<t></t>fed<|end|>"),
        (PHI3, "</s>", "cd<|end|>\n</s>", "fed<|end|>\n</s>"),
        (GPT_OSS, "</s>", "cd</s>", "fed</s>"),
    ],
)
@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_the_last_answer_alone_or_each_as_a_sample_of_its_own(
    template: str, eos: str, first: str, second: str, form: str
) -> None:
    tokenizer = chat_tokenizer(template, eos)
    row = {"messages": CHAT} if form == "messages" else {"prompt": CHAT[:1], "completion": CHAT[1:]}
    before = [tokenizer.apply_chat_template(CHAT[:n], tokenize=False, add_generation_prompt=True) for n in (1, 3)]
    assert learned_of(tokenizer, row, turns="last") == [(before[1], second)]
    assert learned_of(tokenizer, row, turns="each") == [(before[0], first), (before[1], second)]
    # a conversation that ends with a question is learned up to its last answer
    asked = {"messages": [*CHAT, {"role": "user", "content": "f"}]}
    assert learned_of(tokenizer, asked, turns="last") == [(before[1], second)]


def test_a_template_that_writes_eos_at_the_very_end_can_learn_all_turns_at_once() -> None:
    (sample,) = learned_of(chat_tokenizer(PHI3, "</s>"), {"messages": CHAT})
    assert sample[1] == "cd<|end|>\nfed<|end|>\n</s>"


@pytest.mark.parametrize(("template", "eos"), [(QWEN3, "<|end|>"), (FORGETFUL, "<|end|>"), (GPT_OSS, "</s>")])
def test_a_template_that_changes_earlier_turns_is_refused_with_both_ways_out(template: str, eos: str) -> None:
    with pytest.raises(UserError) as caught:
        learned_of(chat_tokenizer(template, eos), {"messages": CHAT})
    message = str(caught.value)
    assert message.startswith("rows, row 1, message 2:")
    assert all(word in message for word in ("--rows.turns last", "--rows.turns each", "generation"))


@pytest.mark.parametrize("turns", ["all", "last", "each"])
def test_an_answer_that_begins_otherwise_than_generation_would_is_shown(turns: str) -> None:
    with pytest.raises(UserError, match=r"row 1, message 2: .*n<t>.*but renders this one as.*cd"):
        learned_of(chat_tokenizer(OPENED), {"messages": CHAT[:2]}, turns=turns)
    if turns != "last":  # neither way out would help
        with pytest.raises(UserError, match=r"row 1, message 2: .*n<t>.*but renders this one as.*cd"):
            learned_of(chat_tokenizer(OPENED), {"messages": CHAT}, turns=turns)


def test_marks_say_which_answer_is_learned_where_prefixes_cannot() -> None:
    template = MARKED.replace("assistant\n{% endif %}", "assistant\n<t>{% endif %}")  # generation begins with a thought
    (sample,) = learned_of(chat_tokenizer(template), {"messages": CHAT}, turns="last")
    assert sample[1] == "fed<|end|>"


def test_samples_of_a_conversation_are_held_out_together() -> None:
    rows = [{"messages": [*CHAT[:1], {"role": "assistant", "content": text}, *CHAT[2:]]} for text in "abcdef"]
    counts: dict[str, float] = {}
    tokenizer, config = chat_tokenizer(), SFTConfig(max_steps=1, eval_fraction=0.5, rows=RowFormat(turns="each"))
    fine_tune(make_model(vocabulary_size=len(tokenizer)), tokenizer, rows, config, lambda found: counts.update(found))
    assert counts.get("eval_loss") is not None
    data = sft_module._prepare(make_model(vocabulary_size=len(tokenizer)), tokenizer, rows, None, config, ("", "", ""))
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (6, 6)
    answers = [
        {tokenizer.decode(samples.token_ids[start:end]).split("assistant\n")[1][0] for start, end in ends}
        for samples in (data.train, data.held_out)
        for ends in [list(zip(samples.starts[:-1], samples.starts[1:], strict=True))]
    ]
    assert not answers[0] & answers[1]


# ---- what a template has written already ----


@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n", "<|end|> \n"])
def test_text_that_ends_with_eos_has_no_second_one(end: str) -> None:
    assert targets(chat_tokenizer(), {"text": "hello" + end})[0] == "hello<|end|>"
    assert targets(chat_tokenizer(), {"prompt": "a", "completion": "b" + end}) == ("ab<|end|>", "b<|end|>")
    assert targets(chat_tokenizer(), {"text": "a<|end|>b"})[0] == "a<|end|>b<|end|>"


def test_null_keys_of_messages_and_calls_without_content_are_read() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls is defined %}CALL{% endif %}")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"messages": [{**CHAT[0], "tool_calls": None}, call]}
    assert learned_of(chat_tokenizer(template), row)[0][1] == "CALL<|end|>"


def test_sft_says_a_template_error_and_a_missing_default_in_one_line() -> None:
    for template, words in (("{{ 'x' + m }}", "undefined"), ("{{ 'x' + 3 }}", "TypeError"), ({"rag": "x"}, "default")):
        with pytest.raises(UserError, match=f"rows, row 1: .*{words}"):
            learned_of(chat_tokenizer(template), {"messages": CHAT[:2]})  # type: ignore[arg-type]
