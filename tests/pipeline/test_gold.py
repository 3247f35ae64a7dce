"""The held-out score: reported, stored, never trained on; and alarms, in a run that was resumed too."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.models import CountingRewards, make_model, make_tokenizer, make_world
from tests.run_folders import assert_same_run

from tether.errors import RewardError, UserError
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, build_ppo, train_ppo
from tether.ppo import LearnerConfig
from tether.rewards import RewardsConfig, Scores
from tether.runs import read_episodes, read_metrics
from tether.runs.alarms import AlarmsConfig


def many_a(completions: Sequence[str], **_: Any) -> list[float]:
    return [text.count("a") for text in completions]


def few_a(completions: Sequence[str], **_: Any) -> list[float]:
    return [-2.0 * text.count("a") for text in completions]


def settings(folder: Path, **changes: Any) -> PPOConfig:
    options: dict[str, Any] = {
        "output": str(folder),
        "iterations": 6,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=4),
        "collect": CollectConfig(prompts=8),
        "learner": LearnerConfig(epochs=2, minibatches=2, learning_rate=1e-2),
        "alarms": AlarmsConfig(window=1, kl=0.02, length_ratio=1.05),
    }
    return PPOConfig(**options | changes)


def parts(gold: Any = few_a) -> Parts:
    return Parts(make_model(), make_tokenizer(), ["ab", "c", "deab", "fa", "bc"], many_a, gold)


def test_gold_is_reported_and_stored_and_changes_nothing(tmp_path: Path) -> None:
    train_ppo(settings(tmp_path / "with"), parts())
    train_ppo(settings(tmp_path / "without"), parts(None))
    rows, others = read_metrics(tmp_path / "with"), read_metrics(tmp_path / "without")
    for row, other in zip(rows, others, strict=True):
        assert row["gold"] == pytest.approx(-2 * row["score"])
        assert row["gold_std"] == pytest.approx(2 * row["score_std"])
        same = {name: value for name, value in row.items() if not name.startswith(("time/", "memory/", "gold"))}
        assert same == {name: value for name, value in other.items() if not name.startswith(("time/", "memory/"))}
        assert row["time/gold"] >= 0
    episode = read_episodes(tmp_path / "with", order="best", limit=1)[0]
    assert episode.details["gold"] == -2 * episode.score
    assert "gold" not in read_episodes(tmp_path / "without", limit=1)[0].details


def test_gold_by_name_has_its_own_weights_and_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "held_out.py").write_text("def both(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    given = parts(None)
    config = settings(tmp_path / "run", gold=RewardsConfig(("held_out.py:both", "held_out.py:both"), (1.0, 3.0)))
    world, _ = build_ppo(config, given)
    metrics = world.metrics(world.collect())
    assert (metrics["gold"], metrics["gold/both"], metrics["gold/both_2"]) == (4.0, 1.0, 1.0)
    with pytest.raises(UserError, match=r"gold\.weights has 2 numbers for 1 functions"):
        build_ppo(settings(tmp_path / "run", gold=RewardsConfig(("held_out.py:both",), (1.0, 3.0))), given)
    with pytest.raises(UserError, match=r"gold\.timeout is 0"):
        build_ppo(settings(tmp_path / "run", gold=RewardsConfig(("held_out.py:both",), timeout=0.0)), given)
    with pytest.raises(UserError, match=r"held_out\.py has no `nothing`"):
        build_ppo(settings(tmp_path / "run", gold=RewardsConfig(("held_out.py:nothing",))), given)
    slow = "import time\ndef slow(completions, **_):\n    time.sleep(5)\n"
    (tmp_path / "slow.py").write_text(slow)
    world, _ = build_ppo(settings(tmp_path / "run", gold=RewardsConfig(("slow.py:slow",), timeout=0.1)), given)
    with pytest.raises(RewardError, match=r"raise `--gold\.timeout`"):
        world.collect()


def test_gold_needs_its_columns_before_anything_is_sampled(tmp_path: Path) -> None:
    def with_answer(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(UserError, match="needs the column `answer`"):
        build_ppo(settings(tmp_path), parts(with_answer))


def test_a_gold_score_that_fails_loses_no_responses() -> None:
    def fail(text: str) -> float:
        raise RewardError("gold: said no")

    world = make_world(collect=CollectConfig(prompts=3))
    world.gold = CountingRewards(fail)  # type: ignore[assignment]
    with pytest.raises(RewardError) as raised:
        world.collect()
    assert len(raised.value.responses) == 3  # type: ignore[attr-defined]


def test_variety_and_length_of_a_batch_by_hand() -> None:
    class Fixed(CountingRewards):
        def __call__(self, prompts: list, completions: list, completion_ids: list, columns: dict) -> Scores:
            self.ids = completion_ids
            return super().__call__(prompts, completions, completion_ids, columns)

    rewards = Fixed()
    world = make_world(rewards=rewards)
    batch = world.collect()
    metrics = world.metrics(batch)
    assert metrics["length_ratio"] == 1.0
    assert metrics["distinct_responses"] == len({tuple(ids) for ids in rewards.ids}) / 12
    assert metrics["sampled_entropy"] == pytest.approx(-float(batch.log_probs.sum()) / metrics["tokens"])
    grams = [[tuple(ids[i : i + 4]) for i in range(len(ids) - 3)] for ids in rewards.ids if len(ids) > 3]
    expected = sum(1 - len(set(own)) / len(own) for own in grams) / len(grams)
    assert metrics["repeated_ngrams"] == pytest.approx(expected)
    first = metrics["response_length"]
    later = world.metrics(world.collect())
    assert later["length_ratio"] == pytest.approx(later["response_length"] / first)
    assert later["length_ratio"] != 1.0


def alarms(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def test_alarms_are_logged_and_written_also_in_a_run_that_was_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tether"):
        train_ppo(settings(tmp_path / "whole"), parts())
    written = alarms(tmp_path / "whole")
    assert {alarm["kind"] for alarm in written if alarm["state"] == "raised"} >= {"kl", "gap"}
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("alarm in iteration")]
    assert len(said) == len(written)
    assert said[0].startswith(f"alarm in iteration {written[0]['iteration']}: {written[0]['seen']}")

    # three iterations are logged, and the newest checkpoint that is whole is that of the second
    def stop(step: Any) -> None:
        if step.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ppo(settings(tmp_path / "broken"), parts(), report=stop)
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "iteration-000003")
    train_ppo(settings(tmp_path / "broken"), parts(), resume=True)
    assert alarms(tmp_path / "broken") == written
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_alarms_that_are_off_are_not_raised(tmp_path: Path) -> None:
    off = AlarmsConfig(kl=None, length_ratio=None, entropy=None, gap=None, window=1)
    train_ppo(settings(tmp_path / "run", alarms=off), parts())
    assert not (tmp_path / "run" / "alarms.jsonl").exists()
