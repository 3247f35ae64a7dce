"""`tether studio`: the server on its address, and the browser that is sent there.

Knows sockets and uvicorn; nothing of what is served.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import socket
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from tether.errors import UserError

from .app import create_app
from .security import Address, is_loopback

SHORTEST_TOKEN = 8  # characters


@dataclass(frozen=True)
class StudioConfig:
    """The studio, a web page over a folder of runs."""

    runs: str = "runs"
    """Folder of the runs, or one run."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs a token, which is made where none is given."""
    port: int = 8555
    """Port to listen on; 0 takes any free one."""
    browser: bool = True
    """Open the page in the browser."""
    token: str | None = None
    """What requests must carry, letters, digits, - and _; the printed address has it. None: made where it is needed."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}, expected 0 to 65535")
        if self.token is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},}}", self.token):
            raise ValueError(f"token: expected at least {SHORTEST_TOKEN} letters, digits, - and _")


def serve(config: StudioConfig, path: str = "/") -> None:
    """Serve until Ctrl-C; `path` is the page that the browser opens.

    Raises:
        UserError: the folder is not there, or the address cannot be listened on.
    """
    import uvicorn

    root = Path(config.runs)
    if not root.is_dir():
        raise UserError(f"{config.runs}: no such folder, expected one with runs: tether studio RUNS")
    token = config.token
    if token is None and not is_loopback(config.host):
        token = secrets.token_urlsafe(24)
    with _listening(config.host, config.port) as listener:
        address = Address(config.host, listener.getsockname()[1])
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(root, address, token),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,  # open pages hold a stream of events that never ends
            )
        )
        query = "" if token is None else ("&" if "?" in path else "?") + f"token={token}"
        url = f"{address.url}{path}{query}"
        print(f"the studio of {root}: {url}", flush=True)
        if (elsewhere := address.url_elsewhere) is not None:
            print(f"from another machine: {elsewhere}{path}{query}", flush=True)
        print("Ctrl-C ends it", flush=True)
        if config.browser:
            threading.Thread(target=_open_browser, args=(url,), daemon=True).start()
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        with contextlib.suppress(KeyboardInterrupt):  # which is how it is ended
            server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host: {host!r} is no name or address of this machine ({error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":  # every address, those of IPv4 too
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(place)
        listener.listen()  # who comes before the server is ready waits for it
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port}: cannot be listened on: {error.strerror}; try --port 0") from None
    return listener


def _open_browser(url: str) -> None:
    """In a thread: some browsers do not return before they are closed."""
    webbrowser.open(url)
