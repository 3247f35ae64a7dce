"""A training run in its folder: the loop, and everything that it leaves behind or goes on from.

Logging, checkpoints, resuming, Ctrl-C: the same for every world. It knows neither what a world is made of nor the
algorithm; whoever calls it brings `build`.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar

from tether.config import config_to_dict
from tether.errors import RewardError, UserError, exited
from tether.pipeline.progress import Progress
from tether.ppo import Learner
from tether.random_states import random_states, set_random_states
from tether.runs import Run, load_state, recorded, refuse_run, save_state
from tether.runs.alarms import AlarmLog, AlarmsConfig
from tether.runs.onlooking import Onlooking
from tether.train import Iteration, World, iterate

logger = logging.getLogger(__name__)

WorldT = TypeVar("WorldT", bound=World)


class RunSettings(Protocol):
    """What a configuration says of its run; a dataclass that has these and whatever else."""

    @property
    def output(self) -> str:
        """Folder of the run."""
        ...

    @property
    def iterations(self) -> int:
        """Length of the run."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Iterations between checkpoints."""
        ...

    @property
    def keep_checkpoints(self) -> int:
        """How many of the newest checkpoints stay."""
        ...

    @property
    def overwrite(self) -> bool:
        """Replace a run that is already there."""
        ...


@dataclass(frozen=True, repr=False)
class Trained(Generic[WorldT]):
    """What training leaves: the run's folder, the newest checkpoint's policy in it, and the pieces in memory."""

    folder: Path
    policy: Path
    world: WorldT
    learner: Learner

    def __repr__(self) -> str:
        return f"Trained({self.learner.iteration} of {self.learner.iterations} iterations, policy={str(self.policy)!r})"


def train_in_folder(
    config: RunSettings,
    build: Callable[[Path | None], tuple[WorldT, Learner]],
    resume: bool = False,
    report: Callable[[Iteration], None] | None = None,
    constants: Callable[[WorldT], dict[str, Any]] | None = None,
    settled: Callable[[WorldT], RunSettings] | None = None,
    begin: Callable[[WorldT, Path], None] | None = None,
    alarms: AlarmsConfig | None = None,
    describe: Callable[[WorldT, Learner], Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> Trained[WorldT]:
    """Train to the end of the run.

    Every iteration goes to `metrics.jsonl`, TensorBoard and the episode store; checkpoints are written every
    `checkpoint_every` iterations, at the end, after Ctrl-C or SIGTERM (which let the iteration finish), and when
    collecting fails. With `resume` the run goes on from its last good checkpoint as if it had never stopped. Where
    TensorBoard, alarms, episodes or the display fail, a line says so and the run goes on.

    Args:
        config: the whole configuration, which is written into the folder.
        build: makes world and learner, at the start of the run or, by `restore`, where a checkpoint left them.
        resume: go on with the run that the folder holds.
        report: told of every iteration, after it was logged.
        constants: of the world; kept in each checkpoint beside the state, for `build` to compare.
        settled: the configuration with what building decided in place of what was left open; it is written into the
            folder instead of `config`, so that the run is resumed with the same.
        begin: called with the world and the folder before the first iteration, again where a run is resumed that was
            killed before its first checkpoint. It must leave all random states as they were.
        alarms: when to raise one; each is logged as a warning and written to the folder. None: never.
        describe: lines for `progress` to say before anything else.
        progress: shows people how the run goes. None: nothing does.

    Raises:
        UserError: something the user brought cannot work.
    """
    folder = Path(config.output)
    if not resume and not config.overwrite:
        refuse_run(folder)
    # A mistake found while building must leave the folder as it was: a new run is made, and an old one changed, after.
    built = None if resume else build(None)
    if built is not None and settled is not None:
        config = settled(built[0])
    with _opened(config, folder, resume) as run:
        found = run.latest_checkpoint() if resume else None
        world, learner = built or build(found[1] if found else None)
        if learner.iteration > config.iterations:
            raise UserError(
                f"iterations is {config.iterations}, but the run in {folder} has done {learner.iteration}: "
                "raise --iterations, or start another run"
            )
        if resume:
            run.rewind(learner.iteration)
            run.update_config(config_to_dict(config if settled is None else settled(world)))
        saved, newest = learner.iteration, found[1] if found else None
        constant = constants(world) if constants is not None else {}
        watch = AlarmLog(folder, alarms) if alarms is not None else None
        looks = Onlooking()

        def save() -> Path:
            state = {**boundary, "learner": learner.state_dict(), **constant}
            return run.save_checkpoint(learner.iteration, lambda checkpoint: _write(checkpoint, world, state))

        # what changes while a batch is collected, as it was after the last iteration that is logged whole
        boundary, complete = _boundary(world), learner.iteration
        device = next(iter(learner.policy.policy_parameters())).device
        with recorded(folder, device, learner.iteration), _Interruption() as interruption:
            try:
                if progress is not None and describe is not None:
                    with looks.at("the display"):
                        progress.say(describe(world, learner))
                if begin is not None and learner.iteration == 0:
                    begin(world, folder)
                if progress is not None and learner.iteration < config.iterations:
                    with looks.at("the display"):
                        progress.begin(learner.iteration)
                for iteration in iterate(world, learner):
                    run.log(iteration.number, iteration.metrics)
                    with looks.at("alarms"):
                        for alarm in watch.log(iteration.number, iteration.metrics) if watch is not None else ():
                            logger.warning("alarm in iteration %d: %s", alarm.iteration, alarm.message)
                    batch = (iteration.trajectories, iteration.advantages, iteration.returns, iteration.last_seen)
                    with looks.at("episodes"):
                        run.log_episodes(iteration.number, world.episodes(*batch))
                    boundary, complete = _boundary(world), iteration.number
                    due = iteration.number % config.checkpoint_every == 0 or iteration.number == config.iterations
                    if due or interruption.wanted:
                        newest = save()
                        saved = iteration.number
                    if progress is not None:
                        with looks.at("the display"):
                            progress.iteration(iteration)
                    if report is not None:
                        report(iteration)
                    if interruption.wanted:
                        break
            except BaseException as error:
                with looks.at("unscored.jsonl"):
                    _keep_responses(folder, learner.iteration + 1, error)
                if complete == 0 and isinstance(error, UserError) and not isinstance(error, RewardError):
                    run.forget_frontier()  # what the user brought cannot work: nothing here is in the way of a new run
                # parameters, boundary and logs are of one iteration unless its update or its logging was broken off
                if not learner.updating and learner.iteration == complete > saved:
                    save()
                if isinstance(error, SystemExit):
                    raise exited(error) from error
                raise
        assert newest is not None  # the last iteration has one, and so has an interrupted run
        return Trained(folder, newest / "policy", world, learner)


def restore(checkpoint: Path, world: World, learner: Learner) -> dict[str, Any]:
    """Bring world and learner, whose policy is loaded already, to where `checkpoint` left them; returns all it held."""
    state = load_state(checkpoint, "trainer")
    world.load_state_dict(state["world"])
    learner.load_state_dict(state["learner"])
    set_random_states(state["random"])
    return state


@contextmanager
def _opened(config: RunSettings, folder: Path, resume: bool) -> Iterator[Run]:
    keep = config.keep_checkpoints
    run = (
        Run.open(folder, keep=keep)
        if resume
        else Run.create(folder, config_to_dict(config), overwrite=config.overwrite, keep=keep)
    )
    try:
        yield run
    finally:
        run.close()


def _boundary(world: World) -> dict[str, Any]:
    return {"world": world.state_dict(), "random": random_states()}


def _write(checkpoint: Path, world: World, state: dict[str, Any]) -> None:
    world.save_policy(checkpoint)
    save_state(checkpoint, "trainer", state)


def _keep_responses(folder: Path, iteration: int, error: BaseException) -> None:
    """Responses whose scoring failed are written beside the metrics, and the error says where."""
    responses = getattr(error, "responses", None)
    if responses:
        lines = [json.dumps({"iteration": iteration, **response}, ensure_ascii=False) for response in responses]
        path = folder / "unscored.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        error.args = (f"{error}; {len(lines)} responses without a score: {path}",)


class _Interruption:
    """The first Ctrl-C or SIGTERM asks the loop to end after this iteration; the second ends it at once."""

    def __init__(self) -> None:
        self.wanted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        with Onlooking().at("the display"):
            print("\nfinishing this iteration, then saving; press Ctrl-C again to stop at once", flush=True)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


__all__ = ["Trained", "restore", "train_in_folder"]
