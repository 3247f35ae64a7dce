"""Observations and rewards brought to unit scale by running statistics.

Knows numpy arrays of environments stepped together; knows neither policies nor environments. It runs at every step,
so that the number of numpy calls counts: about 1 µs each, whatever they do to arrays this small.

N = environments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_CLIP = 10.0
"""Normalised observations and scaled rewards stay within ± this (Huang et al. 2022, continuous details 6 and 8)."""
_EPSILON = 1e-8
"""Added to a variance before its root is taken."""


class RunningStatistics:
    """Mean and variance of all rows seen so far, without keeping them, in float64.

    Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances": the
    batch is merged into what went before. Taken around the mean so far, the merged sum of squared deviations
    M = M_a + M_b + δ²·n_a·n_b/n becomes M_a + Σd² − (Σd)²/n with d = x − mean_a, which is the same in fewer steps.
    Nothing cancels: (Σd)² ≤ n_b·Σd², so that the subtraction never takes more than n_b/n of Σd².

    Attributes:
        mean: of the rows, shaped like one; 0 before the first.
        count: rows seen.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.mean: NDArray[np.float64] = np.zeros(shape)
        self.count = 0
        self._squares: NDArray[np.float64] = np.zeros(shape)  # sum of squared deviations from the mean

    @property
    def variance(self) -> NDArray[np.float64]:
        """Mean squared deviation (divided by the count, as gymnasium does), shaped like one row; 1 before the first."""
        return self._squares / self.count if self.count else np.ones_like(self.mean)

    def update(self, rows: NDArray[Any]) -> None:
        """Take `rows` (n, *shape) into account; they must be finite."""
        if not len(rows):
            return
        if not self.count:
            # the argument above needs a mean near the data, which 0 need not be
            self.mean = np.asarray(np.mean(rows, axis=0, dtype=np.float64))
        self.count += len(rows)
        distances = rows - self.mean
        total = np.add.reduce(distances, axis=0)
        self.mean = self.mean + total / self.count
        self._squares = self._squares + (np.add.reduce(distances * distances, axis=0) - total * total / self.count)

    def state_dict(self) -> dict[str, Any]:
        """The statistics to the last bit."""
        return {
            "mean": torch.from_numpy(np.array(self.mean)),
            "squares": torch.from_numpy(np.array(self._squares)),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state is of rows of another shape.
        """
        found = tuple(state["mean"].shape)
        if found != self.mean.shape:
            raise ValueError(f"statistics of rows of shape {found}, expected shape {self.mean.shape}")
        self.mean = np.array(state["mean"].numpy())
        self._squares = np.array(state["squares"].numpy())
        self.count = int(state["count"])


class ObservationNormaliser:
    """Observations shifted and scaled, component by component, to mean 0 and variance 1, then clipped to ±10.

    Calling it takes the observations into the statistics and normalises them, which is for training;
    `normalise` leaves the statistics as they are, which is for evaluation and for states seen a second time.

    Args:
        shape: of one observation.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.statistics = RunningStatistics(shape)
        self._set_scale()

    def __call__(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """(N, *shape) float32 of observations (N, *shape), after they were taken into the statistics."""
        self.statistics.update(observations)
        self._set_scale()
        return self.normalise(observations)

    def normalise(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """(N, *shape) float32 of observations (N, *shape) by the statistics as they are."""
        centred = observations - self.statistics.mean  # float64: a large mean leaves no digits in float32
        centred *= self._scale
        np.maximum(centred, -_CLIP, out=centred)
        np.minimum(centred, _CLIP, out=centred)
        return centred.astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError where the observations had another shape."""
        self.statistics.load_state_dict(state)
        self._set_scale()

    def _set_scale(self) -> None:
        self._scale = 1.0 / np.sqrt(self.statistics.variance + _EPSILON)


class RewardScaler:
    """Rewards divided by the standard deviation of the discounted return so far, then clipped to ±10.

    The return is Rₜ = γ·Rₜ₋₁ + rₜ from each episode's start on, as in the code that Engstrom et al. 2020
    ("Implementation matters in deep policy gradients", section 3) found to matter; Huang et al. 2022, continuous
    detail 7. Rewards are not shifted: their sign says what is good.

    Args:
        count: N.
        discount: γ.
    """

    def __init__(self, count: int, discount: float) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount is {discount}, expected a number from 0 to 1")
        self.discount = discount
        self.statistics = RunningStatistics()
        self._returns: NDArray[np.float64] = np.zeros(count)

    def __call__(
        self, rewards: NDArray[Any], ended: NDArray[np.bool_], valid: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float64]:
        """(N,) scaled rewards, after they were taken into the statistics.

        Args:
            rewards: (N,) of one step of each environment.
            ended: (N,) True where the episode ended with this step: the next return starts at 0.
            valid: (N,) False where no step was made, so that there is no return to learn from. None: all were.
        """
        returns = self._returns * self.discount
        returns += rewards
        self.statistics.update(returns if valid is None else returns[valid])
        scaled = rewards / math.sqrt(float(self.statistics.variance) + _EPSILON)
        np.maximum(scaled, -_CLIP, out=scaled)
        np.minimum(scaled, _CLIP, out=scaled)
        returns[ended] = 0.0
        # an environment in which no step was made keeps its return
        self._returns = returns if valid is None else np.where(valid, returns, self._returns)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the returns of the episodes that are running."""
        return self.statistics.state_dict() | {"returns": torch.from_numpy(self._returns.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: the state is of another number of environments.
        """
        if len(state["returns"]) != len(self._returns):
            raise ValueError(f"returns of {len(state['returns'])} environments, expected {len(self._returns)}")
        self.statistics.load_state_dict(state)
        self._returns = state["returns"].numpy().copy()
