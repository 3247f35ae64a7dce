"""Questions to an HTTP service: JSON there and back, in threads of their own, with time limits and repeated attempts.

Python's own HTTP client, so nothing more needs to be installed. Knows nothing of rewards.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
Reader = Callable[[Any, bool], ResultT]
"""Makes something of an answer, told whether it is that of the last attempt; raises AnswerError where it cannot."""

MOST_BYTES = 64 * 2**20  # of an answer; a service that sends more sends something else
PASSING = {408, 409, 425, 429}  # besides 500 and above: the same question may be answered later


class AnswerError(Exception):
    """No usable answer; `passing` where another attempt may get one, `wait` the seconds that the service asked for."""

    def __init__(self, reason: str, passing: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirected POST would arrive as a GET without its body."""


@dataclass(frozen=True)
class Service:
    """An address, and how patiently it is asked.

    Attributes:
        timeout: seconds for one attempt, from connecting to the last byte.
        retries: further attempts after the first.
        backoff: seconds before the second attempt; twice as long before each further one, times a random factor from
            ½ to 1, so that many askers do not come back together.
        longest_wait: seconds that one wait lasts at most, whatever the service asks for.
    """

    url: str
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.5
    longest_wait: float = 30.0
    headers: Mapping[str, str] = field(default_factory=dict)

    def post(self, payload: object) -> Any:
        """The JSON that the service answers to one attempt; AnswerError where there is none."""
        body = json.dumps(payload, default=str).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.headers}
        request = urllib.request.Request(self.url, body, headers, method="POST")
        deadline = time.monotonic() + self.timeout
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                answer = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(error) from error
        except (TimeoutError, urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise AnswerError(f"no answer within {self.timeout:g} s") from error
            if isinstance(reason, socket.gaierror):
                raise AnswerError(f"unknown host ({reason.strerror})") from error
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise AnswerError(f"no connection ({said})") from error
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise AnswerError(f"answered something that is not JSON: {_shown(answer)}") from error

    def ask(self, payload: object, read: Reader[ResultT], stop: threading.Event, jitter: random.Random) -> ResultT:
        """What `read` makes of the answer, by as many attempts as it takes.

        Raises:
            AnswerError: the last attempt's, with the number of attempts; or `stop` was set.
        """
        begun = time.monotonic()
        for attempt in range(self.retries + 1):
            try:
                return read(self.post(payload), attempt == self.retries)
            except AnswerError as error:
                tries = f"{attempt + 1} attempts in {time.monotonic() - begun:.1f} s" if attempt else "one attempt"
                if not error.passing or attempt == self.retries:
                    raise AnswerError(f"{error} ({tries})", passing=False) from error
                wait = min(self.longest_wait, max(error.wait, self.backoff * 2**attempt))
                if stop.wait(max(error.wait and wait, wait * jitter.uniform(0.5, 1.0))):
                    raise AnswerError("given up with another question", passing=False) from error
        raise AssertionError("the last attempt returned or raised")


def ask_all(
    service: Service, payloads: Sequence[object], readers: Sequence[Reader[ResultT]], concurrency: int
) -> list[ResultT]:
    """The answers to several questions, in their order, at most `concurrency` under way at once.

    Raises:
        AnswerError: of the first question that failed for good; those under way are left to end by themselves.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for index in range(len(payloads)):
        waiting.put(index)
    done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    stop = threading.Event()
    jitter = random.Random()  # its own: the global one belongs to what must be repeatable

    def work() -> None:
        while not stop.is_set():
            try:
                index = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((index, service.ask(payloads[index], readers[index], stop, jitter)))
            except Exception as error:  # noqa: BLE001 - raised again in the asker's thread
                done.put((index, error))

    for _ in range(min(concurrency, len(payloads))):
        threading.Thread(target=work, name="tether-service", daemon=True).start()
    results: dict[int, ResultT] = {}
    try:
        while len(results) < len(payloads):
            index, result = done.get()
            if isinstance(result, Exception):
                raise result
            results[index] = result
    finally:
        stop.set()
    return [results[index] for index in range(len(payloads))]


_OPENER = urllib.request.build_opener(_NoRedirect)


def _read(response: Any, deadline: float) -> bytes:
    """The whole body before the deadline, which a service that sends byte by byte would stretch for ever."""
    pieces, size = [], 0
    while piece := response.read1(2**16):
        pieces.append(piece)
        size += len(piece)
        if size > MOST_BYTES:
            raise AnswerError(f"answered more than {MOST_BYTES >> 20} MiB", passing=False)
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise AnswerError(f"broke off its answer, {response.length} bytes short")
    return b"".join(pieces)


def _refused(error: urllib.error.HTTPError) -> AnswerError:
    if 300 <= error.code < 400:
        return AnswerError(f"answered {error.code}: it is now at {error.headers.get('Location', '?')}", passing=False)
    try:
        body = error.read(300)
    except (OSError, HTTPException):
        body = b""
    passing = error.code in PASSING or error.code >= 500
    asked = error.headers.get("Retry-After", "")
    said = f": {_shown(body)}" if body.strip() else ""
    return AnswerError(f"answered {error.code} {error.reason}{said}", passing, float(asked) if asked.isdigit() else 0.0)


def _shown(body: bytes) -> str:
    return repr(" ".join(body[:300].decode("utf-8", "replace").split())[:80])
