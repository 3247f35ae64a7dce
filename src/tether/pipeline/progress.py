"""What people see while something takes long: what is prepared, each iteration's numbers, how much is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tether.runs import Display
from tether.runs.display import Pace, duration
from tether.train import Iteration

logger = logging.getLogger("tether")

EVERY = 10.0  # seconds between two lines of a `Tally`


class Progress:
    """A `Display` of iterations, or nothing at all. A context manager.

    Args:
        iterations: of the whole run.
        columns: metrics to show.
        wanted: False says nothing of anything.
    """

    def __init__(self, iterations: int, columns: Sequence[str], wanted: bool = True) -> None:
        self._display = Display(iterations, columns) if wanted else None

    def phase(self, text: str) -> None:
        """Something that may take long begins."""
        if self._display is not None:
            self._display.phase(text)

    def say(self, lines: Sequence[str]) -> None:
        """Lines of their own."""
        if self._display is not None:
            self._display.note("\n".join(lines))

    def begin(self, done: int) -> None:
        """The first iteration starts, after `done` of an earlier time."""
        if self._display is not None:
            self._display.begin(done)

    def iteration(self, iteration: Iteration) -> None:
        """One is done."""
        if self._display is not None:
            self._display.update(iteration.number, iteration.metrics)

    def __enter__(self) -> Self:
        if self._display is not None:
            self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.__exit__(kind, error, trace)


class Tally:
    """Says in the log, now and then, how much of a long piece of work is done and how long the rest takes.

    Args:
        total: how much there is.
        what: of what, such as `prompts`.
        every: seconds between two lines; what is done sooner says nothing.
    """

    def __init__(self, total: int, what: str, every: float = EVERY) -> None:
        self._pace, self._what, self._every = Pace(total), what, every
        self._told = time.monotonic()

    def update(self, done: int) -> None:
        """So much is done now."""
        self._pace.update(done)
        left, now = self._pace.left(), time.monotonic()
        if left is None or done >= self._pace.total or now < self._told + self._every:
            return
        self._told = now
        logger.info("%s of %s %s, %s left", f"{done:,}", f"{self._pace.total:,}", self._what, duration(left))
