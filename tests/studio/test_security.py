"""Who may ask the studio, and with which rules its answers are sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.studio.folders import URL, client, make_run

from tether.runs.labels import NewPair, create_labels
from tether.studio import create_app, security
from tether.studio.app import PAGES
from tether.studio.security import Address, accepts, is_loopback

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "ppo")
    create_labels(tmp_path / "pairs.labels.db", {"name": "pairs"}, [NewPair("q", "yes", "no")])
    return tmp_path


def answer(**changes: Any) -> dict[str, Any]:
    return {"set": "pairs.labels.db", "annotator": "ann", "pair": 1, "answer": "left"} | changes


# ---- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8555", "localhost:8555", "[::1]:8555", "LOCALHOST:8555", "127.0.0.2:8555"])
def test_names_of_this_machine_are_answered(root: Path, host: str) -> None:
    assert client(root, Host=host, Origin=f"http://{host.lower()}").get("/api/runs").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example:8555", "evil.example", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:8556", "192.168.0.7:8555"),
        *("localhost.evil.example:8555", "127.0.0.1.evil.example:8555", "127.0.0.1:8555@evil.example", "[::2]:8555"),
        *("", ":8555", "127.0.0.1:8555:8555", "127.0.0.1:999999", "127.0.0.1 :8555", "0.0.0.0:8555", "localhost.:8555"),
    ],
)
def test_other_names_are_refused_as_dns_rebinding_would_use_them(root: Path, host: str) -> None:
    reply = client(root, Host=host).get("/api/runs")
    assert reply.status_code == 403
    assert reply.json()["error"].startswith("Host: found ")
    assert client(root, Host=host).get("/").status_code == 403


def test_a_configured_host_is_ours_and_all_addresses_mean_any_literal_one() -> None:
    assert accepts(Address("box.lan", 80), "box.lan")
    assert accepts(Address("box.lan", 9000), "Box.lan:9000")
    assert accepts(Address("box.lan", 9000), "localhost:9000")
    assert not accepts(Address("box.lan", 9000), "other.lan:9000")
    assert accepts(Address("0.0.0.0", 9000), "192.168.0.7:9000")
    assert accepts(Address("::", 9000), "[2001:db8::1]:9000")
    assert not accepts(Address("0.0.0.0", 9000), "evil.example:9000")
    assert not accepts(Address("192.168.0.7", 9000), "192.168.0.8:9000")


def test_which_addresses_are_of_this_machine_alone() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "box", "localhost.evil")] == [False] * 5


class NoRoute:
    """A socket on a machine without a network."""

    def __init__(self, *_: object) -> None:
        raise OSError(101, "Network is unreachable")


def test_only_where_all_addresses_are_listened_on_there_is_another_one_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [Address(host).url_elsewhere for host in ("127.0.0.1", "::1", "192.168.0.7", "box.lan")] == [None] * 4
    for host in ("0.0.0.0", "::"):
        found = Address(host, 9000).url_elsewhere
        assert found is not None
        assert accepts(Address(host, 9000), found.removeprefix("http://"))
    monkeypatch.setattr(security.socket, "socket", NoRoute)
    monkeypatch.setattr(security.socket, "gethostname", lambda: "box")
    for host in ("0.0.0.0", "::"):
        assert Address(host, 9000).url_elsewhere == "http://box:9000"
        assert accepts(Address(host, 9000), "box:9000")


# ---- origins and posts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8556"},
        {"Origin": "https://127.0.0.1:8555"},
        {"Origin": "http://localhost:8555"},  # another origin for a browser
        {"Origin": URL, "Sec-Fetch-Site": "cross-site"},
        {"Origin": URL, "Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {},
    ],
)
def test_posts_from_elsewhere_are_refused_and_change_nothing(root: Path, headers: dict[str, str]) -> None:
    asking = TestClient(create_app(root), base_url=URL)
    reply = asking.post("/api/labels/answer", json=answer(), headers=headers)
    assert reply.status_code == 403
    assert reply.json()["error"].startswith("Origin: ")
    assert asking.get("/api/labels").json()["sets"][0]["labelled"] == 0


@pytest.mark.parametrize("headers", [{"Origin": URL}, {"Sec-Fetch-Site": "same-origin"}])
def test_posts_of_the_page_are_taken(root: Path, headers: dict[str, str]) -> None:
    asking = TestClient(create_app(root), base_url=URL, headers=headers)
    assert asking.post("/api/labels/answer", json=answer()).json()["ok"] is True


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_posts_that_a_form_could_send_are_refused(root: Path, kind: str) -> None:
    reply = client(root, **{"Content-Type": kind}).post("/api/labels/answer", content=b"{}")
    assert (reply.status_code, reply.json()["error"]) == (403, "Content-Type: expected application/json")


def test_reading_from_another_page_is_refused_and_links_are_not(root: Path) -> None:
    asking = TestClient(create_app(root), base_url=URL)
    assert asking.get("/api/runs", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}).is_error
    assert asking.get("/api/runs", headers={"Origin": "http://evil.example"}).status_code == 403
    navigation = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert asking.get("/run?run=ppo", headers=navigation).status_code == 200
    assert "access-control-allow-origin" not in asking.get("/api/runs").headers


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(root: Path, method: str) -> None:
    assert client(root).request(method, "/api/runs").status_code == 405


def test_bodies_that_are_too_long_are_refused(root: Path) -> None:
    reply = client(root).post("/api/labels/answer", json=answer(note="x" * 300_000))
    assert reply.status_code == 413

    def pieces() -> Any:
        yield b'{"set": "'
        for _ in range(100):
            yield b"x" * 10_000

    reply = client(root, **{"Content-Type": "application/json"}).post("/api/labels/answer", content=pieces())
    assert reply.status_code == 422


# ---- what is sent with every answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/api/runs", "/api/nothing", "/api/run?run=../x", "/static/nothing.js"])
def test_every_answer_carries_the_pages_rules(root: Path, path: str) -> None:
    headers = client(root).get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_pages_are_one_document_without_inline_scripts_or_styles(root: Path) -> None:
    pages = [client(root).get(path) for path in PAGES]
    assert {page.status_code for page in pages} == {200}
    assert len({page.text for page in pages}) == 1
    assert pages[0].headers["content-type"].startswith("text/html")
    for inline in ("<script>", "<style", "style=", "onclick", "onload", "javascript:", "http://", "https://"):
        assert inline not in pages[0].text, inline


@pytest.mark.parametrize(
    "name", ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "....//app.py", "/etc/passwd", "%00", "x" * 5000, "vendor/.."]
)
def test_nothing_but_files_of_the_page_is_static(root: Path, name: str) -> None:
    assert client(root).get(f"/static/{name}").status_code == 404


def test_scripts_are_sent_as_scripts(root: Path) -> None:
    assert client(root).get("/static/app.js").headers["content-type"].startswith("text/javascript")


# ---- the token -------------------------------------------------------------------------------------------------------


def guarded(root: Path) -> TestClient:
    return TestClient(create_app(root, token=TOKEN), base_url=URL, headers={"Origin": URL}, follow_redirects=False)


@pytest.mark.parametrize("path", ["/", "/api/runs", "/static/app.js", "/api/events"])
def test_without_the_token_nothing_is_answered(root: Path, path: str) -> None:
    asking = guarded(root)
    assert asking.get(path).status_code == 401
    assert asking.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert asking.get(path, headers={"Authorization": b"Bearer \xe9"}).status_code == 401
    assert asking.get(path, headers={"Cookie": f"tether-studio-8555={TOKEN}"}).status_code == 401
    assert asking.get(path, headers={"Cookie": "tether-studio-8555=\x01;;=,"}).status_code == 401
    assert asking.get(path, params={"token": "wrong"}).status_code == 403


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address(root: Path) -> None:
    asking = guarded(root)
    reply = asking.get("/run", params={"run": "ppo", "token": TOKEN})
    assert (reply.status_code, reply.headers["location"]) == (303, "/run?run=ppo")
    cookie = reply.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert TOKEN not in cookie
    assert asking.get("/api/runs").status_code == 200  # the client keeps cookies, as browsers do
    assert asking.post("/api/labels/answer", json=answer()).status_code == 200


@pytest.mark.parametrize("path", ["//evil.example/x", "/%5cevil.example", "///evil.example"])
def test_the_redirect_leads_nowhere_else(root: Path, path: str) -> None:
    reply = guarded(root).get(f"{URL}{path}", params={"token": TOKEN})
    assert reply.status_code == 303
    assert not reply.headers["location"].startswith(("//", "/\\", "http"))


def test_scripts_may_bring_the_token_in_a_header(root: Path) -> None:
    assert guarded(root).get("/api/runs", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
