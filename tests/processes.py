"""`tether` commands in processes of their own, which can be killed at a chosen moment.

A server imports everything once and forks a child for each command, so that none pays for the start-up.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "sqlite3.connect"}
"""Audit events of Python at which a run's files change or are about to."""


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after the `event`-th time (from 1) that a file of the run was touched."""

    event: int
    delay: float


class Commands:
    """Starts commands; see `commands`."""

    def __init__(self, folder: Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.warm"])
        self._folder = folder
        self._names = itertools.count()
        self.log = folder

    def start(
        self,
        arguments: Sequence[str],
        run: Path | None = None,
        kill: Moment | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> BaseProcess:
        """Start `tether *arguments`; what it prints goes to the file `log`.

        With `kill` it is killed by SIGKILL at that moment; without, the number of file events in the folder `run` is
        written to `log` with the suffix `.events`.
        """
        self.log = self._folder / f"command-{next(self._names)}.txt"
        values = (list(arguments), self.log, run, kill, dict(environment or {}))
        process = self._context.Process(target=_command, args=values)
        process.start()
        return process

    def run(self, arguments: Sequence[str], timeout: float = 120.0, **options: object) -> int:
        """Start a command and wait for its end; its exit code, negative for a signal."""
        process = self.start(arguments, **options)  # type: ignore[arg-type]
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            pytest.fail(f"{arguments} did not end in {timeout} s; it printed: {self.log.read_text()}")
        return process.exitcode


def _command(
    arguments: list[str], log: Path, run: Path | None, kill: Moment | None, environment: Mapping[str, str]
) -> None:
    """In the child."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    from tether.cli import main

    torch.set_num_threads(1)
    events = itertools.count(1)
    seen = 0

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(values[0]).startswith(str(run)):
            seen = next(events)
            if kill is not None and seen == kill.event:
                if kill.delay == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    if run is not None:
        sys.addaudithook(watch)
    code = main(arguments)
    sys.stdout.flush()
    log.with_suffix(".events").write_text(str(seen))
    os._exit(code)  # not waiting for the timer, nor for a reward function that hangs
