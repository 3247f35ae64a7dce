"""What a run says before its first iteration, and who asks for it: from the command line and from Python."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_tokenizer

from tether.control.environments import EnvironmentsConfig
from tether.control.world import ControlCollectConfig
from tether.language.adapters import LoRAConfig
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.control import ControlConfig, build_control, train_control
from tether.pipeline.opening import describe_control
from tether.pipeline.opening_language import describe_ppo
from tether.pipeline.ppo import Parts, PPOConfig, build_ppo, train_ppo
from tether.ppo import AdvantageConfig, KLConfig, LearnerConfig
from tether.rewards import RewardsConfig


def letters(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def brief(completions: list[str]) -> list[float]:
    return [-float(len(text)) for text in completions]


def parts() -> Parts:
    return Parts(make_model(), make_tokenizer(), ["ab", "c", "deab"], letters)


def settings(folder: Path, **changes: Any) -> PPOConfig:
    config = PPOConfig(
        output=str(folder / "run"),
        iterations=2,
        sampling=SamplingConfig(max_new_tokens=4),
        collect=CollectConfig(prompts=5, samples_per_prompt=2),
        learner=LearnerConfig(epochs=2, minibatches=2),
    )
    return replace(config, **changes)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_language_run_says_what_it_has(tmp_path: Path) -> None:
    config = settings(tmp_path)
    world, learner = build_ppo(config, parts())
    numbers = sum(parameter.numel() for parameter in world.policy.model.parameters())
    assert describe_ppo(config, world, learner) == [
        "device     cpu, 1 thread, float32, no autocast",
        f"model      LlamaForCausalLM: {numbers:,} parameters, all trained; tokenizer of 16 tokens",
        "critic     a head on the policy's trunk, 17 parameters trained",
        "reference  the model before training; KL penalty in the reward, β 0.05",
        "prompts    3",
        "reward     letters",
        "iteration  5 prompts × 2 responses × up to 4 tokens = up to 40 tokens; 2 epochs of 2 minibatches of 5",
        f"run        2 iterations, in {tmp_path / 'run'}",
    ]


def test_its_lines_are_read_off_what_was_built(tmp_path: Path) -> None:
    """Adapters, products in bfloat16, no critic, a reference's own ways, a resumed run."""
    config = settings(
        tmp_path,
        lora=LoRAConfig(rank=2),
        advantage=AdvantageConfig(estimator="rloo"),
        kl=KLConfig(beta=0.1, placement="loss"),
        reward=RewardsConfig(weights=(0.5,)),
    )
    given = replace(parts(), gold=brief)
    world, learner = build_ppo(config, given)
    learner.iteration = 1
    world.policy.autocast = True
    trained = sum(p.numel() for p in world.policy.model.parameters() if p.requires_grad)
    lines = describe_ppo(config, world, learner)
    assert lines[0].endswith("cpu, 1 thread, float32, matrix products in bfloat16 (autocast)")
    assert f"parameters, {trained:,} of them trained" in lines[1]
    assert lines[2] == "critic     none (rloo compares responses to the same prompt)"
    assert lines[3] == "reference  the model with its adapters off; KL penalty in the loss, β 0.1"
    assert lines[5] == "reward     0.5 × letters; held out: brief"
    assert lines[7].startswith("run        1 iteration after 1 done, in")


def test_a_run_of_control_says_what_it_has(tmp_path: Path) -> None:
    config = ControlConfig(
        env="CartPole-v1",
        output=str(tmp_path / "run"),
        total_steps=64,
        environments=EnvironmentsConfig(count=1),
        collect=ControlCollectConfig(steps=32),
        learner=LearnerConfig(epochs=1, minibatches=3),
    )
    world, learner = build_control(config)
    with closing(world.environments):
        lines = describe_control(config, world, learner)
    assert lines == [
        "device     cpu, 1 thread, float32, no autocast",
        "world      CartPole-v1: observations of 4 numbers, actions Discrete(2)",
        "policy     9,155 parameters, all trained, critic included",
        "iteration  1 environment × 32 steps = 32 steps; 1 epoch of 3 minibatches of about 11",
        f"run        2 iterations, in {tmp_path / 'run'}",
    ]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, True),
        ({"report": print}, False),  # it may show the run itself
        ({"progress": False}, False),
        ({"report": lambda iteration: None, "progress": True}, True),
    ],
)
def test_training_from_python_shows_its_progress(
    options: dict[str, Any], shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_ppo(settings(tmp_path), parts(), **options)
    said = capsys.readouterr().out
    assert ("device     cpu" in said) == shown
    assert ("iteration 2/2  score" in said) == shown
    config = ControlConfig(
        env="CartPole-v1",
        output=str(tmp_path / "control"),
        total_steps=64,
        environments=EnvironmentsConfig(count=1),
        collect=ControlCollectConfig(steps=64),
    )
    train_control(config, **options).world.environments.close()
    said = capsys.readouterr().out
    assert ("making 1 environment of CartPole-v1 …" in said) == shown
    assert ("iteration 1/1  steps" in said) == shown


def test_control_needs_no_transformers() -> None:
    code = "import sys, tether.pipeline.control; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
