"""From a run's configuration to one environment: ids, `file.py:make_env`, the spaces that can be learnt from.

Knows how one environment is found, made and wrapped, and says in one line what is wrong with it. It does not know how
several are stepped together.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.wrappers import TimeLimit

from tether.control.atari import AtariEnvironment, atari_creator, atari_options, is_atari
from tether.control.loading import INSTALL, import_named, one_line_errors
from tether.control.wrappers import ActionRepeat, ChannelsFirst, Checked, FrameStack
from tether.errors import UserError
from tether.yaml_file import describe, one_line

Env = gymnasium.Env[Any, Any]

_OWN = {  # options that would get past the fields of the same meaning
    "render_mode": "it is chosen where episodes are recorded",
    "max_episode_steps": "it is a field beside `options`",
    "num_envs": "the field `count` beside `options` says it",
    "vectorization_mode": "the field `vectorization` beside `options` says it",
    "autoreset_mode": "ended episodes are begun anew by Tether",
}


@dataclass(frozen=True)
class EnvironmentsConfig:
    """How the environment is made, and how many of it are stepped together."""

    count: int = 8
    """Environments stepped together."""
    vectorization: Literal["auto", "native", "sync", "async"] = "auto"
    """How they are stepped: `native`, by the vector environment that the id brings; `sync`, one after the other in this
    process; `async`, each in a worker process, for simulators that need far longer than 0.1 ms a step. `auto` is native
    where the id brings one that can do what is asked, else sync."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments for the environment, as gymnasium.make or the `make_env` function takes them."""
    max_episode_steps: int | None = None
    """Truncate episodes after so many of the environment's own steps, instead of the limit that the id comes with."""
    longest_episode: int = 100_000
    """Where an environment has no time limit of its own, an episode is cut off after so many actions, as by one:
    checkpoints remember it from its first action, and an evaluation would never end."""
    action_repeat: int = 1
    """Do each action so many times and sum the rewards; stops early where the episode ends. Atari: its `frameskip`,
    4 where this is left at 1."""
    frame_stack: int = 1
    """Show the last so many observations as one: images (H, W, C) become (C·k, H, W), vectors are concatenated, oldest
    first. Atari: its `stack_num`, 4 where this is left at 1."""

    def __post_init__(self) -> None:
        for name in ("count", "action_repeat", "frame_stack", "max_episode_steps", "longest_episode"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        if self.vectorization not in ("auto", "native", "sync", "async"):
            raise ValueError(f"vectorization is {self.vectorization!r}, expected auto, native, sync or async")
        for name, reason in _OWN.items():
            if name in self.options:
                raise ValueError(f"options.{name} cannot be given: {reason}")


@dataclass(frozen=True)
class Source:
    """Where environments come from: a registered id, or a function that makes one.

    Attributes:
        name: what the configuration calls it.
        label: what messages call it, ``environment `CartPole-v1` ``.
        spec: what gymnasium has registered under the id; None for a function.
        factory: the function; None for an id.
    """

    name: str
    label: str
    spec: EnvSpec | None = None
    factory: Callable[..., Any] | None = None


def make_environment(env: str, config: EnvironmentsConfig, render_mode: str | None = None) -> Env:
    """One environment with the wrappers of training, to evaluate a policy in or to record episodes.

    An Atari game is the native one with the same preprocessing, but whole games with rewards as they are: never
    clipped (`reward_clipping`), never ended by a lost life (`episodic_life`).

    Args:
        env: a registered id (`CartPole-v1`, `ALE/Pong-v5`, `module:Id-v0`: the module is imported first), or a function
            that returns a gymnasium.Env: `path/file.py:make_env`, `package.module:make_env` (the current folder is
            importable). The function is called with the options as keyword arguments, and with `render_mode` if it
            has an argument of that name.
        config: how it is made; `count` and `vectorization` do not matter here.
        render_mode: gymnasium's, for example `rgb_array`.

    Raises:
        UserError: there is no such id, file or function; it fails; or it makes what cannot be learnt from.
    """
    return build(find_source(env), config, render_mode, training=False)


def find_source(env: str) -> Source:
    """Find the registered id or the function that `env` names; UserError where there is none."""
    label = f"environment `{env}`"
    place, colon, name = env.rpartition(":")
    if not colon:
        return Source(env, label, spec=_find_spec(label, env))
    if not place or not name:
        raise UserError(f"{label}: expected a registered id, `file.py:make_env`, or `package.module:make_env`")
    module = import_named(label, place)
    if not place.endswith(".py") and (re.search(r"-v\d+$", name) or name in gymnasium.registry):
        return Source(env, label, spec=_find_spec(label, name))
    if not hasattr(module, name):
        there = [key for key, value in vars(module).items() if _defined_in(module, value) and not key.startswith("_")]
        raise UserError(f"{label}: {place} has no `{name}`; it has: {', '.join(there) or 'no function'}")
    factory = getattr(module, name)
    if not callable(factory):
        raise UserError(
            f"{label} is not callable, but {type(factory).__name__}; expected a function that returns a gymnasium.Env"
        )
    return Source(env, label, factory=factory)


def build(
    source: Source, config: EnvironmentsConfig, render_mode: str | None = None, *, training: bool, place: str = ""
) -> Env:
    """One environment from `source`, checked and wrapped. `place` tells it from others where it goes wrong."""
    label = source.label
    if source.spec is not None and is_atari(source.spec):
        options = atari_options(label, config, training=training)
        with one_line_errors(f"{label}: cannot be made"):
            check_options(label, atari_creator(), config.options, source.spec.kwargs)
            return Checked(AtariEnvironment(source.spec.id, options, render_mode), label + place)
    if source.spec is not None:
        env = _make_registered(label, source.spec, config, render_mode)
    else:
        assert source.factory is not None
        env = _call_factory(label, source.factory, config, render_mode)
    return wrap(env, config, label, place)


def wrap(env: Env, config: EnvironmentsConfig, label: str, place: str = "") -> Env:
    """`env` checked and wrapped as `config` says. `place` tells it from others where it goes wrong."""
    layout = check_spaces(label, getattr(env, "observation_space", None), getattr(env, "action_space", None))
    env = Checked(env, label + place)
    if config.action_repeat > 1:
        env = ActionRepeat(env, config.action_repeat)
    if layout == "to be transposed":
        env = ChannelsFirst(env)
    if config.frame_stack > 1:
        env = FrameStack(env, config.frame_stack)
    return env


def _make_registered(label: str, spec: EnvSpec, config: EnvironmentsConfig, render_mode: str | None) -> Env:
    with one_line_errors(f"{label}: cannot be made"):
        if spec.entry_point is None:
            raise UserError(f"{label}: the id has only a vector environment: `vectorization: native` steps it")
        creator = spec.entry_point if callable(spec.entry_point) else load_env_creator(spec.entry_point)
        check_options(label, creator, config.options, spec.kwargs)
        arguments = {"render_mode": render_mode} if render_mode is not None else {}
        # The passive checker warns of what Checked makes an error, and costs more than a CartPole step.
        return gymnasium.make(
            spec.id,
            max_episode_steps=config.max_episode_steps,
            disable_env_checker=True,
            **arguments,
            **config.options,
        )


def _call_factory(label: str, factory: Callable[..., Any], config: EnvironmentsConfig, render_mode: str | None) -> Env:
    check_options(label, factory, config.options, {})
    arguments = dict(config.options)
    if render_mode is not None:
        if "render_mode" not in _parameters(factory)[0]:
            raise UserError(
                f"{label}: takes no `render_mode`, so its episodes cannot be recorded: add the argument "
                "`render_mode=None` and hand it to gymnasium.make"
            )
        arguments["render_mode"] = render_mode
    with one_line_errors(f"{label}: fails"):
        env = factory(**arguments)
    if not isinstance(env, gymnasium.Env):
        remedy = ""
        if isinstance(env, gymnasium.vector.VectorEnv):
            remedy = ": return one environment, Tether steps several together"
        elif type(env).__module__.partition(".")[0] == "gym":
            remedy = " (the old gym package's are other ones: import gymnasium as gym)"
        elif isinstance(env, type) and issubclass(env, gymnasium.Env):
            remedy = ": return an instance, call the class"
        raise UserError(f"{label}: returned {_kind(env)}, expected a gymnasium.Env{remedy}")
    if config.max_episode_steps is not None:
        env = TimeLimit(env, config.max_episode_steps)
    return env


def check_spaces(label: str, observations: Any, actions: Any) -> Literal["as it is", "to be transposed"]:
    """What has to be done to an environment's observations; UserError where its spaces cannot be learnt with."""
    for name, space in (("observation_space", observations), ("action_space", actions)):
        if not isinstance(space, spaces.Space):
            raise UserError(f"{label}: its {name} is {_kind(space)}, expected a gymnasium space: set it in __init__")
    _check_actions(label, actions)
    wrap = "return gymnasium.wrappers.FlattenObservation(env) from a function `make_env` and name it `file.py:make_env`"
    if not isinstance(observations, spaces.Box):
        effect = " (numbers one after the other, choices as one-hot)" if _flattens(observations) else ""
        raise UserError(f"{label}: observation space {_shown(observations)}, expected a Box: {wrap}{effect}")
    shape = observations.shape
    if not all(shape):
        raise UserError(f"{label}: observation space {_shown(observations)} is empty, expected at least one number")
    if observations.dtype.kind not in "fiub":
        raise UserError(f"{label}: observations are {observations.dtype}, expected floats, integers or uint8 images")
    if not observations.dtype.isnative or observations.dtype.itemsize > 8:
        raise UserError(
            f"{label}: observations are {observations.dtype.str}, expected numbers of 64 bits at most, in the order of "
            "bytes of this machine"
        )
    if len(shape) == 1:
        return "as it is"
    if len(shape) not in (2, 3) or observations.dtype != np.uint8:
        raise UserError(
            f"{label}: observations have shape {shape} and are {observations.dtype}, expected a vector (n,), or an "
            f"image (H, W, C) of uint8; for a vector: {wrap}"
        )
    if len(shape) == 2 or shape[2] < min(shape[0], shape[1]):
        return "to be transposed"
    if shape[0] < min(shape[1], shape[2]):
        return "as it is"
    raise UserError(f"{label}: observations have shape {shape}, expected an image (H, W, C) or (C, H, W) with few C")


def _check_actions(label: str, space: Any) -> None:
    expected = "expected Discrete, MultiDiscrete or a Box of floats, each with one axis at most"
    remedy = "map the actions with a gymnasium.ActionWrapper in a function `make_env`"
    if isinstance(space, spaces.Box):
        if space.dtype.kind != "f" or len(space.shape) != 1 or space.shape[0] == 0:
            raise UserError(f"{label}: action space {_shown(space)}, {expected}: {remedy}")
        if not space.dtype.isnative or space.dtype.itemsize > 8:
            raise UserError(f"{label}: actions are {space.dtype.str}, expected floats of this machine: {remedy}")
        if np.isnan(space.low).any() or np.isnan(space.high).any() or not (space.low < space.high).all():
            raise UserError(f"{label}: action space {_shown(space)}: expected every lower bound below its upper bound")
    elif isinstance(space, spaces.MultiDiscrete):
        if len(space.shape) != 1:
            raise UserError(f"{label}: action space {_shown(space)}, {expected}: {remedy}")
    elif not isinstance(space, spaces.Discrete):
        raise UserError(f"{label}: action space {_shown(space)}, {expected}: {remedy}")


def check_options(
    label: str, creator: Callable[..., Any], options: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    """UserError where `creator` does not take one of `options`, or needs one that is in neither them nor `known`."""
    names, required, takes_all = _parameters(creator)
    for name in options:
        if not isinstance(name, str):
            raise UserError(f"{label}: options: found the name {name!r}, expected text")
        if not takes_all and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            listed = ", ".join(key for key in names if key not in _OWN and key not in ("game", "batch_size")) or "none"
            raise UserError(f"{label}: option `{name}` is not one that it takes; it takes: {listed}{hint}")
    for name in required:
        if name not in options and name not in known and name not in _OWN:
            raise UserError(f"{label}: needs the option `{name}`: give it as `options: {{{name}: …}}`")


def takes_options(creator: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    """Whether `creator` has an argument for each of `options`."""
    names, _, takes_all = _parameters(creator)
    return takes_all or all(name in names for name in options)


def _parameters(creator: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of the arguments that `creator` takes, of those it needs, and whether it takes any."""
    try:
        parameters = inspect.signature(creator).parameters.values()
    except (TypeError, ValueError):  # written in C: the call itself will tell
        return [], [], True
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    return [p.name for p in named], required, any(p.kind is p.VAR_KEYWORD for p in parameters)


# Registered ids -------------------------------------------------------------------------------------------------


def _find_spec(label: str, name: str) -> EnvSpec:
    if name not in gymnasium.registry and importlib.util.find_spec("ale_py") is not None:
        with one_line_errors(f"{label}: ale_py fails when imported"):
            gymnasium.register_envs(importlib.import_module("ale_py"))  # which registers them
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    if name.startswith("ALE/") and importlib.util.find_spec("ale_py") is None:
        raise UserError(f"{label}: needs the package ale-py, which is not installed: {INSTALL}")
    elsewhere = [key for key in gymnasium.registry if key.endswith(f"/{name}")]
    if elsewhere:
        raise UserError(f"{label}: no such id is registered with gymnasium; did you mean `{elsewhere[0]}`?")
    versions = sorted(
        (key for key in gymnasium.registry if re.sub(r"-v\d+$", "", key) == re.sub(r"-v\d+$", "", name)),
        key=lambda key: (len(key), key),
    )
    if versions:
        what = "has no such version" if re.search(r"-v\d+$", name) else "has no version"
        raise UserError(f"{label}: {what}, expected {' or '.join(f'`{key}`' for key in versions)}")
    if name.endswith(".py"):
        raise UserError(f"{label}: names a file, expected the function in it too: `{name}:make_env`")
    lower = {key.lower(): key for key in gymnasium.registry}
    by_name = {key.rpartition("/")[2]: value for key, value in lower.items()}
    near = [lower[key] for key in difflib.get_close_matches(name.lower(), lower, n=3)]
    near += [by_name[key] for key in difflib.get_close_matches(name.lower().rpartition("/")[2], by_name, n=2)]
    hint = f"did you mean {' or '.join(f'`{key}`' for key in dict.fromkeys(near[:4]))}?" if near else ""
    remedy = "ids of another package are `package:Id-v0`, your own environment is `file.py:make_env`"
    raise UserError(f"{label}: no such id is registered with gymnasium; {hint or remedy}")


def _defined_in(module: ModuleType, value: object) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _flattens(space: spaces.Space[Any]) -> bool:
    try:
        return spaces.utils.flatten_space(space).shape is not None and isinstance(
            spaces.utils.flatten_space(space), spaces.Box
        )
    except NotImplementedError:  # a space of the user's own
        return False


def _shown(space: object) -> str:
    text = one_line(str(space))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float, str, list)):
        return describe(value)
    return f"a class, {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
