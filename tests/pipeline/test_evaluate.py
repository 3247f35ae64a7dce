"""Evaluation: the estimators against enumeration, and a whole evaluation with a reward whose answer is known."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import make_model, make_tokenizer

from tether.errors import RewardError, UserError
from tether.language.prompts import PromptsConfig
from tether.language.sampler import SamplingConfig
from tether.pipeline.evaluate import EvalConfig, estimate, estimate_share, evaluate, pass_at_k
from tether.rewards import RewardsConfig
from tether.uncertainty import wilson, with_error

REWARD = """
def first_letter(completions, wanted):
    return [1.0 if text.startswith(letter) else -1.0 for text, letter in zip(completions, wanted)]

def length(completion_ids):
    return [len(ids) for ids in completion_ids]

def failing(completions):
    raise RuntimeError("no")
"""


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(correct: int, k: int) -> None:
    outcomes = [True] * correct + [False] * (5 - correct)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(1000, 1, 1000) == 1.0
    assert pass_at_k(1000, 1, 10) == pytest.approx(0.01)


def test_standard_error_and_interval_are_those_of_the_mean() -> None:
    values = [0.1, 0.5, 0.9, 0.2]
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert found.interval is not None
    assert found.interval[1] - found.mean == pytest.approx(1.96 * np.std(values, ddof=1) / 2, rel=1e-4)
    assert estimate([0.3]).interval is None
    assert estimate([1.0] * 20).interval is None  # values that are alike do not tell how far off their mean is


@pytest.mark.parametrize(
    ("values", "samples", "independent"),
    [
        ([1.0] * 9 + [0.0], 1, 10),
        ([1.0] * 9 + [0.0], 8, 10),  # as many as prompts where each is all right or all wrong
        ([1.0] * 10, 8, 10),
        ([0.5] * 10, 8, 80),  # as many as responses where prompts are alike
        ([0.25, 0.75], 8, 8),  # p (1 − p) of 1/4 over a variance of 1/16, for 2 prompts
        ([1.0], 1, 1),
    ],
)
def test_a_share_has_wilsons_interval(values: list[float], samples: int, independent: int) -> None:
    share = sum(values) / len(values)
    found = estimate_share(values, samples)
    assert found.interval == pytest.approx(wilson(share * independent, independent))
    assert found.standard_error == estimate(values).standard_error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": p, "wanted": w} for p, w in zip(["ab", "c", "deab", "f"], "abcd", strict=True)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def config(folder: Path, rewards: tuple[str, ...] = ("first_letter",), **options: Any) -> EvalConfig:
    options = {"samples": 8, "sampling": SamplingConfig(max_new_tokens=4, batch_size=20)} | options
    return EvalConfig(
        model=str(folder / "model"),
        prompts=PromptsConfig(str(folder / "prompts.jsonl")),
        reward=RewardsConfig(tuple(f"{folder / 'reward.py'}:{name}" for name in rewards)),
        **options,
    )


def test_score_and_pass_at_k_are_those_of_the_responses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, responses = folder / "result.json", folder / "responses.jsonl"
    result = evaluate(config(folder, output=str(output), responses=str(responses)))
    lines = [json.loads(line) for line in responses.read_text().splitlines()]
    right = np.array([line["response"].startswith(line["wanted"]) for line in lines]).reshape(4, 8)
    assert [line["score"] for line in lines] == np.where(right, 1.0, -1.0).flatten().tolist()
    means = (2 * right - 1).mean(axis=1)
    assert (result.prompts, result.samples) == (4, 8)
    assert result.score.mean == pytest.approx(means.mean())
    assert result.score.standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert list(result.pass_at) == [1, 2, 4, 8]
    assert result.pass_at[1].mean == pytest.approx(right.mean())
    assert result.pass_at[8].mean == pytest.approx(right.any(axis=1).mean())
    assert 0 < result.pass_at[1].mean < result.pass_at[8].mean
    assert [p["correct"] for p in result.per_prompt] == right.sum(axis=1).tolist()
    written = json.loads(output.read_text())
    assert written["result"]["score"]["mean"] == result.score.mean
    assert written["result"]["pass_at"]["8"]["interval"] == pytest.approx(result.pass_at[8].interval)
    assert written["config"]["samples"] == 8
    out = capsys.readouterr().out
    assert "pass@8" in out
    assert with_error(result.score.mean, result.score.standard_error) in out
    low, high = wilson(32 * right.mean(), 32)
    assert low < result.pass_at[1].mean < high
    found = result.pass_at[1].interval
    assert found is not None
    assert found[1] - found[0] >= (high - low) * (1 - 1e-9)  # responses to one prompt are not independent


def test_several_rewards_are_told_apart(folder: Path) -> None:
    result = evaluate(config(folder, ("first_letter", "length"), k=(3,)), show=False)
    assert list(result.parts) == ["first_letter", "length"]
    assert result.parts["length"].mean == pytest.approx(result.response_tokens.mean)
    total = result.parts["first_letter"].mean + result.parts["length"].mean
    assert result.score.mean == pytest.approx(total)
    assert list(result.pass_at) == [3]
    assert result.pass_at[3].mean == 1.0  # every score is above 0 with the length in it


def test_the_threshold_says_what_is_correct(folder: Path) -> None:
    assert evaluate(config(folder, threshold=1.0), show=False).pass_at[1].mean == 0.0
    assert evaluate(config(folder, threshold=-2.0), show=False).pass_at[1].mean == 1.0


def test_a_reward_that_fails_is_named_and_writes_no_result(folder: Path) -> None:
    with pytest.raises(RewardError, match="failing"):
        evaluate(config(folder, ("failing",), output=str(folder / "result.json")), show=False)
    assert not (folder / "result.json").exists()


def test_wrong_input_is_one_line(folder: Path) -> None:
    (folder / "there.json").write_text("precious")
    for options, message in [
        ({"rewards": ()}, "--reward.functions"),
        ({"output": str(folder / "there.json")}, "already there"),
        ({"rewards": ("nothing",)}, "nothing"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(config(folder, **options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    assert (folder / "there.json").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": 4, "k": (8,)}, "k holds 8"),
        ({"samples": 4, "sampling": SamplingConfig(temperature=0)}, "all 4 samples are the same"),
        ({"threshold": math.nan}, "threshold"),
    ],
)
def test_settings_that_contradict_each_other_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)
