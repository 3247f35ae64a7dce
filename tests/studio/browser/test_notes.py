"""Notes and tags in the browser, and the tab that says how a run was started and what it printed."""

from __future__ import annotations

from playwright.sync_api import expect
from tests.studio.browser.conftest import Studio, drawn
from tests.studio.browser.made import MARKUP, make_seeds

from tether.runs import Run, read_metrics
from tether.runs.notes import Notes, read_notes, write_notes


def test_notes_and_tags_are_written_kept_and_lead_to_runs_like_it(studio: Studio) -> None:
    folder = studio.root / "noted"
    make_seeds(folder)
    page = studio.open("/run?run=noted/old")
    page.get_by_role("button", name="Add notes").click()
    page.keyboard.type("baseline, two words")
    page.get_by_label("Note", exact=True).fill(f"β too small\n{MARKUP}")
    with Run.open(folder / "old", tensorboard=False) as run:  # what is typed stays while the run goes on
        last = {name: value for name, value in read_metrics(folder / "old")[-1].items() if name != "iteration"}
        run.log(5, last | {"score": 77.0})
        expect(page.locator('[data-chart="Score"] .reading b').first).to_have_text("77", timeout=5000)
        expect(page.get_by_label("Tags, with commas")).to_have_value("baseline, two words")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("button", name="Edit notes")).to_be_focused()
    assert read_notes(folder / "old") == Notes(f"β too small\n{MARKUP}", ("baseline", "two words"))
    assert page.locator(".notes .note").inner_text() == f"β too small\n{MARKUP}"
    page.get_by_role("link", name="two words").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    assert "tag=two+words" in page.url
    expect(page.locator('tr[data-run="noted/old"]')).to_contain_text("β too small")
    page.get_by_role("group", name="Tags").get_by_role("button", name="two words").click()
    assert page.locator("tbody tr").count() > 1
    for words, count in (("TOO SMALL", 1), ("baseline", 1), ("noted/fast", 1)):
        page.get_by_label("Filter by name, tag or note").fill(words)
        expect(page.locator("tbody tr")).to_have_count(count)
    assert page.locator("#main img, #main script").count() == 0


def test_notes_that_do_not_fit_are_told_and_nothing_is_lost(studio: Studio) -> None:
    page = studio.open("/run?run=seeds/old")
    page.get_by_role("button", name="Add notes").click()
    page.keyboard.type("x" * 41)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".notes [role=alert]")).to_contain_text("Not saved: tags: found")
    expect(page.get_by_label("Tags, with commas")).to_have_value("x" * 41)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Add notes")).to_be_visible()
    studio.faults.clear()  # the browser notes the answer 422


def test_notes_of_two_pages_are_shown_before_one_replaces_the_other(studio: Studio) -> None:
    folder = studio.root / "twice"
    make_seeds(folder)
    page = studio.open("/run?run=twice/old")
    page.get_by_role("button", name="Add notes").click()
    write_notes(folder / "old", Notes("by another page", ("theirs",)))
    page.get_by_label("Note", exact=True).fill("mine")
    page.get_by_role("button", name="Save").click()
    told = page.locator(".notes [role=alert]")
    for words in ("changed meanwhile", "by another page", "theirs"):
        expect(told).to_contain_text(words)
    assert read_notes(folder / "old").note == "by another page"
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("button", name="Edit notes")).to_be_focused()
    assert read_notes(folder / "old") == Notes("mine")
    studio.faults.clear()  # the browser notes the answer 409


def test_the_console_says_how_a_run_was_started_and_what_it_printed(studio: Studio) -> None:
    page = studio.open("/run?run=cartpole")
    page.get_by_role("link", name="Console").click()
    drawn(page)
    start = page.locator(".start")
    expect(start).to_have_count(1)
    for words in ("Started", "commit", "tether ", "torch ", "processor", " of torch", "cpu"):
        expect(start).to_contain_text(words)
    expect(page.locator(".console")).to_contain_text("iteration")
    with (studio.root / "cartpole" / "console.log").open("a") as log:
        log.write(MARKUP + "\x1b[31m\n")
    page.reload()
    drawn(page)
    assert page.locator(".console").inner_text().rstrip().endswith(f"{MARKUP}U+001B[31m")
    with page.expect_download() as download:
        page.get_by_label("The whole log").click()
    assert MARKUP in download.value.path().read_text()
    page = studio.open("/run?run=seeds/old&tab=console")
    expect(page.locator("#main")).to_contain_text("Nothing was kept of how this run was started")
