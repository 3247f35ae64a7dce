"""Calls to reward functions: each with a time limit, its answer checked to be one number per completion.

Knows nothing of where a function came from or how several are weighed. There is no lock: a function that hangs holds up
nobody but its own caller, and that one only until the time limit.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import numbers
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from decimal import Decimal
from queue import SimpleQueue
from typing import Any

import torch

from tether.errors import RewardError
from tether.rewards.loading import RewardFunction, location_of
from tether.rewards.verifiers import Text, text_of

Task = tuple[Callable[[], Any], "Future[Any]"]

UNCHANGING = frozenset({str, int, float, bool, bytes, type(None)})

WAIT = 0.2  # seconds; a Ctrl-C that comes just before a wait is seen only after it


class Caller:
    """Runs reward functions in daemon threads of its own, so that one that hangs can be left behind.

    Plain functions run one after another, always in the same thread, as most are not written for more than one. Async
    functions run together in one event loop, the same one for every call, so that a connection they keep stays usable.
    """

    def __init__(self, timeout: float, flag: str = "--reward.timeout") -> None:
        self.timeout = timeout
        self.flag = flag  # that raises it, for messages
        self._worker: SimpleQueue[Task | None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def call(self, functions: Sequence[RewardFunction], arguments: Mapping[str, Sequence[Any]]) -> list[list[float]]:
        """What each function returns for `arguments`: (functions, completions); NaN where a function returned None.

        Raises:
            RewardError: a function raised, took longer than the time limit, or did not return one number or None per
                completion.
        """
        pending: dict[int, tuple[Future[Any], float]] = {}
        for index, function in enumerate(functions):
            if _is_async(function.call):
                pending[index] = (self._start_async(function, arguments), time.monotonic() + self.timeout)
        results: dict[int, list[float]] = {}
        completions = arguments["completions"]
        try:
            for index, function in enumerate(functions):
                if index not in pending:
                    future = self._start(function, arguments)
                    results[index] = self._finish(function, future, time.monotonic() + self.timeout, completions)
            for index, (future, deadline) in pending.items():
                results[index] = self._finish(functions[index], future, deadline, completions)
        except BaseException:
            for future, _ in pending.values():
                future.cancel()
            self._abandon()
            raise
        return [results[index] for index in range(len(functions))]

    def _start(self, function: RewardFunction, arguments: Mapping[str, Sequence[Any]]) -> Future[Any]:
        if self._worker is None:
            self._worker = SimpleQueue()
            threading.Thread(target=_work, args=(self._worker,), name="tether-reward", daemon=True).start()
            weakref.finalize(self, self._worker.put, None)

        def run() -> Any:
            with torch.no_grad():  # of this thread alone; a score is a number, nothing flows back through it
                result = function.call(**_taken(function, arguments))
                if inspect.isawaitable(result):  # an async function behind a plain one
                    awaited = _awaited(function, lambda: result)
                    result = asyncio.run_coroutine_threadsafe(awaited, self._event_loop()).result()
                return result

        future: Future[Any] = Future()
        self._worker.put((run, future))
        return future

    def _start_async(self, function: RewardFunction, arguments: Mapping[str, Sequence[Any]]) -> Future[Any]:
        awaited = _awaited(function, lambda: function.call(**_taken(function, arguments)))
        return asyncio.run_coroutine_threadsafe(awaited, self._event_loop())

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(loop,), name="tether-reward-async", daemon=True).start()
            weakref.finalize(self, _stop_loop, loop)
        return self._loop

    def _finish(
        self, function: RewardFunction, future: Future[Any], deadline: float, completions: Sequence[Text]
    ) -> list[float]:
        finished = threading.Event()
        future.add_done_callback(lambda _: finished.set())
        # Not future.result(timeout): a TimeoutError of the function's own could not be told from ours.
        while not finished.wait(min(WAIT, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() < deadline:
                continue
            future.cancel()
            raise RewardError(
                f"reward `{function.label}` has not returned after {self.timeout:g} s for {len(completions)} "
                f"completions: mend it, or raise `{self.flag}`"
            )
        if future.cancelled():
            raise RewardError(f"reward `{function.label}` was cancelled while it ran: does it cancel its own task?")
        error = future.exception()
        if error is None:
            return _numbers(function, future.result(), completions)
        if isinstance(error, RewardError):
            raise error
        raise RewardError(_said(function, error)) from error

    def _abandon(self) -> None:
        """Leave the threads to whatever they hang in; the next call starts fresh ones."""
        if self._worker is not None:
            self._worker.put(None)
        if self._loop is not None:
            _stop_loop(self._loop)
        self._worker = self._loop = None


def _work(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        run, future = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(run())
        except BaseException as error:  # noqa: BLE001 - SystemExit too: the caller makes a RewardError of each
            future.set_exception(error)
        del task, run, future  # no result is kept alive while waiting for the next


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    with torch.no_grad():
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()


def _stop_loop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


async def _awaited(function: RewardFunction, start: Callable[[], Any]) -> Any:
    try:
        return await start()
    except (SystemExit, KeyboardInterrupt) as error:  # would end the event loop, and nobody would hear of it
        raise RewardError(_said(function, error)) from error


def _is_async(call: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(getattr(call, "__call__", None))  # noqa: B004


def _taken(function: RewardFunction, arguments: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """The arguments that the function takes, at every depth its own: it may sort them, pop from them or keep them."""
    accepts = function.accepts
    return {
        name: [_own(value) for value in values]  # one by one: rows may share an entry
        for name, values in arguments.items()
        if accepts is None or name in accepts
    }


def _own(value: Any) -> Any:
    """A copy of what can be changed in place; what cannot be copied, such as an open file, is handed on as it is."""
    kind = type(value)
    if kind in UNCHANGING:
        return value
    if kind is list:
        return list(value) if UNCHANGING.issuperset(map(type, value)) else [_own(entry) for entry in value]
    if kind is dict:
        return {key: _own(entry) for key, entry in value.items()}
    if kind is tuple:
        return tuple(_own(entry) for entry in value)
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - of whatever the user's rows hold
        return value


def _said(function: RewardFunction, error: BaseException) -> str:
    """One line about what a reward function raised."""
    place = location_of(error, function.source)
    reason = " ".join(str(error).split())[:300]
    remedy = ""
    if "signal only works in main thread" in reason:
        # math_verify's own time limits are the usual case.
        remedy = ": rewards run in a thread of their own, so leave time limits to `--reward.timeout`"
    return f"reward `{function.label}` raised {type(error).__name__}: {reason} ({place}){remedy}"


def _numbers(function: RewardFunction, result: Any, completions: Sequence[Text]) -> list[float]:
    """The result as one finite float per completion, NaN for None."""
    expected = f"expected a list of {len(completions)} numbers, one per completion"
    if result is None:
        raise RewardError(f"reward `{function.label}` returned None; {expected}: is a `return` missing?")
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        shown = f" ({values!r:.40})" if isinstance(values, str | numbers.Number) else ""
        raise RewardError(f"reward `{function.label}` returned {type(result).__name__}{shown}; {expected}")
    if len(values) != len(completions):
        raise RewardError(f"reward `{function.label}` returned {len(values)} numbers; {expected}")
    return [_number(function, value, index, completions[index]) for index, value in enumerate(values)]


def _number(function: RewardFunction, value: Any, index: int, completion: Text) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of torch or numpy
        value = value.item()
    place = f"for completion {index} ({' '.join(text_of(completion).split())[:60]!r})"
    if not isinstance(value, numbers.Real | Decimal):
        raise RewardError(
            f"reward `{function.label}` returned {type(value).__name__} ({str(value)[:40]!r}) {place}; "
            "expected a number"
        )
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise RewardError(f"reward `{function.label}` returned {score} {place}; expected a finite number")
    return score
