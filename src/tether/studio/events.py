"""Which runs have changed, told to every open page by server-sent events.

One look at the folder each second serves all pages, and none is taken while no page is open.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from .runs import PAUSE, Catalogue

HEARTBEAT = 15.0  # seconds; proxies and browsers give up on a connection that is silent for long
Seen = dict[str, tuple[object, ...]]


async def changes(catalogue: Catalogue, run: str | None = None) -> AsyncIterator[str]:
    """The lines of the stream: one event for each run that has changed since the last look; never ends by itself."""
    seen: Seen = await run_in_threadpool(_look, catalogue)
    yield "retry: 2000\n: open\n\n"
    silent = 0.0
    while True:
        await asyncio.sleep(PAUSE)
        now: Seen = await run_in_threadpool(_look, catalogue)
        changed = [name for name in sorted(now.keys() | seen.keys()) if now.get(name) != seen.get(name)]
        for name in changed:
            if run is None or name == run:
                iteration, state = now[name][:2] if name in now else (None, "gone")
                data = json.dumps({"run": name, "iteration": iteration, "state": state})
                yield f"event: runs\ndata: {data}\n\n"
                silent = 0.0
        seen = now
        silent += PAUSE
        if silent >= HEARTBEAT:
            yield ": still here\n\n"
            silent = 0.0


def _look(catalogue: Catalogue) -> Seen:
    return {s.run: (s.iteration, s.state, s.updated, s.alarms, s.episodes, s.note, s.tags) for s in catalogue.runs()}
