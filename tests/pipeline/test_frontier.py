"""Best-of-n of the reference: the estimator by brute force, what is drawn, and that the run does not notice."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tests.models import make_model, make_prompts, make_tokenizer, make_world
from tests.run_folders import assert_same_run, metric_lines

from tether.errors import RewardError
from tether.language.adapters import LoRAConfig
from tether.language.policy import LanguagePolicy
from tether.language.reference import ReferenceConfig
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.frontier import (
    FrontierConfig,
    best_of_n,
    best_of_n_curve,
    best_of_n_kl,
    draw_frontier,
    is_learned,
)
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.ppo import LearnerConfig
from tether.rewards import Rewards, RewardsConfig
from tether.rewards.models import ModelReward


@pytest.mark.parametrize("scores", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 2.0, 2.0, 2.0], [0.0] * 4, [7.0]])
def test_best_of_n_is_the_mean_over_all_subsets(scores: list[float]) -> None:
    generator = random.Random(0)
    values = [generator.gauss(0, 1) for _ in scores]
    for n in range(1, len(scores) + 1):
        expected = []
        for subset in combinations(range(len(scores)), n):
            best = max(scores[index] for index in subset)
            tied = [values[index] for index in subset if scores[index] == best]
            expected.append(sum(tied) / len(tied))
        assert best_of_n(scores, values, n) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_best_of_n_needs_as_many_samples() -> None:
    with pytest.raises(ValueError, match="n is 3, expected 1 to 2"):
        best_of_n([1.0, 2.0], [1.0, 2.0], 3)


def test_kl_of_best_of_n() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_n_kl(16) == pytest.approx(1.8351, abs=1e-4)


def test_the_curve_has_means_and_standard_errors_over_prompts() -> None:
    curve = best_of_n_curve([0.0, 2.0, 1.0, 5.0], [9.0, 7.0, 3.0, 4.0], samples=2)
    assert [point["n"] for point in curve] == [1, 2]
    assert curve[0]["score"] == pytest.approx(2.0)  # prompts: 1 and 3
    assert curve[0]["score_standard_error"] == pytest.approx(1.0)
    assert curve[1]["score"] == pytest.approx(3.5)  # 2 and 5
    assert curve[1]["gold"] == pytest.approx(5.5)  # 7 and 4: of those that score best
    assert curve[1]["gold_standard_error"] == pytest.approx(1.5)
    assert curve[1]["kl"] == best_of_n_kl(2)
    alone = best_of_n_curve([0.0, 2.0], None, samples=2)[1]
    assert alone["score_standard_error"] is None  # of one prompt
    assert "gold" not in alone


class Scorer:
    """Scores texts, and draws from every global generator as a user's function may."""

    def __init__(self, letter: str) -> None:
        self.letter = letter
        self.sizes: list[int] = []

    def __call__(self, completions: Sequence[str], **_: Any) -> list[float]:
        self.sizes.append(len(completions))
        noise = random.random() + numpy.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return [text.count(self.letter) + 0.0 * noise for text in completions]


def world_with(reward: Any = None, gold: Any = None) -> LanguageWorld:
    rewards = Rewards(RewardsConfig(), [reward or Scorer("a")])
    world = make_world(rewards=rewards, prompts=make_prompts(5), collect=CollectConfig(prompts=2, samples_per_prompt=2))
    world.gold = None if gold is None else Rewards(RewardsConfig(), [gold])
    return world


def read(folder: Path) -> Any:
    return json.loads((folder / "frontier.json").read_text())


def test_the_reference_is_sampled_and_scored(tmp_path: Path) -> None:
    reward = Scorer("a")
    world = world_with(reward, Scorer("b"))
    draw_frontier(world, tmp_path, FrontierConfig(samples=3, prompts=4), seed=7)
    data = read(tmp_path)
    assert (data["prompts"], data["samples"], len(data["responses"])) == (4, 3, 12)
    rows = [response["row"] for response in data["responses"]]
    assert rows == [row for row in rows[::3] for _ in range(3)]
    assert len(set(rows)) == 4
    for response in data["responses"]:
        assert response["score"] == response["response"].count("a")
        assert response["gold"] == response["response"].count("b")
        assert 1 <= response["length"] <= 8
    assert reward.sizes == [4, 4, 4]  # as many in a call as in training
    scores, gold = ([response[name] for response in data["responses"]] for name in ("score", "gold"))
    assert data["curve"] == best_of_n_curve(scores, gold, 3)
    with world.reference.as_model() as model:
        for policy, same in ((LanguagePolicy(model), True), (world.policy, False)):
            sampler = Sampler(policy, world.tokenizer, world.sampler.config, seed=7 ^ 0x66726F6E74696572)
            ids = {prompt.row: prompt.token_ids for prompt in world.prompts}
            texts = sampler.sample([ids[row] for row in rows]).texts
            assert (texts == [response["response"] for response in data["responses"]]) is same


def test_the_run_does_not_notice(tmp_path: Path) -> None:
    world = world_with(gold=Scorer("b"))
    states = world.state_dict()
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    draw_frontier(world, tmp_path, FrontierConfig(samples=2), seed=0)
    assert random.getstate() == before[0]
    assert numpy.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(
        torch.equal(value, states[name])
        for name, value in world.state_dict().items()
        if isinstance(value, torch.Tensor)
    )
    assert read(tmp_path)["prompts"] == 5  # of fewer than 32 all


def test_the_same_seed_draws_the_same_and_another_does_not(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        draw_frontier(world_with(), tmp_path / name, FrontierConfig(samples=2), seed)
        texts.append((tmp_path / name / "frontier.json").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "frontier.json").write_text("kept")
    draw_frontier(world_with(), tmp_path, FrontierConfig(samples=2), seed=0)
    assert (tmp_path / "frontier.json").read_text() == "kept"


def test_by_default_it_is_drawn_where_a_reward_is_learned(tmp_path: Path) -> None:
    plain = world_with()
    draw_frontier(plain, tmp_path, FrontierConfig(), seed=0)
    assert not is_learned(plain.rewards)
    assert not list(tmp_path.iterdir())
    for spec in ("http://127.0.0.1:1/score", "judge?model=m&url=http://127.0.0.1:1/v1"):
        assert is_learned(Rewards(RewardsConfig((spec,))))
    learned = object.__new__(ModelReward)
    learned.__dict__["model"] = type(
        "Model", (), {"score": lambda self, prompts, texts: [float(len(t)) for t in texts]}
    )()
    world = world_with(learned)
    assert is_learned(world.rewards)
    draw_frontier(world, tmp_path, FrontierConfig(samples=0), seed=0)
    assert not list(tmp_path.iterdir())
    draw_frontier(world, tmp_path, FrontierConfig(), seed=0)
    assert read(tmp_path)["samples"] == 16


@pytest.mark.parametrize(("field", "value"), [("samples", -1), ("prompts", 0)])
def test_bad_settings_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        FrontierConfig(**{field: value})


def broken(completions: Sequence[str], **_: Any) -> list[float]:
    raise ValueError("no")


def settings(folder: Path, **changes: Any) -> PPOConfig:
    options: dict[str, Any] = {
        "output": str(folder),
        "iterations": 4,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=4),
        "collect": CollectConfig(prompts=4),
        "learner": LearnerConfig(epochs=1, minibatches=2, learning_rate=3e-3),
        "frontier": FrontierConfig(samples=2),
    }
    return PPOConfig(**options | changes)


def parts(reward: Any = None, gold: Any = None) -> Parts:
    return Parts(make_model(), make_tokenizer(), ["ab", "c", "deab", "fa"], reward or Scorer("a"), gold)


def test_what_was_sampled_is_kept_where_its_scoring_fails(tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        train_ppo(settings(tmp_path / "run"), parts(broken))
    lines = [json.loads(line) for line in (tmp_path / "run" / "unscored.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert set(lines[0]) == {"iteration", "prompt", "response"}
    assert not (tmp_path / "run" / "frontier.json").exists()
    train_ppo(settings(tmp_path / "run"), parts(), resume=True)  # the mended reward
    train_ppo(settings(tmp_path / "whole"), parts())
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "frontier.json").read_bytes() == (tmp_path / "whole" / "frontier.json").read_bytes()


REFERENCES = {
    "whole": {},
    "adapters off": {"lora": LoRAConfig(rank=2)},
    "away": {"reference": ReferenceConfig(offload="disk")},
}


@pytest.mark.parametrize("changes", REFERENCES.values(), ids=REFERENCES)
def test_a_run_with_a_frontier_is_the_run_without(tmp_path: Path, changes: dict[str, Any]) -> None:
    def noisy(completions: Sequence[str], **_: Any) -> list[float]:
        return [text.count("a") + random.random() for text in completions]

    train_ppo(settings(tmp_path / "with", **changes), parts(noisy))
    train_ppo(settings(tmp_path / "without", frontier=FrontierConfig(samples=0), **changes), parts(noisy))
    assert (tmp_path / "with" / "frontier.json").exists()
    assert not (tmp_path / "without" / "frontier.json").exists()
    assert metric_lines(tmp_path / "with") == metric_lines(tmp_path / "without")
    if not changes:  # the reference is the same in all of them
        return
    train_ppo(settings(tmp_path / "plain"), parts(noisy))
    assert read(tmp_path / "with") == read(tmp_path / "plain")


def test_starting_again_removes_the_frontier(tmp_path: Path) -> None:
    train_ppo(settings(tmp_path / "with", iterations=1), parts())
    changes = {"iterations": 1, "frontier": FrontierConfig(samples=0), "overwrite": True}
    train_ppo(settings(tmp_path / "with", **changes), parts())
    assert not (tmp_path / "with" / "frontier.json").exists()
