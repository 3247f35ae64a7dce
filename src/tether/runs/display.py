"""Progress for people: a bar and the last rows of a table on a terminal, one plain line per iteration elsewhere.

Knows names and numbers; nothing of what they mean.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from .console import PROGRESS

ROWS = 8  # of the live table: the trend is seen, and it fits small terminals
RECENT = 20  # iterations whose median says how long the rest will take: an odd slow one does not count
GAP = 2  # between columns
COUNTS = ("steps", "episodes", "tokens")  # whole numbers


class Display:
    """Shows each iteration's numbers as they come. A context manager.

        with Display(20, ("score", "kl")) as display:
            display.phase("collecting")
            display.update(3, {"score": 0.41, "kl": 0.012})

    prints `iteration  3/20  score  +0.410  kl   0.012  4.1 s per iteration, 1 min left` where standard output is no
    terminal. What other code prints or logs meanwhile appears above the live table.

    Args:
        total: how many iterations there are.
        columns: names of the metrics to show, in this order; a metric that is missing shows as `-`, one that has a
            standard error, NAME_error, with it. Names are shown from the last `/` on.
        unit: what an iteration is called, such as `step`.
    """

    def __init__(self, total: int, columns: Sequence[str], unit: str = "iteration") -> None:
        self.total = total
        self.columns = tuple(columns)
        self.unit = unit
        self.pace = Pace(total)
        self._labels = [name.rpartition("/")[2].replace("_", " ") for name in self.columns]
        self._formats = [Format(name) for name in self.columns]
        self._rows: deque[list[str]] = deque(maxlen=ROWS)
        self._console = Console(file=sys.stdout)
        self._live: Live | None = None
        if sys.stdout.isatty() and not self._console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=Column(no_wrap=True)),
                _TimeLeft(self.pace),
                console=self._console,
            )
            self._task = self._progress.add_task(unit, total=total)
            # Warnings go above the table, unless the user sent them elsewhere (2> file).
            terminal = sys.stderr.isatty()
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4, redirect_stderr=terminal
            )

    def phase(self, text: str) -> None:
        """Say in a line of its own what is being done now, which may take long; its first word goes beside the bar."""
        self.note(f"{text} …")
        if self._live is not None:
            self._progress.update(self._task, description=text.split()[0].rstrip(":"))

    def begin(self, done: int = 0) -> None:
        """The first iteration starts now, after `done` of an earlier time: what came before is not counted into it."""
        self.pace.begin(done)
        if self._live is not None:
            self._progress.update(self._task, completed=done, description=self.unit)
        else:
            print(f"{self.unit} {done + 1:,} …", flush=True)

    def update(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Show the numbers of an iteration that is done."""
        self.pace.update(iteration)
        done = f"{iteration:>{len(str(self.total))}}/{self.total}"
        cells = [_cell(form, name, metrics) for name, form in zip(self.columns, self._formats, strict=True)]
        pairs = (f"{label} {cell:>7}" for label, cell in zip(self._labels, cells, strict=True))
        line = "  ".join((f"{self.unit} {done}", *pairs, self.pace.words(self.unit)))
        if self._live is None:
            print(line, flush=True)
            return
        PROGRESS.info(line)
        self._rows.append([done, *cells])
        self._progress.update(self._task, completed=iteration, description=self.unit)

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
            self._live.transient = not self._rows  # of what failed before the first iteration no empty bar stays
            self._live.stop()

    def _render(self) -> Group:
        if not self._rows:
            return Group(self._progress)
        return Group(*table((self.unit, *self._labels), self._rows, self._console.width), self._progress)


def table(labels: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Table | Text]:
    """The rows, in columns as far as the width goes; of the other columns the newest row, as lines below.

    Numbers are never cut. Labels are broken between their words.
    """
    widths = [max(*map(len, labels[place].split()), *(len(row[place]) for row in rows)) for place in range(len(labels))]
    shown, used = 0, -GAP
    while shown < len(labels) and (shown == 0 or used + GAP + widths[shown] <= width):
        used += GAP + widths[shown]
        shown += 1
    # What room is left goes to the labels from the left, so that fewer of them are broken.
    for place in range(shown):
        more = min(max(len(labels[place]), widths[place]) - widths[place], max(0, width - used))
        widths[place], used = widths[place] + more, used + more
    grid = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for place in range(shown):
        grid.add_column(
            labels[place], justify="right", vertical="bottom", header_style="dim", width=widths[place], overflow="fold"
        )
    for row in rows:
        grid.add_row(*row[:shown])
    lines: list[str] = []
    for label, cell in zip(labels[shown:], rows[-1][shown:], strict=True):
        pair = f"{label} {cell}"
        if lines and len(lines[-1]) + GAP + len(pair) <= width:
            lines[-1] += " " * GAP + pair
        else:
            lines.append(pair)
    return [grid, *(Text(line, overflow="fold") for line in lines)]


class Pace:
    """How long an iteration takes and the rest will take, by the median of the recent ones.

    Args:
        total: how many iterations there are.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._recent: deque[float] = deque(maxlen=RECENT)  # seconds per iteration
        self._last = time.monotonic()

    def begin(self, done: int) -> None:
        """Count from now on, and from this many."""
        self.done, self._last = done, time.monotonic()

    def update(self, done: int) -> None:
        """So many are done now."""
        now = time.monotonic()
        if done > self.done:
            self._recent.append((now - self._last) / (done - self.done))
        self.done, self._last = done, now

    @property
    def seconds(self) -> float | None:
        """Of an iteration; None before the first."""
        return statistics.median(self._recent) if self._recent else None

    def left(self) -> float | None:
        """Seconds to the end, as of now; None before the first iteration."""
        if self.seconds is None:
            return None
        begun = min(self.seconds, time.monotonic() - self._last)  # of the iteration that runs now
        return max(0.0, (self.total - self.done) * self.seconds - (begun if self.done < self.total else 0.0))

    def words(self, unit: str) -> str:
        """`4.1 s per iteration, 12 min left`; empty before the first iteration."""
        seconds, left = self.seconds, self.left()
        if seconds is None or left is None:
            return ""
        decimals = sum(seconds < limit for limit in (9.95, 0.995, 0.0995))  # two digits, down to milliseconds
        each = f"{seconds:.{decimals}f} s"
        each = f"{each if seconds < 600 else duration(seconds)} per {unit}"
        return each if self.done >= self.total else f"{each}, {duration(left)} left"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 5 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


class _TimeLeft(ProgressColumn):
    """What `Pace` expects, beside the bar."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(Column(no_wrap=True))
        self._pace = pace

    def render(self, task: Task) -> Text:
        """Empty before the first iteration."""
        left = self._pace.left()
        return Text("" if left is None or self._pace.done >= self._pace.total else f"{duration(left)} left")


def _cell(form: Format, name: str, metrics: Mapping[str, float]) -> str:
    cell, error = form(metrics.get(name)), metrics.get(f"{name}_error")
    return cell if error is None else f"{cell} ±{form(error)}"


class Format:
    """How one metric's numbers are written: the first decides the decimals, a much smaller one later gets more.

    Args:
        name: of the metric. Scores and rewards, which may be either, have a sign; learning rates an exponent; fractions
            and `approx_kl`, which are small, four decimals.
    """

    def __init__(self, name: str) -> None:
        name = name.rpartition("/")[2]
        self._sign = "+" if name.startswith(("score", "reward")) else ""
        self._exponent = name == "learning_rate"
        self._fine = name == "approx_kl" or name.endswith("fraction")
        self._whole = name in COUNTS
        self._decimals = 0 if self._whole else None

    def __call__(self, value: float | None) -> str:
        """`-` for a metric that is missing."""
        if value is None:
            return "-"
        if isinstance(value, int):
            return f"{value:,}"
        value = float(value)
        if not math.isfinite(value):
            return str(value)
        if self._exponent or abs(value) >= 1e9:
            return f"{value:{self._sign}.2e}"
        size = abs(value)
        if not self._whole and (self._decimals is None or 0 < size < 10 ** (1 - self._decimals)):  # one digit is few
            wanted = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 4 if self._fine else 3
            self._decimals = max(wanted, self._decimals or 0)
        rounded = round(value, self._decimals) + 0.0  # no -0.000
        return f"{rounded:{self._sign},.{self._decimals}f}"
