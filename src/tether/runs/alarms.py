"""Alarms: lines that say when a run's numbers leave the range in which a reward is usually followed and not fooled.

They are a function of the metrics alone, so a run that was resumed has the same ones as a run that never stopped. Knows
the names of metrics; nothing of models, rewards or training.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tether.errors import UserError

from .folder import ALARMS_FILE, read_metrics, replace_file

Kind = Literal["kl", "length", "entropy", "gap"]


@dataclass(frozen=True)
class AlarmsConfig:
    """When to raise an alarm: a line in the log and in `alarms.jsonl`. Each threshold may be none, which is off."""

    kl: float | None = 20.0
    """KL to the reference, nats per response, above which the policy is far from what it was. 20 nats are what the best
    of a billion responses of the reference would have."""
    length_ratio: float | None = 2.0
    """Mean response length ÷ that of the first iteration: above this, or below one divided by it."""
    entropy: float | None = 0.01
    """Nats per token, below which hardly anything is tried out any more."""
    gap: float | None = 0.5
    """How far the held-out score of `gold` may fall below its best while the score that is trained on has not fallen,
    in standard deviations of the first iteration's gold scores."""
    window: int = 5
    """Iterations whose mean is compared with a threshold, so that one odd batch raises nothing."""

    def __post_init__(self) -> None:
        for name in ("kl", "entropy", "gap"):
            threshold = getattr(self, name)
            if threshold is not None and not 0 < threshold < math.inf:
                raise ValueError(f"{name} is {threshold}, expected a number above 0, or none")
        if self.length_ratio is not None and not 1 < self.length_ratio < math.inf:
            raise ValueError(f"length_ratio is {self.length_ratio}, expected a number above 1, or none")
        if self.window < 1:
            raise ValueError(f"window is {self.window}, expected at least 1")


@dataclass(frozen=True)
class Alarm:
    """An alarm that was raised, or one that has cleared.

    Attributes:
        iteration: when that was.
        kind: of the alarm.
        state: `raised` or `cleared`.
        since: the iteration in which it was raised.
        value: what was compared with the threshold.
        threshold: as configured.
        seen: what it was, in words.
        remedy: what to do; empty for one that has cleared.
    """

    iteration: int
    kind: Kind
    state: Literal["raised", "cleared"]
    since: int
    value: float
    threshold: float
    seen: str
    remedy: str

    @property
    def message(self) -> str:
        """All of it on one line."""
        return f"{self.seen}: {self.remedy}" if self.state == "raised" else f"over: {self.seen}"


@dataclass(frozen=True)
class _Reading:
    """What an alarm looks at: whether it is due, and in which words."""

    due: bool
    value: float
    threshold: float
    seen: str
    remedy: str


class Alarms:
    """Told of the metrics of one iteration after the other, it says which alarms were raised or have cleared.

    An alarm is raised once, and again only after it has cleared: when it has not been due for a whole window, so that a
    number near its threshold does not ring at every other iteration.
    """

    def __init__(self, config: AlarmsConfig) -> None:
        self.config = config
        self.raised: dict[Kind, Alarm] = {}
        self._quiet: dict[Kind, int] = {}  # iterations in which one that was raised was not due
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=config.window)
        self._first: Mapping[str, Any] | None = None
        self._best: tuple[float, float, int] | None = None  # gold, score and iteration of the best mean gold so far

    def update(self, iteration: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Those that this iteration raised or cleared."""
        self._first = self._first or metrics
        self._recent.append(metrics)
        readings: dict[Kind, _Reading | None] = {
            "kl": self._kl(),
            "length": self._length(),
            "entropy": self._entropy(),
            "gap": self._gap(iteration),
        }
        return [
            alarm
            for kind, reading in readings.items()
            if reading is not None and (alarm := self._change(iteration, kind, reading)) is not None
        ]

    def _change(self, iteration: int, kind: Kind, reading: _Reading) -> Alarm | None:
        before = self.raised.get(kind)
        if reading.due:
            self._quiet[kind] = 0
            if before is not None:
                return None
            numbers = reading.value, reading.threshold
            alarm = Alarm(iteration, kind, "raised", iteration, *numbers, reading.seen, reading.remedy)
            self.raised[kind] = alarm
            return alarm
        if before is None:
            return None
        self._quiet[kind] += 1
        if self._quiet[kind] < self.config.window:
            return None
        del self.raised[kind]
        return Alarm(iteration, kind, "cleared", before.since, reading.value, reading.threshold, reading.seen, "")

    def _mean(self, name: str) -> float | None:
        """Over the last iterations; None where one of them has no such number."""
        values = [row.get(name) for row in self._recent]
        if any(value is None or not math.isfinite(value) for value in values):
            return None
        return math.fsum(values) / len(values)  # type: ignore[arg-type]

    def _kl(self) -> _Reading | None:
        # k1: when the policy is far away, one token in the tail of k3 can outweigh a whole batch
        value, threshold = self._mean("kl_k1"), self.config.kl
        if value is None or threshold is None:
            return None
        return _Reading(
            value > threshold,
            value,
            threshold,
            f"the KL to the reference is {value:.3g} nats per response (alarm above {threshold:g})",
            "raise --kl.beta or set --kl.target, and read what is sampled now",
        )

    def _length(self) -> _Reading | None:
        value, threshold = self._mean("length_ratio"), self.config.length_ratio
        if value is None or threshold is None:
            return None
        return _Reading(
            value > threshold or value < 1 / threshold,
            value,
            threshold,
            f"responses are {value:.3g} times as long as in the first iteration "
            f"(alarm above {threshold:g} and below {1 / threshold:.3g})",
            "see whether length is what the reward pays for; a `length` reward or --kl.beta holds it",
        )

    def _entropy(self) -> _Reading | None:
        value, threshold = self._mean("entropy"), self.config.entropy
        if value is None or threshold is None:
            return None
        return _Reading(
            value < threshold,
            value,
            threshold,
            f"the entropy is {value:.3g} nats per token (alarm below {threshold:g}), so hardly anything new is tried",
            "raise --kl.beta or --learner.entropy-coefficient, or stop here",
        )

    def _gap(self, iteration: int) -> _Reading | None:
        gold, score, threshold = self._mean("gold"), self._mean("score"), self.config.gap
        assert self._first is not None
        gold_std, score_std = self._first.get("gold_std"), self._first.get("score_std")
        if gold is None or score is None or threshold is None or len(self._recent) < self.config.window:
            return None
        if not gold_std or not score_std:  # all alike: nothing to measure a fall by
            return None
        if self._best is None or gold > self._best[0]:
            self._best = gold, score, iteration
        best, score_then, when = self._best
        fall, rise = (best - gold) / gold_std, (score - score_then) / score_std
        return _Reading(
            fall > threshold and rise >= 0,
            fall,
            threshold,
            f"since iteration {when} the gold score has fallen by {fall:.2f} standard deviations (alarm above "
            f"{threshold:g}) while the score went {rise:+.2f}, so the reward is being fooled",
            f"take a policy of about iteration {when}, raise --kl.beta, or mend the reward",
        )


def find_alarms(rows: Iterable[Mapping[str, Any]], config: AlarmsConfig) -> list[Alarm]:
    """All alarms of a run: `rows` are its metrics as `read_metrics` returns them."""
    return _found(Alarms(config), rows)


class AlarmLog:
    """`alarms.jsonl` of a run: one JSON object for each alarm that was raised or has cleared.

    What is there is written anew from the metrics that the folder holds, so that a resumed run has the alarms of one
    that never stopped.
    """

    def __init__(self, folder: Path, config: AlarmsConfig) -> None:
        self.file = folder / ALARMS_FILE
        self._alarms = Alarms(config)
        before = _found(self._alarms, read_metrics(folder))
        if before or self.file.exists():
            replace_file(self.file, "".join(map(_line, before)).encode())

    def log(self, iteration: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Write down what this iteration raised or cleared, and return it."""
        found = self._alarms.update(iteration, metrics)
        if found:
            try:
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write("".join(map(_line, found)))
            except OSError as error:
                raise UserError(f"{self.file}: cannot be written: {error.strerror}") from error
        return found


def _found(alarms: Alarms, rows: Iterable[Mapping[str, Any]]) -> list[Alarm]:
    return [alarm for row in rows for alarm in alarms.update(int(row["iteration"]), row)]


def _line(alarm: Alarm) -> str:
    return json.dumps(asdict(alarm), ensure_ascii=False) + "\n"
