"""The built-in verifiers: what is right, what is wrong, what is in between."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tether.errors import RewardError, UserError
from tether.rewards import Rewards, RewardsConfig, check_reward
from tether.rewards.loading import load_reward
from tether.rewards.verifiers import Arithmetic, ExactMatch, Numeric, Regex


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_exact_match_strips_and_minds_case_unless_told() -> None:
    columns = {"answer": ["Paris", "Paris", "Paris", 7]}
    completions = [" Paris\n", "paris", "Paris.", "7"]
    assert ExactMatch()(completions=completions, **columns) == [1, -1, -1, 1]
    assert ExactMatch(ignore_case=True, wrong=0)(completions=completions, **columns) == [1, 1, 0, 1]


def test_regex_searches_or_matches_the_whole() -> None:
    completions = ["<a>4</a>", "well, <a>4</a>", "4", chat(" <a>1</a>\n")]
    assert Regex("<a>.*</a>")(completions=completions) == [1, 1, -1, 1]
    assert Regex("<a>.*</a>", full=True)(completions=completions) == [1, -1, -1, 1]
    assert Regex("<A>", ignore_case=True, right=2, wrong=0)(completions=completions) == [2, 2, 0, 2]


def test_numeric_reads_gsm8k_answers() -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nTogether 48+24 = 72.\n#### 72"
    completions = ["#### 72", "so it is 72.", "#### 24", "no idea", chat("\\boxed{72}")]
    assert Numeric()(completions=completions, answer=[solution] * 5) == [1, 1, -1, -1, 1]


@pytest.mark.parametrize("answer", [0.5, "0.5", "1/2", Decimal("0.50"), Fraction(1, 2), "#### .5"])
def test_numeric_takes_any_kind_of_answer(answer: Any) -> None:
    assert Numeric()(completions=["0.5", "1/2", "0.51"], answer=[answer] * 3) == [1, 1, -1]


def test_numeric_compares_as_written() -> None:
    assert Numeric()(completions=["0.1", "0.3"], answer=[0.1, 0.3]) == [1, 1]


def test_numeric_can_be_graded_and_tolerant() -> None:
    graded = Numeric(right=1, partial=0.1, wrong=0)
    assert graded(completions=["5", "6", "five"], answer=[5, 5, 5]) == [1, 0.1, 0]
    assert Numeric(tolerance=0.01)(completions=["0.333", "0.3"], answer=["1/3", "1/3"]) == [1, -1]


@pytest.mark.parametrize("answer", [None, "seven", True, float("nan"), ["7"]])
def test_numeric_names_an_answer_that_is_no_number(answer: Any) -> None:
    with pytest.raises(RewardError, match=r"column `answer` of example 1 is .*expected a number"):
        Numeric()(completions=["1", "2"], answer=[1, answer])


def test_arithmetic_works_the_prompt_out() -> None:
    prompts: list[Any] = ["What is 12 + 7?", "12*3=", [{"role": "user", "content": "Compute (2 - 5) * 2"}], "7/2 ="]
    assert Arithmetic()(prompts=prompts, completions=[" 19", "36.", chat("It is -6"), "7/2"]) == [1, 1, 1, 1]
    assert Arithmetic(wrong=0)(prompts=prompts, completions=["18", "", chat("6"), "3.4"]) == [0, 0, 0, 0]
    assert Arithmetic(partial=-0.5)(prompts=prompts[:2], completions=["18", "?"]) == [-0.5, -1]


@pytest.mark.parametrize(
    ("prompt", "message"), [("Who are you?", "holds no expression"), ("1 / (2 - 2) =", "divides by zero")]
)
def test_arithmetic_names_a_prompt_that_it_cannot_work_out(prompt: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Arithmetic()(prompts=["1+1", prompt], completions=["2", "0"])


def test_options() -> None:
    assert load_reward("numeric?answer=solution&right=2&wrong=0&partial=.5&tolerance=1e-3").call == Numeric(
        answer="solution", right=2, wrong=0, partial=0.5, tolerance=1e-3
    )
    assert load_reward("arithmetic").call == Arithmetic()
    assert load_reward("exact_match?ignore_case=true").call == ExactMatch(ignore_case=True)


def test_a_pattern_may_hold_the_separators() -> None:
    spec = r"regex?pattern=(?=x)x & y\?=\d&full=true&wrong=0"
    assert load_reward(spec).call == Regex(r"(?=x)x & y\?=\d", full=True, wrong=0)
    assert check_reward(spec, ["p"] * 2, ["x & y?=1", "x & y?="]) == [1, 0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("numeric?anwser=x", "no option `anwser`; it has: answer, tolerance, right, wrong, partial"),
        ("numeric?answer", "option `answer` has no value"),
        ("numeric?right=one", "option `right` is 'one'; expected a finite number"),
        ("numeric?right=nan", "expected a finite number"),
        ("numeric?right=1&right=2", "given twice"),
        ("numeric?answer=", "option `answer` is empty"),
        ("exact_match?ignore_case=maybe", "expected true or false"),
        ("regex", "needs the option `pattern`"),
        ("regex?pattern=(a", "is no regular expression"),
        ("regex?compiled=x", "no option `compiled`"),
    ],
)
def test_wrong_options_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


def test_check_finds_a_missing_column_and_every_unreadable_answer() -> None:
    rewards = Rewards(RewardsConfig(("numeric?answer=gold",)))
    with pytest.raises(UserError, match="needs the column `gold`, but the prompts have: answer: name the right one"):
        rewards.check(["answer"])
    rewards.check({"gold": [1, 2]}, ["a", "b"])
    with pytest.raises(UserError, match="of example 1 is 'two'"):
        rewards.check({"gold": [1, "two"]}, ["a", "b"])
    with pytest.raises(UserError, match="'Who\\?' of example 1 holds no expression"):
        Rewards(RewardsConfig(("arithmetic",))).check({}, ["1+1", "Who?"])


@pytest.mark.parametrize(
    ("function", "answers", "prompts", "message"),
    [
        ("numeric", [1, "two"], ["a", "b"], "sums.jsonl, row 7: numeric: column `answer` is 'two'; expected a number"),
        ("exact_match", ["a", None], ["a", "b"], "sums.jsonl, row 7: exact_match: column `answer` is null; expected"),
        ("arithmetic", [1, 2], ["1+1", "Who?"], "sums.jsonl, row 7: arithmetic: the prompt 'Who?' holds no expression"),
        ("arithmetic", [1, 2], ["1+1", "1/0"], "sums.jsonl, row 7: arithmetic: the prompt '1/0' divides by zero"),
    ],
)
def test_check_says_where_an_unreadable_example_stands(
    function: str, answers: list[Any], prompts: list[str], message: str
) -> None:
    places = ["sums.jsonl, row 3", "sums.jsonl, row 7"]
    with pytest.raises(UserError, match="^" + re.escape(message)):
        Rewards(RewardsConfig((function,))).check({"answer": answers}, prompts, places)


def test_built_ins_run_like_any_reward() -> None:
    assert check_reward("numeric", ["q", "q"], ["#### 7", "8"], {"answer": ["7", "7"], "other": [0, 0]}) == [1, -1]
    assert check_reward("regex?pattern=a", ["q"], ["b"]) == [-1]
