"""How well scores agree with what people preferred: accuracy with its interval, calibration, and lengths.

Knows numbers alone; nothing of models or of how the scores were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tether.pipeline.comparisons import preference_loss
from tether.uncertainty import wilson

BINS = 10  # of the reliability curve, over confidences from 0.5 to 1


@dataclass(frozen=True)
class Bin:
    """Comparisons whose predicted probability of the likelier response is in [low, high), the last bin closed.

    Attributes:
        count: how many.
        confidence: the mean of that probability, NaN where there are none.
        accuracy: the share in which the likelier response was the chosen one.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """How well scores agree with comparisons. Ties count in the loss and the correlation alone.

    Attributes:
        pairs: comparisons in which one was preferred.
        ties: the others.
        loss: mean of −log σ(r_chosen − r_rejected), in nats, ties by halves; margins and centring left out.
        accuracy: share of pairs in which the chosen response has the higher score; equal scores count half.
        interval: its 95 % interval by Wilson (1927).
        margin: mean of r_chosen − r_rejected over the pairs.
        margin_error: its standard error, NaN of fewer than two pairs.
        calibration_error: Σ (bin's share)·|its accuracy − its confidence| (Guo et al. 2017, equation 3).
        reliability: the curve's bins.
        length_correlation: Pearson's between scores and lengths of responses in tokens.
        longer_by_model: share of pairs, of different lengths, in which the longer response has the higher score.
        longer_by_people: share in which it is the chosen one.
    """

    pairs: int
    ties: int
    loss: float
    accuracy: float
    interval: tuple[float, float]
    margin: float
    margin_error: float
    calibration_error: float
    reliability: tuple[Bin, ...] = field(repr=False)
    length_correlation: float
    longer_by_model: float
    longer_by_people: float


def evaluate_scores(
    chosen: Sequence[float] | Tensor,
    rejected: Sequence[float] | Tensor,
    ties: Sequence[bool] | None = None,
    chosen_lengths: Sequence[int] | None = None,
    rejected_lengths: Sequence[int] | None = None,
) -> Evaluation:
    """Compare scores with what was preferred.

    Args:
        chosen: (n,) scores of the chosen responses, on the scale whose differences go through σ.
        rejected: (n,) of the rejected ones.
        ties: (n,) whether neither was preferred. None: never.
        chosen_lengths: (n,) tokens of the responses. None: nothing is said of lengths.
        rejected_lengths: (n,).
    """
    higher, lower = torch.as_tensor(chosen).double(), torch.as_tensor(rejected).double()
    tied = torch.zeros(len(higher), dtype=torch.bool) if ties is None else torch.tensor(list(ties), dtype=torch.bool)
    losses = preference_loss(higher, lower, torch.zeros_like(higher), tied)
    gaps = (higher - lower)[~tied].numpy()
    right = (gaps > 0) + 0.5 * (gaps == 0)
    accuracy = mean(right)
    error, bins = calibration(gaps)
    correlation = by_model = by_people = math.nan
    if chosen_lengths is not None and rejected_lengths is not None:
        lengths = np.array([*chosen_lengths, *rejected_lengths], dtype=np.float64)
        correlation = _correlation(torch.cat([higher, lower]).numpy(), lengths)
        longer = np.sign(np.array(chosen_lengths) - np.array(rejected_lengths))[~tied.numpy()]
        unequal = longer != 0
        by_people = mean(longer[unequal] > 0)
        by_model = mean(np.where(longer[unequal] > 0, right[unequal], 1 - right[unequal]))
    return Evaluation(
        pairs=len(gaps),
        ties=int(tied.sum()),
        loss=mean(losses.numpy()),
        accuracy=accuracy,
        interval=wilson(float(right.sum()), len(gaps)),
        margin=mean(gaps),
        margin_error=float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan,
        calibration_error=error,
        reliability=bins,
        length_correlation=correlation,
        longer_by_model=by_model,
        longer_by_people=by_people,
    )


def calibration(gaps: np.ndarray, count: int = BINS) -> tuple[float, tuple[Bin, ...]]:
    """Expected calibration error and reliability curve of differences r_chosen − r_rejected, in `count` bins.

    The model says that the response with the higher score is preferred with probability σ(|difference|).
    """
    confidences = 1 / (1 + np.exp(-np.abs(gaps)))
    right = (gaps > 0) + 0.5 * (gaps == 0)
    edges = np.linspace(0.5, 1.0, count + 1)
    places = np.clip(np.searchsorted(edges, confidences, side="right") - 1, 0, count - 1)
    bins, error = [], 0.0
    for place in range(count):
        inside = places == place
        confidence, accuracy = mean(confidences[inside]), mean(right[inside])
        bins.append(Bin(float(edges[place]), float(edges[place + 1]), int(inside.sum()), confidence, accuracy))
        if inside.any():
            error += float(inside.mean()) * abs(accuracy - confidence)
    return (error if len(gaps) else math.nan), tuple(bins)


def mean(values: np.ndarray) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 2 or first.std() == 0 or second.std() == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])
