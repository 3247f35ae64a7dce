"""Normalised scores: mean 0 and standard deviation 1 on reference samples, of one reward model or of an ensemble.

Knows numbers and `score_normalisation.json`, which lies beside the weights; nothing of models or texts.
N = samples, K = members of an ensemble.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tether.errors import UserError, reason

NORMALISATION_FILE = "score_normalisation.json"
COMBINE = ("mean", "min", "mean-std")

Combine = Literal["mean", "min", "mean-std"]


@dataclass(frozen=True)
class Normalisation:
    """What makes scores have mean 0 and standard deviation 1 on reference samples.

    The scores of each member are normalised first, as a Bradley–Terry score is known only up to a constant and members
    would not agree on it; what they are combined to is normalised again. For mean − k·std the moments of the members'
    mean m and standard deviation s are kept, which fit every k: its mean is E[m] − k·E[s], its variance
    Var[m] − 2k·Cov[m, s] + k²·Var[s].

    Attributes:
        means: (K,) of each member's scores on the reference samples.
        stds: (K,) their standard deviations.
        mean: (mean, variance) of the members' mean.
        min: (mean, variance) of the members' minimum.
        spread: (mean, variance, covariance with the members' mean) of the members' standard deviation.
        samples: how many reference samples there were.
        source: what they were.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    mean: tuple[float, float] = (0.0, 1.0)
    min: tuple[float, float] = (0.0, 1.0)
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    samples: int = 0
    source: str = ""

    @staticmethod
    def of(scores: Tensor, source: str) -> Normalisation:
        """From the raw scores (K, N) of the members on N reference samples."""
        scores = scores.double()
        means, stds = scores.mean(dim=1), scores.std(dim=1, correction=0)
        stds = torch.where(stds > 0, stds, torch.ones_like(stds))  # a member that says the same of everything
        each = (scores - means[:, None]) / stds[:, None]
        mean, least, spread = each.mean(dim=0), each.amin(dim=0), each.std(dim=0, correction=0)
        covariance = float(((mean - mean.mean()) * (spread - spread.mean())).mean())
        return Normalisation(
            tuple(means.tolist()),
            tuple(stds.tolist()),
            _moments(mean),
            _moments(least),
            (*_moments(spread), covariance),
            scores.shape[1],
            source,
        )

    @staticmethod
    def identity(members: int) -> Normalisation:
        """Leaves scores as they are."""
        return Normalisation((0.0,) * members, (1.0,) * members)

    def combine(self, scores: Tensor, how: Combine = "mean", k: float = 1.0) -> Tensor:
        """One normalised score (N,) out of the members' raw scores (K, N), as float64."""
        shape = (len(self.means), 1)
        means = torch.tensor(self.means, dtype=torch.float64).reshape(shape)
        stds = torch.tensor(self.stds, dtype=torch.float64).reshape(shape)
        each = (scores.double().cpu() - means) / stds
        if how == "mean":
            combined, (mean, variance) = each.mean(dim=0), self.mean
        elif how == "min":
            combined, (mean, variance) = each.amin(dim=0), self.min
        else:
            combined = each.mean(dim=0) - k * each.std(dim=0, correction=0)
            mean = self.mean[0] - k * self.spread[0]
            variance = self.mean[1] - 2 * k * self.spread[2] + k**2 * self.spread[1]
        return (combined - mean) / (math.sqrt(variance) if variance > 0 else 1.0)

    def member(self, index: int) -> Normalisation:
        """That of one member alone."""
        return Normalisation((self.means[index],), (self.stds[index],), samples=self.samples, source=self.source)

    def save(self, folder: Path) -> None:
        """Write `score_normalisation.json`."""
        text = json.dumps({"members": len(self.means), **asdict(self)}, indent=2)
        (folder / NORMALISATION_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Normalisation | None:
        """Read it back; None where the folder has none.

        Raises:
            UserError: the file is there, and is not what `save` writes.
        """
        file = folder / NORMALISATION_FILE
        if not file.is_file():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return _normalisation(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: no normalisation of scores ({reason(error)}); copy it again from the trained model"
            ) from error


def _moments(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.var(correction=0))


def _normalisation(data: Mapping[str, Any]) -> Normalisation:
    numbers = {name: tuple(map(float, data[name])) for name in ("means", "stds", "mean", "min", "spread")}
    lengths = [len(numbers[name]) for name in ("mean", "min", "spread")]
    if lengths != [2, 2, 3] or not 0 < len(numbers["means"]) == len(numbers["stds"]):
        raise ValueError("a list has the wrong length")
    if not all(math.isfinite(number) for values in numbers.values() for number in values):
        raise ValueError("a number is not finite")
    if min(numbers["stds"]) <= 0:
        raise ValueError("a standard deviation is not above 0")
    return Normalisation(**cast(dict[str, Any], numbers), samples=int(data["samples"]), source=str(data["source"]))
