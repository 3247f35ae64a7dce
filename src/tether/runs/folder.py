"""A run's folder: everything that one training leaves behind, written so that it can be killed at any instant.

    config.yaml      the full configuration
    metrics.jsonl    one JSON object a line, "iteration" first
    tensorboard/     the same numbers as TensorBoard events
    episodes.db      every sampled episode (see `episodes`)
    films/           films of episodes, where some were made
    unscored.jsonl   responses whose scoring failed, if it ever did
    alarms.jsonl     alarms that were raised and cleared, if there were any (see `alarms`)
    frontier.json    what the best of n responses of the reference score, where that was drawn
    report.html      what `tether report` made of it all
    starts.jsonl     the command, the code and the machine of each start (see `starts`)
    console.log      what the training printed (see `console`)
    notes.json       what people noted about it, if they did (see `notes`)
    checkpoints/     the newest states (see `checkpoints`)
    lock             says who is writing

Knows no algorithm and no model. Two runs that compute the same write the same metrics.jsonl, byte for byte, apart from
the fields that measure time or memory of the machine: their names start with `time/` or `memory/`, and they end each
line in this order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tether.episode import FILMS_FOLDER, Episode
from tether.errors import UserError
from tether.yaml_file import dump_yaml, read_yaml

from . import checkpoints
from .console import CONSOLE_FILE
from .episodes import EPISODES_FILE, EpisodeStore
from .lock import FolderLock
from .onlooking import Onlooking
from .starts import STARTS_FILE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
UNSCORED_FILE = "unscored.jsonl"
ALARMS_FILE = "alarms.jsonl"
FRONTIER_FILE = "frontier.json"
REPORT_FILE = "report.html"
NOTES_FILE = "notes.json"
TENSORBOARD_FOLDER = "tensorboard"
CHECKPOINTS_FOLDER = "checkpoints"
MEASURED = ("time/", "memory/")  # prefixes of what differs from one run to the next


class Run:
    """The writing end of a run's folder. Made by `create` or `open`; one process at a time; a context manager.

    Attributes:
        folder: where it is.
        config: what config.yaml holds.
    """

    def __init__(self, folder: Path, config: dict[str, Any], lock: FolderLock, *, keep: int, tensorboard: bool) -> None:
        self.folder = folder
        self.config = config
        self._lock = lock
        self._keep = keep
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._episodes: EpisodeStore | None = None
        self._metrics: int | None = None
        self._looks = Onlooking()

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Mapping[str, Any],
        *,
        overwrite: bool = False,
        keep: int = 2,
        tensorboard: bool = True,
    ) -> Run:
        """Start a new run.

        Args:
            folder: made if it is not there; files that belong to no run do not matter.
            config: plain nested data, written to config.yaml.
            overwrite: remove what an earlier run wrote there, and nothing else.
            keep: how many checkpoints stay, at least 1.
            tensorboard: write TensorBoard events too.

        Raises:
            UserError: the folder holds a run already, is being written to, or cannot be made.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be the run's folder: {error.strerror}") from None
        try:
            if not overwrite:
                refuse_run(folder)
            _clear(folder, keep=() if overwrite else (STARTS_FILE, CONSOLE_FILE))
            replace_file(folder / CONFIG_FILE, dump_yaml(config).encode())
        except BaseException:
            lock.release()
            raise
        return cls(folder, dict(config), lock, keep=keep, tensorboard=tensorboard)

    @classmethod
    def open(cls, folder: str | Path, *, keep: int = 2, tensorboard: bool = True) -> Run:
        """Go on with a run: `latest_checkpoint`, then `rewind` to it (to 0 where there is none), then `log`.

        Raises:
            UserError: the folder holds no run, or is being written to.
        """
        folder = Path(folder)
        config = read_config(folder)
        try:
            lock = FolderLock(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to: {error.strerror}") from None
        return cls(folder, config, lock, keep=keep, tensorboard=tensorboard)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Replace config.yaml, for a run that goes on with some fields changed."""
        replace_file(self.folder / CONFIG_FILE, dump_yaml(config).encode())
        self.config = dict(config)

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append a line to metrics.jsonl and the same to TensorBoard, where names without a `/` get `train/`.

        NaN and infinities become null in the JSON. The line is in the file when this returns: a reader sees all of it
        or, at worst, a last line without its end. TensorBoard may fail: a warning says so, and is its last.
        """
        numbers = {name: _number(value) for name, value in metrics.items()}
        line = json.dumps({"iteration": iteration, **_measured_last(numbers)}, allow_nan=False)
        if self._metrics is None:
            self._metrics = os.open(self.folder / METRICS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _write_all(self._metrics, line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.folder / METRICS_FILE}: cannot be written: {error.strerror}") from error
        if self._tensorboard:
            with self._looks.at("TensorBoard") as look:
                writer = self._open_tensorboard()
                for name, value in metrics.items():
                    writer.add_scalar(name if "/" in name else f"train/{name}", float(value), iteration)
                writer.flush()
            self._tensorboard = not look.failed

    def log_episodes(self, iteration: int, episodes: Sequence[Episode]) -> None:
        """Store the episodes of an iteration in one transaction."""
        self._open_episodes().append(iteration, episodes)

    def forget_frontier(self) -> None:
        """Remove frontier.json, where nothing was trained: the folder then holds no run that `refuse_run` refuses."""
        (self.folder / FRONTIER_FILE).unlink(missing_ok=True)

    def save_checkpoint(self, iteration: int, write: Callable[[Path], None]) -> Path:
        """Save the state after `iteration`: `write` gets an empty folder to fill. Returns where it is in the end.

        What was logged before is flushed to the disk first, so that a checkpoint never knows more than the logs.
        """
        if self._episodes is not None:
            with self._looks.at("episodes"):
                self._episodes.sync()
        if self._metrics is not None:
            with self._looks.at(METRICS_FILE):
                os.fsync(self._metrics)
        return checkpoints.save_checkpoint(self.folder / CHECKPOINTS_FOLDER, iteration, write, self._keep)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(iteration, folder) of the newest checkpoint that is whole; a warning names each broken one.

        Raises:
            UserError: there are checkpoints, and all are broken. To start again at nothing would cost all metrics and
                episodes, which is for the user to decide.
        """
        found = checkpoints.latest_checkpoint(self.folder / CHECKPOINTS_FOLDER)
        if found is None and (there := checkpoints.list_checkpoints(self.folder / CHECKPOINTS_FOLDER)):
            raise UserError(
                f"{self.folder / CHECKPOINTS_FOLDER}: no whole checkpoint among the {len(there)} that are there; put a "
                "good copy in their place, or start again with --overwrite"
            )
        return found

    def rewind(self, iteration: int) -> None:
        """Make the folder what it was after `iteration`.

        Later metrics, episodes, films and checkpoints go, and a torn last line and half-written checkpoints with them.
        TensorBoard is told to drop the later events (its purge step) when the next ones are logged.
        """
        self._close_writers()
        metrics = self.folder / METRICS_FILE
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)
            numbered = ((_iteration(line), line) for line in lines)
            replace_file(metrics, b"".join(line for n, line in numbered if n is not None and n <= iteration))
        if (self.folder / EPISODES_FILE).exists():
            self._open_episodes().remove_after(iteration)
            kept = self._open_episodes().films()
            for film in (self.folder / FILMS_FOLDER).glob("*"):
                if f"{FILMS_FOLDER}/{film.name}" not in kept:
                    film.unlink()
        checkpoints.remove_after(self.folder / CHECKPOINTS_FOLDER, iteration)
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Flush everything and let others write. Closing twice does no harm."""
        self._close_writers()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_episodes(self) -> EpisodeStore:
        if self._episodes is None:
            self._episodes = EpisodeStore(self.folder)
        return self._episodes

    def _open_tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            folder = str(self.folder / TENSORBOARD_FOLDER)
            # The purge step makes TensorBoard drop what a killed process logged beyond the checkpoint.
            self._writer = SummaryWriter(folder, purge_step=self._purge_step)
        return self._writer

    def _close_writers(self) -> None:
        if self._metrics is not None:
            os.close(self._metrics)
        if self._writer is not None:
            with self._looks.at("TensorBoard"):
                self._writer.close()
        if self._episodes is not None:
            with self._looks.at("episodes"):
                self._episodes.close()
        self._metrics = self._writer = self._episodes = None


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of the run in `folder`, without opening it for writing."""
    file = Path(folder) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{folder}: holds no run ({CONFIG_FILE} is missing)")
    return read_yaml(file)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as dicts, without a torn last one. Safe while the run is going on."""
    file = Path(folder) / METRICS_FILE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if _iteration(line) is not None]


def latest_checkpoint(folder: str | Path) -> tuple[int, Path] | None:
    """(iteration, checkpoint) of the newest whole checkpoint of the run in `folder`, for those who only read."""
    return checkpoints.latest_checkpoint(Path(folder) / CHECKPOINTS_FOLDER)


def refuse_run(folder: Path) -> None:
    """UserError where the folder holds a run, for those who would start another there.

    A run that was started and failed before it had anything to keep does not count.
    """
    names = (METRICS_FILE, EPISODES_FILE, CHECKPOINTS_FOLDER, UNSCORED_FILE, FRONTIER_FILE, NOTES_FILE)
    failed = (folder / STARTS_FILE).exists()  # a configuration without a start may be the user's own
    if any((folder / name).exists() for name in names) or ((folder / CONFIG_FILE).exists() and not failed):
        raise UserError(
            f"{folder}: holds a run already; go on with it by --resume, choose another folder, "
            "or replace it by --overwrite"
        )


def _clear(folder: Path, keep: Sequence[str]) -> None:
    for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, FILMS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    databases = (EPISODES_FILE, f"{EPISODES_FILE}-wal", f"{EPISODES_FILE}-shm")
    derived = (UNSCORED_FILE, ALARMS_FILE, FRONTIER_FILE, REPORT_FILE, STARTS_FILE, CONSOLE_FILE, NOTES_FILE)
    for name in (CONFIG_FILE, METRICS_FILE, *derived, *databases):
        if name not in keep:
            (folder / name).unlink(missing_ok=True)


def _measured_last(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(metrics.items(), key=lambda item: [item[0].startswith(kind) for kind in reversed(MEASURED)]))


def _number(value: Any) -> bool | int | float | None:
    if isinstance(value, (bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _iteration(line: bytes) -> int | None:
    """Of a line of metrics.jsonl; None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def replace_file(file: Path, data: bytes) -> None:
    """Write a file so that it has the old content or the new, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a writer that was killed; a link there would lead elsewhere
    with partial.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
