"""Preferences: every form in use is read alike, rows that say nothing are counted, malformed ones named in one line."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.models import make_tokenizer

from tether.errors import UserError
from tether.language.preferences import (
    Preference,
    PreferencesConfig,
    load_preferences,
    preferences_from_rows,
)

USER = {"role": "user", "content": "Hello?"}
KIND = {"role": "assistant", "content": "Hello!"}
RUDE = {"role": "assistant", "content": "What?"}
PAIR = {"prompt": "Hello?", "chosen": " Hello!", "rejected": " What?"}


def one(row: dict[str, Any], **options: Any) -> Preference:
    return preferences_from_rows([row], PreferencesConfig(**options)).pairs[0]


# ---- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_every_kind_of_file_says_the_same(kind: str, tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "Bye", "chosen": "Bye!", "rejected": "…"}]
    path = tmp_path / ("data" if kind == "folder" else f"data.{kind}")
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(PAIR))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    found = load_preferences(PreferencesConfig(str(path))).pairs
    assert found == [
        Preference("Hello?", " Hello!", " What?", row=1),
        Preference("Bye", "Bye!", "…", row=2),
    ]


def test_a_dialogue_of_text_is_divided_after_the_last_shared_assistant() -> None:
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = one({"chosen": f"{shared} Yes, d", "rejected": f"{shared} Yes, e"})
    assert (pair.prompt, pair.chosen, pair.rejected) == (shared, " Yes, d", " Yes, e")


def test_a_response_that_begins_with_the_other_is_whole() -> None:
    shared = "\n\nHuman: a\n\nAssistant:"
    pair = one({"chosen": f"{shared} b", "rejected": f"{shared} b\n\nHuman: c\n\nAssistant: d"})
    assert (pair.prompt, pair.chosen) == (shared, " b")
    assert pair.rejected == " b\n\nHuman: c\n\nAssistant: d"


def test_dialogues_that_part_before_their_last_turn_keep_what_follows() -> None:
    shared = "\n\nHuman: a\n\nAssistant:"
    pair = one({"chosen": f"{shared} b\n\nHuman: c\n\nAssistant: d", "rejected": f"{shared} e"})
    assert pair.prompt == shared
    assert pair.chosen == " b\n\nHuman: c\n\nAssistant: d"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, KIND], "rejected": [USER, RUDE]},
        {"prompt": [USER], "chosen": [KIND], "rejected": [RUDE]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "What?"},
        {"prompt": [USER], "chosen": [USER, KIND], "rejected": [USER, RUDE]},
        {"prompt": "Hello?", "chosen": [USER, KIND], "rejected": [USER, RUDE]},
        {"prompt": "Hello?", "chosen": [KIND], "rejected": [RUDE]},
        {"prompt": None, "chosen": [USER, KIND], "rejected": [USER, RUDE]},
        {"chosen": [USER | {"name": None}, KIND], "rejected": [USER, RUDE]},
    ],
)
def test_messages_in_every_form_in_use_are_the_same_comparison(row: dict[str, Any]) -> None:
    assert one(row) == Preference([USER], [KIND], [RUDE], row=1)


def test_conversations_share_all_turns_up_to_where_they_part() -> None:
    again = {"role": "user", "content": "Again."}
    pair = one({"chosen": [USER, KIND, again, KIND], "rejected": [USER, KIND, again, RUDE]})
    assert pair.prompt == [USER, KIND, again]
    shorter = one({"chosen": [USER, KIND], "rejected": [USER, KIND, again, RUDE]})
    assert shorter.prompt == [USER]
    assert shorter.chosen == [KIND]


ASKED = "\n\nHuman: What is 12 + 7?\n\nAssistant:"
GREETED = "\n\nHuman: Hi\n\nAssistant:"
QUESTION = "What is 12 + 7?"
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        (ASKED, ASKED + " 19", ASKED + " 12", (ASKED, " 19", " 12")),
        (QUESTION + "\n", QUESTION + "\n19", QUESTION + "\n12", (QUESTION + "\n", "19", "12")),
        (f" {QUESTION}\n", QUESTION + " 19", QUESTION + " 12", (f" {QUESTION}\n", " 19", " 12")),
        (QUESTION, ASKED + " 19", ASKED + " 12", (ASKED, " 19", " 12")),
        (QUESTION, "19", "12", (QUESTION, "19", "12")),
        ("Say a", "Say another", "Say apple", ("Say a", "Say another", "Say apple")),  # goes on within a word
        ("Hello", "Hello there", "Hello you", ("Hello", "Hello there", "Hello you")),  # a word may be said again
        ("首都はどこ？", "首都はどこ？東京", "首都はどこ？大阪", ("首都はどこ？", "東京", "大阪")),  # no spaces
        ("首都是", "首都是北京", "首都是上海", ("首都是", "北京", "上海")),
        (
            "Hi",
            "\n\nHuman: Hi\n\nAssistant: a",
            "\n\nHuman: Hi\n\nAssistant: b",
            ("\n\nHuman: Hi\n\nAssistant:", " a", " b"),
        ),
        ([USER], [USER, KIND], [RUDE], ([USER], [KIND], [RUDE])),
        ([SYSTEM, USER], [USER, KIND], [USER, RUDE], ([SYSTEM, USER], [KIND], [RUDE])),
        ([SYSTEM, USER], [USER, KIND], [SYSTEM, USER, RUDE], ([SYSTEM, USER], [KIND], [RUDE])),
        ([USER], [SYSTEM, USER, KIND], [SYSTEM, USER, RUDE], ([SYSTEM, USER], [KIND], [RUDE])),
        ([USER], [{"role": "user", "content": "Hello? "}, KIND], [USER, RUDE], ([USER], [KIND], [RUDE])),
        ([USER], [KIND, USER, KIND], [RUDE], ([USER], [KIND, USER, KIND], [RUDE])),
    ],
)
def test_a_prompt_that_the_responses_hold_is_read_once(prompt: Any, chosen: Any, rejected: Any, expected: Any) -> None:
    pair = one({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        (ASKED, ASKED + " 19", " 12", "`chosen` holds the prompt, `rejected` does not; expected both or none"),
        (QUESTION, "19", QUESTION + " 12", "`rejected` holds the prompt, `chosen` does not"),
        ("首都はどこ？", "首都はどこ？東京", "大阪", "`chosen` holds the prompt, `rejected` does not"),
        (QUESTION, ASKED + " 19", "12", "`chosen` holds the prompt, `rejected` does not"),
        (QUESTION, f"Q: {QUESTION} A: 19", f"Q: {QUESTION} A: 12", "hold the prompt, but do not begin with it"),
        ([USER], [USER | {"content": "Else?"}, KIND], [RUDE], "`chosen` begins with a message of the user that is not"),
        ([USER], [SYSTEM, KIND], [RUDE], "`chosen` begins with a message of the system that is not the prompt's"),
        ([USER], [SYSTEM, USER, KIND], [USER, RUDE], "before the prompt, `chosen` and `rejected` begin with other"),
        ([USER | {"content": QUESTION}], QUESTION + " 19", "12", "`chosen` holds the prompt, `rejected` does not"),
    ],
)
def test_a_prompt_in_one_response_alone_is_refused(prompt: Any, chosen: Any, rejected: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        one({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert message in str(caught.value)
    assert "row 1" in str(caught.value)


def test_what_texts_hold_can_be_said() -> None:
    row = {"prompt": QUESTION, "chosen": QUESTION + " 19", "rejected": "12"}
    pair = one(row, responses="alone")
    assert (pair.prompt, pair.chosen, pair.rejected) == (QUESTION, QUESTION + " 19", "12")
    assert one({"prompt": "Hi", "chosen": "Hi you", "rejected": "Hi I"}, responses="whole").chosen == " you"
    with pytest.raises(UserError, match="do not begin with the prompt, but `responses` is whole"):
        one({"prompt": QUESTION, "chosen": "19", "rejected": "12"}, responses="whole")


def test_chat_makes_messages_of_text() -> None:
    pair = one({"prompt": "Hello?", "chosen": "Hello!", "rejected": "What?"}, chat=True)
    assert pair == Preference([USER], [KIND], [RUDE], row=1)


def test_columns_can_be_named() -> None:
    row = {"question": "a", "better": "b", "worse": "c", "by": 2, "label": "tie"}
    names = {"prompt_column": "question", "chosen_column": "better", "rejected_column": "worse"}
    assert one(row, **names, margin_column="by") == Preference("a", "b", "c", margin=2.0, row=1)
    assert one(row, **names, tie_column="label").tie


@pytest.mark.parametrize(("value", "margin"), [(0, 0.0), (1.5, 1.5), ("2", 2.0), (None, 0.0), ("", 0.0)])
def test_margins(value: Any, margin: float) -> None:
    assert one(PAIR | {"margin": value}).margin == margin


@pytest.mark.parametrize(
    ("value", "tie"),
    [
        (True, True),
        (False, False),
        (None, False),
        ("tie", True),
        ("true", True),
        ("chosen", False),
        ("", False),
        (1, True),
    ],
)
def test_ties(value: Any, tie: bool) -> None:
    assert one(PAIR | {"tie": value}).tie is tie


# ---- rows that say nothing -------------------------------------------------------------------------------------------


def test_duplicates_empty_and_identical_pairs_are_left_out_and_named_by_row(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        PAIR,
        PAIR | {"chosen": "same", "rejected": "same"},
        PAIR,
        PAIR | {"rejected": " \n"},
        PAIR | {"chosen": " What?", "rejected": " Hello!"},  # the contrary is a judgement of its own
        PAIR,
        PAIR | {"prompt": ""},
    ]
    with caplog.at_level(logging.WARNING):
        found = preferences_from_rows(rows, PreferencesConfig("p.jsonl"))
    assert [pair.row for pair in found.pairs] == [1, 5]
    assert (found.duplicates, found.empty, found.identical) == ((3, 6), (4, 7), (2,))
    assert [record.getMessage() for record in caplog.records] == [
        "p.jsonl: left out 2 comparisons that repeat an earlier one (`duplicates: keep` keeps them): rows 3, 6",
        "p.jsonl: left out 2 comparisons with an empty prompt or response: rows 4, 7",
        "p.jsonl: left out 1 comparison whose chosen and rejected responses are identical: row 2",
    ]


def test_many_rows_are_counted_and_the_first_ten_named(caplog: pytest.LogCaptureFixture) -> None:
    preferences_from_rows([PAIR] * 25, PreferencesConfig("p.jsonl"))
    assert caplog.records[0].getMessage().endswith("rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 14 more")


def test_duplicates_can_be_kept() -> None:
    found = preferences_from_rows([PAIR] * 3, PreferencesConfig(duplicates="keep"))
    assert len(found.pairs) == 3
    assert found.duplicates == ()


def test_equal_responses_may_be_a_tie() -> None:
    assert one(PAIR | {"chosen": "same", "rejected": "same", "tie": True}).tie


# ---- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "p.jsonl: no column `rejected` (rejected_column); it has: prompt, chosen"),
        (PAIR | {"chosen": None}, "row 2: column `chosen` is null or missing; expected text or a list of messages"),
        (PAIR | {"rejected": 3}, "row 2: column `rejected` is int (3); expected text or a list of messages"),
        (PAIR | {"rejected": [RUDE]}, "row 2: `chosen` is text and `rejected` messages; expected the same form"),
        (PAIR | {"prompt": []}, "row 2: column `prompt` is an empty list; expected at least one message"),
        (PAIR | {"prompt": ["a"]}, "row 2: column `prompt`, message 1 is str; expected `role` and `content`"),
        (PAIR | {"prompt": [{"role": "user"}]}, "column `prompt`, message 1: `content` is missing or null"),
        (PAIR | {"prompt": [{"role": 1, "content": "a"}]}, "column `prompt`, message 1: `role` is int; expected text"),
        (PAIR | {"chosen": "\ud800"}, "row 2: column `chosen` holds '\\ud800', half of a surrogate pair, not text"),
        (PAIR | {"margin": -1}, "row 2: column `margin` is -1; expected a number of 0 or more"),
        (PAIR | {"margin": "far"}, "row 2: column `margin` is 'far'; expected a number of 0 or more"),
        (PAIR | {"margin": float("nan")}, "row 2: column `margin` is nan; expected a number of 0 or more"),
        (PAIR | {"margin": True}, "row 2: column `margin` is True; expected a number of 0 or more"),
        (PAIR | {"tie": "perhaps"}, "row 2: column `tie` is 'perhaps'; expected true, false or `tie`"),
        (PAIR | {"tie": True, "margin": 1}, "row 2: a tie with a margin of 1; expected no margin"),
        (PAIR | {"prompt": None}, "row 2: there is no prompt, and the two responses do not begin with a shared"),
        ({"prompt": None, "chosen": [USER, KIND], "rejected": [KIND, USER]}, "share no first message"),
    ],
)
def test_a_malformed_row_is_one_line(row: dict[str, Any], message: str) -> None:
    good = {name: PAIR.get(name) for name in row}
    if "rejected" not in row:
        good.pop("rejected", None)
    with pytest.raises(UserError) as caught:
        preferences_from_rows([good, row], PreferencesConfig("p.jsonl"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("p.jsonl")
    assert "\n" not in str(caught.value)


def test_nothing_left_is_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match="no comparison is left of 2 rows: 1 are empty, 1 identical, 0 duplicates"):
        preferences_from_rows([PAIR | {"chosen": ""}, PAIR | {"chosen": " What?"}], PreferencesConfig("p"))
    with pytest.raises(UserError, match="there are no rows"):
        preferences_from_rows([], PreferencesConfig("p"))
    with pytest.raises(UserError, match="no preferences given"):
        load_preferences(PreferencesConfig())


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(UserError, match=r"p, row 1: the comparison is of chat messages.*no chat template"):
        preferences_from_rows(
            [{"prompt": [USER], "chosen": [KIND], "rejected": [RUDE]}], PreferencesConfig("p"), make_tokenizer()
        )


def test_the_two_columns_must_differ() -> None:
    with pytest.raises(ValueError, match="both 'chosen'"):
        PreferencesConfig(rejected_column="chosen")
