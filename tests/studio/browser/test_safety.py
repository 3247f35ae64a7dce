"""What a model wrote is shown as text, wherever it stands; and no page keeps anybody out."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect
from tests.studio.browser.conftest import Studio, visit
from tests.studio.browser.made import MARKUP
from tests.studio.browser.test_runs import PAGES

EVIL = quote("evil <b onmouseover=alert(1)>")


def test_hostile_text_is_text_on_every_page(studio: Studio) -> None:
    """Markup, scripts, control and bidirectional characters, a megabyte: `studio` checks that none of it ran."""
    page = studio.open(f"/episode?run={EVIL}&id=1")
    tokens = page.get_by_role("option")
    assert tokens.first.inner_text() == MARKUP
    assert "U+202E" in tokens.nth(1).inner_text()
    assert "U+0000" in tokens.nth(2).inner_text()
    assert "U+001B" in tokens.nth(2).inner_text()
    assert len(tokens.last.inner_text()) < 1000  # the megabyte is cut
    assert page.locator(".prompt-block").inner_text().startswith(MARKUP)
    tokens.nth(1).hover()
    expect(page.locator(".alternatives")).to_contain_text("onerror")
    for path in (
        f"/run?run={EVIL}",
        f"/run?run={EVIL}&tab=configuration",
        f"/run?run={EVIL}&tab=difference&with=ppo",
        f"/episodes?run={EVIL}",
        f"/episodes?run={EVIL}&same=1",
        f"/compare?run={EVIL}&run=ppo",
        f"/run?run={quote(MARKUP)}",
        "/",
    ):
        visit(page, path)
        assert "onerror" in page.locator("#main").inner_text() or "onmouseover" in page.locator("#main").inner_text()
        assert page.locator("#main img, #main script, #main b[onmouseover]").count() == 0
    studio.faults[:] = [fault for fault in studio.faults if "404" not in fault]  # of the run that is not there


def test_chat_prompts_are_turns_everywhere_and_their_raw_text_is_a_click_away(studio: Studio) -> None:
    """Roles and contents are text: `studio` checks that no markup in them ran."""
    page = studio.open("/episodes?run=chat")
    expect(page.locator(".prompt.line").first).to_have_text(re.compile(r"^user\s*Why\? after 1 more$"))
    page.evaluate("localStorage.setItem('tether-annotator', 'Ada')")
    for path in ("/episode?run=chat&id=1", "/episodes?run=chat&same=1", "/label?set=chat/chat.labels.db"):
        visit(page, path)
        turns = page.locator(".conversation .turn")
        assert turns.locator(".role").all_inner_texts() == ["system", "user"]
        assert turns.first.locator(".text").inner_text().startswith(MARKUP)
        assert "U+202E" in turns.first.inner_text()
        assert turns.last.locator(".text").inner_text() == "Why?"
        expect(page.get_by_text("[U]Why?[A]")).to_be_hidden()
        page.get_by_role("button", name="Raw text").click()
        expect(page.get_by_text("[U]Why?[A]").first).to_be_visible()
        expect(turns.first).to_be_hidden()
        assert page.locator("#main img, #main script").count() == 0


def test_a_megabyte_comes_in_pieces(studio: Studio) -> None:
    page = studio.open(f"/episodes?run={EVIL}&same=1")
    block = page.locator(".answer .text").first
    before = len(block.inner_text())
    assert before < 50_000
    block.get_by_role("button", name="show more").click()
    assert len(block.inner_text()) > before + 10_000


@pytest.mark.slow
def test_axe_finds_nothing_serious_on_any_page(look: Callable[..., Studio]) -> None:
    """All rules in the light theme; those of colours again in the dark one."""
    studio = look(theme="light")
    page = studio.open("/")
    page.evaluate(Axe().axe_script)
    page.evaluate("localStorage.setItem('tether-annotator', 'Ada')")
    found = []
    for path in PAGES:
        visit(page, path)
        for theme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.evaluate("theme => document.documentElement.setAttribute('data-theme', theme)", theme)
            result = page.evaluate("rules => axe.run({resultTypes: ['violations'], ...rules})", rules)
            for violation in result["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    where = [node["html"][:120] for node in violation["nodes"][:3]]
                    found.append(f"{path}, {theme}: {violation['id']}: {where}")
    assert found == []
