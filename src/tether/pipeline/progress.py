"""What people see of a training run: what is being prepared, what was loaded, and each iteration's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tether.runs import Display
from tether.train import Iteration


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
            self._display.phase(f"iteration {done + 1}")
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
