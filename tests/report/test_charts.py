"""Charts: where lines, ticks and texts stand."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tether.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    Series,
    draw,
    number,
    root_ticks,
    thin,
    tick_labels,
    ticks,
    trailing_mean,
)


def points(svg: str, kind: str = "line") -> list[tuple[float, float]]:
    path = re.search(rf'<path class="{kind}[^"]*" d="M([^"]+?)Z?"', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path[1].split("L"))]


def test_a_line_goes_from_corner_to_corner() -> None:
    svg = draw(Chart("c", [Series("s", [1, 2, 3], [0, 16, 32])], width=366, height=246))
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert (x0, x2) == (LEFT, 366 - RIGHT)
    assert x1 == (x0 + x2) / 2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    height = 246 - TOP - BOTTOM  # 32 and a sixteenth of it above and below
    assert y0 == pytest.approx(246 - BOTTOM - height / 18, abs=0.06)
    assert y2 == pytest.approx(TOP + height / 18, abs=0.06)


def test_square_roots_spread_what_is_near_zero() -> None:
    svg = draw(Chart("c", [Series("s", [0, 1, 4, -0.5], [0, 1, 2, 3])], root=True))
    xs = [x for x, _ in points(svg)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert xs[3] == xs[0]  # noise below 0 stands at 0


def test_bands_levels_and_marks_are_drawn_where_they_belong() -> None:
    series = Series("s", [1, 2], [0, 1], low=[-1, 0], high=[1, 2])
    svg = draw(Chart("c", [series], levels=[(2.2, "alarm"), (50, "far away")], marks=[(2, "here"), (9, "outside")]))
    assert len(points(svg, "band")) == 4
    assert "alarm" in svg
    assert "far away" not in svg
    assert svg.count('class="mark"') == 1
    assert svg.count("here</title>") == 1


@pytest.mark.parametrize("values", [[0.0], [5.0], [3.0, 3.0], [0.0, 0.0], [1e-13, 3e-13], [-1e9, 1e9]])
def test_any_numbers_make_a_chart(values: list[float]) -> None:
    for root in (False, True):
        svg = draw(Chart("c", [Series("s", list(range(1, len(values) + 1)), values)], root=root))
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert "inf" not in svg


def test_rounding_is_drawn_as_no_change() -> None:
    assert len({y for _, y in points(draw(Chart("c", [Series("s", [1, 2], [0.1, 0.1 + 1e-16])])))}) == 1


def test_texts_are_escaped() -> None:
    bad = "</svg><script>alert(1)</script>"
    series = Series(bad, [1, 2], [1, 2], notes=[bad, bad], labels=[bad, ""])
    svg = draw(Chart(bad, [series], bad, bad, levels=[(1.5, bad)], marks=[(1, bad)]))
    tree = ElementTree.fromstring(svg)
    assert not [element for element in tree.iter() if "script" in element.tag]
    assert tree.attrib["aria-label"] == bad


def test_ticks_are_round() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 0.3, 5) == [-0.2, 0, 0.2]
    assert ticks(1, 10, 5, whole=True) == [2, 4, 6, 8, 10]
    assert ticks(1, 3, 5, whole=True) == [1, 2, 3]
    assert ticks(1e-13, 9e-13, 5) == [2e-13, 4e-13, 6e-13, 8e-13]
    for high in (0.03, 1.0, 1.84, 7.0, 30.0, 55.0, 1e4):
        found = root_ticks(high)
        assert found[0] == 0.0
        assert 4 <= len(found) <= 10
        assert found[-1] <= high
        assert min(math.sqrt(b) - math.sqrt(a) for a, b in pairwise(found)) > math.sqrt(high) / 10


def test_labels_tell_ticks_apart() -> None:
    assert tick_labels([5.545, 5.55, 5.555]) == ["5.545", "5.550", "5.555"]
    assert tick_labels([0, 0.5, 1]) == ["0.0", "0.5", "1.0"]
    assert tick_labels([-2, 0, 2]) == ["−2", "0", "2"]
    assert tick_labels([0, 20000]) == ["0", "20,000"]
    assert tick_labels([0, 1e-5]) == ["0", "1e−5"]
    assert tick_labels([0, 2.5, 5, 7.5]) == ["0.0", "2.5", "5.0", "7.5"]
    assert tick_labels([5e5, 1e6, 1.5e6]) == ["5.0e5", "1.0e6", "1.5e6"]


@pytest.mark.parametrize("start", [0.0, -3.0, 7.0, 100_000.0])
@pytest.mark.parametrize(
    "step", [1e-7, 1e-5, 2.5e-4, 0.002, 0.125, 0.25, 2.5, 20, 25, 250, 12_500, 250_000, 2.5e7, 1e12]
)
def test_a_tick_stands_where_its_label_says(start: float, step: float) -> None:
    values = [(start + index) * step for index in range(5)]
    labels = tick_labels(values)
    assert [float(text.replace(",", "").replace("−", "-")) for text in labels] == pytest.approx(values, abs=step * 1e-6)
    assert max(map(len, labels)) < 16


def test_both_axes_of_a_chart_say_true_values() -> None:
    svg = draw(Chart("c", [Series("s", [10_000_000, 12_000_000], [0, 8.9])]))
    texts = re.findall(r'<text class="tick"[^>]*>([^<]+)<', svg)
    assert texts == ["0.0", "2.5", "5.0", "7.5", "1.00e7", "1.05e7", "1.10e7", "1.15e7", "1.20e7"]


def test_numbers() -> None:
    shown = [number(x) for x in (0, 1e-12, -1.2345, 0.00056, 1e-5, 12345, 2e6, 99.96, math.nan)]
    assert shown == ["0", "0", "−1.23", "0.00056", "1.0e−5", "12,345", "2.0e6", "100", "–"]


def test_long_lines_are_averaged_in_bins() -> None:
    assert thin([1, 2, 3], [4, 5, 6]) == ([1, 2, 3], [4, 5, 6])
    assert thin([1, 2, 3, 4], [1, 3, 5, 9], most=2) == ([1.5, 3.5], [2, 7])
    xs, ys = thin(list(range(1000)), list(range(1000)), most=7)
    assert xs == ys
    assert len(xs) == 7


def test_trailing_means() -> None:
    assert trailing_mean([1, 3, 5, 7], 2) == [1, 2, 4, 6]
    assert trailing_mean([1, 3], 5) == [1, 2]
