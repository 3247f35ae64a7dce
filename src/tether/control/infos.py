"""What an environment says beside its step: whether an episode succeeded, and in which state it ended.

Knows the names and the forms that gymnasium and others use. N = environments, *obs = shape of an observation.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tether.errors import UserError

logger = logging.getLogger(__name__)

SUCCESS = ("is_success", "success")
FINAL = ("final_obs", "final_observation", "terminal_observation")  # gymnasium, gymnasium before 1.0, Stable-Baselines3
Flags = NDArray[np.bool_]
Numbers = NDArray[np.float64]


@functools.cache
def warn_once(text: str) -> None:
    """Say it, the first time."""
    logger.warning("%s", text)


def flag_of(info: Mapping[str, Any], tell: Callable[[str], None] = warn_once) -> float | None:
    """What an environment says of its success as `is_success` or `success`: a bool or a number, or an array of one.

    None where it says nothing. `tell` is given a line where it says something else.
    """
    strange = ""
    for name in SUCCESS:
        if name in info and info[name] is not None:
            if (flag := _number(info[name])) is not None:
                return flag
            strange = (
                f"`{name}` in the info is {_form(info[name])}, expected True, False or a number: it does not count"
            )
    if strange:
        tell(strange)
    return None


def floats(values: Sequence[float | None]) -> Numbers | None:
    """NaN for None; None where all are."""
    if all(value is None for value in values):
        return None
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def whole_success(values: Sequence[float]) -> list[float]:
    """Of episodes whose environment speaks of success: 0 for those (NaN) that ended without a word; a line says so."""
    if any(map(math.isnan, values)):
        warn_once("episodes that ended without a word on success (`is_success` or `success`) count as failed")
    return [0.0 if math.isnan(value) else value for value in values]


def batched_success(infos: Any, count: int) -> Numbers | None:
    """Success (N,) from the info of a vector environment: arrays beside masks of who says it, or a dict of each.

    Where an environment has begun the next episodes already, `final_info` holds what was said of the steps that ended
    the last ones. What stands beside it counts where it says nothing of success.

    Raises:
        UserError: a mask is none.
    """
    final = infos.get("final_info") if isinstance(infos, Mapping) else None
    last = None if final is None else _success(final, count)
    return _success(infos, count) if last is None else last


def _success(infos: Any, count: int) -> Numbers | None:
    if not isinstance(infos, Mapping):
        each = [info if isinstance(info, Mapping) else {} for info in infos]
        return floats([flag_of(info) for info in each]) if len(each) == count else None
    if not any(name in infos for name in SUCCESS):
        return None
    said: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in SUCCESS:
        values: Any = infos.get(name)
        if values is None:
            continue
        if _length(values) is None and count == 1:
            values = [values]
        if _length(values) != count or isinstance(values, (str, Mapping)):
            warn_once(f"`{name}` in the info is {_form(values)}, expected one for each of {count}: it does not count")
            continue
        mask = _mask(infos, name, count)
        for index in range(count):
            if mask is None or mask[index]:
                said[index][name] = values[index]
    return floats([flag_of(info) for info in said])


def final_observations(infos: Any, ended: Flags, observations: NDArray[Any], label: str) -> tuple[NDArray[Any], Flags]:
    """The states (N, *obs) that the actions led to, where an environment shows the next episodes' first ones already.

    Args:
        infos: of the step.
        ended: (N,) whose episodes ended.
        observations: (N, *obs) that were returned.
        label: with which messages begin.

    Returns:
        The states, and (N,) where they are known.

    Raises:
        UserError: what is said to be one has another shape.
    """
    states, known = observations.copy(), ~ended
    for name in FINAL:
        for index in np.flatnonzero(~known).tolist():
            found = _entry(infos, name, index, len(states))
            if found is None:
                continue
            state = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found)
            if state.shape != states.shape[1:]:
                raise UserError(f"{label}: `{name}` in the info has shape {state.shape}, expected {states.shape[1:]}")
            states[index], known[index] = state, True
    return states, known


def _entry(infos: Any, name: str, index: int, count: int) -> Any:
    """What is said of one environment; None for nothing."""
    if not isinstance(infos, Mapping):
        return infos[index].get(name) if isinstance(infos[index], Mapping) else None
    values = infos.get(name)
    if values is None:
        return None
    mask = _mask(infos, name, count)
    if mask is not None and not mask[index]:
        return None
    if isinstance(values, Mapping):
        return values.get(index)
    return values[index] if _length(values) == count else None


def _mask(infos: Mapping[str, Any], name: str, count: int) -> Any:
    """(N,) who says it; None where all do."""
    mask: Any = infos.get(f"_{name}")
    if mask is None:
        return None
    found = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
    if found.shape != (count,) or found.dtype.kind != "b":
        raise UserError(
            f"`_{name}` in the info has shape {found.shape}, {found.dtype}, expected True or False for each of {count}"
        )
    return found


def _length(values: Any) -> int | None:
    try:
        return len(values)
    except TypeError:  # a number, or an array without axes
        return None


def _number(value: Any) -> float | None:
    if isinstance(value, (list, tuple)):
        return _number(value[0]) if len(value) == 1 else None
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:  # of numpy, torch and others
        value = value.item()
    try:
        number = float(value) if isinstance(value, (bool, int, float)) else math.nan
    except OverflowError:
        number = math.inf
    return number if math.isfinite(number) else None


def _form(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"of shape {tuple(shape)}" if shape else f"a {type(value).__name__}"
