"""A critic that starts as a reward model: its values are the scores, and it learns from there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_tokenizer
from tests.run_folders import assert_same_run, newest_checkpoint
from transformers import AutoModelForSequenceClassification

from tether.errors import UserError
from tether.language.adapters import LoRAConfig, is_adapter
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, build_ppo, train_ppo
from tether.pipeline.value_model import critic_from_reward_model
from tether.ppo import LearnerConfig
from tether.rewards.models import Normalisation, RewardModel

TEXTS = ["ab", "c", "deab", "fa"]


def save_reward_model(folder: Path, kind: str = "llama", seed: int = 3, **overrides: Any) -> str:
    """A reward model with one more token than the policy, for padding, and scores that are normalised."""
    make_model(kind, seed, **overrides).save_pretrained(folder / "lm")
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    Normalisation((0.3,), (0.02,), (0.1, 1.3), (0.0, 1.0), (0.0, 0.0, 0.0), 100, "made up").save(folder / "judge")
    return str(folder / "judge")


def settings(folder: Path, judge: str, **options: Any) -> PPOConfig:
    standard: dict[str, Any] = {
        "output": str(folder / "run"),
        "iterations": 4,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=5),
        "collect": CollectConfig(prompts=4),
        "learner": LearnerConfig(epochs=1, minibatches=2, learning_rate=3e-3),
        "value_model": judge,
    }
    return PPOConfig(**standard | options)


def parts() -> Parts:
    return Parts(
        make_model(), make_tokenizer(), TEXTS, lambda completions, **_: [float(t.count("a")) for t in completions]
    )


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=2)])
@pytest.mark.parametrize(("kind", "overrides"), [("llama", {}), ("gpt2", {}), ("llama", {"hidden_size": 24})])
def test_the_first_values_are_the_scores_of_what_is_written_so_far(
    kind: str, overrides: dict[str, int], lora: LoRAConfig, tmp_path: Path
) -> None:
    """Of another architecture and size than the policy, too."""
    judge = save_reward_model(tmp_path, kind, **overrides)
    world, _ = build_ppo(settings(tmp_path, judge, lora=lora), parts())
    reward = RewardModel(judge)
    batch = world.collect()
    for row in range(len(batch)):
        start, length = int(batch.context.starts[row]), int(batch.mask[row].sum())
        ids = batch.context.tokens[row].tolist()
        for step in range(length):
            raw = reward.members[0](input_ids=torch.tensor([ids[: start + step]])).logits.detach()
            expected = float(reward.normalisation.combine(raw))
            assert float(batch.values[row, step]) == pytest.approx(expected, abs=1e-4)
    assert float(batch.values.abs().max()) > 0.5
    evaluated = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    torch.testing.assert_close(evaluated.values, batch.values, atol=1e-5, rtol=1e-4)


def test_a_model_without_normalisation_is_taken_as_it_is(tmp_path: Path) -> None:
    judge = save_reward_model(tmp_path)
    (Path(judge) / "score_normalisation.json").unlink()
    critic = critic_from_reward_model(judge, make_tokenizer(), 10, LoRAConfig())
    assert torch.equal(critic.weight, RewardModel(judge).members[0].score.weight[0])
    assert critic.bias == 0.0


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(rank=2)])
def test_it_learns_saves_and_resumes(lora: LoRAConfig, tmp_path: Path) -> None:
    judge = save_reward_model(tmp_path)
    config = settings(tmp_path, judge, lora=lora)
    start = build_ppo(config, parts())[0].policy
    whole = train_ppo(config, parts())
    trunk = dict(start.value_trunk.named_parameters())
    moved = {n for n, p in whole.world.policy.value_trunk.named_parameters() if not torch.equal(p, trunk[n])}
    assert moved
    assert not lora.rank or all(is_adapter(name) for name in moved)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)
    critic = newest_checkpoint(whole.folder)[1] / "critic.safetensors"
    whole_size = 4 * sum(p.numel() for p in start.value_trunk.parameters())
    assert (critic.stat().st_size > whole_size) == (not lora.rank)


# ---- what cannot be ------------------------------------------------------------------------------------------------


def test_an_ensemble_has_to_be_narrowed_down(tmp_path: Path) -> None:
    judge = Path(save_reward_model(tmp_path))
    for index in range(2):
        (tmp_path / "both" / f"member-{index}").mkdir(parents=True)
        for file in judge.iterdir():
            (tmp_path / "both" / f"member-{index}" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"both: an ensemble; the critic starts from one of it: .*both/member-0"):
        critic_from_reward_model(str(tmp_path / "both"), make_tokenizer(), 10, LoRAConfig())


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    judge = save_reward_model(tmp_path)
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(UserError, match=r"another tokenizer than the policy's: '<new>' is None there and 16 here"):
        critic_from_reward_model(judge, other, 10, LoRAConfig())


def test_a_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    judge = save_reward_model(tmp_path, "gpt2", n_positions=8)
    with pytest.raises(UserError, match="its context is 8 tokens, but a prompt with its response may have 9"):
        build_ppo(settings(tmp_path, judge), parts())


def test_a_policy_is_no_reward_model(tmp_path: Path) -> None:
    save_reward_model(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"value_model .*lm: not a reward model"):
        build_ppo(settings(tmp_path, str(tmp_path / "lm")), parts())


def test_another_reward_model_on_resuming_is_refused_where_it_is_frozen(tmp_path: Path) -> None:
    judge = save_reward_model(tmp_path)
    config = settings(tmp_path, judge, lora=LoRAConfig(rank=2))
    train_ppo(replace(config, iterations=2), parts())
    other = save_reward_model(tmp_path / "other", seed=8)
    with pytest.raises(UserError, match="begun with another value_model"):
        train_ppo(replace(config, value_model=other), parts(), resume=True)
