"""Films of recorded episodes: an episode is played again, from its seed and by its actions, where frames are rendered.

Training itself renders nothing and is not touched. It knows how an environment is made and rendered, nothing of
policies; the store only learns the file's name.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tether.control.loading import one_line_errors
from tether.control.making import EnvironmentsConfig, make_environment
from tether.control.words import in_words
from tether.episode import FILMS_FOLDER
from tether.errors import UserError

logger = logging.getLogger(__name__)

MOST_FRAMES = 128  # of a longer episode every second, third, … state is shown
LONGEST_SIDE = 200  # pixels of a frame; larger ones are shrunk by a whole factor


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
        choose_renderer()
        require_imageio("collect.film_every")
        with closing(make_environment(env, config, "rgb_array")) as environment:
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
            `columns`, of every `every`-th state. None where the episode went another way.
        """
        import imageio.v3 as imageio

        every = math.ceil((len(actions) + 1) / MOST_FRAMES)
        frames = []
        with closing(make_environment(self.env, self.config, "rgb_array")) as environment:
            label = f"environment `{self.env}`"
            seen, _ = environment.reset(seed=seed)
            for step, (action, state) in enumerate(zip(actions, states, strict=True)):
                if in_words(np.asarray(seen)[None]) != [state]:
                    logger.warning("%s: no film: the same seed and actions led to other observations", label)
                    return None
                if step % every == 0:
                    frames.append(shrink(render(environment, label)))
                seen, *_ = environment.step(np.array(action, dtype=environment.action_space.dtype)[()])
            if len(actions) % every == 0:
                frames.append(shrink(render(environment, label)))
        strip, columns = _in_rows(np.stack(frames))
        file = self.folder / FILMS_FOLDER / f"{name}.png"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            imageio.imwrite(file, strip, extension=".png")
        except OSError as error:
            raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
        height, width = frames[0].shape[:2]
        cut = {"frames": len(frames), "columns": columns, "width": width, "height": height, "every": every}
        return f"{FILMS_FOLDER}/{file.name}", cut


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
    """(H, W, 3) what the environment shows of its present state; UserError where that is no image."""
    with one_line_errors(f"{label}: the environment's render failed"):
        frame = environment.render()
    if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3):
        found = f"shape {frame.shape}, {frame.dtype}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UserError(f"{label}: the environment's render returned {found}, expected an image (H, W, 3) of uint8")
    return frame


def shrink(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A frame (H, W, 3) by the smallest whole factor that leaves no side above `LONGEST_SIDE` pixels, by means."""
    factor = math.ceil(max(frame.shape[:2]) / LONGEST_SIDE)
    height, width = frame.shape[0] // factor, frame.shape[1] // factor
    cut = frame[: height * factor, : width * factor]
    return cut.reshape(height, factor, width, factor, -1).mean(axis=(1, 3)).astype(np.uint8)


def _in_rows(frames: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Frames (n, H, W, 3) as one image that is about square, and how many stand in a row."""
    count, height, width, channels = frames.shape
    columns = min(count, math.ceil(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    padded[:count] = frames
    grid = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels), columns
