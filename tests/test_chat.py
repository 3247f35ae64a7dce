"""Chat templates: which one, what it is given, and one line for whatever it raises."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tokenizers_of_kinds import CHATML, KINDS
from tether.chat import ChatOptions, ChatTemplate, Conversation, kept_kwargs, said, variables_of
from tether.errors import UserError

THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
)
TOOLS = "{% if tools %}{% for t in tools %}<{{ t.function.name }}>{% endfor %}{% endif %}"
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]
ROME = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def tokenizer(template: Any = CHATML) -> PreTrainedTokenizerFast:
    made = KINDS["qwen"]()
    made.chat_template = template
    return made


def render(template: Any, messages: Any = CHAT, **options: Any) -> str:
    return ChatTemplate(tokenizer(template), ChatOptions(**options)).render(messages, "here", generation_prompt=True)


def test_variables_reach_the_template_as_transformers_hands_them_on() -> None:
    expected = tokenizer(THINKING).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert expected.endswith("<think></think>")
    assert render(THINKING, chat_template_kwargs={"enable_thinking": False}) == expected
    assert not render(THINKING).endswith("<think></think>")


def test_a_rows_own_variables_go_before_those_of_the_options() -> None:
    own = Conversation(CHAT, {"enable_thinking": True})
    assert render(THINKING, own, chat_template_kwargs={"enable_thinking": False}) == render(THINKING)


def test_a_variable_that_the_template_never_reads_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made = tokenizer(THINKING)
    for _ in range(3):
        ChatTemplate(made, ChatOptions(chat_template_kwargs={"enable_thinkin": False}), "prompts").render(CHAT, "here")
    assert [record.message for record in caplog.records] == [
        "prompts.chat_template_kwargs: the chat template never reads `enable_thinkin`, so it is ignored"
    ]
    caplog.clear()
    loops = "{% for m in messages %}{% if m.role == 'x' %}{% continue %}{% endif %}{% generation %}{{ quiet }}"
    render(loops + "{% endgeneration %}{% endfor %}", chat_template_kwargs={"quiet": True})
    assert not caplog.records


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "messages", 3])
def test_a_variable_that_is_not_the_users_to_give_is_refused(name: Any) -> None:
    with pytest.raises(UserError, match=f"chat_template_kwargs has `{name}`"):
        render(CHATML, chat_template_kwargs={name: True})


def test_the_template_may_come_from_a_file_or_as_text_or_be_one_of_several(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("file {{ messages[0].content }}", encoding="utf-8")
    assert render(CHATML, chat_template=str(file)) == render(None, chat_template=str(file)) == "file What is 2 + 2?"
    assert render(CHATML, chat_template="text {{ messages[0].role }}") == "text user"
    several = {"default": "one", "rag": "two {{ documents[0].text }}", "tool_use": "three {{ tools | length }}"}
    assert render(several) == "one"
    assert render(several, Conversation(CHAT, {"documents": [{"text": "x"}]}), chat_template="rag") == "two x"
    assert render(several, Conversation(CHAT, {"tools": ROME})) == "three 1"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"", "empty"), (b"\xff{{ x }}", "not UTF-8")]
)
def test_a_template_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ChatTemplate(tokenizer(), ChatOptions(chat_template=str(file)), "rows")
    assert str(caught.value).startswith(f"rows.chat_template: {file}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'CALL ' + messages[0] }}", "TypeError: can only concatenate"),
        ("{{ messages[0].content / 2 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no\nway') }}", "refuses the messages: no way"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for %}", "Expected"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ({"tool_use": CHATML}, "no default"),
    ],
)
def test_whatever_a_template_raises_is_one_line_that_names_the_place(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        render(template)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


def test_tools_are_read_where_the_template_reads_them_and_said_to_be_left_out_elsewhere(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = Conversation(CHAT, variables_of({"tools": ROME}, "row 1"))
    assert render(TOOLS + CHATML, own).startswith("<weather>")
    assert not caplog.records
    assert render(CHATML, own) == render(CHATML)
    assert "never reads `tools`" in caplog.text


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"tools": ROME}, {"tools": ROME}),
        ({"tools": json.dumps(ROME), "documents": None}, {"tools": ROME}),
        ({"tools": [], "documents": [{"text": "x"}]}, {"documents": [{"text": "x"}]}),
        ({"chat_template_kwargs": {"a": 1, "b": None}, "other": 3}, {"a": 1}),
        ({"chat_template_kwargs": '{"a": false}'}, {"a": False}),
        ({"tools": ""}, {}),
    ],
)
def test_columns_that_a_template_reads(row: dict[str, Any], found: dict[str, Any]) -> None:
    assert variables_of(row, "row 1") == found


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat_template_kwargs": [1]}, "column `chat_template_kwargs` is list"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has `tokenize`"),
    ],
)
def test_columns_of_another_form_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        variables_of(row, "row 1")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"a": 1}, "column `tools` is dict; expected a list"),
        ("hammer, saw", "column `tools` is text that is not valid JSON"),
    ],
)
def test_a_column_that_happens_to_have_the_name_is_refused_by_a_template_that_reads_it_alone(
    column: Any, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = Conversation(CHAT, variables_of({"tools": column}, "row 1"))
    with pytest.raises(UserError, match=f"here: {message}"):
        render(TOOLS + CHATML, own)
    assert render(CHATML, own) == render(CHATML)
    assert "never reads `tools`" in caplog.text


def test_a_conversation_is_a_list_that_keeps_its_variables_when_it_is_copied() -> None:
    made = Conversation(CHAT, {"tools": ROME})
    assert made == CHAT
    assert json.loads(json.dumps(made)) == CHAT
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301 - its own bytes
        assert copied == made
        assert copied.variables == {"tools": ROME}


def test_template_and_variables_are_saved_with_the_tokenizer(tmp_path: Path) -> None:
    made = tokenizer("other")
    options = ChatOptions(chat_template=THINKING, chat_template_kwargs={"enable_thinking": False})
    chat = ChatTemplate(made, options)
    wanted = chat.render(CHAT, "here", generation_prompt=True)
    chat.keep()
    made.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert kept_kwargs(read) == {"enable_thinking": False}
    assert ChatTemplate(read).render(CHAT, "here", generation_prompt=True) == wanted
    other = ChatOptions(chat_template_kwargs={"enable_thinking": True})
    assert ChatTemplate(read, other).render(CHAT, "here", generation_prompt=True) != wanted
    assert read.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>user")  # transformers reads it too


def test_settled_options_do_not_need_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("one {{ messages }}", encoding="utf-8")
    options = ChatOptions(chat_template=str(file))
    settled = ChatTemplate(tokenizer(), options).settled(options)
    file.write_text("two", encoding="utf-8")
    assert ChatTemplate(tokenizer(), settled).render(CHAT, "here").startswith("one")


def test_what_a_message_says_is_its_content_or_its_calls() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    assert said({"role": "user", "content": "Hi"}) == "Hi"
    assert said({"role": "assistant", "content": None}) == ""
    assert json.loads(said({"role": "assistant", "tool_calls": calls})) == calls
    assert said({"role": "assistant", "content": "so", "tool_calls": calls}) == "so"


def test_nothing_is_logged_of_a_template_that_reads_what_it_is_given(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        render(THINKING, chat_template_kwargs={"enable_thinking": False})
    assert not caplog.records
