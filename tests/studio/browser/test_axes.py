"""What charts are drawn by, on a run's page and where runs are compared; and seeds that are averaged."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import pytest
from playwright.sync_api import Page, expect
from tests.studio.browser.conftest import Studio, drawn

from tether.runs import read_metrics

SEEDS = ["seeds/sums-seed1", "seeds/sums-seed2", "seeds/fast-seed1"]


def compared(runs: list[str], **more: str) -> str:
    return "/compare?" + urlencode([*(("run", run) for run in runs), *more.items()])


def choose(page: Page, by: str) -> None:
    page.get_by_label("Horizontal axis").select_option(by)


def places(page: Page, title: str = "Score") -> list[float]:
    """Where the points of a chart lie on its horizontal axis: by the keys, from the first to the last."""
    chart = page.locator(f'[data-chart="{title}"]')
    chart.locator(".plot").focus()
    page.keyboard.press("Home")
    found: list[float] = []
    while True:
        words = chart.locator(".where").inner_text()
        at = float(next(word for word in words.replace(",", "").split() if word[0].isdigit()))
        if found and found[-1] == at:
            return found
        found.append(at)
        page.keyboard.press("ArrowRight")


def test_charts_are_drawn_by_episodes_tokens_and_time(studio: Studio) -> None:
    page = studio.open("/run?run=ppo")
    page.wait_for_selector('[data-chart="Score"] .u-over')
    rows = read_metrics(studio.root / "ppo")
    assert places(page) == [row["iteration"] for row in rows]
    for by, name in (("episodes", "episodes"), ("tokens", "tokens")):
        choose(page, by)
        assert places(page) == [sum(row[name] for row in rows[: end + 1]) for end in range(len(rows))]
        assert f"x={by}" in page.url
    choose(page, "time")
    times = [sum(row["time/iteration"] for row in rows[: end + 1]) for end in range(len(rows))]
    assert places(page) == pytest.approx(times, rel=0.01)
    expect(page.locator('[data-chart="Score"] .where')).to_contain_text("seconds of training")
    page.reload()
    drawn(page)
    expect(page.get_by_label("Horizontal axis")).to_have_value("time")
    choose(page, "iteration")
    assert "x=" not in page.url


def test_a_controllers_steps_are_a_sum_already(studio: Studio) -> None:
    page = studio.open("/run?run=cartpole&x=steps")
    page.wait_for_selector('[data-chart="Score"] .u-over')
    assert places(page)[-1] == read_metrics(studio.root / "cartpole")[-1]["steps"]
    options = page.get_by_label("Horizontal axis").locator("option").all_inner_texts()
    assert options == ["By iteration", "By episodes", "By steps", "By time, seconds"]


def test_what_a_run_did_not_count_cannot_be_an_axis(studio: Studio) -> None:
    page = studio.open("/run?run=seeds/old&x=episodes")
    expect(page.locator("p[role=status]")).to_have_text(
        "Not by episodes: iteration 1 has no number of episodes. The charts are by iteration."
    )
    option = page.get_by_label("Horizontal axis").locator("option[value=episodes]")
    assert option.is_disabled()
    assert option.inner_text() == "By episodes (iteration 1 has no number of episodes)"
    assert places(page) == [1, 2, 3, 4]
    choose(page, "tokens")
    assert places(page) == [300, 600, 900, 1200]
    expect(page.locator("p[role=status]")).to_be_hidden()


def test_runs_are_compared_by_what_is_chosen(studio: Studio) -> None:
    page = studio.open(compared([*SEEDS[:2], "seeds/old"]))
    page.wait_for_selector('[data-chart="Score"] .u-over')
    choose(page, "time")
    assert places(page) == [0.5, 1, 1.5, 2, 3, 4.5, 6]  # minutes, of runs that take 30, 60 and 90 seconds
    expect(page.get_by_label("Horizontal axis").locator("option[value=episodes]")).to_be_disabled()
    page.get_by_label("Smoothing").select_option("0.6")
    assert "x=time" in page.url
    assert "smooth=0.6" in page.url
    page.get_by_label("Leave out seeds/old").click()
    expect(page.get_by_label("Horizontal axis")).to_have_value("time")
    expect(page.get_by_label("Smoothing")).to_have_value("0.6")


def test_a_comparison_reads_the_last_value_of_a_line_that_has_none_there(studio: Studio) -> None:
    page = studio.open(compared(SEEDS[:2], x="tokens"))
    page.wait_for_selector('[data-chart="Score"] .u-over')
    plot = page.locator('[data-chart="Score"] .plot')
    plot.focus()
    page.keyboard.press("Home")
    for _ in range(2):  # 100, 200, 300: the second run has points at 200, 400, 600
        page.keyboard.press("ArrowRight")
    expect(page.locator('[data-chart="Score"] .where')).to_have_text("300 tokens")
    assert page.locator('[data-chart="Score"] .reading b').all_inner_texts() == ["4.00", "4.00"]


def columns(page: Page, title: str = "Score") -> Any:
    """The numbers behind the saved chart: how many bands it draws."""
    with page.expect_download() as download:
        page.get_by_label(f"{title} as SVG", exact=True).click()
    return download.value.path().read_text()


def test_seeds_are_averaged_with_a_band(studio: Studio) -> None:
    page = studio.open(compared(SEEDS))
    page.wait_for_selector('[data-chart="Score"] .u-over')
    assert 'opacity="0.16"' not in columns(page)
    page.get_by_label("Average over seeds").check()
    assert "seeds=mean" in page.url
    chart = page.locator('[data-chart="Score"]')
    assert chart.locator(".of").all_inner_texts() == ["seeds/sums, mean of 2", "seeds/fast-seed1"]
    expect(chart.locator(".unit")).to_have_text("mean per episode, band min to max")
    assert columns(page).count('opacity="0.16"') == 1
    # scores of 2, 3, 4, 5 and of 4, 5, 6: as far as both go
    chart.locator(".plot").focus()
    page.keyboard.press("Home")
    assert chart.locator(".reading b").all_inner_texts() == ["3.00", "6.00"]
    page.keyboard.press("End")
    assert chart.locator(".reading b").all_inner_texts() == ["5.00", "9.00"]
    page.get_by_label("Average over seeds").uncheck()
    assert chart.locator(".of").all_inner_texts() == ["seeds/sums-seed1", "seeds/sums-seed2", "seeds/fast-seed1"]


def test_a_group_is_called_by_what_the_names_of_its_runs_have_in_common(studio: Studio) -> None:
    page = studio.open("/")
    names = [
        (["a/sums-seed1", "a/sums-seed12"], "a/sums, mean of 2"),
        (["sums", "sweep/sums-seed1"], "sums, mean of 2"),
        (["sums1", "sums2", "sums3"], "sums, mean of 3"),
        (["alpha", "alpine"], "alpha, mean of 2"),
        (["lr 1e-4 #1", "lr 1e-4 #2"], "lr 1e-4 #, mean of 2"),
        (["only"], "only"),
    ]
    for given, expected in names:
        call = "async names => (await import('/static/seeds.js')).groupName(names.map(name => ({ name })))"
        assert page.evaluate(call, given) == expected


def test_means_and_bands_are_those_of_lines_that_are_straight_between_their_points(studio: Studio) -> None:
    page = studio.open("/")
    found = page.evaluate(
        """async () => (await import("/static/seeds.js")).averaged([0, 1, 2, 3, 4],
          [{x: [0, 2, 4], values: [0, 4, 8]}, {x: [1, 2, 3], values: [10, null, 14]}])"""
    )
    assert found["values"] == [None, 6, 8, 10, None]
    assert found["low"] == [None, 2, 4, 6, None]
    assert found["high"] == [None, 10, 12, 14, None]


def test_runs_that_differ_in_more_than_their_seed_are_not_averaged(studio: Studio) -> None:
    page = studio.open(compared([SEEDS[0], SEEDS[2]], seeds="mean"))
    box = page.get_by_label("Average over seeds")
    expect(box).to_be_disabled()
    expect(box).not_to_be_checked()
    expect(page.get_by_text("No two of these runs differ in their seed alone.")).to_be_visible()


def test_smoothing_is_kept_in_the_address_of_a_run_too(studio: Studio) -> None:
    page = studio.open("/run?run=ppo&smooth=0.9")
    expect(page.get_by_label("Smoothing")).to_have_value("0.9")
    page.get_by_label("Smoothing").select_option("0")
    assert "smooth" not in page.url
