"""The table of runs, a run's charts and tables, and comparing: in a real browser, over real runs, while one trains."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect
from tests.studio.browser.conftest import PHONE, Studio, drawn, visit
from tests.studio.browser.made import ITERATIONS, make_language_run

from tether.runs import Run, read_config, read_metrics

PAGES = [
    "/",
    "/run?run=ppo",
    "/run?run=ppo&tab=configuration",
    "/run?run=ppo&tab=difference",
    "/run?run=ppo&tab=alarms",
    "/run?run=ppo&tab=checkpoints",
    "/run?run=ppo&tab=console",
    "/run?run=cartpole&x=time",
    "/compare?run=seeds/sums-seed1&run=seeds/sums-seed2&run=seeds/old&seeds=mean&x=episodes",
    "/compare?run=ppo&run=sweep/faster",
    "/episodes?run=ppo",
    "/episodes?run=ppo&same=1",
    "/episode?run=ppo&id=5",
    "/episode?run=cartpole&id=3",
    "/labels",
    "/label?set=pairs.labels.db",
    "/episode?run=chat&id=1",
    "/label?set=chat/chat.labels.db",
    "/label?set=pairs.labels.db&rename=1",
]


def row(page: Page, name: str) -> str:
    return page.locator(f'tr[data-run="{name}"]').inner_text()


def reading(page: Page, title: str) -> float:
    return float(page.locator(f'[data-chart="{title}"] .reading b').first.inner_text().replace("−", "-"))


def test_the_table_shows_all_runs_and_sorts(studio: Studio) -> None:
    page = studio.open("/")
    assert "finished" in row(page, "ppo")
    assert f"{ITERATIONS} / {ITERATIONS}" in row(page, "ppo")
    assert "control" in row(page, "cartpole")
    score = read_metrics(studio.root / "ppo")[-1]["score"]
    shown = page.locator('tr[data-run="ppo"] .score b').inner_text().replace("−", "-")
    assert abs(float(shown) - score) < 0.01
    page.get_by_role("button", name="Score").click()
    order = page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.run)")
    assert order.index("cartpole") < order.index("ppo")  # the largest first
    page.get_by_role("button", name="Score").click()
    again = page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.run)")
    assert again.index("ppo") < again.index("cartpole")
    page.get_by_placeholder("Filter by name").fill("sweep")
    expect(page.locator("tbody tr")).to_have_count(1)


def test_a_run_that_trains_is_followed_without_reloading(studio: Studio) -> None:
    folder = studio.root / "live"
    make_language_run(folder, iterations=2)
    page = studio.open("/run?run=live")
    table = studio.open("/")
    expect(page.locator(".state").first).to_have_text("finished")
    config = read_config(folder) | {"iterations": 5}
    last = read_metrics(folder)[-1]
    with Run.open(folder, tensorboard=False) as run:
        run.update_config(config)
        run.log(3, {name: value for name, value in last.items() if name != "iteration"} | {"score": 123.0})
        expect(page.locator('[data-chart="Score"] .reading b').first).to_have_text("123", timeout=5000)
        expect(page.locator(".title .state")).to_have_text("training", timeout=5000)
        expect(page.locator(".title .progress")).to_have_text("3 / 5")
        expect(table.locator('tr[data-run="live"] .score b')).to_have_text("123", timeout=5000)
        expect(table.locator('tr[data-run="live"] .state')).to_have_text("training")
    run.close()
    expect(page.locator(".title .state")).to_have_text("stopped", timeout=5000)


def test_charts_read_out_what_is_pointed_at_and_move_together(studio: Studio) -> None:
    page = studio.open("/run?run=ppo")
    rows = read_metrics(studio.root / "ppo")
    titles = page.locator(".chart h3").all_inner_texts()
    for title in ("Score", "KL", "Entropy", "Clip fraction", "Explained variance", "Value loss", "Length"):
        assert title in titles
    assert {"Gradient norm", "Throughput", "Time by phase"} <= set(titles)
    assert abs(reading(page, "Score") - rows[-1]["score"]) < 0.01
    box = page.locator('[data-chart="Score"] .u-over').bounding_box()
    assert box
    page.mouse.move(box["x"] + 1, box["y"] + 40)
    assert abs(reading(page, "Score") - rows[0]["score"]) < 0.01
    assert abs(reading(page, "Entropy") - rows[0]["entropy"]) < 0.01
    expect(page.locator('[data-chart="KL"] .where')).to_have_text("iteration 1")
    page.locator('[data-chart="Entropy"] .plot').focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator('[data-chart="Score"] .where')).to_have_text("iteration 2")


def test_every_other_metric_is_a_tick_away_and_kept_in_the_address(studio: Studio) -> None:
    page = studio.open("/run?run=ppo")
    page.get_by_text("More metrics").click()
    page.get_by_label("approx_kl", exact=True).check()
    expect(page.locator('[data-chart="approx_kl"]')).to_be_visible()
    assert "more=approx_kl" in page.url
    page.reload()
    drawn(page)
    expect(page.locator('[data-chart="approx_kl"] .u-over')).to_be_visible()


def test_charts_and_tables_can_be_taken_along(studio: Studio, tmp_path: Path) -> None:
    page = studio.open("/run?run=ppo")

    def saved(name: str) -> bytes:
        with page.expect_download() as download:
            page.get_by_label(name, exact=True).click()
        file = tmp_path / "saved"
        download.value.save_as(file)
        return file.read_bytes()

    assert saved("Score as PNG").startswith(b"\x89PNG")
    picture = saved("Score as SVG").decode()
    assert picture.startswith("<svg")
    assert ">Score<" in picture
    assert picture.count("<path") > 3
    table = saved("Metrics as CSV").decode().splitlines()
    assert table[0].startswith("iteration,")
    assert len(table) == ITERATIONS + 1
    page = studio.open("/run?run=ppo&tab=configuration")
    assert b"learner.learning_rate,0.003" in saved("configuration as CSV")


def test_settings_the_difference_and_checkpoints(studio: Studio) -> None:
    page = studio.open("/run?run=ppo&tab=configuration")
    page.get_by_label("Find a setting").fill("learning_rate")
    expect(page.locator(".settings dd").first).to_have_text("0.003")
    page.get_by_role("link", name="Difference").click()
    page.get_by_role("combobox").select_option("sweep/faster")
    line = page.locator("tr", has_text="learner.learning_rate")
    expect(line.locator(".was")).to_have_text("0.003")
    expect(line.locator(".is")).to_have_text("0.006")
    page.get_by_role("link", name="Checkpoints").click()
    expect(page.locator("tbody tr").first).to_contain_text(f"iteration-{ITERATIONS:06}")


def test_several_runs_are_compared(studio: Studio) -> None:
    page = studio.open("/")
    page.get_by_label("Choose ppo").check()
    page.get_by_label("Choose sweep/faster").check()
    page.get_by_role("button", name="Compare 2").click()
    expect(page.get_by_role("heading", name="Settings that differ")).to_be_visible()
    assert re.search(r"/compare\?run=ppo&run=sweep%2Ffaster", page.url)
    names = page.locator('[data-chart="Score"] .of').all_inner_texts()
    assert names == ["ppo", "sweep/faster"]
    values = page.locator('tr:has(th code:text-is("entropy"))').inner_text()
    assert f"{read_metrics(studio.root / 'ppo')[-1]['entropy']:.2f}" in values
    expect(page.get_by_role("table", name="Settings that differ")).to_contain_text("learner.learning_rate")
    page.get_by_label("Leave out ppo").click()
    expect(page.locator(".chips li:not(.add)")).to_have_count(1)


def test_the_theme_follows_the_system_and_is_kept_when_switched(look: Callable[..., Studio]) -> None:
    studio = look(theme="dark")
    page = studio.open("/")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_label("Switch to the light theme").click()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
    page.get_by_label("Switch to the dark theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_no_page_is_wider_than_a_phone(look: Callable[..., Studio]) -> None:
    studio = look(size=PHONE)
    page = studio.open("/")
    page.evaluate("localStorage.setItem('tether-annotator', 'Ada')")
    for path in [*PAGES, "/episode?run=evil <b onmouseover=alert(1)>&id=1"]:
        visit(page, path)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path


def test_keys_move_through_the_table_and_are_explained(studio: Studio) -> None:
    page = studio.open("/")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("compare the chosen runs")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    first = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") != first
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.textContent") == first
    page.keyboard.press("x")
    expect(page.locator("tr.chosen")).to_have_count(1)
    page.keyboard.press("Enter")
    page.wait_for_url("**/run?run=*")


def test_the_skip_link_leads_to_the_content(studio: Studio) -> None:
    page = studio.open("/labels")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_what_is_not_there_is_said_in_one_line(studio: Studio) -> None:
    page = studio.open("/run?run=nowhere")
    expect(page.get_by_role("alert")).to_contain_text("nowhere")
    assert studio.faults, "the browser itself notes the answer 404"
    studio.faults.clear()
