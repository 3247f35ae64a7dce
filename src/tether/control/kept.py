"""What wrappers of a user's own gather from episode to episode: found, saved, brought back, frozen.

gymnasium's NormalizeObservation and NormalizeReward, and whatever has `state_dict` and `load_state_dict`. It knows
chains of wrappers; nothing of episodes or checkpoints.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from gymnasium.wrappers import vector as vector_wrappers

from tether.control.loading import one_line_errors
from tether.errors import UserError

States = list[tuple[str, Any]]
"""Of each layer that is kept, the outermost first: the name of its class, and numbers, text and arrays, nested."""

_RMS = {
    NormalizeObservation: "obs_rms",
    NormalizeReward: "return_rms",
    vector_wrappers.NormalizeObservation: "obs_rms",
    vector_wrappers.NormalizeReward: "return_rms",
}
_RETURNS = ("discounted_reward", "accumulated_reward")  # of the episodes that run, by the single and the vector one
_MOMENTS = ("mean", "var", "count")
_OWN = "own"  # what a class of the user's own adds to one of these by its `state_dict`
_NO_DATA = (gymnasium.Env, VectorEnv, gymnasium.Space, np.random.Generator, ModuleType)
_DEEPEST = 4  # objects within objects that are looked into


def layers(env: Any) -> Iterator[Any]:
    """The wrappers from the outermost on, then what they wrap; of several environments each chain in turn."""
    while env is not None:
        yield env
        if isinstance(env, VectorEnv):
            for single in getattr(env, "envs", ()):
                yield from layers(single)
        inner = vars(env).get("env")
        env = inner if isinstance(inner, (gymnasium.Env, VectorEnv)) else None


def kept_layers(env: Any) -> list[Any]:
    """The layers whose state is kept."""
    return [layer for layer in layers(env) if _rms(layer) is not None or _has_state(layer)]


def states_of(kept: Sequence[Any], label: str) -> States:
    """What these layers have gathered; copies.

    Raises:
        UserError: a `state_dict` fails, or holds what cannot be stored.
    """
    found: States = []
    for layer in kept:
        name, rms = type(layer).__name__, _rms(layer)
        state: Any = {}
        if _has_state(layer):
            with one_line_errors(f"{label}: state_dict of its wrapper `{name}`"):
                state = _packed(layer.state_dict(), f"{label}: state_dict of its wrapper `{name}`")
        if rms is not None:
            own = {_OWN: state} if _has_state(layer) else {}
            state = {moment: np.array(getattr(rms, moment)) for moment in _MOMENTS} | own
            state |= {key: np.array(getattr(layer, key)) for key in _RETURNS if hasattr(layer, key)}
        found.append((name, state))
    return found


def bring_states(kept: Sequence[Any], states: States, label: str) -> list[str]:
    """Give the layers what `states_of` found; a line for whatever finds no counterpart.

    Raises:
        UserError: a `load_state_dict` fails.
    """
    left, missing = list(states), []
    state: Any
    for layer in kept:
        name, rms = type(layer).__name__, _rms(layer)
        place = next((place for place, (other, _) in enumerate(left) if other == name), None)
        if place is None:
            missing.append(f"nothing is saved for its wrapper `{name}`, which begins anew")
            continue
        state = left.pop(place)[1]
        own = state if rms is None else state.get(_OWN)
        if own is not None and _has_state(layer):
            with one_line_errors(f"{label}: load_state_dict of its wrapper `{name}`"):
                layer.load_state_dict(_unpacked(own))
        if rms is None:
            continue
        rms = _rms(layer)  # what was loaded may be another
        saved, expected = np.asarray(state["mean"]).shape, np.asarray(rms.mean).shape
        if saved != expected:
            raise UserError(f"{label}: its wrapper `{name}` has statistics of shape {expected}, but saved are {saved}")
        for moment in _MOMENTS:
            value, there = np.array(state[moment]), getattr(rms, moment)
            if not isinstance(there, np.ndarray):  # a count of numpy's would make float32 statistics float64
                value = value[()] if isinstance(there, np.generic) else value.item()
            setattr(rms, moment, value)
        for key in _RETURNS:
            there = getattr(layer, key, None)
            if key in state and there is not None and np.asarray(there).shape == np.asarray(state[key]).shape:
                setattr(layer, key, np.array(state[key]))
    missing += [f"what its wrapper `{name}` had gathered is left out, since there is none now" for name, _ in left]
    return missing


def freeze(env: Any) -> None:
    """Statistics stay as they are from now on."""
    for layer in layers(env):
        if _rms(layer) is not None or hasattr(layer, "update_running_mean"):
            layer.update_running_mean = False


def merged(states: Sequence[States]) -> States:
    """One set from those of several environments: running means together, of anything else the first's."""
    together: States = []
    for place, (name, first) in enumerate(states[0] if states else []):
        others = [found[place][1] for found in states if place < len(found) and found[place][0] == name]
        together.append((name, _merged_moments(others) if _is_moments(first) else first))
    return together


def digests_of(env: Any) -> dict[str, str]:
    """A digest of each attribute of the user's own wrappers that are not kept, by `Class.attribute`.

    Two of them, taken each after a reset with the same seed, differ where a wrapper takes something along.
    """
    digests: dict[str, str] = {}
    for layer in layers(env):
        if not isinstance(layer, (gymnasium.Wrapper, VectorWrapper)) or _has_state(layer):
            continue
        theirs = type(layer).__module__.partition(".")[0] in ("gymnasium", "tether")
        kept = () if _rms(layer) is None else (*_RMS.values(), *_RETURNS)
        for name, value in vars(layer).items():
            # of a wrapper of gymnasium, the user's is what it was given to call, as TransformObservation is
            if name in kept or (theirs and not (callable(value) and _is_object(value))):
                continue
            digest = hashlib.sha256()
            _add(value, digest.update, _DEEPEST)
            digests[f"{type(layer).__name__}.{name}"] = digest.hexdigest()
    return digests


def to_tensors(value: Any) -> Any:
    """The same with a tensor for each array, for storage."""
    return _mapped(value, np.ndarray, lambda array: torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape))


def to_arrays(value: Any) -> Any:
    """Back from `to_tensors`."""
    return _mapped(value, torch.Tensor, lambda tensor: tensor.numpy().copy())


def _rms(layer: Any) -> Any:
    return next((getattr(layer, name, None) for kind, name in _RMS.items() if isinstance(layer, kind)), None)


def _has_state(layer: Any) -> bool:
    return all(callable(getattr(layer, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_moments(state: Any) -> bool:
    return isinstance(state, dict) and all(name in state for name in _MOMENTS)


def _merged_moments(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Chan, Golub and LeVeque 1979, over all of them at once."""
    counts = np.array([float(state["count"]) for state in states])
    means, variances = (np.stack([np.asarray(state[name], np.float64) for state in states]) for name in ("mean", "var"))
    shares = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    first = {name: value for name, value in states[0].items() if name not in _MOMENTS}
    kind = np.asarray(states[0]["mean"]).dtype
    return {"mean": mean.astype(kind), "var": variance.astype(kind), "count": np.array(counts.sum()), **first}


def _packed(value: Any, place: str) -> Any:
    """Plain data with arrays; what is no JSON under a word of its own."""
    if isinstance(value, (np.number, np.bool_)):
        return {"number": np.array(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": value.detach().cpu().numpy().copy()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return {"array": value.copy()}
    if isinstance(value, (list, tuple)):
        entries = [_packed(entry, place) for entry in value]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    if isinstance(value, Mapping):
        return {"dict": [[_packed(key, place), _packed(entry, place)] for key, entry in value.items()]}
    raise UserError(f"{place} holds a {type(value).__name__}, expected numbers, text, arrays, tensors, lists and dicts")


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpacked(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return torch.from_numpy(np.array(content))
        case "array":
            return np.array(content)
        case "number":
            return np.array(content)[()]
        case "tuple":
            return tuple(_unpacked(entry) for entry in content)
        case _:
            return {_unpacked(key): _unpacked(entry) for key, entry in content}


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, kind, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(entry, kind, change) for entry in value)
    return value


def _add(value: Any, add: Callable[[bytes], None], depth: int) -> None:
    """What is in `value`, as far as it is data: no environment, no function, no generator, which a seed begins anew."""
    if isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        add(f"{value!r};".encode())
    elif isinstance(value, np.ndarray):
        add(f"{value.shape}".encode() + (value.tobytes() if value.dtype != object else b""))
        if depth and value.dtype == object:
            _add(value.ravel().tolist(), add, depth - 1)
    elif isinstance(value, torch.Tensor):
        add(repr(value.tolist()).encode() if value.numel() < 10_000 else str(float(value.double().sum())).encode())
    elif depth and isinstance(value, Mapping):
        for key, entry in value.items():
            add(f"{key!r}:".encode())
            _add(entry, add, depth - 1)
    elif depth and isinstance(value, (set, frozenset)):
        add(repr(sorted(map(repr, value))).encode())
    elif depth and isinstance(value, (list, tuple, deque)):
        add(f"{len(value)}[".encode())
        for entry in value:
            _add(entry, add, depth - 1)
    elif depth and _is_object(value):
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        _add({**getattr(value, "__dict__", {}), **slots}, add, depth - 1)


def _is_object(value: Any) -> bool:
    """Whether it may hold data of its own in attributes, also where it can be called."""
    if isinstance(value, (*_NO_DATA, type)) or inspect.isroutine(value):
        return False
    return hasattr(value, "__dict__") or bool(_slots(type(value)))


def _slots(kind: type) -> list[str]:
    named = [vars(each).get("__slots__", ()) for each in kind.__mro__]
    return [name for names in named for name in ([names] if isinstance(names, str) else names)]
