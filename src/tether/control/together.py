"""From a run's configuration to N environments that are stepped together: natively, in this process, in others.

`making.py` knows how one is made; nothing here knows of episodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import AutoresetMode

from tether.control.atari import atari_creator, atari_options, is_atari
from tether.control.automatic import Automatic
from tether.control.loading import one_line_errors
from tether.control.making import (
    EnvironmentsConfig,
    Source,
    build,
    check_options,
    check_spaces,
    find_source,
    takes_options,
)
from tether.control.vectors import Games, Loop, Seeded
from tether.control.workers import Workers
from tether.errors import UserError

Kind = Literal["native", "sync", "async"]


def make_together(source: Source, config: EnvironmentsConfig, seed: int) -> tuple[Kind, Seeded | Automatic]:
    """What steps the environments, and by which kind; `seed` begins the generators of worker processes."""
    if is_native(source, config):
        return "native", make_native(source, config)
    makers = [functools.partial(_make_one, source.name, config, index) for index in range(config.count)]
    if config.vectorization == "async":
        seeds = [int(np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(1)[0]) for i in range(config.count)]
        return "async", Workers(source.label, makers, seeds)
    return "sync", in_a_loop(source.label, [make() for make in makers])


def is_native(source: Source, config: EnvironmentsConfig) -> bool:
    """Whether the id's own vector environment steps them; UserError where it cannot, but is asked to."""
    if config.vectorization not in ("auto", "native"):
        return False
    reason = _not_native(source, config)
    if reason and config.vectorization == "native":
        raise UserError(
            f"{source.label}: cannot be stepped natively: {reason}; expected `vectorization: sync` or async"
        )
    return not reason


def in_a_loop(label: str, envs: list[gymnasium.Env[Any, Any]]) -> Loop:
    """These, one after the other; UserError where they are not alike, or not several."""
    for index, env in enumerate(envs):
        if any(env.unwrapped is other.unwrapped for other in envs[:index]):
            raise UserError(f"{label}: returned the same environment twice, expected a new one from every call")
        if env.observation_space != envs[0].observation_space or env.action_space != envs[0].action_space:
            raise UserError(
                f"{label}: environments 0 and {index} have different spaces, expected the same for all: "
                f"{env.observation_space}, {env.action_space}"
            )
    return Loop(envs)


def _make_one(env: str, config: EnvironmentsConfig, index: int) -> gymnasium.Env[Any, Any]:
    """One of several. A worker process finds the environment itself: a function from a file cannot be sent to it."""
    return build(find_source(env), config, training=True, place=place_of(config, index))


def place_of(config: EnvironmentsConfig, index: int) -> str:
    """What messages add to the label of one of several."""
    return f", index {index}" if config.count > 1 else ""


def _not_native(source: Source, config: EnvironmentsConfig) -> str:
    """Why no native environment can do what is asked; empty where one can."""
    spec = source.spec
    if spec is None or spec.vector_entry_point is None:
        return "it brings no vector environment"
    if is_atari(spec):
        return ""
    if config.action_repeat > 1 or config.frame_stack > 1:
        return "action_repeat and frame_stack are for single environments"
    if spec.additional_wrappers:
        return "its id has wrappers for single environments"
    if config.vectorization == "auto" and spec.entry_point is not None:
        asked = {**config.options, **({} if config.max_episode_steps is None else {"max_episode_steps": 1})}
        with one_line_errors(f"{source.label}: cannot be made"):
            if not takes_options(_creator(spec), asked):
                return "its vector environment does not take these options"
    return ""


def _creator(spec: EnvSpec) -> Callable[..., Any]:
    entry_point = spec.vector_entry_point
    assert entry_point is not None
    return entry_point if callable(entry_point) else load_env_creator(entry_point)


def make_native(
    source: Source, config: EnvironmentsConfig, watch: Callable[[Any, bool], None] | None = None
) -> Seeded | Automatic:
    """The id's own vector environment; with `watch`, which only one environment can have, it renders."""
    label, spec = source.label, source.spec
    assert spec is not None
    with one_line_errors(f"{label}: cannot be made"):
        if is_atari(spec):
            options = atari_options(label, config, training=True)
            check_options(label, atari_creator(), config.options, spec.kwargs)
            return Games(spec.id, config.count, options)
        options = dict(config.options)
        if config.max_episode_steps is not None:
            options["max_episode_steps"] = config.max_episode_steps
        check_options(label, _creator(spec), options, spec.kwargs)
        if watch is not None:
            if not takes_options(_creator(spec), {"render_mode": None}):
                raise UserError(
                    f"{label}: its vector environment, in which it was trained, takes no `render_mode`, so its "
                    "episodes cannot be filmed: add the argument `render_mode=None`, or try the policy without a film"
                )
            options["render_mode"] = "rgb_array"
        vector = gymnasium.make_vec(spec.id, num_envs=config.count, vectorization_mode="vector_entry_point", **options)
    mode = vector.metadata.get("autoreset_mode")
    if mode not in [known for member in AutoresetMode for known in (member, member.value)]:
        raise UserError(
            f"{label}: its vector environment has the autoreset mode {mode}, expected next-step, same-step or "
            "disabled: `vectorization: sync` steps single ones"
        )
    if check_spaces(label, vector.single_observation_space, vector.single_action_space) != "as it is":
        raise UserError(
            f"{label}: its vector environment shows images (H, W, C): `vectorization: sync` transposes them"
        )
    limited = spec.max_episode_steps is not None or config.max_episode_steps is not None
    return Automatic(label, vector, limited, watch)
