"""A process beside this one that reads what a model wrote: started when first needed, and anew when it hangs or dies.

Knows how to ask with a time limit; what is asked is in `scoring_main.py`, which that process runs.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from tether.errors import RewardError, UserError

PROGRAM = Path(__file__).with_name("scoring_main.py")
START = 120.0  # seconds that importing the scorer's library may take


def require(module: str, what: str) -> None:
    """UserError where `module` is not installed."""
    if find_spec(module) is None:
        raise UserError(f'{what} needs the package `{module.replace("_", "-")}`: pip install "tether[rlhf]"')


@functools.cache
def scoring_process(scorer: str) -> ScoringProcess:
    """The one for this scorer, as its library takes seconds to import."""
    return ScoringProcess(scorer)


class ScoringProcess:
    """Asks a process of its own; each question has a time limit, after which the process is ended.

    Args:
        scorer: `math` or `gym`.
    """

    def __init__(self, scorer: str) -> None:
        self.scorer = scorer
        self._process: subprocess.Popen[str] | None = None
        self._replies: SimpleQueue[str | None] = SimpleQueue()
        self._number = 0
        self._lock = threading.Lock()  # a thread that was left behind must not take another's reply

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """The reply, or None where there was none in time, or the process died of the question.

        Raises:
            RewardError: the process could not start.
        """
        with self._lock:
            self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            self._number += 1
            try:
                self._process.stdin.write(json.dumps({**request, "id": self._number}) + "\n")
                self._process.stdin.flush()
            except OSError:
                self.close()
                return None
            reply = self._receive(timeout)
            if reply is None:
                self.close()
            return reply

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _start(self) -> None:
        if self._process is not None:
            return
        # the same order of sets in every process, so that a task's problems are the same in every run
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **threads, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C is this process's alone
        )
        weakref.finalize(self, _end, self._process)
        self._replies = SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        assert self._process.stdin is not None
        self._number = 0
        self._process.stdin.write(json.dumps({"scorer": self.scorer}) + "\n")
        self._process.stdin.flush()
        reply = self._receive(START)
        if reply is None or "error" in reply:
            said = "it ended at once" if reply is None else str(reply["error"])
            self.close()
            raise RewardError(f"the process that scores answers cannot start: {' '.join(said.split())[:300]}")

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            if line is None:
                return None
            reply: dict[str, Any] = json.loads(line)
            if reply["id"] == self._number:
                return reply


def _read(stream: IO[str], replies: SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            replies.put(line)
    replies.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:
            return  # what was buffered for a process that is gone
    process.wait()
