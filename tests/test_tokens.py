"""Text to tokens: one bos, no eos that nobody wrote, no space that is not there."""

from __future__ import annotations

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.tokenizers_of_kinds import byte_level, sentence_piece
from tether.tokens import tokenize_behind, tokenize_text, tokenize_whole


def adding(template: str, specials: list[str], **names: str) -> PreTrainedTokenizerFast:
    made = byte_level([*specials], **names)
    ids = [(token, made.convert_tokens_to_ids(token)) for token in specials]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return made


@pytest.mark.parametrize(
    ("template", "specials", "text", "whole"),
    [
        ("<s> $A", ["<s>", "</s>"], "Hi", "<s>Hi"),
        ("<s> $A", ["<s>", "</s>"], "<s>Hi", "<s>Hi"),
        ("<s> $A", ["<s>", "</s>"], "<s><s>Hi", "<s><s>Hi"),
        ("<s> $A", ["<s>", "</s>"], "Hi<s>", "<s>Hi<s>"),
        ("<s> $A </s>", ["<s>", "</s>"], "<s>Hi</s>", "<s>Hi</s>"),
        ("<s> $A </s>", ["<s>", "</s>"], "Hi</s>", "<s>Hi</s>"),
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>", "</s>"], "[gMASK]<sop>Hi", "[gMASK]<sop>Hi"),
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>", "</s>"], "<sop>Hi", "[gMASK]<sop><sop>Hi"),
        ("[CLS] $A [SEP]", ["[CLS]", "[SEP]"], "[CLS]Hi[SEP]", "[CLS]Hi[SEP]"),
    ],
)
def test_what_the_tokenizer_adds_is_not_added_twice(template: str, specials: list[str], text: str, whole: str) -> None:
    made = adding(template, specials, eos_token=specials[-1])
    assert made.decode(tokenize_whole(made, [text])[0]) == whole


def test_a_text_to_be_continued_loses_an_eos_that_was_added_alone() -> None:
    made = adding("<s> $A </s>", ["<s>", "</s>"], eos_token="</s>")
    read = [made.decode(ids) for ids in tokenize_text(made, ["Hi", "<s>Hi", "Hi</s>", "Hi"])]
    assert read == ["<s>Hi", "<s>Hi", "<s>Hi</s>", "<s>Hi"]


def test_the_first_text_that_begins_with_bos_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    made = sentence_piece()
    for _ in range(2):
        tokenize_text(made, ["Hi", "<s>Hi", "<s>Ho"], ["data, row 1", "data, row 2", "data, row 3"])
    (record,) = caplog.records
    assert record.message.startswith("data, row 2: the text begins with <s>")


@pytest.mark.parametrize("prefix", ["normalizer", "first", "always", "never"])
@pytest.mark.parametrize("text", ["19", " 19", "the fox", "\n19"])
def test_a_text_behind_another_gains_no_space(prefix: str, text: str) -> None:
    made = sentence_piece(prefix)
    (ids,) = tokenize_behind(made, [text])
    before = made("What is", add_special_tokens=False).input_ids
    assert made.decode(before + ids) == "What is" + text
