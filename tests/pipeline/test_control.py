"""`tether control`: what a run leaves, going on after whatever stopped it, trying its policy, the shipped settings."""

from __future__ import annotations

import io
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from rich.console import Console
from tests.processes import Commands, Moment
from tests.run_folders import checkpoint_files, episode_rows, metric_lines, newest_checkpoint

from tether.cli import main
from tether.config import dump_config, load_config
from tether.control.environments import Environments, EnvironmentsConfig, make_environment
from tether.control.world import ControlCollectConfig
from tether.errors import UserError
from tether.pipeline.control import (
    ControlConfig,
    ControlEvalConfig,
    ControlEvaluation,
    _device,
    _show,
    build_control,
    evaluate_control,
    load_actor,
    train_control,
)
from tether.ppo import AdvantageConfig, LearnerConfig
from tether.runs import read_config, read_episodes, read_metrics
from tether.uncertainty import with_error

ROOT = Path(__file__).resolve().parent.parent.parent
SHIPPED = sorted((ROOT / "examples" / "control").glob("*.yaml"))
ITERATIONS = 6
WORLD = """
import os, signal, time

import gymnasium
import numpy as np

steps = 0

class Walk(gymnasium.Env):
    "A random walk that the action leans on; succeeds at +3, fails at -3. Once, it may stop its own run."
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, broken=""):
        self.broken = broken

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.0
        return self.shown(), {}

    def shown(self):
        return np.array([self.place, self.np_random.normal()], np.float32)

    def step(self, action):
        global steps
        steps += 1
        if str(steps) == os.environ.get("STOP_AT"):
            for _ in range(int(os.environ["STOP_TIMES"])):
                os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
                time.sleep(0.3)
            time.sleep(float(os.environ["STOP_HANG"]))
        self.place += (2 * action - 1) * 0.5 + self.np_random.normal()
        ended = bool(abs(self.place) > 3)
        if self.broken == "nan":
            self.place = float("nan")
        return self.shown(), float(self.place), ended, False, {"is_success": self.place > 3} if ended else {}

def make_env(**options):
    return gymnasium.wrappers.TimeLimit(Walk(**options), 20)

class Pictured(gymnasium.Wrapper):
    def __init__(self, env, kind):
        super().__init__(env)
        self.kind = kind

    def render(self):
        if self.kind == "image":
            return np.full((4, 6, 3), 10 * abs(self.unwrapped.place), np.uint8)
        return {"floats": lambda: np.zeros((4, 6)), "nothing": lambda: None, "failing": lambda: 1 / 0}[self.kind]()

def make_pictures(render_mode=None, kind="image"):
    return Pictured(make_env(), kind)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`world.py`, and a configuration for each way to step environments."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "world.py").write_text(WORLD)
    for name, env in (("native", "CartPole-v1"), ("sync", f"{folder / 'world.py'}:make_env")):
        (folder / f"{name}.yaml").write_text(dump_config(settings(folder, env)))
    return folder


def settings(folder: Path, env: str, **changes: Any) -> ControlConfig:
    small: dict[str, Any] = {
        "env": env,
        "output": str(folder / "run"),
        "total_steps": ITERATIONS * 2 * 12,
        "checkpoint_every": 2,
        "environments": EnvironmentsConfig(count=2),
        "collect": ControlCollectConfig(12, normalise_observations=True, normalise_rewards=True, record=2),
        "learner": LearnerConfig(epochs=2, minibatches=2, learning_rate=1e-2, schedule="linear"),
    }
    return ControlConfig(**small | changes)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        yield Commands(tmp_path_factory.mktemp("logs"))


@pytest.mark.parametrize(("shape", "expected"), [((4,), "cpu"), ((3, 8, 8), "cuda")], ids=["vector", "image"])
def test_small_controllers_on_vectors_stay_on_the_cpu(
    shape: tuple[int, ...], expected: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.pipeline.control.choose_device", lambda device: {"auto": "cuda"}.get(device, device))
    environments: Any = SimpleNamespace(observation_space=SimpleNamespace(shape=shape))
    assert _device(settings(folder, "CartPole-v1"), environments) == expected
    assert _device(settings(folder, "CartPole-v1", device="cuda:1"), environments) == "cuda:1"


def test_the_device_that_was_taken_is_written_down(tmp_path: Path) -> None:
    with train_control(settings(tmp_path, "CartPole-v1"), progress=False).world.environments:
        assert read_config(tmp_path / "run")["device"] == "cpu"


def start(folder: Path, kind: str, run: Path) -> list[str]:
    return ["control", "--config", str(folder / f"{kind}.yaml"), "--output", str(run)]


@pytest.fixture(scope="module")
def whole(folder: Path, commands: Commands) -> Callable[[str], Path]:
    """The run of a kind that never stopped; beside it the number of moments at which its files are touched."""

    def run(kind: str) -> Path:
        place = folder / f"whole-{kind}"
        if not place.exists():
            assert commands.run(start(folder, kind, place), run=place) == 0, commands.log.read_text()
            place.with_suffix(".events").write_text(commands.log.with_suffix(".events").read_text())
            assert len(metric_lines(place)) == ITERATIONS
        return place

    return run


def assert_same_run(found: Path, expected: Path) -> None:
    """Metrics, episodes, networks, statistics, optimizer, environments and random states: the same bytes."""
    assert metric_lines(found) == metric_lines(expected)
    assert episode_rows(found) == episode_rows(expected)
    assert newest_checkpoint(found)[0] == newest_checkpoint(expected)[0]
    files = checkpoint_files(found)
    assert files.keys() == {
        "manifest.json",
        "policy/policy.safetensors",
        "policy/observations.safetensors",
        "trainer.safetensors",
        "trainer.json",
    }
    different = [name for name, content in checkpoint_files(expected).items() if files.get(name) != content]
    assert different == []


# A run's folder ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_settings_metrics_episodes_and_checkpoints(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "left"
    assert main(start(folder, "sync", run)) == 0
    said = capsys.readouterr().out
    assert f"tether control --eval {run} --record {run}/film.gif" in said
    assert "--resume" not in said  # it is over
    names = {"config.yaml", "metrics.jsonl", "episodes.db", "tensorboard", "checkpoints", "lock"}
    names |= {"starts.jsonl", "console.log"}
    assert {path.name for path in run.iterdir()} == names
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["iteration-000004", "iteration-000006"]
    assert read_config(run)["environments"]["count"] == 2
    rows = read_metrics(run)
    assert [row["steps"] for row in rows] == [24 * i for i in range(1, ITERATIONS + 1)]
    expected = {"score", "score_std", "episode_length", "success", "reward", "episodes", "steps", "policy_loss",
                "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance", "learning_rate",
                "time/collecting", "time/learning", "time/iteration", "time/steps_per_second_collected"}  # fmt: skip
    assert expected <= rows[-1].keys()
    episodes = read_episodes(run)
    assert len(episodes) == sum(row["episodes"] for row in rows)
    assert {episode.details["environment"] for episode in episodes} == {0, 1}
    lengths = [len(episode.rewards) for episode in episodes]
    assert rows[-1]["episode_length"] == pytest.approx(np.mean(lengths))
    assert rows[-1]["score"] == pytest.approx(np.mean([episode.score for episode in episodes]))
    assert max(lengths) > 12  # goes over more than one collection
    assert_same_run(run, whole("sync"))  # the same settings, the same bytes


def test_a_run_is_repeated_from_its_own_configuration(folder: Path, whole: Callable[[str], Path]) -> None:
    run = folder / "again"
    assert main(["control", "--config", str(whole("native") / "config.yaml"), "--output", str(run)]) == 0
    assert_same_run(run, whole("native"))


def test_worker_processes_make_the_same_run_and_end_with_it(folder: Path, whole: Callable[[str], Path]) -> None:
    run = folder / "async"
    assert main([*start(folder, "sync", run), "--environments.vectorization", "async"]) == 0
    assert metric_lines(run) == metric_lines(whole("sync"))
    assert episode_rows(run) == episode_rows(whole("sync"))
    assert not multiprocessing.active_children()


def test_no_worker_process_stays_where_building_fails(folder: Path) -> None:
    source = "import gymnasium\ndef make_env():\n    return gymnasium.make('CartPole-v1')\n"
    images = source.replace("gymnasium.make('CartPole-v1')", "Small()").replace(
        "def", "import numpy as np\nclass Small(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(0, 255, (20, 20, 3), np.uint8)\n"
        "    action_space = gymnasium.spaces.Discrete(2)\ndef", 1
    )  # fmt: skip
    (folder / "small.py").write_text(images)
    config = settings(folder, f"{folder / 'small.py'}:make_env")
    config = replace(config, environments=EnvironmentsConfig(count=2, vectorization="async"))
    with pytest.raises(UserError, match="at least 36 × 36 pixels"):
        build_control(config)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "ALE/Pong-v5"])
def test_the_step_by_which_an_environment_is_tried_changes_nothing(
    env: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    for tried in (True, False):
        if not tried:
            monkeypatch.setattr("tether.pipeline.control._try_out", lambda *_: None)
        config = settings(folder, env, collect=ControlCollectConfig(12))
        world = build_control(config)[0]
        batches.append(world.collect())
        world.environments.close()
    assert torch.equal(batches[0].actions, batches[1].actions)
    assert torch.equal(batches[0].rewards, batches[1].rewards)
    assert torch.equal(batches[0].context.observations, batches[1].context.observations)


# Going on ---------------------------------------------------------------------------------------------------------


def killed(kind: str, folder: Path, whole: Path, commands: Commands, moments: list[Moment]) -> int:
    """How many of the runs were killed; the others had ended before."""
    kills = 0
    for moment in moments:
        run = folder / f"killed-{kind}-{len(moments)}-{moment.event}"
        code = commands.run(start(folder, kind, run), run=run, kill=moment)
        assert code in (-9, 0), commands.log.read_text()
        kills += code == -9
        on = ["control", "--resume", str(run)] if (run / "config.yaml").exists() else start(folder, kind, run)
        assert commands.run(on) == 0, commands.log.read_text()
        assert_same_run(run, whole)
        assert not list(run.glob("checkpoints/.*"))
    return kills


def moments(whole: Path, count: int, seed: int) -> list[Moment]:
    """One in each stretch of the run; half of them right at a change of a file, half a random time after it."""
    events = int(whole.with_suffix(".events").read_text())
    draw = random.Random(seed)
    edges = [5 + round(i * (events - 12) / count) for i in range(count + 1)]
    return [
        Moment(draw.randint(edges[i] + 1, edges[i + 1]), 0.0 if i % 2 else draw.uniform(0.0, 0.02))
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_killed_at_random_moments(kind: str, folder: Path, whole: Callable[[str], Path], commands: Commands) -> None:
    assert killed(kind, folder, whole(kind), commands, moments(whole(kind), 2, seed=0)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "sync"])
def test_killed_at_fifteen_moments(kind: str, folder: Path, whole: Callable[[str], Path], commands: Commands) -> None:
    assert killed(kind, folder, whole(kind), commands, moments(whole(kind), 15, seed=1)) > 11


def stop(by: str, at: int, times: int = 1, hang: float = 0.0) -> dict[str, str]:
    """Environment in which the world's `at`-th step sends its process a signal."""
    return {"STOP_BY": by, "STOP_AT": str(at), "STOP_TIMES": str(times), "STOP_HANG": str(hang)}


def test_an_interrupted_run_finishes_its_iteration_and_saves(
    folder: Path, whole: Callable[[str], Path], commands: Commands
) -> None:
    run = folder / "interrupted"
    assert commands.run(start(folder, "sync", run), environment=stop("SIGINT", at=24 * 2 + 5)) == 0
    said = commands.log.read_text()
    assert "finishing this iteration, then saving" in said
    assert f"tether control --resume {run}" in said
    assert len(metric_lines(run)) == newest_checkpoint(run)[0] == 3  # where none was due
    assert commands.run(["control", "--resume", str(run)]) == 0
    assert_same_run(run, whole("sync"))


def test_a_second_ctrl_c_stops_at_once(folder: Path, whole: Callable[[str], Path], commands: Commands) -> None:
    """In the midst of a step that would take another minute; the last whole iteration is saved."""
    run = folder / "at-once"
    started = time.monotonic()
    environment = stop("SIGINT", at=24 * 3 + 5, times=2, hang=60.0)
    assert commands.run(start(folder, "sync", run), environment=environment) == 130
    assert time.monotonic() - started < 40
    said = commands.log.read_text()
    assert "tether: interrupted" in said
    assert "Traceback" not in said
    assert newest_checkpoint(run)[0] == 3
    assert main(["control", "--resume", str(run)]) == 0
    assert_same_run(run, whole("sync"))


@pytest.mark.parametrize("kind", ["native", "sync"])
def test_a_run_that_is_over_goes_on_with_more_steps(kind: str, folder: Path) -> None:
    short, straight = folder / f"short-{kind}", folder / f"straight-{kind}"
    constant = ["--learner.schedule", "constant"]  # another length changes a schedule
    assert main([*start(folder, kind, straight), *constant]) == 0
    assert main([*start(folder, kind, short), *constant, "--total-steps", "72"]) == 0
    assert main(["control", "--resume", str(short)]) == 0  # nothing left to do
    assert len(metric_lines(short)) == 3
    assert main(["control", "--resume", str(short), "--total-steps", "144"]) == 0
    assert_same_run(short, straight)


def test_a_run_stays_in_its_environments(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole("native")
    before = checkpoint_files(run)
    for flags, said in (
        (["--env", "Acrobot-v1"], "env is 'Acrobot-v1', but the run began with 'CartPole-v1'"),
        (["--environments.count", "3"], "environments.count is 3, but the run began with 2"),
        (
            ["--environments.max-episode-steps", "9"],
            "resume without --environments.max-episode-steps, or start another",
        ),
        (["--network.hidden", "8"], "holds another policy than the configuration describes"),
        (["--collect.no-normalise-rewards"], "collect.normalise_rewards is false, but the run began with true"),
    ):
        assert main(["control", "--resume", str(run), *flags]) == 2
        assert said in capsys.readouterr().err
    assert checkpoint_files(run) == before
    assert read_config(run)["env"] == "CartPole-v1"


def test_a_run_may_go_on_with_other_environments_of_the_same_kind_in_worker_processes(folder: Path) -> None:
    config = settings(folder, f"{folder / 'world.py'}:make_env", output=str(folder / "moved"), total_steps=72)
    for vectorization, steps in (("sync", 72), ("async", 96)):
        environments = EnvironmentsConfig(count=2, vectorization=vectorization)  # type: ignore[arg-type]
        config = replace(config, environments=environments, total_steps=steps)
        with closing(train_control(config, resume=vectorization == "async").world.environments) as used:
            assert used.kind == vectorization
    assert [row["steps"] for row in read_metrics(folder / "moved")] == [24, 48, 72, 96]


def test_an_error_in_the_midst_of_a_run_leaves_what_was_learnt(
    folder: Path, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = folder / "failing", folder / "failing.py"
    source.write_text(WORLD.replace("steps += 1", "steps += 1\n        assert steps != 24 * 3 + 7, 'stumbled'"))
    assert main([*start(folder, "sync", run), "--env", f"{source}:make_env"]) == 2
    said = capsys.readouterr().err
    assert f"environment `{source}:make_env`, index 0, step " in said
    assert "step raised AssertionError: stumbled" in said
    assert newest_checkpoint(run)[0] == 3
    source.write_text(WORLD)
    assert main(["control", "--resume", str(run)]) == 0
    assert metric_lines(run) == metric_lines(whole("sync"))
    assert episode_rows(run) == episode_rows(whole("sync"))


# Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [False, True])
def test_the_policy_of_a_run_is_tried(
    sample: bool, whole: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole("sync")
    words = ["control", "--eval", str(run), "--episodes", "5", "--seed", "3", *(["--sample"] if sample else [])]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    result = evaluate_control(ControlEvalConfig(str(run), 5, sample, 3))
    assert capsys.readouterr().out == said  # the seed decides
    assert len(result.returns) == len(result.lengths) == 5
    returns = np.array(result.returns)
    assert f"iteration {ITERATIONS}, 5 episodes, {'actions drawn' if sample else 'greedy'}" in said
    assert f"mean return  {with_error(returns.mean(), returns.std(ddof=1) / 5**0.5)} " in said
    assert f"from {returns.min():.6g} to {returns.max():.6g}" in said
    lengths = np.array(result.lengths)
    assert f"mean length  {with_error(lengths.mean(), lengths.std(ddof=1) / 5**0.5)}" in said
    # episodes that the time limit cuts off say nothing of success
    assert ("success" in said) == (result.success is not None)
    other = evaluate_control(ControlEvalConfig(str(run), 5, sample, 4))
    assert other.returns != result.returns


def test_returns_below_one_keep_their_digits_and_success_has_its_interval() -> None:
    stream = io.StringIO()
    found = ControlEvaluation([1.0] * 9 + [0.0], [12] * 10, [1.0] * 9 + [0.0])
    _show(Console(file=stream, width=200), ControlEvalConfig("run"), ControlConfig(env="FrozenLake-v1"), 7, found)
    assert stream.getvalue().splitlines() == [
        "FrozenLake-v1, iteration 7, 10 episodes, greedy",
        "  mean return  0.90 ± 0.10   from 0 to 1",
        "  mean length  12.0",
        "  success      90% (60 to 98%)",
    ]


def test_an_evaluation_is_episodes_played_by_hand_with_frozen_statistics(whole: Callable[[str], Path]) -> None:
    run = whole("sync")
    config = load_config(ControlConfig, ["--config", str(run / "config.yaml")], "", "")
    with Environments.to_try(config.env, config.environments, 2) as environments:
        player = load_actor(config, environments, newest_checkpoint(run)[1])
    assert player.normaliser is not None
    statistics = player.normaliser.state_dict()
    policy: Any = player.policy
    returns, lengths = [], []
    with closing(make_environment(config.env, config.environments)) as env:
        for episode in range(6):
            # of episode k in environment 0, as in training
            seed = int(np.random.SeedSequence(2, spawn_key=(0, episode)).generate_state(1)[0]) >> 1
            seen, _ = env.reset(seed=seed)
            rewards: list[float] = []
            over = False
            while not over:
                normalised = (seen - statistics["mean"].numpy()) / np.sqrt(
                    statistics["squares"].numpy() / statistics["count"] + 1e-8
                )
                features = policy.trunk(torch.tensor(normalised[None], dtype=torch.float32))
                action = player.act(player.see(seen[None]), None)[1][0]
                assert action == policy.head.linear(features).argmax()
                seen, reward, terminated, truncated, _ = env.step(action)
                rewards.append(float(reward))
                over = terminated or truncated
            returns.append(sum(rewards))
            lengths.append(len(rewards))
    assert player.normaliser.state_dict()["count"] == statistics["count"] == 2 * (12 * ITERATIONS + 1)
    result = evaluate_control(ControlEvalConfig(str(run), 6, seed=2))
    assert (result.returns, result.lengths) == (returns, lengths)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_film_of_the_first_episode(suffix: str, tmp_path: Path, whole: Callable[[str], Path]) -> None:
    film = tmp_path / "films" / f"first{suffix}"
    assert main(["control", "--eval", str(whole("native")), "--episodes", "2", "--record", str(film)]) == 0
    length = evaluate_control(ControlEvalConfig(str(whole("native")), 1)).lengths[0]
    frames = imageio.imread(film)
    assert frames.shape[1:] == (400, 600, 3)
    # of each state, the last included; equal ones in a row are one frame of a GIF, which lasts longer
    assert len(frames) == length + 1 if suffix == ".mp4" else 2 < len(frames) <= length + 1
    assert any((frame != frames[0]).any() for frame in frames)
    assert list(film.parent.iterdir()) == [film]


def pictures(folder: Path, kind: str) -> Path:
    """A run in a world that renders pictures of its own."""
    run = folder / f"pictures-{kind}"
    config = settings(folder, f"{folder / 'world.py'}:make_pictures", output=str(run), total_steps=24)
    config = replace(config, environments=EnvironmentsConfig(count=2, options={"kind": kind}))
    train_control(config).world.environments.close()
    return run


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("nothing", "render returned NoneType, expected an image (H, W, 3) of uint8"),
        ("floats", "render returned shape (4, 6), float64, expected an image"),
        ("failing", "render failed: ZeroDivisionError"),
    ],
)
def test_pictures_that_make_no_film(kind: str, says: str, folder: Path, tmp_path: Path) -> None:
    run = pictures(folder, kind)
    with pytest.raises(UserError) as error:
        evaluate_control(ControlEvalConfig(str(run), 1, record=str(tmp_path / "film.gif")))
    assert says in str(error.value)


def test_films_that_cannot_be(
    folder: Path, whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for run, film, says in (
        (whole("sync"), tmp_path / "film.gif", "takes no `render_mode`, so its episodes cannot be recorded"),
        (whole("native"), tmp_path / "film.avi", "expected a file name that ends in .gif or .mp4"),
        (whole("native"), tmp_path / "file" / "film.gif", "cannot be written: "),
        (pictures(folder, "image"), tmp_path / "file" / "a" / "film.mp4", "cannot be written: "),
    ):
        assert main(["control", "--eval", str(run), "--episodes", "1", "--record", str(film)]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert says in errors[0]


def test_a_policy_is_not_tried_on_numbers_that_are_none(
    folder: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    config = load_config(ControlConfig, ["--config", str(whole("sync") / "config.yaml")], "", "")
    (tmp_path / "checkpoints").symlink_to(whole("sync") / "checkpoints")
    broken = replace(config, environments=EnvironmentsConfig(options={"broken": "nan"}))
    (tmp_path / "config.yaml").write_text(dump_config(broken))
    with pytest.raises(UserError, match=r"step 1 of its episode: observation\[0\] is nan"):
        evaluate_control(ControlEvalConfig(str(tmp_path), 1))


def test_folders_that_hold_nothing_to_try(
    whole: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.yaml").write_text("model: model\niterations: 3\n")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_bytes((whole("native") / "config.yaml").read_bytes())
    for words, says in (
        (["--eval", str(tmp_path / "none")], "holds no run (config.yaml is missing)"),
        (["--eval", str(tmp_path / "text")], "names no `env`, so it is no run of `tether control`"),
        (["--eval", str(tmp_path / "begun")], "no checkpoint to evaluate"),
        (["--eval"], "--eval: found no value"),
        (["--eval", str(whole("native")), "--episodes", "0"], "episodes is 0, expected at least 1"),
        (["--resume", str(tmp_path / "text")], "config.yaml: model: no such field"),
    ):
        assert main(["control", *words]) == 2
        assert says in capsys.readouterr().err


# Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_are_read_and_run(path: Path, tmp_path: Path) -> None:
    """All as it is but for the size: one small iteration."""
    config = load_config(ControlConfig, ["--config", str(path)], "", "")
    assert config.output.startswith("runs/")
    assert config.environments.count * config.collect.steps % config.learner.minibatches == 0
    small = replace(
        config,
        output=str(tmp_path / "run"),
        total_steps=8 * config.environments.count,
        collect=replace(config.collect, steps=8),
        learner=replace(config.learner, epochs=1, minibatches=1),
    )
    trained = train_control(small)
    trained.world.environments.close()
    row = read_metrics(tmp_path / "run")[0]
    assert row["steps"] > 0
    assert np.isfinite(row["value_loss"])


def test_there_are_settings_of_each_kind_of_world() -> None:
    assert len(SHIPPED) >= 7
    assert {"cartpole", "pendulum", "hopper", "pong"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(("steps", "iterations"), [(1, 1), (24, 1), (25, 2), (48, 2)])
def test_the_last_iteration_is_done_whole(steps: int, iterations: int, tmp_path: Path) -> None:
    assert settings(tmp_path, "CartPole-v1", total_steps=steps).iterations == iterations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0, expected at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"output": ""}, "output is empty"),
        ({"advantage": AdvantageConfig("rloo")}, "compares episodes from the same start"),
        ({"learner": LearnerConfig(minibatches=25)}, "minibatches is 25, but an iteration has only 24 steps"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, "CartPole-v1", **changes)


@pytest.mark.slow
def test_cartpole_is_solved_by_the_shipped_settings(tmp_path: Path) -> None:
    assert (
        main(["control", "--config", str(ROOT / "examples/control/cartpole.yaml"), "--output", str(tmp_path / "run")])
        == 0
    )
    result = evaluate_control(ControlEvalConfig(str(tmp_path / "run"), 20))
    assert np.mean(result.returns) > 475  # what gymnasium calls solved
