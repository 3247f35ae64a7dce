"""What a run of a language model says before its first iteration; `opening` has what both worlds say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import kept_kwargs
from tether.language.adapters import describe_adapters, has_adapters
from tether.language.reference import AdapterReference
from tether.language.world import LanguageWorld
from tether.pipeline.opening import (
    aligned,
    count,
    describe_device,
    describe_parameters,
    describe_run,
    describe_updates,
)
from tether.ppo import Learner
from tether.rewards import Rewards

if TYPE_CHECKING:
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
            f"{count(sampling.max_new_tokens, 'token')} = up to {tokens:,} tokens; "
            f"{describe_updates(learner, responses)}",
        ),
        ("run", describe_run(config.output, learner)),
    ]
    return aligned(parts)


def describe_policy(model: PreTrainedModel, name: str) -> str:
    """A model that is not trained, in one line: name, class, size, and what computes it."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{name} ({type(model).__name__}): {size:,} parameters, {describe_device(model.parameters(), False)}"


def describe_model(model: PreTrainedModel, name: str = "") -> str:
    """Name, class, and how many parameters it has, of which trained; what has adapters, and what has none."""
    kind = type(model).__name__
    adapters = f"; adapters of {describe_adapters(model)}" if has_adapters(model) else ""
    return f"{f'{name} ({kind})' if name else kind}: {describe_parameters(model.parameters())}{adapters}"


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a router sends each token to some of several experts."""
    config = model.config.get_text_config()
    return any(
        (getattr(config, name, None) or 0) > 1 for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """How many tokens it knows, and what its chat template is given."""
    given = ", ".join(f"{name}: {json.dumps(value, default=str)}" for name, value in kept_kwargs(tokenizer).items())
    return f"tokenizer of {len(tokenizer):,} tokens" + (f", its chat template with {given}" if given else "")


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
