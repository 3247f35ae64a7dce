"""Atari games, by the vector environment that ale-py brings: emulation and preprocessing in C++, several at once.

The preprocessing is that of Mnih et al. (2015, Methods) as ale-py does it: an action is repeated for 4 frames, the
pixel-wise maximum of the last two is turned to grey and scaled to 84 × 84, and the last 4 of these are one observation
(4, 84, 84); up to 30 no-ops at the start, and FIRE where the game waits for it; rewards are clipped to their sign.
The `v5` ids have sticky actions besides (Machado et al. 2018): with a probability of 0.25 the last action is repeated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray

from tether.errors import UserError

if TYPE_CHECKING:
    from tether.control.making import EnvironmentsConfig

ENTRY_POINT = "ale_py.vector_env:AtariVectorEnv"
_SCREEN = {"img_height": 210, "img_width": 160, "grayscale": False, "stack_num": 1}
_OLDEST = [0, 12]
SEEDS = 2**31
"""Seeds are below: the emulator takes 32 bits with a sign."""


def is_atari(spec: EnvSpec) -> bool:
    """Whether `spec` is a game that ale-py's vector environment plays."""
    return spec.vector_entry_point == ENTRY_POINT


def atari_creator() -> Callable[..., Any]:
    """ale-py's vector environment."""
    return load_env_creator(ENTRY_POINT)


def atari_options(label: str, config: EnvironmentsConfig, *, training: bool) -> dict[str, Any]:
    """Keyword arguments for the game: `config.options`, and the fields that mean the same.

    `frame_stack` is its `stack_num` and `action_repeat` its `frameskip`; left at 1 they are the game's own, 4 each.
    `max_episode_steps` is counted in actions, the no-ops at the start included. Evaluation plays whole games with
    rewards as they are.

    Raises:
        UserError: the same thing is said twice, or an option makes what Tether cannot train on.
    """
    options = dict(config.options)
    for name, option in (("frame_stack", "stack_num"), ("action_repeat", "frameskip")):
        value = getattr(config, name)
        if value > 1 and option in options:
            raise UserError(f"{label}: {name} is {value} and option `{option}` is {options[option]}: give one of them")
        if value > 1:
            options[option] = value
    for option, value, remedy in (
        ("batch_size", 0, "all environments are stepped together"),
        ("life_loss_info", False, "`episodic_life: true` ends an episode with each life"),
        ("grayscale", True, "images are (stack_num, H, W)"),
    ):
        if options.get(option, value) != value:
            raise UserError(f"{label}: option `{option}` is {options[option]}, expected {value}: {remedy}")
    frameskip = options.get("frameskip", 4)
    if type(frameskip) is not int or frameskip < 1:
        raise UserError(f"{label}: option `frameskip` is {frameskip}, expected a whole number of at least 1")
    if config.max_episode_steps is not None:
        if "max_num_frames_per_episode" in options:
            raise UserError(f"{label}: max_episode_steps and option `max_num_frames_per_episode`: give one of them")
        options["max_num_frames_per_episode"] = config.max_episode_steps * frameskip
    if not training:
        options |= {"reward_clipping": False, "episodic_life": False}
    return options


def make_games(name: str, count: int, options: dict[str, Any]) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    """`count` games of the id `name`, stepped together. An ended one must be reset before the next step.

    Raises:
        UserError: ale-py is too old to begin one game anew with a seed of its own.
    """
    found = importlib.metadata.version("ale-py")
    if [int(part) for part in found.split(".")[:2]] < _OLDEST:
        raise UserError(f"environment `{name}`: found ale-py {found}, expected 0.12 or newer: `pip install -U ale-py`")
    return gymnasium.make_vec(name, num_envs=count, vectorization_mode="vector_entry_point", **options)


class AtariEnvironment(gymnasium.Env[NDArray[np.uint8], Any]):
    """One game as a gymnasium.Env: the vector environment with a single game in it, so that nothing differs.

    Rendering shows the colours of the whole screen: a second emulator of the same seed that does the same actions.
    """

    def __init__(self, name: str, options: dict[str, Any], render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise UserError(f"environment `{name}`: render mode `{render_mode}` is not offered, expected `rgb_array`")
        options = {"num_threads": 1, **options}
        self._game = make_games(name, 1, options)
        self._screen = make_games(name, 1, {**options, **_SCREEN}) if render_mode else None
        self._ended = True
        self._shown: NDArray[Any] | None = None
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 60 // min(60, options.get("frameskip", 4))}
        self.observation_space = self._game.single_observation_space
        self.action_space = self._game.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Begin a game; without `seed` it is drawn."""
        super().reset(seed=seed)
        chosen = np.array([int(self.np_random.integers(SEEDS)) if seed is None else seed % SEEDS])
        observations, infos = self._game.reset(seed=chosen)  # type: ignore[arg-type]
        if self._screen is not None:
            self._shown = self._screen.reset(seed=chosen)[0]  # type: ignore[arg-type]
        self._ended = False
        return observations[0], _first(infos)

    def step(self, action: Any) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Do `action`; ResetNeeded where the game has ended."""
        if self._ended:
            raise ResetNeeded("the game has ended: call reset")
        actions = np.asarray(action)[None]
        observations, rewards, terminated, truncated, infos = self._game.step(actions)
        if self._screen is not None:
            self._shown = self._screen.step(actions)[0]
        self._ended = bool(terminated[0] or truncated[0])
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _first(infos)

    def render(self) -> Any:
        """The screen (210, 160, 3) uint8, None without a render mode."""
        if self._shown is None:
            return None
        return self._shown[0, 0]

    def close(self) -> None:
        """Give the emulators back."""
        self._game.close()
        if self._screen is not None:
            self._screen.close()


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: values[0].item() for name, values in infos.items()}
