"""Prompts from files, folders and chats, and one line for everything that is wrong with them."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tether.errors import UserError
from tether.language.prompts import Prompt, PromptsConfig, load_prompts, load_rows

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + message.role) }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS = [{"prompt": "What is 2 + 2?", "answer": "4"}, {"prompt": "Größe, 大小\n\u2028?", "answer": "ü"}]
USER = {"role": "user", "content": "Hi"}


def byte_tokenizer(template: str | None = None, chat: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte; `template` is the post-processor's, with <s> and </s> as it says."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template is not None:
        special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    wrapped.chat_template = chat
    return wrapped


def load(
    path: Path | str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    context: int | None = None,
    reserve: int = 0,
    **options: Any,
) -> list[Prompt]:
    return load_prompts(PromptsConfig(path=str(path), **options), tokenizer or byte_tokenizer(), context, reserve)


def jsonl(folder: Path, rows: list[Any], name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def error(*args: Any, **options: Any) -> str:
    """The one line that this raises."""
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- every way to bring rows ------------------------------------------------------------------------------------------


def write_as(folder: Path, kind: str) -> Path:
    import datasets

    path = folder / f"data.{kind}"
    if kind in ("saved", "dictionary"):
        data = datasets.Dataset.from_list(ROWS)
        (datasets.DatasetDict({"train": data, "test": data}) if kind == "dictionary" else data).save_to_disk(path)
        return path
    if kind == "folder":
        path.mkdir()
        return jsonl(path, ROWS, "train.jsonl").parent
    if kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
        return path
    if kind.startswith("csv"):
        text = "prompt,answer\r\n" + "".join(f'"{row["prompt"]}",{row["answer"]}\r\n' for row in ROWS)
    elif kind.startswith("jsonl"):
        text = jsonl(folder, ROWS, "plain.jsonl").read_text(encoding="utf-8").replace("\n", "\r\n\n")  # blank lines
    else:
        text = json.dumps(ROWS, indent=1)
    data_bytes = b"\xef\xbb\xbf" + text.encode()  # with a byte order mark, as Windows writes it
    path.write_bytes(gzip.compress(data_bytes) if kind.endswith(".gz") else data_bytes)
    return path


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "saved", "dictionary", "folder"],
)
def test_every_format_gives_the_same_prompts(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_as(tmp_path, kind)
    prompts = load(path)
    assert [prompt.source for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert [prompt.columns for prompt in prompts] == ROWS
    assert [prompt.row for prompt in prompts] == [1, 2]
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(prompt.token_ids) for prompt in prompts] == [prompt.text for prompt in prompts]


def test_a_csv_field_may_be_long_and_hold_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,answer\n"' + "a, b\n" * 40_000 + '",1\n')
    assert load_rows(str(path)) == [{"prompt": "a, b\n" * 40_000, "answer": "1"}]


def test_columns_that_a_row_lacks_are_none(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a"}, {"answer": 1, "prompt": "b"}])
    assert [prompt.columns for prompt in load(path)] == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 1}]


def test_a_split_of_a_saved_folder(tmp_path: Path) -> None:
    import datasets

    data = {
        "train": datasets.Dataset.from_list([{"prompt": "a"}]),
        "test": datasets.Dataset.from_list([{"prompt": "b"}]),
    }
    datasets.DatasetDict(data).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", split="test")[0].source == "b"
    assert "no split `dev`; it has: train, test" in error(tmp_path / "saved", split="dev")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "single")
    assert "one dataset without splits" in error(tmp_path / "single", split="test")


# --- which tokens a policy reads --------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [(None, [], []), ("<s> $A", ["<s>"], []), ("$A </s>", [], ["</s>"]), ("<s> $A </s>", ["<s>"], ["</s>"])],
)
@pytest.mark.parametrize("text", ["Hi", "Hi</s>", "</s>"])
def test_text_keeps_bos_and_loses_only_an_added_eos(
    tmp_path: Path, template: str | None, before: list[str], after: list[str], text: str
) -> None:
    tokenizer = byte_tokenizer(template)
    prompt = load(jsonl(tmp_path, [{"prompt": text}]), tokenizer)[0]
    special = tokenizer.convert_tokens_to_ids
    assert list(prompt.token_ids) == special(before) + ids(text)
    assert tokenizer(text)["input_ids"] == special(before) + ids(text) + special(after)  # what it would have been


def test_chat_tokens_are_the_templates_own(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<s> $A </s>", CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hey"}, USER]
    for column in ("messages", "prompt"):
        prompt = load(jsonl(tmp_path, [{column: messages, "answer": 1}]), tokenizer)[0]
        assert prompt.text == "<s>[system]Be brief.[user]Hi[assistant]Hey[user]Hi[assistant]"
        assert list(prompt.token_ids) == ids(prompt.text)  # one bos, no eos
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
        assert prompt.source == messages
        assert prompt.columns["answer"] == 1


def test_null_keys_of_messages_are_dropped(tmp_path: Path) -> None:
    # `datasets` gives every message the keys of all messages.
    path = jsonl(tmp_path, [{"messages": [{**USER, "name": None}]}])
    assert load(path, byte_tokenizer(chat=CHAT_TEMPLATE))[0].source == [USER]


def test_text_as_a_user_message_with_a_system_message(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "2+2?"}])
    tokenizer = byte_tokenizer(chat=CHAT_TEMPLATE)
    prompt = load(path, tokenizer, column="question", chat=True, system="Be brief.")[0]
    assert prompt.text == "<s>[system]Be brief.[user]2+2?[assistant]"
    assert prompt.source == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    prompt = load(path, tokenizer, template="Q: {question}", chat=True)[0]
    assert prompt.text == "<s>[user]Q: 2+2?[assistant]"


def test_template_over_columns(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "2+2?", "level": 3.25}])
    prompt = load(path, template="Question ({level:.1f}): {question}\nAnswer {{x}}:")[0]
    assert prompt.source == prompt.text == "Question (3.2): 2+2?\nAnswer {x}:"
    assert prompt.columns == {"question": "2+2?", "level": 3.25}


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_prompts_longer_than_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path, [{"prompt": "a" * length} for length in (4, 6, 7, 5)])
    assert len(load(path, context=10, reserve=3)) == 4
    message = error(path, context=10, reserve=4)
    assert message.startswith(
        f"{path}, row 3: the prompt has 7 tokens, but the model's context of 10 less max_new_tokens (4)"
    )
    assert "leaves room for 6" in message
    assert message.endswith("`--prompts.overlong skip`")
    with caplog.at_level(logging.WARNING):
        kept = load(path, context=10, reserve=5, overlong="skip")
    assert [prompt.row for prompt in kept] == [1, 4]
    assert "skipped 2 of 4 prompts" in caplog.text


def test_max_tokens_and_context_together(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "aaaa"}, {"prompt": "aaaaaaaa"}])
    assert "row 2: the prompt has 8 tokens, but prompts.max_tokens is 5" in error(path, context=100, max_tokens=5)
    assert "leaves room for 7" in error(path, context=10, reserve=3, max_tokens=50)
    assert len(load(path, max_tokens=8)) == 2
    message = error(path, max_tokens=3, overlong="skip")
    assert "every one of the 2 prompts is too long (the shortest has 4 tokens)" in message
    assert "leaves no room for a prompt in the model's context of 8 tokens" in error(path, context=8, reserve=8)
    assert "prompts.max_tokens is 0; expected at least 1" in error(path, max_tokens=0)
    assert "prompts.overlong is 'cut'" in error(path, overlong="cut")


# --- one line for everything that is malformed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', "line 2: malformed JSON: Expecting value (column 12)"),
        ("a.jsonl", b'{"prompt": "a"}\n\n["a"]\n', "line 3: found a list; expected one JSON object a line"),
        ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1: JSON that cannot be read"),
        ("a.jsonl", b"[" * 200_000, "line 1: "),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2: not UTF-8 text (byte 0xff)"),
        ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8 text"),
        ("a.jsonl.gz", b'{"prompt": "a"}', "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-6], "not a complete gzip file"),
        (
            "a.json",
            b'{"prompt": "a"}\n{"prompt": "b"}',
            "line 2: malformed JSON: Extra data (column 1): one object a line",
        ),
        ("a.json", b'{"prompt": "a"}', "found an object; expected a list of objects: one object a line is JSONL"),
        ("a.json", b"3", "found a number; expected a list of objects"),
        ("a.json", b'[{"prompt": "a"}, null]', "row 2: found null; expected an object"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"prompt,answer\n", "holds no rows"),
        ("a.csv", b"prompt,answer\na,1\nb,c,2\n", "line 3: 3 fields; the header has 2 (prompt, answer): put quotes"),
        ("a.csv", b"prompt,answer\na\n", "line 2: 1 fields"),
        ("a.csv", b"prompt,prompt\na,b\n", "line 1: column `prompt` appears twice"),
        ("a.csv", b'prompt\n"a\n', "malformed CSV: unexpected end of data"),
        ("a.parquet", b"prompt", "not a readable Parquet file"),
        ("a.parquet", b"", "not a readable Parquet file"),
        ("a.txt", b"What?", "cannot tell the format by its name; expected one of .jsonl"),
        (
            "a.jsonl",
            b'{"text": "a", "answer": 1}',
            "no column `prompt` or `messages`; it has: text, answer: name the one",
        ),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in error(path)
    assert error(path).startswith(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "missing.jsonl: no such file or folder" in error("missing.jsonl")
    assert "no such file or folder" in error(tmp_path / "missing")
    assert "no data given" in error("")


def test_a_folder_that_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    assert "`datasets` cannot read this folder" in error(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    assert "`datasets` cannot read this folder" in error(tmp_path / "broken")


def test_a_hub_name_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> None:
        assert (name, config, split) == ("owner/name", None, "train")
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error("owner/name")
    assert "no dataset of this name could be loaded from the hub: ValueError: Config name is missing. Please" in message
    assert message.endswith("give one as `owner/name:CONFIG`")


def test_a_hub_name_with_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        assert (name, config, split) == ("owner/name", "main", "test")
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("owner/name:main", split="test")[0].source == "a"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 2: column `prompt` is null or missing; expected text or a list of messages"),
        (7, "row 2: column `prompt` is int (7)"),
        ({"role": "user"}, "row 2: column `prompt` is dict"),
        ("", "row 2: column `prompt` is empty"),
        (" \n", "row 2: column `prompt` is empty"),
        ("\ud800", "row 2: column `prompt` holds '\\ud800', half of a surrogate pair"),
        ([USER], "row 2: the prompt is a list of messages, but that of row 1 is text"),
    ],
)
def test_a_prompt_that_is_no_text(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "fine"}, {"prompt": value}]))
    assert message in error(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "row 2: column `messages` is an empty list"),
        (["Hi"], "row 2: column `messages`, message 1 is str; expected an object with `role` and `content`"),
        ([USER, {"content": "x"}], "row 2: column `messages`, message 2 has no `role`; it has: content"),
        ([{"from": "human", "value": "x"}], "message 1 has no `role`; it has: from, value"),
        ([{"role": "user", "content": None}], "message 1 has no `content`"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1: `content` is list; expected text"),
        ([{"role": "user", "content": " "}], "message 1 is empty"),
        ([USER, {"role": "assistant", "content": "4"}], "row 2: column `messages` ends with an assistant turn"),
        (
            [{"role": "human", "content": "x"}],
            "row 2: the tokenizer's chat template refuses the messages: Unknown role human",
        ),
        ("text", "row 2: the prompt is text, but that of row 1 is a list of messages"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, value: Any, message: str) -> None:
    path = jsonl(tmp_path, [{"messages": [USER]}, {"messages": value}])
    assert message in error(path, byte_tokenizer(chat=CHAT_TEMPLATE))


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    assert "row" not in error(jsonl(tmp_path, [{"messages": [USER]}]))
    assert "has no chat template" in error(jsonl(tmp_path, [{"messages": [USER]}]))
    assert "has no chat template" in error(jsonl(tmp_path, [{"prompt": "a"}]), chat=True)


def test_a_tokenizer_that_makes_nothing_of_a_prompt(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.backend_tokenizer.model = models.BPE(vocab={"a": 0}, merges=[])
    assert "row 2: the tokenizer makes no token of the prompt 'b'" in error(
        jsonl(tmp_path, [{"prompt": "a"}, {"prompt": "b"}]), tokenizer
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "question"}, "no column `question` (prompts.column); it has: prompt, answer"),
        ({"column": "prompt", "template": "{prompt}"}, "`column` and `template` are both set"),
        ({"template": "Q: {question}"}, "prompts.template: names the column `question`, but"),
        ({"template": "Q: {}"}, "prompts.template: names the column ``"),
        ({"template": "Q: {prompt"}, "prompts.template: expected '}' before end of string"),
        ({"template": "Q:"}, "prompts.template names no column"),
        ({"template": "{answer:d}{prompt}"}, "row 1: prompts.template cannot be filled: ValueError"),
        ({"template": "{prompt.size}"}, "row 1: prompts.template cannot be filled: AttributeError"),
        ({"system": "Be brief."}, "prompts.system is set, but the prompts are plain text: add `--prompts.chat`"),
        ({"split": "test"}, "split `test` was asked for, but a single file has no splits"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in error(jsonl(tmp_path, ROWS), **options)


def test_a_template_over_a_null(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": "a"}, {"question": None}])
    assert "row 2: column `question`, which prompts.template names, is null" in error(path, template="{question}")


def test_two_system_messages(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"messages": [{"role": "system", "content": "x"}, USER]}])
    message = error(path, byte_tokenizer(chat=CHAT_TEMPLATE), system="y")
    assert "row 1: column `messages` begins with a system message, and prompts.system is set too" in message
