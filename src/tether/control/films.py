"""Films: of episodes that were recorded in training, and of one that is being played in an evaluation.

Training itself renders nothing and is not touched: an episode is played again, from its seed and by its actions. It
knows how an environment is made and rendered, nothing of policies; the store only learns the file's name. A film that
fails in the midst of a run is told in a line, and the run goes on.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tether.control.infos import warn_once
from tether.control.kept import kept_layers
from tether.control.loading import one_line_errors
from tether.control.making import EnvironmentsConfig, make_environment
from tether.control.words import in_words
from tether.episode import FILMS_FOLDER
from tether.errors import UserError
from tether.random_states import random_states_kept, seed_random_states

logger = logging.getLogger(__name__)

MOST_FRAMES = 128  # of a longer episode every second, third, … state is shown
MOST_KEPT = 1000  # frames of a film that is taken while it is played
MOST_BYTES = 2**29  # of them together
LONGEST_SIDE = 200  # pixels of a frame; larger ones are shrunk by a whole factor
MOST_FRAMES_PER_SECOND = 50  # browsers play no GIF faster
USUAL_FRAMES_PER_SECOND = 30  # where the environment does not say


class Films:
    """Makes films of episodes, each one PNG with its frames in rows from left to right.

    Args:
        folder: of the run.
        env: what the environments are, as `make_environment` takes it.
        config: how they are made.

    Raises:
        UserError: the environment cannot be made or rendered, or no images can be written.
    """

    def __init__(self, folder: Path, env: str, config: EnvironmentsConfig) -> None:
        self.folder, self.env, self.config = folder, env, config
        self._told: set[str] = set()  # kinds of what went wrong
        choose_renderer()
        require_imageio("collect.film_every")
        with random_states_kept(), closing(make_environment(env, config, "rgb_array")) as environment:
            environment.reset(seed=0)
            render(environment, f"environment `{env}`")

    def make(
        self, name: str, seed: int, actions: Sequence[Any], states: Sequence[str]
    ) -> tuple[str, dict[str, int]] | None:
        """Film one episode.

        Args:
            name: of the file, without its ending.
            seed: that the episode was begun with.
            actions: as the environment takes them.
            states: what was observed before each of them, in words; the film has to show the same.

        Returns:
            The file relative to the run's folder, and how it is cut: `frames` of `width` × `height` pixels in so many
            `columns`, of every `every`-th state. None where the episode went another way, or there can be no film of
            it: a line says why, once.
        """
        label = f"environment `{self.env}`"
        try:
            # what an environment draws from the global generators is its episode's, as in a worker process
            with one_line_errors(f"{label}: the film failed"), random_states_kept():
                seed_random_states(seed)
                every = math.ceil((len(actions) + 1) / MOST_FRAMES)
                frames = self._frames(seed, actions, states, every)
                if frames is None:
                    warn_once(f"{label}: no film: the same seed and actions led to other observations")
                    return None
                return self._write(name, frames, every)
        except UserError as error:
            kind = re.sub(r"\d+", "", str(error))
            if kind not in self._told:
                self._told.add(kind)
                logger.warning("no film, and training goes on: %s", error)
            return None

    def _frames(
        self, seed: int, actions: Sequence[Any], states: Sequence[str], every: int
    ) -> list[NDArray[np.uint8]] | None:
        """Of every `every`-th state; None where the episode goes another way."""
        frames = []
        label = f"environment `{self.env}`"
        with closing(make_environment(self.env, self.config, "rgb_array")) as environment:
            comparable = not kept_layers(environment)  # else observations depend on earlier episodes
            seen, _ = environment.reset(seed=seed)
            for step, (action, state) in enumerate(zip(actions, states, strict=True)):
                if comparable and in_words(np.asarray(seen)[None]) != [state]:
                    return None
                if step % every == 0:
                    frames.append(shrink(render(environment, label)))
                seen, _, terminated, truncated, _ = environment.step(self._action(environment, action))
                if (terminated or truncated) and step + 1 < len(actions):
                    return None
            if len(actions) % every == 0:
                frames.append(shrink(render(environment, label)))
        return frames

    @staticmethod
    def _action(environment: Any, action: Any) -> Any:
        return np.array(action, dtype=environment.action_space.dtype)[()]

    def _write(self, name: str, frames: Sequence[NDArray[np.uint8]], every: int) -> tuple[str, dict[str, int]]:
        import imageio.v3 as imageio

        together = of_one_size(frames)
        strip, columns = _in_rows(together)
        file = self.folder / FILMS_FOLDER / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            imageio.imwrite(file, strip, extension=".png")
        except BaseException:
            file.unlink(missing_ok=True)
            raise
        height, width = together.shape[1:3]
        cut = {"frames": len(frames), "columns": columns, "width": width, "height": height, "every": every}
        return f"{FILMS_FOLDER}/{file.name}", cut


class Film:
    """A film of the first episode that is played while it rolls. What `Environments.to_try` calls a `watch`.

    Of environments that are faster than a film can show, only every second, third, … state is rendered and kept. Where
    there are more than `MOST_KEPT` frames, or `MOST_BYTES` of them, every second one goes, and from there on half as
    many are taken, as often as need be: a film of any length has its pace, and bounded memory.

    Args:
        path: of the file, which ends in .gif or .mp4.

    Raises:
        UserError: it cannot be written, or no images can be.
    """

    def __init__(self, path: str) -> None:
        choose_renderer()
        require_imageio(path)
        self.path = path
        self._frames: list[NDArray[np.uint8]] = []
        self._states = 0
        self._episodes: int | None = None  # begun; None before it rolls
        self._speed = float(USUAL_FRAMES_PER_SECOND)
        self._every = 1  # states from one frame to the next
        self._fault = ""
        with _written(path):
            # tried now rather than after the episode; what fails until then leaves no empty file
            there = Path(path).exists()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("ab").close()
            if not there:
                Path(path).unlink()

    def roll(self) -> None:
        """From the next episode on."""
        self._episodes = 0

    def __call__(self, environment: Any, begins: bool) -> None:
        """Take the present state.

        Raises:
            UserError: the first one is no image, so that there would be no film. What fails later is told at the end.
        """
        if self._episodes is None:
            return
        self._episodes += begins
        if self._episodes > 1 or self._fault:
            return
        if not self._states:
            self._speed = frames_per_second(environment)
            self._every = math.ceil(self._speed / MOST_FRAMES_PER_SECOND)
        self._states += 1
        if (self._states - 1) % self._every:
            return
        try:
            self._frames.append(render(environment, self.path))
        except UserError as error:
            if not self._frames:
                raise
            self._fault = str(error)
        if len(self._frames) > MOST_KEPT or sum(frame.nbytes for frame in self._frames) > MOST_BYTES:
            self._frames = self._frames[::2]
            self._every *= 2

    def finish(self) -> bool:
        """Write it; whether that worked. A line says why not, or that it ends early."""
        import imageio.v3 as imageio

        options: dict[str, Any] = {"duration": 1000 * self._every / self._speed, "loop": 0}
        if self.path.endswith(".mp4"):  # needs even sides; without the last it would stretch them to multiples of 16
            options = {"plugin": "FFMPEG", "fps": self._speed / self._every, "macro_block_size": 2}
        try:
            with _written(self.path), one_line_errors(f"{self.path}: cannot be written"):
                imageio.imwrite(self.path, of_one_size(self._frames), **options)
        except UserError as error:
            logger.warning("no film: %s", error)
            return False
        if self._fault:
            logger.warning("the film ends early: %s", self._fault)
        return True


def frames_per_second(environment: Any) -> float:
    """What the environment says of it, and the usual where it says nothing that could be."""
    said = (environment.metadata or {}).get("render_fps")
    if isinstance(said, Real) and math.isfinite(said) and float(said) > 0:
        return float(said)
    if said is not None:
        logger.warning("render_fps is %r, so the film has %d frames per second", said, USUAL_FRAMES_PER_SECOND)
    return float(USUAL_FRAMES_PER_SECOND)


@contextmanager
def _written(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def choose_renderer() -> None:
    """MuJoCo renders without a display only if told so."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def require_imageio(what: str) -> None:
    """UserError where images cannot be written."""
    try:
        import imageio.v3  # noqa: F401
    except ImportError as error:
        raise UserError(f'{what}: films need imageio: pip install "tether[control]"') from error


def render(environment: Any, label: str) -> NDArray[np.uint8]:
    """(H, W, 3) what the environment shows of its present state, a copy; grey becomes colour, transparency is left out.

    Raises:
        UserError: it fails, or shows no image.
    """
    # what it draws to show itself is no part of the episode
    with (
        one_line_errors(f"{label}: the environment's render failed"),
        random_states_kept(),
        _generator_kept(environment),
    ):
        frame = environment.render()
        if not isinstance(frame, np.ndarray) and hasattr(frame, "__array_interface__"):  # an image of PIL
            frame = np.asarray(frame)
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.size:
        if frame.ndim == 2:
            frame = frame[:, :, None]
        if frame.ndim == 3 and frame.shape[2] in (1, 3, 4):
            return np.repeat(frame, 3, axis=2) if frame.shape[2] == 1 else np.array(frame[:, :, :3])
    found = f"shape {frame.shape}, {frame.dtype}" if isinstance(frame, np.ndarray) else type(frame).__name__
    raise UserError(f"{label}: the environment's render returned {found}, expected an image (H, W, 3) of uint8")


@contextmanager
def _generator_kept(environment: Any) -> Iterator[None]:
    generator = getattr(getattr(environment, "unwrapped", None), "_np_random", None)
    if not isinstance(generator, np.random.Generator):
        yield
        return
    before = generator.bit_generator.state
    try:
        yield
    finally:
        generator.bit_generator.state = before


def of_one_size(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Frames (H, W, 3) together as (n, H, W, 3); those that are smaller than others get black edges below and right."""
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    together = np.zeros((len(frames), height, width, 3), dtype=np.uint8)
    for place, frame in enumerate(frames):
        together[place, : frame.shape[0], : frame.shape[1]] = frame
    return together


def shrink(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame (H, W, 3) by the smallest whole factor that leaves no side above `LONGEST_SIDE` pixels, by means."""
    factor = math.ceil(max(frame.shape[:2]) / LONGEST_SIDE)
    down, across = min(factor, frame.shape[0]), min(factor, frame.shape[1])  # a side that is shorter becomes 1
    height, width = frame.shape[0] // down, frame.shape[1] // across
    cut = frame[: height * down, : width * across]
    return cut.reshape(height, down, width, across, -1).mean(axis=(1, 3)).astype(np.uint8)


def _in_rows(frames: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Frames (n, H, W, 3) as one image that is about square, and how many stand in a row."""
    count, height, width, channels = frames.shape
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    padded[:count] = frames
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels), columns
