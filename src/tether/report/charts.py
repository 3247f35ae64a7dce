"""Line charts as SVG: numbers in, markup out, no script. Knows nothing of runs.

Colours are CSS classes (`c1`, `c2`, …), so that the page decides them, for light and for dark. Every point says its
numbers when it is pointed at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .text import escape

POINTS = 150  # of a line; more are averaged in bins, as a page is read by eye
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34  # margins in pixels: tick labels stand there


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend and for what a point says.
        x: one number per point, rising for a line over iterations.
        y: as many.
        colour: 1 to 4, a class of the page.
        dashed: drawn so.
        points: a dot at each point.
        low: (optional) lower edge of a band, one number per point; empty for none.
        high: upper edge.
        notes: (optional) what each point says when pointed at, instead of its numbers.
        labels: (optional) small text beside each point; empty text for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1
    dashed: bool = False
    points: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    notes: Sequence[str] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """What is drawn, and how.

    Attributes:
        title: for those who cannot see it.
        series: the lines.
        x_name: what the horizontal axis counts.
        y_name: what the vertical axis counts; empty where the heading says it.
        width: in pixels of the drawing, which is scaled to the page.
        height: likewise.
        levels: horizontal lines with their names, such as thresholds.
        marks: vertical lines with their names, such as alarms.
        root: the horizontal axis starts at 0 and is drawn by square roots, which spreads what is near 0; otherwise it
            counts something whole.
    """

    title: str
    series: Sequence[Series]
    x_name: str = ""
    y_name: str = ""
    width: int = 360
    height: int = 210
    levels: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str]] = ()
    root: bool = False


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element."""
    xs = [x for series in chart.series for x in series.x]
    ys = [y for series in chart.series for values in (series.y, series.low, series.high) for y in values]
    x_low, x_high = (0.0, max(xs)) if chart.root else (min(xs), max(xs))
    if x_high <= x_low:
        x_low, x_high = (0.0, 1.0) if chart.root else (x_low - 0.5, x_low + 0.5)
    y_low, y_high = _padded(min(ys), max(ys))
    levels = [(value, name) for value, name in chart.levels if y_low - (y_high - y_low) / 4 <= value <= y_high * 1.25]
    for value, _ in levels:
        y_low, y_high = min(y_low, value), max(y_high, value)
    spread = math.sqrt if chart.root else float
    inner_width, inner_height = chart.width - LEFT - RIGHT, chart.height - TOP - BOTTOM

    def place_x(x: float) -> float:
        share = (spread(max(x, 0.0) if chart.root else x) - spread(x_low)) / (spread(x_high) - spread(x_low))
        return LEFT + share * inner_width

    def place_y(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * inner_height

    parts = [
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.title)}">',
        *_axes(chart, (x_low, x_high), (y_low, y_high), place_x, place_y),
    ]
    for value, name in levels:
        y = place_y(value)
        parts.append(f'<path class="level" d="M{LEFT} {y:.1f}H{chart.width - RIGHT}"/>')
        parts.append(
            f'<text class="small" x="{chart.width - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
    for x, name in chart.marks:
        if x_low <= x <= x_high:
            line = f'<path class="mark" d="M{place_x(x):.1f} {TOP}V{chart.height - BOTTOM}"/>'
            parts.append(f"<g>{line}<title>{escape(name)}</title></g>")
    for series in chart.series:
        parts += _line(series, place_x, place_y)
    parts.append("</svg>")
    return "".join(parts)


def _line(series: Series, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> list[str]:
    places = [(place_x(x), place_y(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = []
    if series.low:
        upper = [f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in zip(series.x, series.high, strict=True)]
        lower = [f"{place_x(x):.1f} {place_y(y):.1f}" for x, y in zip(series.x, series.low, strict=True)]
        parts.append(f'<path class="band c{series.colour}" d="M{"L".join([*upper, *reversed(lower)])}Z"/>')
    dashes = " dashed" if series.dashed else ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts.append(f'<path class="line c{series.colour}{dashes}" d="M{path}"/>')
    notes = series.notes or [f"{number(x)}: {number(y)}" for x, y in zip(series.x, series.y, strict=True)]
    single = len(places) == 1
    for index, (x, y) in enumerate(places):
        if series.points or single:
            parts.append(f'<circle class="dot c{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
        note = escape(f"{series.name}, {notes[index]}")
        parts.append(f'<circle class="spot" cx="{x:.1f}" cy="{y:.1f}" r="7"><title>{note}</title></circle>')
    for (x, y), label in zip(places, series.labels, strict=False):
        if label:
            text = f'<text class="small c{series.colour}" x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">'
            parts.append(f"{text}{escape(label)}</text>")
    return parts


def _axes(
    chart: Chart,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
) -> list[str]:
    parts, floor = [], chart.height - BOTTOM
    beside = ticks(*y_range, 5)
    for value, label in zip(beside, tick_labels(beside), strict=True):
        y = place_y(value)
        parts.append(f'<path class="rule" d="M{LEFT} {y:.1f}H{chart.width - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    below = root_ticks(x_range[1]) if chart.root else ticks(*x_range, 5, whole=True)
    labels = [number(value) for value in below] if chart.root else tick_labels(below)
    for value, label in zip(below, labels, strict=True):
        x = place_x(value)
        parts.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {floor}H{chart.width - RIGHT}"/>')
    middle = (LEFT + chart.width - RIGHT) / 2
    if chart.x_name:
        place = f'x="{middle:.0f}" y="{chart.height - 4}" text-anchor="middle"'
        parts.append(f'<text class="name" {place}>{escape(chart.x_name)}</text>')
    if chart.y_name:
        place = f'transform="translate(11 {TOP + (floor - TOP) / 2:.0f}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="name" {place}>{escape(chart.y_name)}</text>')
    return parts


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, at most about so many; whole ones where asked."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(
        factor for factor in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if (high - low) / (factor * step) <= about
    )
    step = max(step, 1.0) if whole else step
    start = math.ceil(low / step - 1e-9)
    # by a product, not a sum, so that 0.3 is 0.3
    return [float(f"{index * step:.12g}") for index in range(start, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Each number's true value, all with as many decimals as the finest needs; with an exponent where it is shorter."""
    size = max(map(abs, values), default=0.0)
    step = min((abs(b - a) for a, b in pairwise(values)), default=size)

    def exact(form: str) -> list[str]:
        for digits in range(15):
            texts = [f"{value:{form.replace('#', str(digits))}}" for value in values]
            errors = (abs(float(text.replace(",", "")) - value) for text, value in zip(texts, values, strict=True))
            if all(error <= step * 1e-6 for error in errors):
                return texts
        return [str(value) for value in values]

    texts = exact(",.#f")
    if size >= 1e6 or 0 < size < 1e-3:
        powers = ["0" if value == 0 else _short(text) for text, value in zip(exact(".#e"), values, strict=True)]
        texts = min(powers, texts, key=lambda labels: max(map(len, labels)))
    return [text.replace("-", "−") for text in texts]


def _short(text: str) -> str:
    """1.5e+06 as 1.5e6."""
    return re.sub(r"e\+?(-?)0*", r"e\1", text)


def root_ticks(high: float) -> list[float]:
    """Round numbers from 0 to `high` that stand well apart where the axis is drawn by square roots."""
    power = math.floor(math.log10(high))
    steps = [digit * 10.0**exponent for exponent in range(power - 3, power + 1) for digit in (1, 2, 3, 5)]
    chosen = [0.0]
    for value in steps:
        if value <= high and math.sqrt(value) - math.sqrt(chosen[-1]) >= math.sqrt(high) / 9:
            chosen.append(round(value, 12))
    return chosen


def _padded(low: float, high: float) -> tuple[float, float]:
    if low == high == 0:  # a share or a count, most often
        return -1 / 16, 1.0
    size = max(abs(low), abs(high))
    margin = (high - low) / 16 if high - low > 1e-9 * size else size / 10  # rounding is no change
    return low - margin, high + margin


def thin(xs: Sequence[float], ys: Sequence[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """At most so many points: means over equal shares of the points in their order."""
    if len(xs) <= most:
        return list(xs), list(ys)
    edges = [round(index * len(xs) / most) for index in range(most + 1)]
    pairs = list(pairwise(edges))
    return [_mean(xs[a:b]) for a, b in pairs], [_mean(ys[a:b]) for a, b in pairs]


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of it and of those before it, at most `window` in all."""
    return [_mean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def number(value: float) -> str:
    """Three digits that say something, a true minus sign, no exponent where none is needed."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size < 1e-9:  # what rounding leaves of nothing
        return "0"
    if size >= 1e6 or size < 1e-4:
        text = _short(f"{value:.1e}")
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")
