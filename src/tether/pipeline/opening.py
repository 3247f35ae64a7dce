"""What a run says before its first iteration: what was loaded, what computes it, and what an iteration is.

Everything is read off the pieces as they were built; the configuration only gives names to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.language.reference import AdapterReference
from tether.language.world import LanguageWorld
from tether.ppo import Learner
from tether.rewards import Rewards

if TYPE_CHECKING:
    from tether.control.world import ControlWorld
    from tether.pipeline.control import ControlConfig
    from tether.pipeline.ppo import PPOConfig


def describe_ppo(config: PPOConfig, world: LanguageWorld, learner: Learner) -> list[str]:
    """Lines about a language world and its learner, the first of which names device and precision."""
    policy, collect, sampling = world.policy, world.config, world.sampler.config
    responses = collect.prompts * collect.samples_per_prompt
    tokens = responses * sampling.max_new_tokens
    prompts = f"{len(world.prompts):,}"
    if source := config.prompts.path or config.task:
        prompts += f" from {source}"
    parts = [
        ("device", describe_device(policy.model.parameters(), policy.autocast)),
        ("model", f"{describe_model(policy.model, config.model)}; {describe_tokenizer(world.tokenizer)}"),
        ("critic", _critic(world, learner)),
        ("reference", _reference(config, world)),
        ("prompts", prompts),
        ("reward", _rewards(world.rewards) + (f"; held out: {_rewards(world.gold)}" if world.gold is not None else "")),
        (
            "iteration",
            f"{collect.prompts:,} prompts × {count(collect.samples_per_prompt, 'response')} × up to "
            f"{count(sampling.max_new_tokens, 'token')} = up to {tokens:,} tokens; {_updates(learner, responses)}",
        ),
        ("run", _run(config.output, learner)),
    ]
    return aligned(parts)


def describe_control(config: ControlConfig, world: ControlWorld, learner: Learner) -> list[str]:
    """Lines about a world of simulators and its learner, the first of which names device and precision."""
    environments, policy = world.environments, world.policy
    steps = environments.count * world.config.steps
    seen = " × ".join(map(str, environments.observation_space.shape)) or "1"
    at_most = "up to " if world.config.whole_episodes else ""
    own = f"{count(environments.count, 'environment')} × {at_most}{count(world.config.steps, 'step')}"
    parts = [
        ("device", describe_device(policy.policy_parameters(), False)),
        ("world", f"{config.env}: observations of {seen} numbers, actions {environments.action_space}"),
        ("policy", f"{_parameters(policy.policy_parameters() + policy.value_parameters())}, critic included"),
        ("iteration", f"{own} = {at_most}{steps:,} steps; {_updates(learner, steps)}"),
        ("run", _run(config.output, learner)),
    ]
    return aligned(parts)


def describe_policy(model: PreTrainedModel, name: str) -> str:
    """A model that is not trained, in one line: name, class, size, and what computes it."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{name} ({type(model).__name__}): {size:,} parameters, {describe_device(model.parameters(), False)}"


def describe_device(parameters: Iterable[nn.Parameter], autocast: bool) -> str:
    """`cpu, 2 threads, float32, matrix products in bfloat16 (autocast)`, off the parameters themselves."""
    kinds: dict[str, None] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        kinds[str(parameter.dtype).removeprefix("torch.")] = None
        device = parameter.device
    where = str(device)
    if device.type == "cpu":
        where += f", {count(torch.get_num_threads(), 'thread')}"
    elif device.type == "cuda":
        where += f" ({torch.cuda.get_device_name(device)})"
    return f"{where}, {' and '.join(kinds)}, {'matrix products in bfloat16 (autocast)' if autocast else 'no autocast'}"


def describe_model(model: PreTrainedModel, name: str = "") -> str:
    """Name, class, and how many parameters it has, of which trained."""
    kind = type(model).__name__
    return f"{f'{name} ({kind})' if name else kind}: {_parameters(model.parameters())}"


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """How many tokens it knows."""
    return f"tokenizer of {len(tokenizer):,} tokens"


def aligned(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a word and what is said of it."""
    listed = list(parts)
    width = max(len(word) for word, _ in listed)
    return [f"{word:<{width}}  {text}" for word, text in listed]


def count(number: int, what: str) -> str:
    """`1 step`, `2,048 steps`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _parameters(parameters: Iterable[nn.Parameter]) -> str:
    own = list(parameters)
    every = sum(parameter.numel() for parameter in own)
    trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return f"{every:,} parameters" + (", all trained" if trained == every else f", {trained:,} of them trained")


def _critic(world: LanguageWorld, learner: Learner) -> str:
    if not learner.advantage.uses_critic:
        return f"none ({learner.advantage.estimator} compares responses to the same prompt)"
    own = sum(parameter.numel() for parameter in world.policy.value_parameters() if parameter.requires_grad)
    where = "a head on the policy's trunk" if world.policy.value_trunk is None else "a trunk of its own and a head"
    return f"{where}, {own:,} parameters trained"


def _reference(config: PPOConfig, world: LanguageWorld) -> str:
    reference, kl = world.reference, world.kl
    own = "the model with its adapters off" if isinstance(reference, AdapterReference) else "the model before training"
    kind = config.reference.model or own
    if reference.config.ema is not None:
        kind += f", following the policy (ema {reference.config.ema:g})"
    elif reference.config.reset_every is not None:
        kind += f", the policy anew every {count(reference.config.reset_every, 'iteration')}"
    if not kl.beta:
        return f"{kind}; KL is measured, not penalised (β 0)"
    goal = "" if kl.config.target is None else f", adaptive, for {kl.config.target:g} nats"
    return f"{kind}; KL penalty in the {kl.config.placement}, β {kl.beta:g}{goal}"


def _rewards(rewards: Rewards) -> str:
    named = zip(rewards.functions, rewards.weights, strict=True)
    return ", ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in named)


def _updates(learner: Learner, rows: int) -> str:
    epochs, minibatches = learner.config.epochs, learner.config.minibatches
    size = f"{'about ' if rows % minibatches else ''}{round(rows / minibatches):,}"
    return f"{count(epochs, 'epoch')} of {minibatches} minibatch{'' if minibatches == 1 else 'es'} of {size}"


def _run(output: str, learner: Learner) -> str:
    done = f" after {learner.iteration:,} done" if learner.iteration else ""
    return f"{count(learner.iterations - learner.iteration, 'iteration')}{done}, in {output}"
