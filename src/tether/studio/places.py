"""Names that come from outside as places within the runs folder, and nowhere else.

Knows which files of a run are read, so that none of them leads out of the folder by a link.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from tether.runs.console import CONSOLE_FILE
from tether.runs.episodes import EPISODES_FILE
from tether.runs.folder import ALARMS_FILE, CONFIG_FILE, METRICS_FILE, NOTES_FILE
from tether.runs.labels import LABELS_SUFFIX
from tether.runs.starts import STARTS_FILE

from .replies import ForbiddenError, NotFoundError

READ = (
    *(CONFIG_FILE, METRICS_FILE, ALARMS_FILE, NOTES_FILE, STARTS_FILE, CONSOLE_FILE),
    *(EPISODES_FILE, f"{EPISODES_FILE}-wal", f"{EPISODES_FILE}-shm", "lock"),
)


def inside(root: Path, name: str) -> Path:
    """`root/name`, which is there and does not leave the root, by `..` or by a link.

    Args:
        root: resolved.
        name: POSIX path relative to it; `.` for itself.

    Raises:
        ForbiddenError: it leads out.
        NotFoundError: nothing is there.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ForbiddenError(f"{name!r}: leads out of the runs folder, expected a name within it")
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, a NUL, too long, links in a circle
        raise NotFoundError(f"{name!r}: there is no such run or file") from None
    if found != root and root not in found.parents:
        raise ForbiddenError(f"{name!r}: a link that leads out of the runs folder")
    return found


def run_folder(root: Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        ForbiddenError: it, or a file of it that is read, leads out.
        NotFoundError: it is no run.
    """
    folder = inside(root, name)
    if not is_run(folder):
        raise NotFoundError(f"{name!r}: holds no run")
    fault = strays(root, folder)
    if fault is not None:
        raise ForbiddenError(f"{name}/{fault}: a link that leads out of the runs folder")
    return folder


def strays(root: Path, folder: Path) -> str | None:
    """The first file of the run that leads out of the root, if any does."""
    for name in READ:
        file = folder / name
        if file.is_symlink() and root not in Path(_resolved(file)).parents:
            return name
    return None


def is_run(folder: Path) -> bool:
    """Whether a folder has the files of a run, in whatever state."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, METRICS_FILE, EPISODES_FILE))


def label_file(root: Path, name: str) -> Path:
    """The file of a set of labels."""
    if not name.endswith(LABELS_SUFFIX):
        raise NotFoundError(f"{name!r}: no set of labels, expected a file *{LABELS_SUFFIX}")
    file = inside(root, name)
    if not file.is_file():
        raise NotFoundError(f"{name!r}: no such file")
    if any(file.with_name(file.name + suffix).is_symlink() for suffix in ("-wal", "-shm", "-journal")):
        raise ForbiddenError(f"{name!r}: a link stands where SQLite keeps what it writes")
    return file


def relative(root: Path, path: Path) -> str:
    """The name of a place within the root, for `inside`."""
    return path.relative_to(root).as_posix()


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError):
        return Path("/")
