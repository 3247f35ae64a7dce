"""Chat templates through every command: variables, files, tools, nulls of Parquet, and what a run keeps of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_model
from tests.tokenizers_of_kinds import CHATML, KINDS
from transformers import AutoTokenizer

from tether.chat import kept_kwargs
from tether.cli import main
from tether.language.preferences import PreferencesConfig, preferences_from_rows
from tether.language.prompts import PromptsConfig, load_prompts, prompts_from_rows
from tether.language.rows import load_rows
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline import comparisons
from tether.pipeline import sft as sft_module
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.pipeline.samples import RowFormat, tokenize_rows
from tether.ppo import LearnerConfig
from tether.rewards import models as reward_models
from tether.rewards.passes import encode
from tether.runs import read_config

QUIET = "{% if quiet is defined and quiet %}<|im_start|>quiet\n{% endif %}"
TOOLS = (
    "{% if tools %}{% for t in tools %}tool {{ t.function.name }} {{ t.function.parameters | tojson }}\n{% endfor %}"
    "{% endif %}"
)
CALLS = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}"
)
ASKED = [{"role": "user", "content": "What is 12 + 7?"}]
ANSWER = [{"role": "assistant", "content": "19"}]
OTHER = [{"role": "assistant", "content": "7"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template has a switch, another template in a file, and data for every command."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = QUIET + CHATML
    make_model(vocabulary_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "loud.jinja").write_text("{% if quiet %}loud{% endif %}" + CHATML, encoding="utf-8")
    rows = {
        "prompts": {"prompt": ASKED},
        "rows": {"messages": [*ASKED, *ANSWER]},
        "pairs": {"prompt": ASKED, "chosen": ANSWER, "rejected": OTHER},
        "answers": {"prompt": ASKED, "response": "19"},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
    (folder / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
    )
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The texts that models read from now on."""
    texts: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sample = Sampler.sample

    def sampled(self: Sampler, prompt_ids: Any, *rest: Any) -> Any:
        texts.extend(tokenizer.decode(ids) for ids in prompt_ids)
        return sample(self, prompt_ids, *rest)

    def tokenized(*arguments: Any) -> Any:
        found = tokenize_rows(*arguments)
        texts.extend(tokenizer.decode(found.samples.token_ids[start:]) for start in found.samples.starts[:-1])
        return found

    def encoded(*arguments: Any) -> Any:
        found = encode(*arguments)
        texts.extend(map(tokenizer.decode, found))
        return found

    monkeypatch.setattr(Sampler, "sample", sampled)
    monkeypatch.setattr(sft_module, "tokenize_rows", tokenized)
    monkeypatch.setattr(comparisons, "encode", encoded)
    monkeypatch.setattr(reward_models, "encode", encoded)
    monkeypatch.chdir(folder)
    return texts


SMALL = ("--sampling.max-new-tokens", "4")
PPO = (
    *("ppo", "--model", "model", "--prompts.path", "prompts.jsonl", "--reward.functions", "rewards.py:length"),
    *("--collect.prompts", "2", "--learner.minibatches", "1", "--learner.epochs", "1", *SMALL),
)
SFT = ("sft", "--model", "model", "--data", "rows.jsonl", "--max-steps", "1")
REWARD = ("reward", "--model", "model", "--preferences.path", "pairs.jsonl", "--eval-fraction", "0", "--max-steps", "1")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "ppo": ((*PPO, "--iterations", "1", "--output", "OUT"), "prompts."),
    "sft": ((*SFT, "--output", "OUT"), "rows."),
    "reward": ((*REWARD, "--preferences.duplicates", "keep", "--output", "OUT"), "preferences."),
    "generate": (
        ("generate", "--model", "model", "--prompts.path", "prompts.jsonl", "--output", "OUT.jsonl", *SMALL),
        "prompts.",
    ),
    "eval": (
        (
            "eval",
            "--model",
            "model",
            "--prompts.path",
            "prompts.jsonl",
            "--reward.functions",
            "rewards.py:length",
            *SMALL,
        ),
        "prompts.",
    ),
    "label": (
        *(("label", "--policy", "model", "--prompts.path", "prompts.jsonl", "--pairs", "1", "--no-open"),),
        "prompts.",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("way", ["variables", "file"])
def test_every_command_renders_as_it_is_told(
    command: str, way: str, read: list[str], folder: Path, tmp_path: Path
) -> None:
    words, section = COMMANDS[command]
    words = tuple(word.replace("OUT", str(tmp_path / "out")) for word in words)
    if command == "label":
        words = (*words, "--output", str(tmp_path / "x.labels.db"), "--sampling.max-new-tokens", "8")
    flags = [f"--{section}chat-template-kwargs", "{quiet: true}"]
    if way == "file":
        flags += [f"--{section}chat-template", "loud.jinja"]
    assert main([*words, *flags]) == 0
    begins = "loud<|im_start|>user" if way == "file" else "<|im_start|>quiet\n<|im_start|>user"
    assert read
    assert all(text.startswith(begins) for text in read)
    if command in ("ppo", "sft", "reward"):
        kept = read_config(tmp_path / "out")[section.removesuffix(".")]
        assert kept["chat_template_kwargs"] == {"quiet": True}
        expected = (folder / "loud.jinja").read_text() if way == "file" else None
        assert kept["chat_template"] == expected
        saved = next(tmp_path.rglob("tokenizer_config.json"))
        tokenizer = AutoTokenizer.from_pretrained(saved.parent)
        assert kept_kwargs(tokenizer) == {"quiet": True}
        assert tokenizer.chat_template == (expected or QUIET + CHATML)


def test_a_reward_model_is_asked_as_it_was_trained(read: list[str], tmp_path: Path) -> None:
    words = tuple(word.replace("OUT", str(tmp_path / "out")) for word in COMMANDS["reward"][0])
    assert main([*words, "--preferences.chat-template-kwargs", "{quiet: true}"]) == 0
    score = ("score", "--model", str(tmp_path / "out" / "model"), "--data", "answers.jsonl", "--output")
    read.clear()
    assert main([*score, str(tmp_path / "a.jsonl")]) == 0
    assert read
    assert all(text.startswith("<|im_start|>quiet") for text in read)
    read.clear()
    assert main([*score, str(tmp_path / "b.jsonl"), "--chat-template-kwargs", "{quiet: false}"]) == 0
    assert all(text.startswith("<|im_start|>user") for text in read)
    reward_model = reward_models.ModelReward(str(tmp_path / "out" / "model"), chat_template_kwargs='{"quiet": false}')
    read.clear()
    reward_model(prompts=[ASKED], completions=[ANSWER])
    assert read[0].startswith("<|im_start|>user")


def test_a_resumed_run_renders_as_it_began_though_the_file_has_changed(read: list[str], tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("own{% if quiet %} quiet{% endif %}" + CHATML, encoding="utf-8")
    flags = ("--prompts.chat-template", str(template), "--prompts.chat-template-kwargs", '{"quiet": true}')
    assert main([*PPO, *flags, "--iterations", "1", "--output", str(tmp_path / "run")]) == 0
    template.write_text("another" + CHATML, encoding="utf-8")
    before = set(read)
    read.clear()
    assert main(["ppo", "--resume", str(tmp_path / "run"), "--iterations", "2"]) == 0
    assert set(read) == before
    assert all(text.startswith("own quiet<|im_start|>user") for text in read)


def test_a_policy_is_asked_as_it_was_trained(read: list[str], tmp_path: Path) -> None:
    assert main([*SFT, "--output", str(tmp_path / "sft"), "--rows.chat-template-kwargs", "{quiet: true}"]) == 0
    read.clear()
    generate = ("generate", "--model", str(tmp_path / "sft" / "policy"), "--prompts.path", "prompts.jsonl", *SMALL)
    assert main([*generate, "--output", str(tmp_path / "a.jsonl")]) == 0
    assert all(text.startswith("<|im_start|>quiet") for text in read)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{{ 'CALL ' + messages }}", "TypeError"), ("{{ raise_exception('no') }}", "no"), ("{% if %}", "Expected")],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_in_one_line_what_a_template_raises(
    command: str, template: str, words: str, read: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, section = COMMANDS[command]
    given = tuple(word.replace("OUT", str(tmp_path / "out")) for word in given)
    if command == "label":
        given = (*given, "--output", str(tmp_path / "x.labels.db"))
    assert main([*given, f"--{section}chat-template", template]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert ".jsonl, row 1: " in line
    assert words in line
    assert not (tmp_path / "out").exists()


# ---- tools beside the messages ----

WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]


@pytest.mark.parametrize("form", [list, json.dumps])
def test_tools_are_read_by_the_policy_and_by_the_reward_model(form: Any) -> None:
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = TOOLS + CHATML
    tools = form(WEATHER)
    wanted = tokenizer.apply_chat_template([*ASKED, *ANSWER], tools=WEATHER, tokenize=False)
    assert wanted.startswith("tool weather")
    prompt = prompts_from_rows([{"prompt": ASKED, "tools": tools}], PromptsConfig(), tokenizer, None, 4)[0]
    assert wanted.startswith(prompt.text)
    assert prompt.source == ASKED
    samples = tokenize_rows([{"messages": [*ASKED, *ANSWER], "tools": tools}], tokenizer, RowFormat(), 999).samples
    assert tokenizer.decode(samples.token_ids) == wanted.rstrip("\n")
    pair = preferences_from_rows(
        [{"prompt": ASKED, "chosen": ANSWER, "rejected": OTHER, "tools": tools}], PreferencesConfig(), tokenizer
    ).pairs[0]
    for asked in (pair.prompt, prompt.source):  # in training, and as a reward of PPO
        assert tokenizer.decode(encode(tokenizer, [asked], [pair.chosen])[0]) == wanted


def test_pairs_that_differ_in_their_tools_are_no_duplicates() -> None:
    row = {"prompt": ASKED, "chosen": ANSWER, "rejected": OTHER}
    found = preferences_from_rows([row | {"tools": WEATHER}, row | {"tools": None}, row], PreferencesConfig())
    assert [pair.row for pair in found.pairs] == [1, 2]
    assert found.duplicates == (3,)


# ---- calls of tools out of files with types ----


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


CALLED = [
    {
        "messages": [*ASKED, call("weather", city="Rome"), {"role": "tool", "content": "20"}],
        "info": {"a": 1, "b": None},
    },
    {"messages": [*ASKED, call("add", a=3, b=[9, 1]), {"role": "tool", "content": "12"}], "info": {"a": None, "b": 2}},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import datasets
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("files")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, CALLED)))
    parquet.write_table(pyarrow.Table.from_pylist(CALLED), folder / "rows.parquet")
    datasets.Dataset.from_list(CALLED).save_to_disk(folder / "saved")
    return {name: str(folder / name) for name in ("rows.jsonl", "rows.parquet", "saved")}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "saved"])
def test_calls_are_the_same_from_every_kind_of_file(files: dict[str, str], name: str) -> None:
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = CALLS
    rows = load_rows(files[name])
    samples = tokenize_rows(rows, tokenizer, RowFormat(), 999).samples
    learned = tokenizer.decode(samples.token_ids[samples.is_target])
    weather = 'CALL {"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>'
    assert learned == weather + 'CALL {"name": "add", "arguments": {"a": 3, "b": [9, 1]}}<|im_end|>'
    prompts = load_prompts(PromptsConfig(files[name]), tokenizer, None, 4)
    assert weather in prompts[0].text
    assert [row["info"] for row in rows] == [row["info"] for row in CALLED]  # a reward reads what the file holds


def test_a_data_set_in_memory_is_read_as_its_folder_is() -> None:
    import datasets

    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = CALLS
    rows = datasets.Dataset.from_list(CALLED)
    assert "null" not in prompts_from_rows(rows, PromptsConfig(), tokenizer, None, 4)[0].text
    assert "null" not in tokenizer.decode(tokenize_rows(rows, tokenizer, RowFormat(), 999).samples.token_ids)


def test_a_null_that_json_spells_out_stays() -> None:
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = CALLS
    row = {"messages": [*ASKED, call("weather", city=None), {"role": "tool", "content": "20"}]}
    assert '"arguments": {"city": null}' in prompts_from_rows([row], PromptsConfig(), tokenizer, None, 4)[0].text


def test_calls_without_content_go_through_a_run(tmp_path: Path) -> None:
    tokenizer = KINDS["qwen"]()
    tokenizer.chat_template = CALLS
    config = PPOConfig(
        output=str(tmp_path / "run"),
        iterations=1,
        sampling=SamplingConfig(max_new_tokens=4),
        collect=CollectConfig(prompts=2),
        learner=LearnerConfig(epochs=1, minibatches=1),
    )
    model = make_model(vocabulary_size=len(tokenizer), max_position_embeddings=512)
    prompts = [{"prompt": row["messages"]} for row in CALLED]
    trained = train_ppo(config, Parts(model, tokenizer, prompts, lambda completions, **_: [1.0] * len(completions)))
    batch = trained.world.collect()
    episodes = trained.world.episodes(batch, batch.rewards, batch.rewards)
    assert '"name": "weather"' in str([episode.details["messages"] for episode in episodes])
