"""PPO's options for practice, all at once: a run with them is resumed to the last bit, and wrong ones are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_model, make_tokenizer
from tests.run_folders import assert_same_run

from tether.cli import main
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.ppo import AdvantageConfig, KLConfig, LearnerConfig
from tether.runs import read_episodes, read_metrics


def has_an_a(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("a" in text) for text in completions]


def parts() -> Parts:
    """A model of its own each time, since it is trained in place."""
    return Parts(make_model(), make_tokenizer(), ["ab", "c", "deab", "fa", "bc"], has_an_a)


def settings(folder: Path) -> PPOConfig:
    return PPOConfig(
        output=str(folder / "run"),
        iterations=4,
        checkpoint_every=2,
        sampling=SamplingConfig(max_new_tokens=5, top_p=0.95),
        collect=CollectConfig(
            prompts=3, samples_per_prompt=2, overlong_buffer=2, overlong_penalty=0.5, filter_prompts=True, max_draws=3
        ),
        advantage=AdvantageConfig(value_lam=1.0, length_adaptive=1.5, whiten_rewards=True),
        kl=KLConfig(beta=0.1, target=0.01, horizon=20),
        learner=LearnerConfig(epochs=1, minibatches=2, learning_rate=3e-3, clip_high=0.28, value_warmup_iterations=1),
    )


def test_all_details_at_once_are_resumed_bitwise(tmp_path: Path) -> None:
    config = settings(tmp_path)
    whole = train_ppo(config, parts())
    lines = read_metrics(whole.folder)
    assert max(line["draws"] for line in lines) > 1
    assert 0 < max(line["filtered_share"] for line in lines) < 1
    assert lines[0]["beta"] == lines[1]["beta"] == 0.1  # the first iteration trains the critic alone
    assert len({line["beta"] for line in lines[1:]}) == 3
    assert all(len(read_episodes(whole.folder, iteration=line["iteration"])) == 6 for line in lines)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)


def test_a_buffer_longer_than_the_limit_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(ValueError, match=r"collect.overlong_buffer is 6, expected at most sampling.max_new_tokens, 5"):
        replace(config, collect=replace(config.collect, overlong_buffer=6))


def test_progress_shows_the_score_of_everything_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The batch's own is that of prompts with signal alone, and says little of how good the policy is."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    (tmp_path / "reward.py").write_text(
        "def has_an_a(completions, **_):\n    return [float('a' in c) for c in completions]\n"
    )
    command = ["ppo", "--model", str(tmp_path / "model"), "--prompts.path", str(tmp_path / "prompts.jsonl")]
    command += ["--reward.functions", f"{tmp_path / 'reward.py'}:has_an_a", "--collect.samples-per-prompt", "2"]
    command += ["--sampling.max-new-tokens", "4", "--iterations", "1", "--output", str(tmp_path / "run")]
    assert main([*command, "--collect.filter-prompts"]) == 0
    shown = capsys.readouterr().out
    line = read_metrics(tmp_path / "run")[0]
    assert f"score drawn  {line['score_drawn']:+.3f}" in shown
    assert f"filtered share {line['filtered_share']:7.3f}" in shown
    assert main([*command, "--overwrite"]) == 0
    assert "score drawn" not in capsys.readouterr().out
