"""Who may ask, and what the page may do: hosts, origins, the token and the content security policy.

A page elsewhere on the web cannot read a run (its name would not be ours, which stops DNS rebinding) nor post an answer
(its origin is not ours), and what a model wrote cannot run in ours. Knows nothing of what is asked.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .replies import problem

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "media-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
LONGEST_BODY = 256 * 1024  # bytes; an answer with a note is far below
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]\s]+)(?::(\d{1,5}))?")


@dataclass(frozen=True)
class Address:
    """Where the studio listens.

    Attributes:
        host: as it was configured: a name or an address without brackets.
        port: that was bound.
    """

    host: str = "127.0.0.1"
    port: int = 8555

    @property
    def url(self) -> str:
        """As a browser on this machine reaches it."""
        return self._url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    @property
    def url_elsewhere(self) -> str | None:
        """As a browser on another machine reaches it, where that is another address; None where it is not."""
        listening = _address(self.host)
        if listening is None or not listening.is_unspecified:
            return None
        return self._url(own_address(ipv6=listening.version == 6))

    def _url(self, host: str) -> str:
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def own_address(ipv6: bool) -> str:
    """An address of this machine that others can reach; its name where none is found. Sends nothing.

    A UDP socket that is connected says from which address packets would leave; the addresses that it is connected to
    are reserved for documentation (RFC 5737, RFC 3849).
    """
    routes = [(socket.AF_INET, "192.0.2.1")]
    if ipv6:
        routes.insert(0, (socket.AF_INET6, "2001:db8::1"))
    for family, elsewhere in routes:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((elsewhere, 9))
                found = ipaddress.ip_address(probe.getsockname()[0])
        except OSError:  # no route
            continue
        if not (found.is_loopback or found.is_unspecified or found.is_link_local):
            return str(found)
    return socket.gethostname()


def accepts(address: Address, header: str) -> bool:
    """Whether a Host header names us.

    A name that somebody else's DNS points at us is not ours, which is how DNS rebinding is told. Where all addresses
    are listened on, any literal address is fine, as rebinding needs a name.
    """
    match = _HOST.fullmatch(header.lower())
    if match is None or int(match[2] or 80) != address.port:
        return False
    name = match[1].strip("[]")
    if is_loopback(name) or name == address.host.lower():
        return True
    listening = _address(address.host)
    if listening is None or not listening.is_unspecified:
        return False
    return _address(name) is not None or name == socket.gethostname().lower()


class Guard:
    """Stands before the app: refuses who may not ask, and sends the page's rules with every answer."""

    def __init__(self, app: ASGIApp, address: Address, token: str | None = None) -> None:
        self.app = app
        self.address = address
        self.token = token
        self.cookie = f"tether-studio-{address.port}"  # cookies do not know ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/api/") else "no-cache")
            await send(message)

        reply = self._refusal(scope) or self._entrance(scope) or self._without_token(scope)
        if reply is not None:
            await reply(scope, receive, answer)
            return
        await self.app(scope, _limited(receive), answer)

    def _refusal(self, scope: Scope) -> Response | None:
        """Of requests that no page of ours sends."""
        headers, method = Headers(scope=scope), scope["method"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not accepts(self.address, hosts[0]):
            found = repr(hosts[0][:100]) if hosts else "none"
            return problem(403, f"Host: found {found}, expected {self.address.url.removeprefix('http://')}")
        if method not in ("GET", "HEAD", "POST"):
            return problem(405, f"{method}: expected GET or POST")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        foreign = (origin is not None and origin.lower() != f"http://{hosts[0].lower()}") or (
            site is not None and site not in ("same-origin", "none")
        )
        navigated = method == "GET" and headers.get("sec-fetch-mode") == "navigate" and origin is None
        if foreign and not navigated and (method == "POST" or scope["path"].startswith("/api/")):
            return problem(403, "Origin: the request comes from another site, expected one from the studio's own page")
        if method != "POST":
            return None
        if origin is None and site is None:
            return problem(403, f"Origin: none was given, expected http://{hosts[0]}")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return problem(403, "Content-Type: expected application/json")
        if (
            len(length := headers.get("content-length", "0")) > 9
            or not length.isdecimal()
            or int(length) > LONGEST_BODY
        ):
            return problem(413, f"the request is longer than {LONGEST_BODY:,} bytes")
        return None

    def _entrance(self, scope: Scope) -> Response | None:
        """`?token=` once becomes a cookie, and leaves the address bar."""
        if self.token is None or scope["method"] != "GET":
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if not given:
            return None
        if not _equal(given[0], self.token):
            return problem(403, "token: not the one that the studio printed when it was started")
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        path = "/" + quote(scope["path"]).lstrip("/")  # `//elsewhere` would lead there
        reply = RedirectResponse(f"{path}?{rest}" if rest else path, 303)
        reply.set_cookie(self.cookie, _digest(self.token), httponly=True, samesite="strict", path="/")
        return reply

    def _without_token(self, scope: Scope) -> Response | None:
        if self.token is None:
            return None
        headers = Headers(scope=scope)
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(bearer.strip(), self.token):
            return None
        if _equal(_cookie(headers, self.cookie), _digest(self.token)):
            return None
        return problem(401, "a token is needed: open the address that the studio printed when it was started")


def _limited(receive: Receive) -> Receive:
    """Bodies that say no length are cut off where they get too long; what is left is no JSON."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > LONGEST_BODY:
            return {"type": "http.request", "body": b"", "more_body": False}
        return message

    return limited


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _digest(token: str) -> str:
    """What the cookie holds: the token itself stays out of the browser's files."""
    return hashlib.sha256(f"tether studio {token}".encode()).hexdigest()


def _equal(found: str, expected: str) -> bool:
    """In a time that does not tell where they differ."""
    return hmac.compare_digest(found.encode("utf-8", "replace"), expected.encode())


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
