"""`tether control`: an environment becomes a world with a policy in it, and the loop runs in a folder.

The learner, the loop and the run's folder are those of `tether ppo`. Here is also how the policy of such a run is
tried: `tether control --eval RUN`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tether.config import config_from_dict, config_to_dict
from tether.control.acting import Actor
from tether.control.environments import Environments, EnvironmentsConfig, tell_now_and_then
from tether.control.films import Film, Films
from tether.control.infos import whole_success
from tether.control.normalisation import ObservationNormaliser
from tether.control.policy import ControlPolicy, NetworkConfig
from tether.control.world import ControlCollectConfig, ControlWorld, load_policy
from tether.devices import AUTO, choose_device
from tether.errors import UserError
from tether.pipeline.opening import count, describe_control
from tether.pipeline.progress import Progress
from tether.pipeline.training import Trained, restore, train_in_folder
from tether.ppo import AdvantageConfig, Learner, LearnerConfig
from tether.random_states import random_states_kept, seed_random_states
from tether.runs import latest_checkpoint, load_state, read_config
from tether.train import Iteration
from tether.uncertainty import share, with_error

logger = logging.getLogger(__name__)

SHOWN = ("steps", "score", "episode_length", "entropy", "approx_kl", "clip_fraction", "explained_variance")


@dataclass(frozen=True)
class ControlConfig:
    """PPO for control: everything that can be set, with its default."""

    env: str = ""
    """Registered id of a gymnasium environment, such as CartPole-v1, or `file.py:make_env`."""
    output: str = "runs/control"
    """Folder of the run: configuration, metrics, episodes, checkpoints."""
    total_steps: int = 100_000
    """Environment steps of the run, over all environments; the last iteration is done whole."""
    seed: int = 0
    """Of everything random: the networks, the actions, the environments, the order of minibatches."""
    device: str = "auto"
    """Torch device of the networks, e.g. cpu or cuda. auto: for images cuda where there is one; else cpu, on which the
    small networks for vectors are faster."""
    threads: int | None = None
    """Threads of torch. None: one for vectors, whose small networks are slower with more; its own number for images."""
    checkpoint_every: int = 50
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    overwrite: bool = False
    """Replace a run that `output` already holds."""
    environments: EnvironmentsConfig = field(default_factory=EnvironmentsConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collect: ControlCollectConfig = field(default_factory=ControlCollectConfig)
    advantage: AdvantageConfig = field(default_factory=lambda: AdvantageConfig(gamma=0.99))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(learning_rate=3e-4, adam_epsilon=1e-5, max_gradient_norm=0.5)
    )

    def __post_init__(self) -> None:
        for name in ("total_steps", "checkpoint_every", "keep_checkpoints", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        if not self.output:
            raise ValueError("output is empty, expected the folder of the run")
        if not self.advantage.uses_critic:
            raise ValueError(
                f"advantage.estimator {self.advantage.estimator} compares episodes from the same start, which control "
                "has not: expected gae"
            )
        batch = self.environments.count * self.collect.steps
        if batch < self.learner.minibatches:
            raise ValueError(
                f"learner.minibatches is {self.learner.minibatches}, but an iteration has only {batch} steps "
                "(environments.count × collect.steps)"
            )

    @property
    def iterations(self) -> int:
        """Turns of collect, credit, update."""
        return math.ceil(self.total_steps / (self.environments.count * self.collect.steps))


def build_control(config: ControlConfig, checkpoint: Path | None = None) -> tuple[ControlWorld, Learner]:
    """World and learner of a configuration, at the start of the run or where `checkpoint` left it.

    Raises:
        UserError: the environment cannot be made or used, or the checkpoint is of another.
    """
    if not config.env:
        raise UserError("no environment given: name one with --env, such as CartPole-v1")
    if config.device != AUTO:
        choose_device(config.device)  # before any environment is made
    if checkpoint is not None:
        _refuse_other_environments(config, checkpoint)
    seed_random_states(config.seed)
    environments = Environments(config.env, config.environments, config.seed)
    try:
        policy = ControlPolicy(environments.observation_space, environments.action_space, config.network, config.seed)
        policy.to(_device(config, environments))
        if checkpoint is None:
            _try_out(environments, Actor(policy))
        fewest = config.learner.minibatches
        films = _films(config, environments)
        world = ControlWorld(
            policy, environments, config.collect, config.advantage.gamma, config.seed, fewest=fewest, films=films
        )
        if checkpoint is not None:
            load_policy(checkpoint, policy, None)
        learner = Learner(policy, config.learner, config.advantage, None, config.iterations, config.seed)
        if checkpoint is not None:
            restore(checkpoint, world, learner)
    except BaseException:
        environments.close()  # worker processes would stay
        raise
    return world, learner


def _device(config: ControlConfig, environments: Environments) -> str:
    vectors = len(environments.observation_space.shape) == 1
    return "cpu" if config.device == AUTO and vectors else choose_device(config.device)


def _films(config: ControlConfig, environments: Environments) -> Films | None:
    if not config.collect.film_every:
        return None
    if not environments.replayable:
        raise UserError(
            f"collect.film_every: `{config.env}` is stepped by its own vector environment, whose episodes have no seed "
            "to play them again by: set environments.vectorization to sync"
        )
    return Films(Path(config.output), config.env, config.environments)


def _try_out(environments: Environments, actor: Actor) -> None:
    """One step, twice, so that most mistakes in an environment are told before anything else is done.

    Afterwards everything is as if they had not been made, for environments that depend on their seed alone and wrappers
    whose state is kept. A warning names those that take along anything else from one episode to the next, and tells of
    environments that begin in another way from the same seed.
    """
    before = environments.state_dict()
    found = []
    for _ in range(2):
        with random_states_kept():  # both begin with the same global generators
            first = environments.reset()
            digests = environments.digests()
            step = environments.step(actor.act(actor.see(first.copy()), None)[1])
            found.append((digests, (first, step.successors, step.rewards)))
            environments.load_state_dict(before)
    (digests, one), (after, other) = found
    changed = [name for old, new in zip(digests, after, strict=True) for name in old if old[name] != new[name]]
    for name in dict.fromkeys(changed):
        logger.warning(
            "%s: its wrapper keeps `%s` from one episode to the next, which a checkpoint and --eval have not: "
            "give it state_dict and load_state_dict, or let Tether normalise (collect.normalise_observations, "
            "collect.normalise_rewards)",
            environments.label,
            name,
        )
    if not changed and not all(map(np.array_equal, one, other)):
        logger.warning(
            "%s: the same seed began two different episodes, so that none can be repeated, by --resume, --eval or for "
            "a film: call super().reset(seed=seed) in its reset, draw from self.np_random, and keep nothing in between",
            environments.label,
        )


def _environments_of(config: ControlConfig) -> dict[str, Any]:
    """What has to stay as it is for the episodes of a checkpoint to go on."""
    settings = {f"environments.{name}": value for name, value in config_to_dict(config.environments).items()}
    del settings["environments.vectorization"]
    return {"env": config.env, **settings}


def _refuse_other_environments(config: ControlConfig, checkpoint: Path) -> None:
    saved = load_state(checkpoint, "trainer").get("environments", {})
    for name, value in _environments_of(config).items():
        if name in saved and saved[name] != value:
            raise UserError(
                f"{name} is {value!r}, but the run began with {saved[name]!r}, and its episodes go on: resume without "
                f"--{name.replace('_', '-')}, or start another run"
            )


def train_control(
    config: ControlConfig,
    resume: bool = False,
    report: Callable[[Iteration], None] | None = None,
    progress: bool | None = None,
) -> Trained[ControlWorld]:
    """Train as configured, in a folder: see `tether.pipeline.training.train_in_folder`. Environments are left open.

    Args:
        config: see `ControlConfig`.
        resume: go on with the run that `config.output` holds.
        report: told of every iteration, after it was logged.
        progress: print what is made and how the run goes. None: unless there is a `report`, which may show it itself.

    Raises:
        UserError: something the user brought cannot work.
    """
    kept = {"environments": _environments_of(config)}
    threads_before = torch.get_num_threads()
    with Progress(config.iterations, SHOWN, report is None if progress is None else progress) as shown:

        def build(checkpoint: Path | None) -> tuple[ControlWorld, Learner]:
            shown.phase(f"making {count(config.environments.count, 'environment')} of {config.env}")
            world, learner = build_control(config, checkpoint)
            set_threads(config, world.environments)
            return world, learner

        try:
            return train_in_folder(
                config,
                build,
                resume,
                report,
                lambda world: kept,
                settled=lambda world: replace(config, device=str(world.policy.device)),
                describe=lambda world, learner: describe_control(config, world, learner),
                progress=shown,
            )
        finally:
            torch.set_num_threads(threads_before)


def set_threads(config: ControlConfig, environments: Environments) -> None:
    """Give torch as many threads as the configuration says; who trains or tries takes them back at the end."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif len(environments.observation_space.shape) == 1:
        torch.set_num_threads(1)


@dataclass(frozen=True)
class ControlEvalConfig:
    """Try the policy of a run."""

    eval: str = ""
    """Folder of the run; its newest checkpoint is tried."""
    episodes: int = 100
    """How many to play."""
    sample: bool = False
    """Draw actions as in training, instead of taking the likeliest."""
    seed: int = 0
    """Of the environment and of sampled actions."""
    record: str | None = None
    """File (.gif or .mp4) for a film of the first episode."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}, expected at least 1")
        if self.record is not None and Path(self.record).suffix not in (".gif", ".mp4"):
            raise ValueError(f"record is {self.record!r}, expected a file name that ends in .gif or .mp4")


@dataclass(frozen=True, repr=False)
class ControlEvaluation:
    """What came of the episodes, one entry each; success is None where the environment never speaks of it."""

    returns: list[float]
    lengths: list[int]
    success: list[float] | None

    def __repr__(self) -> str:
        return f"ControlEvaluation({len(self.returns)} episodes, mean return {_mean(self.returns)})"


def evaluate_control(config: ControlEvalConfig) -> ControlEvaluation:
    """Play episodes with the policy of a run, and print what came of them.

    Statistics of observations stay as training left them, also those of wrappers in the environment; rewards are the
    environment's own. A film that fails after it began is told in a line, and the result is kept.

    Raises:
        UserError: the run or its environment cannot be used, or the film cannot be written.
    """
    folder = Path(config.eval)
    settings = read_config(folder)
    if "env" not in settings:
        raise UserError(f"{folder}: its config.yaml names no `env`, so it is no run of `tether control`")
    run = config_from_dict(ControlConfig, settings, str(folder / "config.yaml"))
    found = latest_checkpoint(folder)
    if found is None:
        raise UserError(f"{folder}: no checkpoint to evaluate")
    seed_random_states(config.seed)
    threads_before = torch.get_num_threads()
    film = None if config.record is None else Film(config.record)
    with Environments.to_try(run.env, run.environments, config.seed, film) as environments:
        try:
            set_threads(run, environments)
            actor = load_actor(run, environments, found[1])
            environments.bring_gathered(load_state(found[1], "trainer")["world"]["environments"])
            _try_out(environments, actor)
            evaluation = _play(config, environments, actor, film)
        finally:
            torch.set_num_threads(threads_before)
    filmed = film is not None and film.finish()
    _show(Console(highlight=False, soft_wrap=True), config, run, found[0], evaluation, filmed)
    return evaluation


def load_actor(config: ControlConfig, environments: Environments, checkpoint: Path) -> Actor:
    """The policy of a run's checkpoint, on the CPU, with the statistics that its observations are normalised by."""
    space = environments.observation_space
    policy = ControlPolicy(space, environments.action_space, config.network)
    normaliser = ObservationNormaliser(space.shape) if config.collect.normalise_observations else None
    load_policy(checkpoint, policy, normaliser)
    return Actor(policy, normaliser)


def _play(config: ControlEvalConfig, environments: Environments, actor: Actor, film: Film | None) -> ControlEvaluation:
    """Episodes in one environment, the first of them filmed."""
    generator = torch.Generator().manual_seed(config.seed) if config.sample else None
    returns: list[float] = []
    lengths: list[int] = []
    success: list[float] = []
    total, length = 0.0, 0
    if film is not None:
        film.roll()
    tell = tell_now_and_then()
    seen = actor.see(environments.reset())
    while len(returns) < config.episodes:
        noise = None if generator is None else actor.policy.noise(1, 1, generator)[0]
        step = environments.step(actor.act(seen, noise)[1])
        seen = actor.see(step.observations)
        if not step.valid[0]:
            continue
        total, length = total + float(step.rewards[0]), length + 1
        tell("%s of %s episodes played, %s steps of the next", len(returns), config.episodes, length)
        if step.terminated[0] or step.truncated[0]:
            returns.append(total)
            lengths.append(length)
            success.append(math.nan if step.success is None else float(step.success[0]))
            total, length = 0.0, 0
    return ControlEvaluation(returns, lengths, None if all(map(math.isnan, success)) else whole_success(success))


def _show(
    console: Console,
    config: ControlEvalConfig,
    run: ControlConfig,
    iteration: int,
    evaluation: ControlEvaluation,
    filmed: bool = False,
) -> None:
    returns = evaluation.returns
    how = "actions drawn" if config.sample else "greedy"
    console.print(f"{run.env}, iteration {iteration}, {len(returns)} episodes, {how}", markup=False)
    console.print(f"  mean return  {_mean(returns)}   from {min(returns):.6g} to {max(returns):.6g}", markup=False)
    console.print(f"  mean length  {_mean(evaluation.lengths)}", markup=False)
    if evaluation.success is not None:
        counts = set(evaluation.success) <= {0.0, 1.0}
        success = share(sum(evaluation.success), len(evaluation.success)) if counts else _mean(evaluation.success)
        console.print(f"  success      {success}", markup=False)
    if filmed:
        console.print(f"  film         {config.record}", markup=False)


def _mean(values: Sequence[float]) -> str:
    """With its standard error, where there is one."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return with_error(float(np.mean(values)), error)


__all__ = [
    "ControlConfig",
    "ControlEvalConfig",
    "ControlEvaluation",
    "build_control",
    "evaluate_control",
    "load_actor",
    "set_threads",
    "train_control",
]
