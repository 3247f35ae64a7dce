"""Numbers on the page: a tick stands where its label says, and a value has the digits that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from playwright.sync_api import Page
from tests.studio.browser.conftest import Studio

STEPS = (1e-7, 1e-5, 2.5e-4, 0.002, 0.125, 0.25, 2.5, 20, 25, 250, 12_500, 250_000, 2.5e7, 1e12)


def asked(page: Page, name: str, *arguments: Any) -> Any:
    """What a function of format.js returns."""
    call = "async ([name, given]) => (await import('/static/format.js'))[name](...given)"
    return page.evaluate(call, [name, arguments])


def read(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def labels(page: Page, values: Sequence[float | None]) -> list[str]:
    return list(asked(page, "axisNumbers", values))


def test_a_tick_stands_where_its_label_says(studio: Studio) -> None:
    page = studio.open("/")
    for step in STEPS:
        for start in (0, -3, 7, 100_000):
            values = [(start + index) * step for index in range(5)]
            found = labels(page, values)
            assert [read(text) for text in found] == pytest.approx(values, abs=step * 1e-6), (step, start)
            assert max(map(len, found)) < 16
    assert labels(page, [0, 2.5, 5, 7.5]) == ["0.0", "2.5", "5.0", "7.5"]
    assert labels(page, [0, 0.5, None, 1]) == ["0.0", "0.5", "", "1.0"]
    assert labels(page, [-2, 0, 2]) == ["−2", "0", "2"]
    assert labels(page, [0, 1e-5]) == ["0", "1e−5"]
    assert labels(page, [5e5, 1e6, 1.5e6]) == ["5.0e5", "1.0e6", "1.5e6"]
    assert labels(page, []) == []
    assert labels(page, [3]) == ["3"]


def test_the_ticks_of_a_drawn_chart_say_true_values(studio: Studio) -> None:
    """Of a saved chart the labels stand where the same numbers would be drawn."""
    page = studio.open("/run?run=ppo")
    page.wait_for_selector('[data-chart="Length"] .u-over')
    drawn = page.evaluate(
        """async () => {
          const { ChartGroup } = await import("/static/charts.js");
          const { chartSvg } = await import("/static/image.js");
          const group = new ChartGroup(new AbortController().signal);
          const chart = group.add({ title: "t", series: [{ label: "s", colour: "c1" }] });
          document.querySelector(".charts").append(chart.element);
          chart.update([0, 1, 2, 3], [{ values: [0, 9, 4, 2] }]);
          await new Promise(requestAnimationFrame);
          const texts = [...chartSvg(chart).querySelectorAll("text[text-anchor=end]")];
          return texts.map((text) => [text.textContent, Number(text.getAttribute("y"))]);
        }"""
    )
    (first, y0), (second, y1) = ((read(text), y) for text, y in drawn[:2])
    for text, y in drawn[2:]:
        assert y == pytest.approx(y0 + (y1 - y0) * (read(text) - first) / (second - first), abs=0.2)


def test_small_numbers_keep_their_digits(studio: Studio) -> None:
    page = studio.open("/")
    shown = {
        0: "0",
        1.2345: "1.23",
        0.00123: "0.00123",
        0.00025: "0.000250",
        1e-5: "1.00e−5",
        -0.5: "−0.500",
        12345: "12,345",
    }
    assert {value: asked(page, "number", value) for value in shown} == shown
    shares = {0: "0 %", 0.0001: "< 0.1 %", 0.123: "12.3 %", 0.9997: "> 99.9 %", 1: "100 %"}
    assert {value: asked(page, "percent", value) for value in shares} == shares
    sizes = {999: "999 B", 1500: "1.50 kB", 999_999: "1,000 kB"}
    assert {value: asked(page, "bytes", value) for value in sizes} == sizes
