"""`tether ppo`: a model, prompts and a reward become a world and a learner, and the loop runs in a folder.

Here the pieces meet: configuration, loading, and what a run needs to go on. The algorithm is not here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.errors import UserError
from tether.language.models import (
    check_vocabulary,
    context_length,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    prepare_model,
    prepare_tokenizer,
)
from tether.language.policy import LanguagePolicy
from tether.language.prompts import PromptsConfig, load_prompts, prompts_from_rows
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.training import Trained, restore, train_in_folder
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
from tether.rewards import Rewards, RewardsConfig
from tether.rewards.tasks import ProblemsConfig, Task
from tether.runs.random_states import seed_random_states
from tether.train import Iteration


@dataclass(frozen=True)
class PPOConfig:
    """PPO for a language model: everything that can be set, with its default."""

    model: str = ""
    """Folder or hub name of the causal language model that is trained."""
    reference: str = ""
    """Folder or hub name of the model that the KL is measured against. Empty: `model` as it was before training."""
    task: str = ""
    """Prompts and verifier in one: `reasoning_gym:NAME`, for example reasoning_gym:chain_sum. Takes the place of
    `prompts.path`; the functions of `reward`, if any, are added to its verifier."""
    output: str = "runs/ppo"
    """Folder of the run: configuration, metrics, episodes, checkpoints."""
    iterations: int = 100
    """Turns of collect, credit, update."""
    seed: int = 0
    """Of everything random: the value head's trunk, the order of prompts and minibatches, the sampler."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's parameters. The value head, log-probabilities and losses are float32 always."""
    separate_value_trunk: bool = False
    """Give the critic a copy of the model's trunk, instead of a head on the policy's own."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    overwrite: bool = False
    """Replace a run that `output` already holds."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: RewardsConfig = field(default_factory=RewardsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)

    def __post_init__(self) -> None:
        for name in ("iterations", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        if self.task and self.prompts.path:
            raise ValueError("task and prompts.path are both set, but a task brings its own prompts: drop one")
        if not self.output:
            raise ValueError("output is empty, expected the folder of the run")
        responses = self.collect.prompts * self.collect.samples_per_prompt
        if responses < self.learner.minibatches:
            raise ValueError(
                f"learner.minibatches is {self.learner.minibatches}, but an iteration has only {responses} responses "
                "(collect.prompts × collect.samples_per_prompt)"
            )
        if not self.advantage.uses_critic and self.collect.samples_per_prompt < 2:
            raise ValueError(
                f"advantage.estimator {self.advantage.estimator} compares responses to the same prompt; "
                f"collect.samples_per_prompt is {self.collect.samples_per_prompt}, expected at least 2"
            )
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature is 0, but PPO learns from sampled tokens; expected a number above 0")


@dataclass
class Parts:
    """What may be handed over in memory instead of by name; None is loaded as the configuration says.

    Attributes:
        model: a causal LM; it is trained in place.
        tokenizer: its tokenizer.
        prompts: texts, or rows of a data set as dicts; `PPOConfig.prompts` says how to read them.
        reward: a function in the convention of `PPOConfig.reward`.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Sequence[str | dict[str, Any]] | None = None
    reward: Callable[..., Any] | None = None


def build_ppo(
    config: PPOConfig, parts: Parts | None = None, checkpoint: Path | None = None
) -> tuple[LanguageWorld, Learner]:
    """World and learner of a configuration, at the start of the run or where `checkpoint` left it.

    Args:
        config: see `PPOConfig`.
        parts: pieces already in memory.
        checkpoint: a folder that `save_checkpoint` wrote.

    Raises:
        UserError: a model, prompts or reward that cannot be used.
    """
    parts = parts or Parts()
    task = Task(config.task, config.problems) if config.task else None
    rewards = Rewards(config.reward, None if parts.reward is None else [parts.reward], task)
    seed_random_states(config.seed)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code) if parts.tokenizer is None else parts.tokenizer
    prepare_tokenizer(tokenizer)
    base = _load(config, config.model) if parts.model is None else prepare_model(parts.model, config.device)
    check_vocabulary(base, tokenizer, config.model or "model")
    room = (context_length(base), config.sampling.max_new_tokens)
    if task is not None:
        prompts = prompts_from_rows(task.rows, config.prompts, tokenizer, *room)
    elif parts.prompts is None:
        prompts = load_prompts(config.prompts, tokenizer, *room)
    else:
        rows = [{"prompt": p} if isinstance(p, str) else p for p in parts.prompts]
        prompts = prompts_from_rows(rows, config.prompts, tokenizer, *room)
    rewards.check(
        {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}, [p.source for p in prompts]
    )
    reference = _load(config, config.reference) if config.reference else copy.deepcopy(base)
    model = base
    if checkpoint is not None:
        model = _load(config, str(checkpoint / "policy"))
        if parts.model is not None:  # trained in place on resuming too, in the precision that it came in
            base.load_state_dict(model.state_dict())
            model = base
    policy = LanguagePolicy(model, config.separate_value_trunk)
    kl = KLController(config.kl)
    sampler = Sampler(policy, tokenizer, config.sampling, config.seed)
    world = LanguageWorld(policy, reference, sampler, prompts, rewards, kl, config.collect, config.seed)
    learner = Learner(policy, config.learner, config.advantage, kl, config.iterations, config.seed)
    if checkpoint is not None:
        world.load_critic(checkpoint)
        if restore(checkpoint, world, learner)["reference"] != fingerprint(reference):
            raise UserError(
                f"{config.output}: the run was begun with another reference; give the model as it was before training"
            )
    return world, learner


def _load(config: PPOConfig, path: str) -> PreTrainedModel:
    return load_causal_lm(path, config.dtype, config.device, config.trust_remote_code)


def train_ppo(
    config: PPOConfig,
    parts: Parts | None = None,
    resume: bool = False,
    report: Callable[[Iteration], None] | None = None,
) -> Trained[LanguageWorld]:
    """Train as configured, in a folder: see `tether.pipeline.training.train_in_folder`.

    Raises:
        UserError: something the user brought cannot work.
    """
    return train_in_folder(
        config,
        lambda checkpoint: build_ppo(config, parts, checkpoint),
        resume,
        report,
        lambda world: {"reference": fingerprint(world.reference)},
    )


__all__ = ["PPOConfig", "Parts", "Trained", "build_ppo", "train_ppo"]
