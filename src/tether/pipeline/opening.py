"""What a run says before its first iteration: what was loaded, what computes it, and what an iteration is.

Everything is read off the pieces as they were built; the configuration only gives names to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from tether.ppo import Learner

if TYPE_CHECKING:
    from tether.control.world import ControlWorld
    from tether.pipeline.control import ControlConfig


def describe_control(config: ControlConfig, world: ControlWorld, learner: Learner) -> list[str]:
    """Lines about a world of simulators and its learner, the first of which names device and precision."""
    environments, policy = world.environments, world.policy
    steps = environments.count * world.config.steps
    seen = " × ".join(map(str, environments.observation_space.shape)) or "1"
    at_most = "up to " if world.config.whole_episodes else ""
    own = f"{count(environments.count, 'environment')} × {at_most}{count(world.config.steps, 'step')}"
    parts = [
        ("device", describe_device(policy.policy_parameters(), False)),
        ("world", f"{config.env}: observations of {seen} numbers, actions {environments.action_space}"),
        ("policy", f"{describe_parameters(policy.policy_parameters() + policy.value_parameters())}, critic included"),
        ("iteration", f"{own} = {at_most}{steps:,} steps; {describe_updates(learner, steps)}"),
        ("run", describe_run(config.output, learner)),
    ]
    return aligned(parts)


def describe_device(parameters: Iterable[nn.Parameter], autocast: bool) -> str:
    """`cpu, 2 threads, float32, matrix products in bfloat16 (autocast)`, off the parameters themselves."""
    kinds: dict[str, None] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        kinds[str(parameter.dtype).removeprefix("torch.")] = None
        device = parameter.device
    where = str(device)
    if device.type == "cpu":
        where += f", {count(torch.get_num_threads(), 'thread')}"
    elif device.type == "cuda":
        where += f" ({torch.cuda.get_device_name(device)})"
    return f"{where}, {' and '.join(kinds)}, {'matrix products in bfloat16 (autocast)' if autocast else 'no autocast'}"


def aligned(parts: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a word and what is said of it."""
    listed = list(parts)
    width = max(len(word) for word, _ in listed)
    return [f"{word:<{width}}  {text}" for word, text in listed]


def count(number: int, what: str) -> str:
    """`1 step`, `2,048 steps`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def describe_parameters(parameters: Iterable[nn.Parameter]) -> str:
    """How many numbers they hold, of which trained."""
    own = list(parameters)
    every = sum(parameter.numel() for parameter in own)
    trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return f"{every:,} parameters" + (", all trained" if trained == every else f", {trained:,} of them trained")


def describe_updates(learner: Learner, rows: int) -> str:
    """Epochs and minibatches of an iteration that collects `rows`."""
    epochs, minibatches = learner.config.epochs, learner.config.minibatches
    size = f"{'about ' if rows % minibatches else ''}{round(rows / minibatches):,}"
    return f"{count(epochs, 'epoch')} of {minibatches} minibatch{'' if minibatches == 1 else 'es'} of {size}"


def describe_run(output: str, learner: Learner) -> str:
    """Iterations to go, and where they are kept."""
    done = f" after {learner.iteration:,} done" if learner.iteration else ""
    return f"{count(learner.iterations - learner.iteration, 'iteration')}{done}, in {output}"
