"""Films of episodes: the frames of the very states that were stored, and training as it is without them."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.run_folders import metric_lines

from tether.cli import main
from tether.control import films
from tether.control.films import Films, shrink
from tether.control.making import EnvironmentsConfig
from tether.errors import UserError
from tether.runs import read_episodes

SOURCE = """
import gymnasium
import numpy as np


class Painted(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    render_mode = "rgb_array"
    begun = 0

    def __init__(self, random=False):
        self.random = random

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Painted.begun += 1
        self.start, self.time = int(self.np_random.integers(1, 200)), 0
        if self.random:
            self.start = Painted.begun
        return self.shown(), {}

    def step(self, action):
        self.time += 1 + int(action)
        return self.shown(), 1.0, self.time >= 9, False, {}

    def shown(self):
        return np.array([self.start, self.time], np.float32)

    def render(self):
        frame = np.zeros((6, 8, 3), np.uint8)
        frame[:, :, 0], frame[:, :, 1] = self.start, self.time
        return frame


def make_env(render_mode=None, random=False):
    return Painted(random)


def make_blind(render_mode=None):
    env = Painted()
    env.render = lambda: None
    return env
"""


@pytest.fixture
def painted(tmp_path: Path) -> Path:
    file = tmp_path / "painted.py"
    file.write_text(SOURCE)
    return file


def start(file: Path, run: Path, *flags: str) -> list[str]:
    command = f"control --env {file}:make_env --output {run} --total-steps 96 --environments.count 2 --collect.steps 16"
    settings = "--collect.record 2 --learner.epochs 1 --learner.minibatches 1 --checkpoint-every 2 --network.hidden 4"
    return [*command.split(), *settings.split(), *flags]


def frames_of(run: Path, name: str, cut: dict[str, int]) -> list[NDArray[Any]]:
    image = imageio.imread(run / name)
    width, height = cut["width"], cut["height"]
    places = [divmod(number, cut["columns"]) for number in range(cut["frames"])]
    return [image[y * height : (y + 1) * height, x * width : (x + 1) * width] for y, x in places]


def test_a_film_shows_every_state_of_its_episode(painted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(start(painted, run, "--collect.film-every", "32")) == 0
    episodes = read_episodes(run, limit=1000)
    filmed = [episode for episode in episodes if episode.frames is not None]
    assert len(filmed) == 3  # 96 steps
    assert {path.name for path in (run / "films").iterdir()} == {str(e.frames).removeprefix("films/") for e in filmed}
    for episode in filmed:
        frames = frames_of(run, str(episode.frames), episode.details["film"])
        assert episode.details["film"]["every"] == 1
        assert len(frames) == episode.length + 1  # the last is of what the last action led to
        for state, frame in zip(episode.states or [], frames, strict=False):
            assert [f"{number:+.3f}" for number in frame[0, 0, :2]] == state.split()
        assert frames[-1][0, 0, 1] >= 9


def test_filming_changes_nothing_else(painted: Path, tmp_path: Path) -> None:
    plain, filmed = tmp_path / "plain", tmp_path / "filmed"
    assert main(start(painted, plain)) == 0
    assert main(start(painted, filmed, "--collect.film-every", "1")) == 0
    assert not (plain / "films").exists()
    assert metric_lines(plain) == metric_lines(filmed)
    for expected, found in zip(read_episodes(plain, limit=1000), read_episodes(filmed, limit=1000), strict=True):
        details = {name: value for name, value in found.details.items() if name != "film"}
        assert vars(found) | {"frames": None, "details": details} == vars(expected)


def test_a_resumed_run_has_the_films_of_one_that_never_stopped(painted: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(start(painted, whole, "--collect.film-every", "20")) == 0
    assert main(start(painted, parts, "--collect.film-every", "20", "--total-steps", "64")) == 0
    (parts / "films" / "left-over.png").write_bytes(b"of an iteration that was never logged")
    assert main(["control", "--resume", str(parts), "--total-steps", "96"]) == 0
    found, expected = ({path.name: path.read_bytes() for path in (run / "films").iterdir()} for run in (parts, whole))
    assert found == expected
    names = [[episode.frames for episode in read_episodes(run, limit=1000)] for run in (parts, whole)]
    assert names[0] == names[1]
    assert main(start(painted, parts, "--overwrite")) == 0
    assert not (parts / "films").exists()


def test_an_episode_that_is_not_a_function_of_its_seed_has_no_film(
    painted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        flags = ("--collect.film-every", "1", "--environments.options", "{random: true}")
        assert main(start(painted, run, *flags)) == 0
    assert "no film: the same seed and actions led to other observations" in caplog.text
    assert all(episode.frames is None for episode in read_episodes(run, limit=1000))
    assert not (run / "films").exists()


def test_long_episodes_and_large_frames_are_thinned(
    painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(films, "MOST_FRAMES", 4)
    made = Films(tmp_path, f"{painted}:make_env", EnvironmentsConfig()).make("name", 3, [0] * 8, _states(painted, 3, 8))
    assert made is not None
    name, cut = made
    assert (cut["frames"], cut["every"]) == (3, 3)  # of 9 states
    assert [int(frame[0, 0, 1]) for frame in frames_of(tmp_path, name, cut)] == [0, 3, 6]
    large = np.arange(5 * 401 * 3, dtype=np.uint32).reshape(5, 401, 3).astype(np.uint8)
    assert shrink(large).shape == (1, 133, 3)
    assert shrink(large[:, :200]).tolist() == large[:, :200].tolist()


def _states(file: Path, seed: int, steps: int) -> list[str]:
    """Of an episode of zeros."""
    start = int(np.random.default_rng(np.random.PCG64(seed)).integers(1, 200))
    return [f"+{start}.000 +{time}.000" for time in range(steps)]


def test_what_cannot_be_filmed_is_told_before_the_run_begins(
    painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="render returned NoneType, expected an image"):
        Films(run, f"{painted}:make_blind", EnvironmentsConfig())
    native = ["control", "--env", "CartPole-v1", "--output", str(run), "--collect.film-every", "100"]
    assert main([*native, "--environments.vectorization", "native"]) == 2
    assert "collect.film_every: `CartPole-v1` is stepped by its own vector environment" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([np.full((4, 6), 7)], (1, 4, 6, 3)),
        ([np.full((4, 6, 1), 7)], (1, 4, 6, 3)),
        ([np.full((4, 6, 4), 7)], (1, 4, 6, 3)),
        ([np.full((4, 6, 3), 7), np.full((9, 5, 3), 7)], (2, 9, 6, 3)),
    ],
    ids=["flat", "grey", "transparent", "resized"],
)
def test_unusual_frames_make_a_film(frames: list[NDArray[Any]], expected: tuple[int, ...]) -> None:
    shown = iter(frames)
    environment: Any = SimpleNamespace(render=lambda: next(shown).astype(np.uint8))
    together = films.of_one_size([films.render(environment, "") for _ in frames])
    assert together.shape == expected
    assert (together[0, :4, :5] == 7).all()
    assert (together[-1] == 7).sum() == 3 * frames[-1].shape[0] * frames[-1].shape[1]


def test_a_frame_is_a_copy() -> None:
    buffer = np.zeros((4, 4, 3), np.uint8)
    frame = films.render(SimpleNamespace(render=lambda: buffer), "")
    buffer[...] = 9
    assert not frame.any()


@pytest.mark.parametrize("said", [None, 0, -3, float("nan"), "fast", 20, 20.5])
def test_the_speed_of_a_film_is_the_environments_where_it_is_one(said: Any) -> None:
    usual = films.USUAL_FRAMES_PER_SECOND
    found = films.frames_per_second(SimpleNamespace(metadata={"render_fps": said}))
    assert found == (said if said in (20, 20.5) else usual)


def test_a_film_that_fails_on_the_way_leaves_what_it_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    film = films.Film(str(tmp_path / "film.gif"))
    frames = iter([np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)])
    environment: Any = SimpleNamespace(metadata={}, render=lambda: next(frames))  # StopIteration after two
    film.roll()
    for begins in (True, False, False, False, True):
        film(environment, begins)
    with caplog.at_level(logging.WARNING):
        assert film.finish()
    assert "the film ends early" in caplog.text
    assert len(imageio.imread(tmp_path / "film.gif")) == 2


def test_a_film_that_cannot_begin_is_refused(tmp_path: Path) -> None:
    film = films.Film(str(tmp_path / "film.gif"))
    film.roll()
    with pytest.raises(UserError, match="render returned NoneType"):
        film(SimpleNamespace(metadata={}, render=lambda: None), True)


def test_a_long_narrow_frame_is_shrunk() -> None:
    assert shrink(np.full((1, 5000, 3), 7, np.uint8)).shape == (1, 200, 3)
    assert shrink(np.full((1999, 3, 3), 7, np.uint8)).shape[1] == 1


@pytest.mark.parametrize(("limit", "value"), [("MOST_KEPT", 10), ("MOST_BYTES", 10 * 2 * 2 * 3)])
def test_a_film_of_any_length_has_bounded_memory_and_its_pace(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(films, limit, value)
    film = films.Film(str(tmp_path / "film.gif"))
    film.roll()
    shown = SimpleNamespace(metadata={"render_fps": 10})
    for step in range(100):
        shown.render = lambda step=step: np.full((2, 2, 3), step, np.uint8)
        film(shown, step == 0)
        assert len(film._frames) <= 10
    assert [int(frame[0, 0, 0]) for frame in film._frames] == list(range(0, 100, 16))
    assert film.finish()
    assert imageio.immeta(tmp_path / "film.gif")["duration"] == 1600
