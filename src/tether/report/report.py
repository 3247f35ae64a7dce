"""`tether report`: reads a run's folder and writes its page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tether.errors import UserError
from tether.runs.folder import REPORT_FILE, replace_file

from .page import page
from .run import read_run


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained page about a run."""

    run: str = ""
    """Folder of the run."""
    output: str = ""
    """File to write. Empty: `report.html` in the run's folder."""


def report(config: ReportConfig) -> Path:
    """Write the page and return its file.

    Raises:
        UserError: the folder holds no run, or none that has finished an iteration; the file cannot be written.
    """
    if not config.run:
        raise UserError("no run given: tether report FOLDER, such as tether report runs/ppo")
    file = Path(config.output) if config.output else Path(config.run) / REPORT_FILE
    text = page(read_run(Path(config.run)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode())
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    return file
