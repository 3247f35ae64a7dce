"""Vector environments that an id brings: they begin episodes themselves, and hold their state in attributes.

N = environments, *obs = shape of an observation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from tether.control.infos import batched_success, final_observations
from tether.control.kept import States, bring_states, digests_of, freeze, kept_layers, layers, states_of
from tether.control.loading import close_told, one_line_errors, reason_of
from tether.control.vectors import Flags, Numbers
from tether.errors import STOPS, UserError


class Automatic:
    """A vector environment that an id brings: it begins episodes itself, in the step that ends one or in the next, or
    those that it is told to.

    Attributes:
        pending: (N,) bool, the next step will ignore the action and begin an episode.
        limited: whether it comes with a time limit.
    """

    def __init__(
        self,
        label: str,
        vector: VectorEnv[Any, Any, Any],
        limited: bool = False,
        watch: Callable[[Any, bool], None] | None = None,
    ) -> None:
        self._watch = watch
        self._label = label
        self._vector = vector
        self._mode = AutoresetMode(vector.metadata.get("autoreset_mode"))
        self._kept = kept_layers(vector)
        self.limited = limited
        self.pending: Flags = np.zeros(vector.num_envs, dtype=np.bool_)
        self.observation_space: Any = vector.single_observation_space
        self.action_space: Any = vector.single_action_space

    def reset(self, seeds: Sequence[int]) -> NDArray[Any]:
        """Begin an episode in all of them; seeds the one generator with the first of `seeds`."""
        self.pending = np.zeros_like(self.pending)
        with one_line_errors(f"{self._label}: reset failed"):
            observations, _ = self._vector.reset(seed=seeds[0])
        observations = np.array(observations)
        self._show(begins=True)
        return observations

    def _show(self, begins: bool) -> None:
        if self._watch is not None:
            self._watch(_Only(self._vector), begins)

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[Any], Numbers, Flags, Flags, NDArray[Any], Numbers | None]:
        """Do one action in each that is not pending; `Results` with the successors (N, *obs) before the success.

        Raises:
            UserError: it fails; or an episode was cut off, and the state that it was cut off in is not told.
        """
        try:
            seen, rewards, terminated, truncated, infos = self._vector.step(actions)
        except STOPS:
            raise
        except BaseException as error:
            raise UserError(f"{self._label}: step raised {reason_of(error)}") from error
        terminated, truncated = np.array(terminated, dtype=np.bool_), np.array(truncated, dtype=np.bool_)
        observations = successors = np.array(seen)
        ended = terminated | truncated
        # one that begins the next episode in the same step shows that one
        begins = self.pending if self._mode == AutoresetMode.NEXT_STEP else ended
        self._show(bool(begins.any()) and self._mode != AutoresetMode.DISABLED)
        with one_line_errors(f"{self._label}: its info cannot be read"):
            success = batched_success(infos, len(terminated)) if infos else None
        if self._mode == AutoresetMode.NEXT_STEP:
            self.pending = ended
        elif ended.any() and self._mode == AutoresetMode.SAME_STEP:
            with one_line_errors(f"{self._label}: its info cannot be read"):
                successors, known = final_observations(infos, ended, observations, self._label)
            if (truncated & ~terminated & ~known).any():
                raise UserError(
                    f"{self._label}: an episode was cut off, but its last observation is neither `final_obs` nor "
                    "`final_observation` in the info, and the one that was returned is the next episode's: its value "
                    "would be learned from; let the environment tell it, or set `vectorization: sync`"
                )
        elif ended.any():
            observations = successors.copy()
            with one_line_errors(f"{self._label}: reset failed"):
                begun, _ = self._vector.reset(options={"reset_mask": ended})
            observations[ended] = np.array(begun)[ended]
            self._show(begins=True)
        return observations, np.array(rewards, dtype=np.float64), terminated, truncated, successors, success

    def gathered(self) -> list[tuple[States, States]]:
        """What wrappers around it have gathered, twice: there is no episode that could be done again."""
        found = states_of(self._kept, self._label)
        return [(found, found)] if found else []

    def bring(self, states: Sequence[States]) -> list[str]:
        """Give the wrappers what they had gathered; a line for what fits none."""
        return bring_states(self._kept, states[0], self._label)

    def freeze(self) -> None:
        """What the wrappers have gathered stays as it is from now on."""
        freeze(self._vector)

    def digests(self) -> list[dict[str, str]]:
        """A digest of whatever else its wrappers hold."""
        return [digests_of(self._vector)]

    def snapshot(self) -> dict[str, Any] | None:
        """Its arrays, numbers and random generator as `restore` takes them; None where it is made of other things too.

        Spaces and the description that gymnasium has registered are constants. An array of another library, an
        emulator, an object of its own: what it does with them cannot be known, and nothing is saved.
        """
        around = [layer for layer in layers(self._vector) if layer is not self._vector.unwrapped]
        if any(layer not in self._kept and not type(layer).__module__.startswith("gymnasium.") for layer in around):
            return None
        saved: dict[str, Any] = {"pending": torch.from_numpy(self.pending.copy())}
        attributes: dict[str, Any] = {}
        for name, value in vars(self._vector.unwrapped).items():
            if isinstance(value, (spaces.Space, EnvSpec)) or name == "metadata":
                continue
            if isinstance(value, np.random.Generator):
                try:
                    attributes[name] = ["generator", json.dumps(value.bit_generator.state)]
                except TypeError:  # the state of this kind of generator holds arrays
                    return None
            elif value is None or isinstance(value, (bool, str)):
                attributes[name] = ["plain", value]
            elif isinstance(value, float):
                attributes[name] = ["plain", float(value)]  # numpy's float64 is a float too
            elif isinstance(value, int):
                attributes[name] = ["integer", str(value)]  # of any size
            elif type(value) is np.ndarray and value.ndim > 0 and value.dtype.kind in "fiub":
                attributes[name] = ["array", torch.from_numpy(value.copy())]
            else:
                return None
        return saved | {"attributes": attributes}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from `snapshot`."""
        self.pending = saved["pending"].numpy().copy()
        for name, (form, value) in saved["attributes"].items():
            if form == "generator":
                state = json.loads(value)
                generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
                generator.bit_generator.state = state
                setattr(self._vector.unwrapped, name, generator)
            elif form == "integer":
                setattr(self._vector.unwrapped, name, int(value))
            else:
                setattr(self._vector.unwrapped, name, value.numpy().copy() if form == "array" else value)

    def close(self) -> None:
        """Close it; the second time nothing."""
        close_told(self._vector, self._label)


class _Only:
    """A vector environment of one, as who watches it sees a single one: its image is not one of several."""

    def __init__(self, vector: VectorEnv[Any, Any, Any]) -> None:
        self._vector = vector
        self.metadata, self.unwrapped = vector.metadata, vector.unwrapped

    def render(self) -> Any:
        """Its image, alone or the first of the images of all."""
        shown: Any = self._vector.render()
        several = isinstance(shown, (list, tuple)) or (isinstance(shown, np.ndarray) and shown.ndim == 4)
        return shown[0] if several and len(shown) == 1 else shown
