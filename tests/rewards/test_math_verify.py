"""Mathematical answers by math-verify in a process of their own, and the rewards for length and format."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tether.errors import RewardError, UserError
from tether.rewards import Rewards, RewardsConfig, check_reward
from tether.rewards.loading import load_reward
from tether.rewards.mathematics import MathVerify
from tether.rewards.scoring import scoring_process
from tether.rewards.scoring_main import RefusedError, check_expression
from tether.rewards.shape import Format, Length

needs_library = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")


@pytest.fixture
def verifier() -> MathVerify:
    return MathVerify(timeout=1, wrong=0)


@needs_library
@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        (r"\frac{1}{2}", "so it is 0.5", 1),
        ("1/2", r"Thus \boxed{\frac{2}{4}}.", 1),
        ("1/2", r"\boxed{\frac{1}{3}}", 0),
        (r"She has 3 left. \boxed{12}", "The answer is $12$.", 1),
        ("48/2 = 24 clips\n#### 72", "#### 72", 1),
        ("(x+1)^2", r"$x^2 + 2x + 1$", 1),
        (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", 1),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1),
        (7, "7", 1),
        ("7", "", 0),
        ("7", "no idea what this is about\nat all", 0),
    ],
)
def test_answers_are_compared_by_what_they_mean(
    verifier: MathVerify, answer: Any, completion: str, score: float
) -> None:
    assert verifier(completions=[completion], answer=[answer]) == [score]


@needs_library
def test_chat_completions_and_partial_scores() -> None:
    graded = MathVerify(partial=0.25)
    message = [{"role": "assistant", "content": r"\boxed{8}"}]
    assert graded(completions=[message, message, "\n\n?"], answer=["8", "9", "9"]) == [1, 0.25, -1]


@needs_library
def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_is_read(
    verifier: MathVerify,
) -> None:
    """Rewards are called in a thread, where signals, which math-verify's limits are made of, do not work."""
    tower = r"\boxed{9^{9^{9^{9^9}}}}"
    rewards = Rewards(RewardsConfig(), [verifier])
    assert threading.current_thread() is threading.main_thread()
    scores = rewards(["q"] * 3, ["$4$", tower, "$4$"], [[]] * 3, {"answer": ["4"] * 3})
    assert scores.total == [1, 0, 1]


@needs_library
def test_a_process_that_dies_is_replaced(verifier: MathVerify) -> None:
    assert verifier(completions=["3"], answer=["3"]) == [1]
    process = scoring_process("math")._process
    assert process is not None
    process.kill()
    process.wait()
    assert sum(verifier(completions=["3", "3"], answer=["3", "3"])) >= 1
    assert verifier(completions=["3"], answer=["3"]) == [1]


@needs_library
@pytest.mark.parametrize(
    "code",
    [
        "__import__('pathlib').Path('{}').touch()",
        "$__import__('pathlib').Path('{}').touch()$",
        r"\boxed{{__import__('pathlib').Path('{}').touch()}}",
        "the final answer is 1+open('{}','w').close()",
    ],
)
def test_code_in_an_answer_is_not_run(verifier: MathVerify, code: str, tmp_path: Path) -> None:
    assert verifier(completions=[code.format(tmp_path / "made")], answer=["4"]) == [0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["1 + 2*3", "Symbol('x')**Integer(2)", "[['_', 'Q'], (1, 2)]", "Function('f')(2) < -1"]
)
def test_arithmetic_may_be_evaluated(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "open('x')",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "a[0]",
        "__import__('os')",
        "f'{1}'",
        "{1: 2}",
    ],
)
def test_more_than_arithmetic_may_not(text: str) -> None:
    with pytest.raises(RefusedError):
        check_expression(text)


@needs_library
def test_unreadable_answers_are_found_before_training() -> None:
    rewards = Rewards(RewardsConfig(("math_verify?answer=gold",)))
    rewards.check({"gold": ["1", r"\frac12"]}, ["a", "b"])
    with pytest.raises(RewardError, match=r"column `gold` of example 1 is null; expected a mathematical answer"):
        rewards.check({"gold": ["1", None]}, ["a", "b"])
    with pytest.raises(RewardError, match=r"column `gold` of example 0 is '\$\$'; expected a mathematical answer"):
        rewards.check({"gold": ["$$"]}, ["a"])
    with pytest.raises(UserError, match="needs the column `gold`"):
        rewards.check(["answer"])


def test_without_the_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.rewards.scoring.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs the package `math-verify`: pip install "tether\[rlhf\]"'):
        load_reward("math_verify")


# ---- length and format ----------------------------------------------------------------------------------------------


def test_length_is_a_reward_by_name() -> None:
    assert load_reward("length?per_token=-0.5").call == Length(per_token=-0.5)
    Rewards(RewardsConfig(("length?per_token=1",))).check({}, ["p", "q"])
    assert check_reward("length?per_token=-0.5", ["p"] * 2, ["a", "b"], completion_ids=[[1], [1, 2, 3]]) == [-0.5, -1.5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("length", "rewards nothing"),
        ("length?per_token=short", "'short'; expected a finite number"),
        ("format?tags=think,think", "expected different names"),
        ("format?tags=<a>", "expected different names"),
    ],
)
def test_wrong_options_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think>\na\n</think>\n\n<answer></answer>\n", 1),
        ("<think>a</think> so <answer>b</answer>", -1),
        ("<think>a</think><answer>b</answer>.", -1),
        ("<answer>b</answer><think>a</think>", -1),
        ("<think>a<answer>b</think></answer>", -1),
        ("<think>a</think><think>a</think><answer>b</answer>", -1),
        ("b", -1),
    ],
)
def test_format_is_sections_in_tags(completion: str, score: float) -> None:
    assert Format()(completions=[completion, [{"role": "assistant", "content": completion}]]) == [score] * 2


def test_format_can_be_graded_and_opened_by_the_prompt() -> None:
    assert Format(partial=0.4)(completions=["<think>a</think>", "", "<think>"]) == [0.2, -1, 0.1]
    opened = Format(opened=True, partial=0.3)
    assert opened(completions=["a</think><answer>b</answer>", "a", "a</think>"]) == pytest.approx([1, -1, 0.1])
