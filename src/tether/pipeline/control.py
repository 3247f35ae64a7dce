"""`tether control`: an environment becomes a world with a policy in it, and the loop runs in a folder.

The learner, the loop and the run's folder are those of `tether ppo`. Here is also how the policy of such a run is
tried: `tether control --eval RUN`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from tether.config import config_from_dict, config_to_dict
from tether.control.environments import Environments, EnvironmentsConfig, make_environment
from tether.control.films import Films, choose_renderer, render, require_imageio
from tether.control.normalisation import ObservationNormaliser
from tether.control.policy import ControlPolicy, NetworkConfig
from tether.control.vectors import success_of
from tether.control.world import ControlCollectConfig, ControlWorld, load_policy
from tether.devices import AUTO, choose_device
from tether.errors import UserError
from tether.pipeline.opening import count, describe_control
from tether.pipeline.progress import Progress
from tether.pipeline.training import Trained, restore, train_in_folder
from tether.ppo import AdvantageConfig, Learner, LearnerConfig
from tether.runs import latest_checkpoint, load_state, read_config
from tether.runs.random_states import seed_random_states
from tether.train import Iteration
from tether.uncertainty import share, with_error

SHOWN = ("steps", "score", "episode_length", "entropy", "approx_kl", "clip_fraction", "explained_variance")
MOST_FRAMES_PER_SECOND = 50  # of films; browsers play no GIF faster


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
            _try_out(environments, policy)
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


def _try_out(environments: Environments, policy: ControlPolicy) -> None:
    """One step, so that most mistakes in an environment are told before the run gets its folder.

    Afterwards everything is as if it had not been made, for environments that depend on their seed alone.
    """
    before = environments.state_dict()
    states = torch.from_numpy(environments.reset())
    environments.step(policy.to_environment(policy.act(states.to(policy.device), None)))
    environments.load_state_dict(before)


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
            set_threads(config, world)
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


def set_threads(config: ControlConfig, world: ControlWorld) -> None:
    """Give torch as many threads as the configuration says; `train_control` does, and takes them back at the end."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif len(world.environments.observation_space.shape) == 1:
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
    """What came of the episodes, one entry each; success is None where the environment does not speak of it."""

    returns: list[float]
    lengths: list[int]
    success: list[float] | None

    def __repr__(self) -> str:
        return f"ControlEvaluation({len(self.returns)} episodes, mean return {_mean(self.returns)})"


def evaluate_control(config: ControlEvalConfig) -> ControlEvaluation:
    """Play episodes with the policy of a run, and print what came of them.

    Statistics of observations stay as training left them; rewards are the environment's own.

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
    player = Player.load(run, found[1])
    if config.record:
        choose_renderer()
    with closing(make_environment(run.env, run.environments, "rgb_array" if config.record else None)) as environment:
        generator = torch.Generator().manual_seed(config.seed) if config.sample else None
        returns, lengths, success = [], [], []
        for episode in range(config.episodes):
            filmed = config.record if episode == 0 else None
            with _film(filmed, environment.metadata.get("render_fps", 30)) as add_frame:
                observation, _ = environment.reset(seed=config.seed if episode == 0 else None)
                total, length, over = 0.0, 0, False
                while not over:
                    add_frame(environment)
                    action = player.act(observation, generator)
                    observation, reward, terminated, truncated, info = environment.step(action)
                    total, length, over = total + float(reward), length + 1, terminated or truncated
                    if not (math.isfinite(total) and np.isfinite(observation).all()):
                        raise UserError(
                            f"environment `{run.env}`, step {length} of episode {episode + 1}: found nan or inf in the "
                            "observation or the reward, expected finite numbers"
                        )
                add_frame(environment)
            returns.append(total)
            lengths.append(length)
            if (succeeded := success_of(info)) is not None:
                success.append(succeeded)
    evaluation = ControlEvaluation(returns, lengths, success or None)
    _show(Console(highlight=False, soft_wrap=True), config, run, found[0], evaluation)
    return evaluation


@dataclass(frozen=True)
class Player:
    """A trained policy with the statistics that its observations are normalised by."""

    policy: ControlPolicy
    normaliser: ObservationNormaliser | None

    @classmethod
    def load(cls, config: ControlConfig, checkpoint: Path) -> Player:
        """The policy of a run's checkpoint, on the CPU."""
        with closing(make_environment(config.env, config.environments)) as environment:
            observations: Any = environment.observation_space
            policy = ControlPolicy(observations, environment.action_space, config.network)
        normaliser = ObservationNormaliser(observations.shape) if config.collect.normalise_observations else None
        load_policy(checkpoint, policy, normaliser)
        return cls(policy, normaliser)

    def act(self, observation: NDArray[Any], generator: torch.Generator | None = None) -> Any:
        """One action, as the environment takes it: the likeliest, or drawn where there is a generator."""
        observations = observation[None]
        if self.normaliser is not None:
            observations = self.normaliser.normalise(observations)
        noise = None if generator is None else self.policy.noise(1, 1, generator)[0]
        return self.policy.to_environment(self.policy.act(torch.from_numpy(observations), noise))[0]


@contextmanager
def _film(path: str | None, frames_per_second: int) -> Iterator[Callable[[Any], None]]:
    """Gives a function that films an environment's present state; without a path it does nothing.

    Of environments that are faster than a film can show only every second, third, … state is rendered and kept.
    """
    if path is None:
        yield lambda environment: None
        return
    require_imageio(path)
    import imageio.v3 as imageio

    frames: list[NDArray[Any]] = []
    every, states = math.ceil(frames_per_second / MOST_FRAMES_PER_SECOND), itertools.count()

    def add_frame(environment: Any) -> None:
        if next(states) % every:
            return
        frames.append(render(environment, path))

    with _written(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).open("ab").close()  # now rather than after the episode
    yield add_frame
    options: dict[str, Any] = {"duration": 1000 * every / frames_per_second, "loop": 0}
    if path.endswith(".mp4"):  # the codec needs even sides; without the last it would stretch them to multiples of 16
        options = {"plugin": "FFMPEG", "fps": frames_per_second / every, "macro_block_size": 2}
    with _written(path):
        imageio.imwrite(path, np.stack(frames), **options)


@contextmanager
def _written(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def _show(
    console: Console, config: ControlEvalConfig, run: ControlConfig, iteration: int, evaluation: ControlEvaluation
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
    if config.record is not None:
        console.print(f"  film         {config.record}", markup=False)


def _mean(values: Sequence[float]) -> str:
    """With its standard error, where there is one."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return with_error(float(np.mean(values)), error)


__all__ = [
    "ControlConfig",
    "ControlEvalConfig",
    "ControlEvaluation",
    "Player",
    "build_control",
    "evaluate_control",
    "set_threads",
    "train_control",
]
