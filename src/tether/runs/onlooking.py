"""What people look at never ends a run: films, tables, charts and stored episodes may fail, what is learned goes on.

Knows neither what is shown nor how.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from tether.errors import STOPS, reason

logger = logging.getLogger("tether")


class Onlooking:
    """Contexts for what people look at: a failure inside is told in a line, the first time of each kind."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def at(self, what: str) -> _Look:
        """A context for `what`, as the line calls it. Ctrl-C passes through it."""
        return _Look(what, self._told)


class _Look:
    def __init__(self, what: str, told: set[str]) -> None:
        self._what, self._told = what, told
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, STOPS):
            return False
        self.failed = True
        if self._what not in self._told:
            self._told.add(self._what)
            logger.warning("%s: %s; the run goes on without", self._what, reason(error))
        return True
