"""Questions to an HTTP service: JSON there and back, in threads of their own, with time limits and repeated attempts.

Python's own HTTP client, so nothing more needs to be installed. Knows nothing of completions and scores.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tether.errors import UserError

ResultT = TypeVar("ResultT")
Reader = Callable[[Any, bool], ResultT]
"""Makes something of an answer, told whether it is that of the last attempt; raises AnswerError where it cannot."""

MOST_BYTES = 64 * 2**20  # of an answer; a service that sends more sends something else
PASSING = {408, 409, 425, 429}  # besides 500 and above: the same question may be answered later
LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the service asks for


class AnswerError(Exception):
    """No usable answer; `passing` where another attempt may get one, `wait` the seconds that the service asked for."""

    def __init__(self, reason: str, passing: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.passing = passing
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirected POST would arrive as a GET without its body."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """An address, and how patiently it is asked.

    Waits between attempts double, each times a random factor from ½ to 1, so that many askers do not come back
    together; none is longer than `LONGEST_WAIT`.
    """

    url: str
    """Address of the service, http:// or https://."""
    concurrency: int = 4
    """Requests under way at once."""
    timeout: float = 60.0
    """Seconds for one attempt, from connecting to the last byte."""
    retries: int = 5
    """Further attempts for a request that failed, each after twice the wait of the one before."""
    backoff: float = 0.5
    """Seconds before the second attempt."""
    token_env: str = ""
    """Environment variable with a token, sent as `Authorization: Bearer …`; it is kept out of the configuration."""

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"reward `{self.address}`"

    @property
    def address(self) -> str:
        """`url` without what should not be in it, for messages."""
        return re.sub(r"//[^/@]*@", "//…@", self.url)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{self.label}: no address: {error}; expected http://HOST:PORT/PATH") from error
        if parts.scheme not in ("http", "https") or not host or re.search(r"\s", self.url) or not self.url.isascii():
            raise UserError(f"{self.label}: {self.address!r} is no address; expected http://HOST:PORT/PATH")
        if parts.username or parts.password:
            raise UserError(f"{self.label}: the address holds a password, which every log would show: use `token_env`")
        for name, least in (("concurrency", 1), ("retries", 0), ("backoff", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{self.label}: option `{name}` is {getattr(self, name):g}; expected at least {least}")
        if not self.timeout > 0:
            raise UserError(f"{self.label}: option `timeout` is {self.timeout:g}; expected seconds above 0")
        self.headers()

    def headers(self) -> dict[str, str]:
        """Those of every request.

        Raises:
            UserError: the token's variable was named and is not set, or holds what no header can.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        token = os.environ.get(self.token_env, "").strip() if self.token_env else ""
        named = self.token_env != type(self).token_env
        if named and not token:
            raise UserError(
                f"{self.label}: the environment variable {self.token_env} is not set; it should hold the token"
            )
        if not token.isascii() or not token.isprintable():
            raise UserError(
                f"{self.label}: the environment variable {self.token_env} holds more than a token: "
                "line breaks or letters beyond ASCII"
            )
        return headers | ({"Authorization": f"Bearer {token}"} if token else {})

    def post(self, payload: object, path: str = "") -> Any:
        """The JSON that the service answers to one attempt; AnswerError where there is none."""
        body = json.dumps(payload, default=str).encode()
        request = urllib.request.Request(self.url + path, body, self.headers(), method="POST")
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

    def ask(
        self, payload: object, read: Reader[ResultT], stop: threading.Event, jitter: random.Random, path: str = ""
    ) -> ResultT:
        """What `read` makes of the answer, by as many attempts as it takes.

        Raises:
            AnswerError: the last attempt's, with the number of attempts; or `stop` was set.
        """
        begun = time.monotonic()
        for attempt in range(self.retries + 1):
            try:
                return read(self.post(payload, path), attempt == self.retries)
            except AnswerError as error:
                tries = f"{attempt + 1} attempts in {time.monotonic() - begun:.1f} s" if attempt else "one attempt"
                if not error.passing or attempt == self.retries:
                    raise AnswerError(f"{error} ({tries})", passing=False) from error
                wait = min(LONGEST_WAIT, max(error.wait, self.backoff * 2**attempt))
                if stop.wait(max(error.wait and wait, wait * jitter.uniform(0.5, 1.0))):
                    raise AnswerError("given up with another question", passing=False) from error
        raise AssertionError("the last attempt returned or raised")

    def ask_all(self, payloads: Sequence[object], readers: Sequence[Reader[ResultT]], path: str = "") -> list[ResultT]:
        """The answers to several questions, in their order, at most `concurrency` under way at once.

        Args:
            payloads: what is posted.
            readers: one for each answer.
            path: what the address ends with for these questions.

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
                    done.put((index, self.ask(payloads[index], readers[index], stop, jitter, path)))
                except Exception as error:  # noqa: BLE001 - raised again in the asker's thread
                    done.put((index, error))

        for _ in range(min(self.concurrency, len(payloads))):
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
