"""Judging pairs in the browser, by keys alone, and what the store then holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.studio.browser.conftest import Studio
from tests.studio.browser.made import make_labels

from tether.runs.labels import LabelSet

PAIRS = 5


@pytest.fixture
def file(root: Path) -> Path:
    file = root / "judged.labels.db"
    file.unlink(missing_ok=True)
    make_labels(file, PAIRS)
    return file


def begin(studio: Studio, file: Path, name: str) -> Page:
    page = studio.open(f"/label?set={file.name}")
    expect(page.get_by_label("Your name")).to_be_focused()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    expect(page.locator(".side")).to_have_count(2)
    return page


def done(page: Page, number: int) -> None:
    expect(page.locator(".label-header .progress")).to_have_text(f"{number} / {PAIRS}")


def answers(file: Path) -> list[tuple[int, str, str | None]]:
    with LabelSet(file) as labels:
        return [(answer.pair, answer.answer, answer.note) for answer in labels.answers()]


def test_pairs_are_judged_by_keys_alone(studio: Studio, file: Path) -> None:
    page = begin(studio, file, "Ada")
    longer = "right" if "longer" in page.locator(".side.right").inner_text() else "left"
    page.keyboard.press("2" if longer == "right" else "1")
    done(page, 1)
    assert answers(file) == [(1, "b", None)]
    page.keyboard.press("n")
    page.keyboard.type("neither says why")
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    done(page, 2)
    page.keyboard.press("t")
    done(page, 3)
    page.keyboard.press("s")
    done(page, 4)
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_text("All pairs are judged")).to_be_visible()
    kept = answers(file)
    assert kept[1:4] == [(2, "both_bad", "neither says why"), (3, "tie", None), (4, "skip", None)]
    assert kept[4][1] in ("a", "b")


def test_undo_takes_the_last_answer_back(studio: Studio, file: Path) -> None:
    page = begin(studio, file, "Grace")
    first = page.locator(".prompt-block").inner_text()
    page.keyboard.press("3")
    done(page, 1)
    page.keyboard.press("u")
    done(page, 0)
    assert page.locator(".prompt-block").inner_text() == first
    assert answers(file) == []
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()


def test_keys_typed_into_the_note_judge_nothing(studio: Studio, file: Path) -> None:
    page = begin(studio, file, "Ada")
    page.keyboard.press("n")
    page.keyboard.type("1 2 3 best u")
    done(page, 0)
    assert answers(file) == []


def test_two_people_and_how_far_they_agree(studio: Studio, file: Path) -> None:
    page = begin(studio, file, "Ada")
    for answer in ("t", "t", "b", "t", "b"):
        before = len(answers(file))
        page.keyboard.press(answer)
        done(page, before + 1)
    page.get_by_label("You are Ada").click()
    page.get_by_label("Your name").fill("Grace")
    page.keyboard.press("Enter")
    expect(page.locator(".side")).to_have_count(2)
    for number, answer in enumerate(("t", "t", "b", "b", "b"), start=1):
        page.keyboard.press(answer)
        done(page, number)
    page.get_by_role("link", name="Labels").first.click()
    card = page.locator(".label-set", has_text=file.name)
    expect(card.locator("tbody tr")).to_have_count(2)
    expect(card.locator('[data-coefficient="cohen"]')).to_contain_text("Ada and Grace, 5 pairs")
    # of 5 pairs 4 alike; by chance 3/5·2/5 + 2/5·3/5 = 0.48: (0.8 − 0.48) ÷ 0.52
    expect(card.locator('[data-coefficient="cohen"] b')).to_have_text("0.615")
    with page.expect_download() as download:
        card.get_by_text("JSONL").click()
    assert download.value.suggested_filename.endswith(".jsonl")


def test_a_refused_answer_is_said_and_the_pair_stays(studio: Studio, file: Path) -> None:
    page = begin(studio, file, "Ada")
    page.route("**/api/labels/answer", lambda route: route.abort())
    page.keyboard.press("1")
    expect(page.get_by_role("alert")).to_contain_text("Not saved")
    done(page, 0)
    page.unroute("**/api/labels/answer")
    page.keyboard.press("1")
    done(page, 1)
    studio.faults.clear()  # the browser notes the request that was cut
