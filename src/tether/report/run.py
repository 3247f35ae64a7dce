"""A run's folder as the page needs it, and what can be said of the run in a sentence.

Reads while the run goes on, and whatever there is: no gold score, frontier or episodes are no errors.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.config import config_from_dict
from tether.errors import UserError
from tether.runs import StoredEpisode, read_config, read_episodes, read_metrics, read_revisited
from tether.runs.alarms import Alarm, AlarmsConfig, find_alarms
from tether.runs.episodes import EPISODES_FILE
from tether.runs.folder import FRONTIER_FILE, METRICS_FILE

SAMPLES = 4  # of each kind
HARDLY = 0.1  # standard deviations, which is about the noise of the mean of a hundred responses


@dataclass(frozen=True)
class RunData:
    """What there is of a run.

    Attributes:
        folder: where it is.
        config: what config.yaml holds.
        rows: metrics, one dict per iteration; never empty.
        alarms: raised and cleared, in their order; empty where the run has no settings for them.
        thresholds: the settings of its alarms; None where it has none.
        frontier: what `frontier.json` holds; None where there is none.
        last: iteration whose episodes are shown; 0 where there are none.
        samples: episodes of that iteration by heading, such as `best`.
        revisited: pairs of the first and the last episode of a prompt.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    alarms: list[Alarm]
    thresholds: AlarmsConfig | None
    frontier: dict[str, Any] | None
    last: int = 0
    samples: dict[str, list[StoredEpisode]] = field(default_factory=dict)
    revisited: list[tuple[StoredEpisode, StoredEpisode]] = field(default_factory=list)

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Iterations and values of a metric, where it is a finite number."""
        pairs = [(float(row["iteration"]), row.get(name)) for row in self.rows]
        known = [(x, float(y)) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]
        return [x for x, _ in known], [y for _, y in known]

    @property
    def kl(self) -> str:
        """The metric for the KL to the reference. `kl` was a noisier estimate before it had an error: then `kl_k1`."""
        return "kl" if self.column("kl_error")[1] else "kl_k1"

    @property
    def window(self) -> int:
        """Iterations whose mean is looked at."""
        return 5 if self.thresholds is None else self.thresholds.window

    def now(self, name: str) -> float | None:
        """Mean of a metric over the last iterations; None where it has no value."""
        values = self.column(name)[1][-self.window :]
        return math.fsum(values) / len(values) if values else None

    def error(self, name: str) -> float | None:
        """Standard error of that mean, by how the iterations differ; None of fewer than two."""
        values = self.column(name)[1][-self.window :]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    def start(self, name: str) -> tuple[float, float] | None:
        """Mean and standard deviation of `score` or `gold` before training.

        Of the frontier's samples, where they were drawn, otherwise of the first iteration. None where they are unknown
        or all alike.
        """
        if self.frontier is not None and name in self.frontier["responses"][0]:
            values = [float(response[name]) for response in self.frontier["responses"]]
            mean = math.fsum(values) / len(values)
            std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        else:
            means, stds = self.column(name)[1], self.column(f"{name}_std")[1]
            if not means or not stds:
                return None
            mean, std = means[0], stds[0]
        return (mean, std) if std > 0 else None

    def risen(self, name: str) -> float | None:
        """By how many standard deviations `score` or `gold` stands above its start; None where that is unknown."""
        start, now = self.start(name), self.now(name)
        return None if start is None or now is None else (now - start[0]) / start[1]


@dataclass(frozen=True)
class Verdict:
    """Followed or fooled, in a word and a sentence.

    Attributes:
        kind: of the mark beside it: `good`, `bad` or `open`.
    """

    kind: str
    word: str
    sentence: str


def read_run(folder: Path) -> RunData:
    """All that the page shows.

    Raises:
        UserError: the folder holds no run, or none that has finished an iteration; a file of it is damaged.
    """
    config, rows = read_config(folder), read_metrics(folder)
    if not rows:
        raise UserError(f"{folder / METRICS_FILE}: no iteration is done yet, expected at least one: try again later")
    thresholds = None
    if "alarms" in config:
        thresholds = config_from_dict(AlarmsConfig, config["alarms"], f"{folder / 'config.yaml'}: alarms")
    data = RunData(
        folder=folder,
        config=config,
        rows=rows,
        alarms=[] if thresholds is None else find_alarms(rows, thresholds),
        thresholds=thresholds,
        frontier=_read_frontier(folder / FRONTIER_FILE),
    )
    if not (folder / EPISODES_FILE).is_file():
        return data
    newest = read_episodes(folder, order="newest", limit=1)
    if not newest:
        return data
    last = newest[0].iteration
    orders = {"best": "best", "worst": "worst"} | ({} if newest[0].kl is None else {"most kl": "most kl"})
    samples = {name: _different(read_episodes(folder, last, order=order, limit=64)) for name, order in orders.items()}  # type: ignore[arg-type]
    return RunData(**vars(data) | {"last": last, "samples": samples, "revisited": read_revisited(folder, SAMPLES)})


def verdict(data: RunData) -> Verdict:
    """What the gold score says of the score; without one nobody can say."""
    score, gold = data.risen("score"), data.risen("gold")
    if gold is None or score is None:
        reason = (
            "All first responses have the same score, or the same gold score: there is no measure for what came later."
            if data.column("gold")[1]
            else "No held-out score (--gold.functions) was given to tell. A score that rises shows that the reward was "
            "climbed, not that it asks for the right thing: read the samples."
        )
        return Verdict("open", "Followed or fooled?", reason)
    change = f"the score went {_signed(score)} standard deviations and the gold score {_signed(gold)}"
    best, when = _best_gold(data)
    if best - gold > HARDLY:
        change += f" (at its best, about iteration {when:.0f}, {_signed(best)})"
    gaps = [alarm for alarm in data.alarms if alarm.kind == "gap"]
    if gaps and gaps[-1].state == "raised":
        return Verdict("bad", "Fooled.", f"The reward is climbed while the gold score falls. Since the start {change}.")
    if score <= HARDLY:
        return Verdict("open", "Not climbed yet.", f"Since the start {change}.")
    if gold < -HARDLY:
        return Verdict("bad", "Fooled.", f"Since the start {change}: what was gained is not what was meant.")
    if gold <= HARDLY:
        return Verdict("open", "Climbed, but for nothing so far.", f"Since the start {change}.")
    return Verdict("good", "Followed, as far as the gold score can tell.", f"Since the start {change}.")


def _best_gold(data: RunData) -> tuple[float, float]:
    """The highest mean gold score over a window, in standard deviations above the start, and the window's end."""
    start, (iterations, values) = data.start("gold"), data.column("gold")
    assert start is not None
    window = min(data.window, len(values))
    means = [math.fsum(values[end - window : end]) / window for end in range(window, len(values) + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    return (means[best] - start[0]) / start[1], iterations[best + window - 1]


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _different(episodes: Sequence[StoredEpisode]) -> list[StoredEpisode]:
    """The first few that differ in prompt or response."""
    found: dict[tuple[str, str], StoredEpisode] = {}
    for episode in episodes:
        found.setdefault((episode.prompt, episode.response), episode)
    return list(found.values())[:SAMPLES]


def _read_frontier(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if not data["responses"] or not all({"n", "kl", "score"} <= point.keys() for point in data["curve"]):
            raise ValueError("a part of it is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); move it away, and the report goes without it") from error
    return dict(data)
