"""A studio over runs made for the tests, and a real Chromium that looks at it.

Every page that a test opens is watched: an error in its console, an exception, or a breach of the content security
policy fails the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from tests.studio.browser.made import make_all

from tether.studio import create_app
from tether.studio.security import Address

LAPTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
CHROMIUM = os.environ.get("TETHER_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WATCH = """
window.breaches = [];
document.addEventListener("securitypolicyviolation", (breach) => {
  window.breaches.push(`${breach.violatedDirective} ${breach.blockedURI}`);
});
"""


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a studio over `root`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = Address("127.0.0.1", listener.getsockname()[1])
        app = create_app(root, address)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address.url
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Studio:
    """A studio with its browser: `open` a page and look."""

    url: str
    root: Path
    context: BrowserContext
    faults: list[str] = field(default_factory=list)

    def open(self, path: str) -> Page:
        """A page in a new tab, drawn."""
        page = self.context.new_page()
        page.on("console", lambda said: self.faults.append(f"{path}: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(f"{path}: {error}"))
        page.goto(self.url + path)
        drawn(page)
        return page

    def check(self) -> None:
        """Nothing went wrong on any page."""
        breaches = [breach for page in self.context.pages for breach in page.evaluate("window.breaches")]
        assert breaches == []
        assert self.faults == []
        assert not any(page.evaluate("'hacked' in window") for page in self.context.pages)


def drawn(page: Page) -> None:
    """Wait until the page that the address means is there."""
    page.wait_for_selector("#main:not([aria-busy])", state="attached")


def visit(page: Page, path: str) -> None:
    """Go there within the page, as a link does, which is faster than loading it anew."""
    page.evaluate(
        """path => {
          document.getElementById("main").setAttribute("aria-busy", "true");
          history.pushState(null, "", path);
          dispatchEvent(new PopStateEvent("popstate"));
        }""",
        path,
    )
    drawn(page)
    page.evaluate("() => new Promise(requestAnimationFrame)")


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_all(folder)
    return folder


@pytest.fixture(scope="package")
def url(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it, or name it by TETHER_CHROMIUM")
    with chromium() as started:
        yield started


@pytest.fixture
def look(url: str, root: Path, browser: Browser) -> Iterator[Callable[..., Studio]]:
    """`look(theme=…, size=…)`: a studio in a fresh profile; its pages are checked at the end."""
    opened: list[Studio] = []

    def start(theme: str = "light", size: dict[str, int] = LAPTOP) -> Studio:
        context = browser.new_context(viewport=size, color_scheme=theme, has_touch=size is PHONE, accept_downloads=True)
        context.set_default_timeout(10_000)
        context.add_init_script(WATCH)
        opened.append(Studio(url, root, context))
        return opened[-1]

    yield start
    for studio in opened:
        studio.check()
        studio.context.close()


@pytest.fixture
def studio(look: Callable[..., Studio]) -> Studio:
    return look()
