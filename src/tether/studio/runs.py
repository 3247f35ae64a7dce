"""The runs of a folder as the page lists them: what they are, how far they came, and what is wrong with some.

A run that is damaged or half written is listed with its fault. The folder is looked through at most once a second,
however many ask. Knows the names of a few metrics; nothing of episodes or labels.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tether.errors import UserError
from tether.runs.checkpoints import list_checkpoints
from tether.runs.episodes import EPISODES_FILE
from tether.runs.folder import (
    ALARMS_FILE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    NOTES_FILE,
    TENSORBOARD_FOLDER,
)
from tether.runs.labels import LABELS_SUFFIX
from tether.runs.lock import is_held
from tether.runs.notes import Notes, read_notes
from tether.runs.starts import without_secrets
from tether.yaml_file import read_yaml

from .metrics import MetricsLog, Row
from .places import is_run, relative, strays

SPARKS = 40  # numbers of a sparkline
DEPTH = 5  # folders within folders
MOST_FOLDERS = 20_000  # that are looked through
MOST_NODES = 20_000  # of a configuration; YAML's aliases can stand for billions
LONGEST_FILE = 4 * 1024 * 1024  # bytes of a configuration or of alarms
PAUSE = 1.0  # seconds between two looks
_PASSED_OVER = {CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, "node_modules", "__pycache__"}
_LENGTHS, _SPEEDS = (
    ("response_length", "episode_length"),
    ("time/tokens_per_second_sampled", "time/tokens_per_second", "time/steps_per_second_collected"),
)


@dataclass(frozen=True)
class RunSummary:
    """One line of the table of runs; `docs/studio.md` says what each column means."""

    run: str
    name: str
    kind: str
    state: str
    iteration: int | None
    iterations: int | None
    score: float | None
    kl: float | None
    length: float | None
    tokens_per_second: float | None
    alarms: int
    episodes: bool
    updated: float
    spark: list[float]
    fault: str | None
    note: str
    tags: list[str]


class Catalogue:
    """All runs under a root, with what was read of them; safe to use from several threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._summaries: list[RunSummary] = []
        self._kept: dict[Path, tuple[tuple[Any, ...], RunSummary]] = {}
        self._logs: dict[Path, MetricsLog] = {}
        self.left_out: str | None = None  # that there are more folders than were looked through, or deeper ones

    def runs(self) -> list[RunSummary]:
        """The newest first; of at most a second ago."""
        with self._lock:
            if time.monotonic() - self._looked > PAUSE:
                found = [self._summary(folder) for folder in self._folders() if is_run(folder)]
                self._summaries = sorted(found, key=lambda summary: (-summary.updated, summary.run))
                self._looked = time.monotonic()
            return self._summaries

    def log(self, folder: Path) -> MetricsLog:
        """The metrics of a run."""
        return self._logs.setdefault(folder, MetricsLog(folder / METRICS_FILE))

    def summary(self, folder: Path) -> RunSummary:
        """One run as it is now."""
        with self._lock:
            return self._summary(folder)

    def label_files(self) -> list[Path]:
        """Sets of labels under the root."""
        return sorted(path for folder in self._folders() for path in _label_files(folder))

    def _folders(self) -> list[Path]:
        deeper: list[Path] = []
        found = list(_folders(self.root, deeper))
        self.left_out = None
        if len(found) == MOST_FOLDERS:
            looked = f"The {MOST_FOLDERS:,} nearest folders were looked through; what lies in others"
        elif deeper:
            looked = f"Folders were looked through to {DEPTH} levels below this one; what lies deeper, as in "
            looked += f"{readable(relative(self.root, deeper[0]))},"
        else:
            return found
        remedy = "To see it, start the studio on a folder further in: tether studio FOLDER"
        self.left_out = f"{looked} is not listed here. {remedy}"
        return found

    def _summary(self, folder: Path) -> RunSummary:
        held = is_held(folder)
        stamps = [_stamp(folder / name) for name in (CONFIG_FILE, METRICS_FILE, ALARMS_FILE, NOTES_FILE)]
        sign = (held, (folder / EPISODES_FILE).is_file(), *stamps)
        kept = self._kept.get(folder)
        if kept is None or kept[0] != sign:
            kept = (sign, self._summarise(folder, held))
            self._kept[folder] = kept
        return kept[1]

    def _summarise(self, folder: Path, held: bool) -> RunSummary:
        name, stray = readable(relative(self.root, folder)), strays(self.root, folder)
        if stray is not None:
            return _damaged(name, f"{stray}: a link that leads out of the runs folder", folder)
        if "\ufffd" in name:
            return _damaged(name, "its name is not UTF-8: rename the folder", folder)
        fault, config, notes = None, {}, Notes()
        try:
            notes = read_notes(folder)
        except UserError as error:
            fault = str(error).replace(f"{folder}/", "")
        try:
            config = config_of(folder)
        except UserError as error:
            fault = str(error).replace(f"{folder}/", "")
        log = self.log(folder)
        rows = log.rows()
        fault = fault or log.fault
        last: Mapping[str, Any] = rows[-1] if rows else {}
        kind, planned = kind_of(config), iterations_of(config)
        return RunSummary(
            run=name,
            name=self.root.name if name == "." else name,
            kind=kind,
            state=_state(fault, held, last.get("iteration"), planned, kind),
            iteration=last.get("iteration"),
            iterations=planned,
            score=last.get("score"),
            kl=last.get("kl"),
            length=_first(last, _LENGTHS),
            tokens_per_second=_first(last, _SPEEDS),
            alarms=sum(alarm["state"] == "raised" for alarm in last_of_each_kind(alarms_of(folder))),
            episodes=(folder / EPISODES_FILE).is_file(),
            updated=_updated(folder),
            spark=spark([row.get("score", row.get("loss")) for row in rows]),
            fault=fault,
            note=notes.note,
            tags=list(notes.tags),
        )


def run_details(catalogue: Catalogue, folder: Path) -> dict[str, Any]:
    """A run's page, less its metrics."""
    summary = catalogue.summary(folder)
    rows = catalogue.log(folder).rows()
    names = dict.fromkeys(name for row in rows for name in row)
    return asdict(summary) | {
        "config": config_or_nothing(folder),
        "metrics": [name for name in names if name != "iteration"],
        "alarms": alarms_of(folder),
        "raised": summary.alarms,
        "checkpoints": checkpoints_of(folder),
        "rows": len(rows),
    }


def metrics_since(rows: Sequence[Row], since: int | None, names: Sequence[str] | None) -> list[Row]:
    """Rows of later iterations, with these metrics alone where they are named."""
    later = rows if since is None else [row for row in rows if row["iteration"] > since]
    if names is None:
        return list(later)
    wanted = {"iteration", *names}
    return [{name: value for name, value in row.items() if name in wanted} for row in later]


def difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Fields whose values differ, those of the left one first."""
    first, second = dict(_leaves(left)), dict(_leaves(right))
    fields = ((name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second]))
    return [{"name": name, "left": left, "right": right} for name, left, right in fields if left != right]


def config_of(folder: Path) -> dict[str, Any]:
    """The run's configuration as plain JSON data; empty where there is none.

    Raises:
        UserError: it is damaged, or no configuration.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    if file.stat().st_size > LONGEST_FILE:
        raise UserError(f"{file.name}: longer than {LONGEST_FILE:,} bytes, expected a configuration")
    left = [MOST_NODES]
    return dict(_plain(read_yaml(file), left, 0, file.name))


def config_or_nothing(folder: Path) -> dict[str, Any]:
    """The same; empty where it is damaged, which the run's summary says."""
    try:
        return config_of(folder)
    except UserError:
        return {}


def kind_of(config: Mapping[str, Any]) -> str:
    """`ppo`, `control` or `unknown`, told by the sections."""
    if isinstance(config.get("learner"), dict):
        if isinstance(config.get("environments"), dict):
            return "control"
        if isinstance(config.get("sampling"), dict):
            return "ppo"
    return "unknown"


def iterations_of(config: Mapping[str, Any]) -> int | None:
    """How long the run is to be, where the configuration says."""
    if kind_of(config) != "control":
        planned = config.get("iterations")
        return planned if _is_count(planned) else None
    collect = config.get("collect")
    steps = collect.get("steps") if isinstance(collect, dict) else None
    total, count = config.get("total_steps"), config["environments"].get("count")
    if _is_count(total) and _is_count(steps) and _is_count(count):
        return math.ceil(total / (steps * count))
    return None


def alarms_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of alarms.jsonl that are whole."""
    file = folder / ALARMS_FILE
    if not file.is_file():
        return []
    try:
        with file.open("rb") as stream:
            lines = stream.read(LONGEST_FILE).split(b"\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            alarm = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(alarm, dict) and isinstance(alarm.get("kind"), str) and isinstance(alarm.get("state"), str):
            found.append(alarm)
    return found


def last_of_each_kind(alarms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How each alarm stands."""
    return list({alarm["kind"]: alarm for alarm in alarms}.values())


def checkpoints_of(folder: Path) -> list[dict[str, Any]]:
    """Checkpoints that are there, the oldest first."""
    place = folder / CHECKPOINTS_FOLDER
    if place.is_symlink():
        return []
    found = []
    try:
        for iteration, path in list_checkpoints(place):
            files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
            size, when = sum(file.stat().st_size for file in files), path.stat().st_mtime
            found.append({"iteration": iteration, "path": relative(folder, path), "bytes": size, "time": when})
    except OSError:  # removed while it was looked at
        return found
    return found


def spark(values: Sequence[Any]) -> list[float]:
    """At most `SPARKS` numbers that show how the values went: means of equal parts."""
    numbers = [float(value) for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    parts = min(SPARKS, len(numbers))
    bounds = [round(part * len(numbers) / parts) for part in range(parts + 1)] if parts else []
    return [math.fsum(numbers[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]


def readable(name: str) -> str:
    """A file's name as text; what is not UTF-8 in it as `\ufffd`."""
    return os.fsencode(name).decode("utf-8", "replace")


def _folders(root: Path, deeper: list[Path]) -> Iterator[Path]:
    """The root and the folders in it, the nearest first; no link, and a bounded number.

    To `deeper` go those that lie too deep and are in no run: what a run keeps in folders is its own.
    """
    waiting, seen = deque([(root, 0)]), 0
    while waiting and seen < MOST_FOLDERS:
        folder, depth = waiting.popleft()
        seen += 1
        yield folder
        if depth == DEPTH and is_run(folder):
            continue
        try:
            with os.scandir(folder) as entries:
                names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        kept = sorted(name for name in names if not name.startswith(".") and name not in _PASSED_OVER)
        inner = [folder / name for name in kept]
        if depth == DEPTH:
            deeper += inner
        else:
            waiting += [(path, depth + 1) for path in inner]


def _label_files(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(LABELS_SUFFIX)]
    except OSError:
        return []
    return [folder / name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]


def _state(fault: str | None, held: bool, done: int | None, planned: int | None, kind: str) -> str:
    if fault is not None:
        return "damaged"
    if held:
        return "training"
    if done is None:
        return "empty"
    if planned is None:
        return "finished" if kind == "unknown" else "stopped"
    return "finished" if done >= planned else "stopped"


def _damaged(name: str, fault: str, folder: Path) -> RunSummary:
    nothing: dict[str, None] = dict.fromkeys(("iteration", "iterations", "score", "kl", "length", "tokens_per_second"))
    return RunSummary(
        run=name,
        name=name,
        kind="unknown",
        state="damaged",
        alarms=0,
        episodes=False,
        updated=_updated(folder),
        spark=[],
        fault=fault,
        note="",
        tags=[],
        **nothing,
    )


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _updated(folder: Path) -> float:
    stamps = (_stamp(folder / name) for name in (CONFIG_FILE, METRICS_FILE))
    return max((stamp[2] / 1e9 for stamp in stamps if stamp is not None), default=0.0)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _plain(value: Any, left: list[int], depth: int, name: str) -> Any:
    """YAML's data as JSON's: keys and dates as text, secrets masked.

    `left` counts down, as aliases can stand for billions of nodes.
    """
    left[0] -= 1
    if left[0] < 0 or depth > 50:
        raise UserError(f"{name}: more than {MOST_NODES:,} values, or nested too deeply, expected a configuration")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, left, depth + 1, name) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, left, depth + 1, name) for entry in value]
    if isinstance(value, str):
        return without_secrets(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) else str(value)
    return str(value)


def _leaves(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _leaves(entry, f"{path}{name}.")
        else:
            yield f"{path}{name}", entry
