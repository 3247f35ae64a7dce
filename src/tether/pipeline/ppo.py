"""`tether ppo`: a model, prompts and a reward become a world and a learner, and the loop runs in a folder.

Here the pieces meet: configuration, loading, and what a run needs to go on. The algorithm is not here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import ChatTemplate
from tether.devices import check_compiler, choose_device
from tether.episode import short_repr
from tether.errors import UserError
from tether.language.adapters import LoRAConfig, base_of, give_adapters, read_weights
from tether.language.models import (
    Quantization,
    check_quantization,
    fingerprint,
    load_causal_lm,
    load_tokenizer,
    load_trainable,
    prepare_model,
    prepare_tokenizer,
)
from tether.language.policy import Critic, LanguagePolicy
from tether.language.products import bfloat16_pays
from tether.language.prompts import Prompt, PromptsConfig, load_prompts, prompts_from_rows
from tether.language.reference import AdapterReference, ModelReference, Reference, ReferenceConfig
from tether.language.rows import plain_rows
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.memory import keep_freed_memory
from tether.pipeline.brought import check_data, describe_data, describe_sources, warn_of_changes
from tether.pipeline.checks import cheap_findings, heed
from tether.pipeline.frontier import FrontierConfig, draw_frontier
from tether.pipeline.opening_language import describe_ppo
from tether.pipeline.progress import Progress
from tether.pipeline.training import Trained, restore, train_in_folder
from tether.pipeline.value_model import critic_from_reward_model
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
from tether.pretrained import check_vocabulary, context_length, embedding_rows
from tether.random_states import seed_random_states
from tether.rewards import Rewards, RewardsConfig
from tether.rewards.functions import Functions
from tether.rewards.tasks import ProblemsConfig, Task
from tether.runs.alarms import AlarmsConfig
from tether.train import Iteration

logger = logging.getLogger(__name__)

AUTOCAST_FROM = 5_000_000  # parameters


@dataclass(frozen=True)
class PPOConfig:
    """PPO for a language model: everything that can be set, with its default."""

    model: str = ""
    """Folder or hub name of the causal language model that is trained."""
    task: str = ""
    """Prompts and verifier in one: `reasoning_gym:NAME`, for example reasoning_gym:chain_sum. Takes the place of
    `prompts.path`; the functions of `reward`, if any, are added to its verifier."""
    output: str = "runs/ppo"
    """Folder of the run: configuration, metrics, episodes, checkpoints."""
    iterations: int = 100
    """Turns of collect, credit, update."""
    seed: int = 0
    """Of everything random: the value head's trunk, the order of prompts and minibatches, the sampler."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's parameters. The value head, log-probabilities and losses are float32 always."""
    autocast: bool | None = None
    """Multiply matrices in bfloat16; parameters, gradients, logits, values and losses stay in `dtype`. None: a
    measurement at the start decides for models of 5 million parameters or more; below that it saves no time. What was
    decided is written to config.yaml, and a resumed run keeps to it. Set it to get the same numbers on any machine."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    compile: bool = False
    """Compile the model's layers with `torch.compile` for learning. It takes up to a minute at the start and, on a CPU,
    a C++ compiler."""
    separate_value_trunk: bool = False
    """Give the critic a copy of the model's trunk, instead of a head on the policy's own."""
    value_model: str = ""
    """Folder or hub name of a reward model that the critic starts as, in a trunk of its own (Ouyang et al. 2022), with
    the normalisation of its scores. Empty: the critic starts at 0."""
    quantization: Quantization = "none"
    """Keep the weights of a model whose adapters are trained in 4 or 8 bits (QLoRA, Dettmers et al. 2023); needs
    bitsandbytes and CUDA."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    overwrite: bool = False
    """Replace a run that `output` already holds."""
    new_pass: bool = False
    """With `--resume`: the prompts are others than before, so begin a new pass over them. Off: others are refused."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    problems: ProblemsConfig = field(default_factory=ProblemsConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: RewardsConfig = field(default_factory=RewardsConfig)
    gold: RewardsConfig = field(default_factory=RewardsConfig)
    """A held-out score: responses are scored and never trained on, to see whether the reward is followed or fooled."""
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
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
        if self.value_model and not self.advantage.uses_critic:
            raise ValueError(f"value_model is set, but advantage.estimator {self.advantage.estimator} trains no critic")
        check_quantization(self.quantization, self.lora)
        if self.lora.rank and self.reference.model and self.reference.moves:
            raise ValueError("lora.rank and reference.model are set: such a reference cannot follow the adapters")
        if self.lora.rank and not self.reference.model:
            for name, default in (("offload", "none"), ("dtype", None)):
                if (found := getattr(self.reference, name)) != default:
                    raise ValueError(
                        f"reference.{name} is {found}, but with lora.rank the reference is the model with its adapters "
                        "off, and has no weights of its own; name one by reference.model, or drop it"
                    )
        if self.collect.overlong_buffer > self.sampling.max_new_tokens:
            raise ValueError(
                f"collect.overlong_buffer is {self.collect.overlong_buffer}, "
                f"expected at most sampling.max_new_tokens, {self.sampling.max_new_tokens}"
            )


@dataclass(repr=False)
class Parts:
    """What may be handed over in memory instead of by name; None is loaded as the configuration says.

    Attributes:
        model: a causal LM; it is trained in place.
        tokenizer: its tokenizer.
        prompts: texts, or rows of a data set as dicts; `PPOConfig.prompts` says how to read them.
        reward: a function, a list of them (weighted by `PPOConfig.reward.weights`), or a dict from function to weight.
            Built-in rewards and files go by their names, as in `PPOConfig.reward.functions`.
        gold: the same, for what `PPOConfig.gold` is for.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Sequence[str | dict[str, Any]] | None = None
    reward: Functions | None = None
    gold: Functions | None = None

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        shown = {
            "model": lambda model: type(model).__name__,
            "tokenizer": lambda tokenizer: type(tokenizer).__name__,
            "prompts": lambda prompts: f"<{len(prompts)}>",
            "reward": _names,
            "gold": _names,
        }
        return f"Parts({', '.join(f'{name}={shown[name](value)}' for name, value in given.items())})"


def _names(functions: Any) -> str:
    if isinstance(functions, dict):
        return f"{{{', '.join(f'{_names(function)}: {weight}' for function, weight in functions.items())}}}"
    if isinstance(functions, list | tuple):
        return f"[{', '.join(map(_names, functions))}]"
    return getattr(functions, "__name__", None) or short_repr(functions)


def build_ppo(
    config: PPOConfig, parts: Parts | None = None, checkpoint: Path | None = None
) -> tuple[LanguageWorld, Learner]:
    """World and learner of a configuration, at the start of the run or where `checkpoint` left it.

    The process keeps the memory it frees from then on, see `tether.memory`.

    Args:
        config: see `PPOConfig`.
        parts: pieces already in memory.
        checkpoint: a folder that `save_checkpoint` wrote.

    Raises:
        UserError: a model, prompts or reward that cannot be used.
    """
    keep_freed_memory()
    config = replace(config, device=choose_device(config.device))
    parts = parts or Parts()
    if config.compile:
        check_compiler(config.device)
    task, rewards, gold = load_rewards(config, parts)
    seed_random_states(config.seed)
    tokenizer = load_own_tokenizer(config, parts)
    base = load_base(config, parts)
    check_vocabulary(base, tokenizer, config.model or "model")
    prompts = read_prompts(config, parts, task, tokenizer, base)
    check_rewards(config, prompts, rewards, gold)
    if checkpoint is None:
        heed(cheap_findings(config, tokenizer, base, prompts))
    return assemble(config, parts, base, tokenizer, prompts, (rewards, gold), checkpoint)


def load_rewards(config: PPOConfig, parts: Parts) -> tuple[Task | None, Rewards, Rewards | None]:
    """The task, where one is named, what scores responses, and what scores them for comparison only."""
    task = Task(config.task, config.problems) if config.task else None
    rewards = Rewards(config.reward, parts.reward, task)
    given = parts.gold is not None or bool(config.gold.functions)
    return task, rewards, Rewards(config.gold, parts.gold, section="gold") if given else None


def load_own_tokenizer(config: PPOConfig, parts: Parts) -> PreTrainedTokenizerBase:
    """The policy's."""
    tokenizer = load_tokenizer(config.model, config.trust_remote_code) if parts.tokenizer is None else parts.tokenizer
    prepare_tokenizer(tokenizer)
    ChatTemplate(tokenizer, config.prompts, "prompts").keep()  # saved with the policy
    return tokenizer


def read_prompts(
    config: PPOConfig, parts: Parts, task: Task | None, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel
) -> list[Prompt]:
    """Where episodes start: the task's problems, rows in memory, or a data set."""
    room = (context_length(base), config.sampling.max_new_tokens)
    if task is not None:
        return prompts_from_rows(task.rows, config.prompts, tokenizer, *room)
    if parts.prompts is None:
        return load_prompts(config.prompts, tokenizer, *room)
    rows = [{"prompt": p} if isinstance(p, str) else p for p in plain_rows(parts.prompts)]
    return prompts_from_rows(rows, config.prompts, tokenizer, *room)


def check_rewards(config: PPOConfig, prompts: Sequence[Prompt], rewards: Rewards, gold: Rewards | None) -> None:
    """UserError where a reward misses a column, or cannot read an answer."""
    columns = {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}
    places = [f"{config.prompts.path or config.task or 'prompts'}, row {p.row}" for p in prompts]
    for scorer in (rewards, *([] if gold is None else [gold])):
        scorer.check(columns, [p.source for p in prompts], places)


def assemble(
    config: PPOConfig,
    parts: Parts,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    scorers: tuple[Rewards, Rewards | None],
    checkpoint: Path | None = None,
) -> tuple[LanguageWorld, Learner]:
    """World and learner of pieces that are loaded and checked; `scorers` are the reward's and the held-out ones."""
    rewards, gold = scorers
    model, reference = (_adapted if config.lora.rank else _whole)(config, parts, base, checkpoint)
    policy = LanguagePolicy(
        model,
        config.separate_value_trunk,
        _critic(config, tokenizer, prompts),
        autocast=_autocast(config, model),
        checkpointing=config.gradient_checkpointing,
        compiled=config.compile,
    )
    kl = KLController(config.kl)
    sampler = Sampler(policy, tokenizer, config.sampling, config.seed)
    world = LanguageWorld(policy, reference, sampler, prompts, rewards, kl, config.collect, config.seed, gold)
    learner = Learner(policy, config.learner, config.advantage, kl, config.iterations, config.seed)
    if checkpoint is not None:
        world.load_critic(checkpoint)
        state, constants = restore(checkpoint, world, learner), _constants(world)
        if state["reference"] != constants["reference"]:
            raise UserError(
                f"{config.output}: the run was begun with another reference; give the model as it was before training"
            )
        if state["frozen_critic"] != constants["frozen_critic"]:
            raise UserError(f"{config.output}: the run was begun with another value_model; give it as it was then")
        if config.new_pass:
            world.begin_pass()
            logger.info("a new pass begins, over %s prompts", f"{len(prompts):,}")
        else:
            check_data(state.get("data"), constants["data"], config.prompts.path or config.task or "prompts")
        warn_of_changes(state.get("sources", {}), constants["sources"])
    return world, learner


def load_base(config: PPOConfig, parts: Parts) -> PreTrainedModel:
    """The model as it was before training, with the adapters that are to be trained where there is a rank."""
    if parts.model is not None:
        model = prepare_model(parts.model, config.device)
        return give_adapters(model, config.lora) if config.lora.rank else model
    return load_trainable(
        config.model, config.lora, config.dtype, config.device, config.trust_remote_code, config.quantization
    )


def _whole(
    config: PPOConfig, parts: Parts, base: PreTrainedModel, checkpoint: Path | None
) -> tuple[PreTrainedModel, Reference]:
    """The model all of which is trained, where `checkpoint` left it, and the reference beside it."""
    own = _named_reference(config, base) if config.reference.model else copy.deepcopy(base)
    reference = ModelReference(own, config.reference)
    if checkpoint is None:
        return base, reference
    model = _load(config, str(checkpoint / "policy"))
    if parts.model is None:
        return model, reference
    base.load_state_dict(model.state_dict())  # trained in place on resuming too, in the precision that it came in
    return base, reference


def _adapted(
    config: PPOConfig, parts: Parts, base: PreTrainedModel, checkpoint: Path | None
) -> tuple[PreTrainedModel, Reference]:
    """The model with the adapters that are trained, where `checkpoint` left them, and the reference within it."""
    reference: Reference
    if config.reference.model:
        reference = ModelReference(_named_reference(config, base), config.reference)
    else:
        trained = parts.model is None and base_of(config.model) is not None
        reference = AdapterReference(base, config.reference, trained)
    if checkpoint is not None:
        read_weights(base, str(checkpoint / "policy"))
    return base, reference


def _autocast(config: PPOConfig, model: PreTrainedModel) -> bool:
    if config.autocast is not None:
        return config.autocast
    large = sum(parameter.numel() for parameter in model.parameters()) >= AUTOCAST_FROM
    return large and config.dtype == "float32" and bfloat16_pays(model)


def _critic(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Critic | None:
    """What the critic starts as, unless that is a head of zeros."""
    if not config.value_model:
        return None
    longest = max(len(prompt.token_ids) for prompt in prompts) + config.sampling.max_new_tokens
    options = (config.dtype, config.device, config.trust_remote_code)
    return critic_from_reward_model(config.value_model, tokenizer, longest, config.lora, *options)


def _settled(config: PPOConfig, world: LanguageWorld) -> PPOConfig:
    """With what was decided for this machine, so that the run goes on in the same way on another."""
    prompts = ChatTemplate(world.tokenizer, config.prompts, "prompts").settled(config.prompts)
    device, autocast = str(world.policy.device), world.policy.autocast
    return replace(config, device=device, autocast=autocast, prompts=prompts, new_pass=False)


def _constants(world: LanguageWorld) -> dict[str, Any]:
    """What a run was begun with, by which a resumed one is compared."""
    frozen = world.policy.critic_parameters(trained=False)
    return {
        "reference": world.reference.fingerprint,
        "frozen_critic": fingerprint(frozen.values()),
        "data": describe_data(world.prompts),
        "sources": describe_sources(world.tokenizer, {"reward": world.rewards, "gold": world.gold}),
    }


def _named_reference(config: PPOConfig, base: PreTrainedModel) -> PreTrainedModel:
    """The model of `reference.model`, which must know every token that the policy can draw."""
    model = _load(config, config.reference.model or "")
    known, drawn = embedding_rows(model), embedding_rows(base)
    if known < drawn:
        raise UserError(
            f"reference.model: {config.reference.model} embeds {known:,} tokens and the policy {drawn:,}, so that it "
            "cannot score all that is drawn; name a reference with the policy's tokenizer, or resize_token_embeddings"
        )
    return model


def _load(config: PPOConfig, path: str) -> PreTrainedModel:
    return load_causal_lm(path, config.dtype, config.device, config.trust_remote_code, config.quantization)


def train_ppo(
    config: PPOConfig,
    parts: Parts | None = None,
    resume: bool = False,
    report: Callable[[Iteration], None] | None = None,
    progress: bool | None = None,
) -> Trained[LanguageWorld]:
    """Train as configured, in a folder: see `tether.pipeline.training.train_in_folder`.

    Args:
        config: see `PPOConfig`.
        parts: pieces already in memory.
        resume: go on with the run that `config.output` holds.
        report: told of every iteration, after it was logged.
        progress: print what is loaded and how the run goes. None: unless there is a `report`, which may show it itself.

    Raises:
        UserError: something the user brought cannot work.
    """
    if config.new_pass and not resume:
        raise UserError("new_pass is set, but a run that begins has no other pass; it is for --resume")
    with Progress(config.iterations, _shown(config), report is None if progress is None else progress) as shown:

        def build(checkpoint: Path | None) -> tuple[LanguageWorld, Learner]:
            shown.phase(f"loading {config.model or 'prompts and model'}")
            return build_ppo(config, parts, checkpoint)

        return train_in_folder(
            config,
            build,
            resume,
            report,
            _constants,
            settled=lambda world: _settled(config, world),
            begin=lambda world, folder: draw_frontier(world, folder, config.frontier, config.seed, shown.phase),
            alarms=config.alarms,
            describe=lambda world, learner: describe_ppo(config, world, learner),
            progress=shown,
        )


def _shown(config: PPOConfig) -> tuple[str, ...]:
    """Metrics that the progress shows; the rest is in `metrics.jsonl`."""
    return (
        "score",
        *(("score_drawn", "filtered_share") if config.collect.filter_prompts else ()),
        "reward",
        "kl",
        "entropy",
        "response_length",
        "eos_share",
        "clip_fraction",
        "explained_variance",
    )


__all__ = ["PPOConfig", "Parts", "Trained", "build_ppo", "train_ppo"]
