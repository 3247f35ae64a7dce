"""Progress for people: a bar and the last rows of a table on a terminal, one plain line per iteration elsewhere.

Knows names and numbers; nothing of what they mean.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .console import PROGRESS

ROWS = 8  # of the live table: the trend is seen, and it fits small terminals


class Display:
    """Shows each iteration's numbers as they come. A context manager.

        with Display(20, ("score", "kl")) as display:
            display.phase("collecting")
            display.update(3, {"score": 0.41, "kl": 0.012})

    prints `iteration  3/20  score  +0.410  kl   0.012` where standard output is no terminal. What other code prints or
    logs meanwhile appears above the live table.

    Args:
        total: how many iterations there are.
        columns: names of the metrics to show, in this order; a metric that is missing shows as `-`. Names are shown
            from the last `/` on.
        unit: what an iteration is called, such as `step`.
        start: iterations that were done before (a resumed run).
    """

    def __init__(self, total: int, columns: Sequence[str], unit: str = "iteration", start: int = 0) -> None:
        self.total = total
        self.columns = tuple(columns)
        self.unit = unit
        self._labels = [name.rpartition("/")[2].replace("_", " ") for name in self.columns]
        self._rows: deque[list[str]] = deque(maxlen=ROWS)
        console = Console(file=sys.stdout)
        self._live: Live | None = None
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task(unit, total=total, completed=start)
            # Warnings go above the table, unless the user sent them elsewhere (2> file).
            terminal = sys.stderr.isatty()
            self._live = Live(self._render(), console=console, refresh_per_second=4, redirect_stderr=terminal)

    def phase(self, text: str) -> None:
        """Say what is being done now, beside the bar; plain output leaves it out."""
        if self._live is not None:
            self._progress.update(self._task, description=text)

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Show the numbers of an iteration that is done."""
        done = f"{iteration:>{len(str(self.total))}}/{self.total}"
        cells = [_format(name, metrics.get(name)) for name in self.columns]
        pairs = (f"{label} {cell:>7}" for label, cell in zip(self._labels, cells, strict=True))
        line = "  ".join((f"{self.unit} {done}", *pairs))
        if self._live is None:
            print(line, flush=True)
            return
        PROGRESS.info(line)
        self._rows.append([done, *cells])
        self._progress.update(self._task, completed=iteration, description=self.unit)
        self._live.update(self._render())

    def note(self, text: str) -> None:
        """A line of its own, above the live table."""
        if self._live is None:
            print(text, flush=True)
        else:
            PROGRESS.info(text)
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for label in (self.unit, *self._labels):
            table.add_column(label, justify="right", header_style="dim", overflow="ellipsis", no_wrap=True)
        for row in self._rows:
            table.add_row(*row)
        return Group(table, self._progress) if self._rows else Group(self._progress)


def _format(name: str, value: float | None) -> str:
    """Three decimals where they say something; a sign for scores and rewards, which may be either."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    sign = "+" if name.rpartition("/")[2].startswith(("score", "reward")) else ""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:{sign}.1e}"
    return f"{value:{sign},.0f}" if size >= 100 else f"{value:{sign}.3f}"
