"""Line charts as figures of a page (`page`): inline SVG. Colours and strokes are CSS. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

STYLE = """
.charts { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figcaption i { display: inline-block; width: 1.1em; height: 3px; margin: 0 .3em .25em .8em; border-radius: 2px; }
.chart text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart .middle { text-anchor: middle; }
.chart .end { text-anchor: end; }
.chart path { fill: none; }
.grid { stroke: var(--line); }
.line { stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .35; }
.reference { stroke: var(--soft); stroke-dasharray: 5 4; }
.s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.line { stroke: currentColor; } .dot { fill: currentColor; } i { background: currentColor; }
.line.s2 { stroke-dasharray: 7 5; } .line.s3 { stroke-dasharray: 1 5; } .line.faint { stroke-dasharray: none; }
@media (max-width: 30rem) { .chart text { font-size: 14px; } }
"""

WIDTH, HEIGHT = 400, 230  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 388, 14, 196  # of the frame in it
_LOG_FROM = 30  # largest / smallest value from which a logarithmic axis shows more


def label(value: float) -> str:
    """A number for an axis or a table, to three digits: 0.25, 3e-4, 12.5k, 32M."""
    value = float(f"{value:.3g}")
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    if 0 < abs(value) < 1e-2:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart), the first <= low, the last >= high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, but for its last digits
        padding = abs(low) / 10 or 1.0
        low, high = low - padding, high + padding
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    digits = 1 - math.floor(math.log10(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most about `count` powers of ten, evenly apart, the first <= low, the last >= high; both > 0."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, math.ceil((last - first) / count))
    return [10.0**i for i in range(first, max(last, first + 1) + step, step)]


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`: `position` is 0 at one and 1 at the other."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], log: bool = False) -> Axis:
        """From tick to tick around all `values`; logarithmic if asked for and worth it. No values: 0 to 1."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        log = log and low > 0 and high / low >= _LOG_FROM
        marks = log_ticks(low, high) if log else ticks(low, high)
        return cls(marks[0], marks[-1], marks, log)

    @classmethod
    def powers(cls, values: Sequence[float]) -> Axis:
        """Logarithmic, from power of ten to power of ten around all `values` > 0."""
        marks = log_ticks(min(values), max(values))
        return cls(marks[0], marks[-1], marks, log=True)

    @classmethod
    def numbers(cls, count: int) -> Axis:
        """Of `count` things numbered from 0, with half a number of room at both ends."""
        marks = [tick for tick in ticks(0.0, max(count - 1.0, 1.0)) if tick < count and tick.is_integer()]
        return cls(-0.5, count - 0.5, marks)

    @classmethod
    def until(cls, high: float) -> Axis:
        """From 0 to `high` > 0 itself, with the ticks between."""
        return cls(0.0, high, [tick for tick in ticks(0.0, high) if tick <= high])

    def position(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """A line. `dots` marks each point; `noisy` draws the points faintly below their smooth course; `names` stand beside
    the points, which then have no line.
    """

    name: str
    points: Sequence[Point]
    dots: bool = False
    noisy: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """A chart. `reference` is a horizontal line: name, value. The y axis reaches to all of `shows`. `across` names the
    x axis; `at` is a place on it in words.
    """

    title: str
    unit: str
    series: Sequence[Series]
    reference: tuple[str, float] | None = None
    shows: Sequence[float] = ()
    log: bool = False
    across: str = "tokens"
    at: str = "{} tokens"


def smooth(points: Sequence[Point], span: float) -> list[Point]:
    """Each value as the mean of all, weighted by exp(-(distance in x) / span), span > 0."""
    back = _decaying(points[::-1], span)[::-1]
    # Both passes count the point itself.
    return [
        (x, (total + later - y) / (weight + later_weight - 1))
        for (x, y), (total, weight), (later, later_weight) in zip(points, _decaying(points, span), back, strict=True)
    ]


def _decaying(points: Sequence[Point], span: float) -> list[tuple[float, float]]:
    """At each point the weighted sum of the values up to it, and of the weights."""
    result, total, weight, last = [], 0.0, 0.0, 0.0
    for x, y in points:
        keep = math.exp(-abs(x - last) / span)
        total, weight, last = keep * total + y, keep * weight + 1, x
        result.append((total, weight))
    return result


def thin(points: Sequence[Point], limit: int = 600) -> list[Point]:
    """At most about `limit` points that look the same: the extremes of each of limit / 2 runs."""
    if len(points) <= limit:
        return list(points)
    size, result = math.ceil(2 * len(points) / limit), []
    for begin in range(0, len(points), size):
        run = points[begin : begin + size]
        result += sorted({min(run, key=lambda point: point[1]), max(run, key=lambda point: point[1])})
    return result


def path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """The `d` of an SVG path; that of one point is a dot (round caps)."""
    places = [f"{_across(x, a):.1f} {_up(y, b):.1f}" for a, b in points]
    return f"M{places[0]}h0" + "".join(f"L{place}" for place in places[1:]) if places else ""


def figure(chart: Chart, key: str, x: Axis, y: Axis | None = None) -> str:
    """`svg` with a caption, as an element of a page."""
    legend = ""
    if len(chart.series) > 1:
        legend = "".join(f'<i class="s{i}"></i>{escape(one.name)}' for i, one in enumerate(chart.series, 1))
    caption = f"{escape(chart.title)} <span>{escape(chart.unit)}{legend}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{svg(chart, key, x, y)}</figure>"


def svg(chart: Chart, key: str, x: Axis, y: Axis | None = None) -> str:
    """`chart` as an <svg> over `x`; `key` makes its ids unique in the page. `y`: by default around all values."""
    values = [*chart.shows, *(b for series in chart.series for _, b in series.points)]
    if chart.reference:
        values.append(chart.reference[1])
    y = y or Axis.over(values, chart.log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-title {key}-desc">',
        f'<title id="{key}-title">{escape(chart.title)}</title>',
        f'<desc id="{key}-desc">{escape(describe(chart))}</desc>',
        *_frame(x, y, chart.across),
    ]
    if chart.reference:
        name, value = chart.reference
        height = _up(y, value)
        parts.append(f'<path class="reference" d="M{LEFT} {height:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="note" x="{LEFT + 4}" y="{height - 4:.1f}">{escape(name)} {label(value)}</text>')
    for number, series in enumerate(chart.series, 1):
        parts += _line(series, number, x, y, chart.at)
    if not any(series.points for series in chart.series):
        parts.append(f'<text class="note middle" x="{(LEFT + RIGHT) / 2}" y="{(TOP + BOTTOM) / 2}">no values</text>')
    return "".join([*parts, "</svg>"])


def describe(chart: Chart) -> str:
    """The chart in words: where each line begins and ends."""
    sentences = []
    for series in chart.series:
        if series.points:
            (x0, y0), (x1, y1) = series.points[0], series.points[-1]
            first, last = chart.at.format(label(x0)), chart.at.format(label(x1))
            sentences.append(f"{series.name}: {label(y0)} at {first}, {label(y1)} at {last}.")
    if chart.reference:
        sentences.append(f"{chart.reference[0]}: {label(chart.reference[1])}.")
    return " ".join(sentences) or "No values."


def _across(x: Axis, value: float) -> float:
    return LEFT + x.position(value) * (RIGHT - LEFT)


def _up(y: Axis, value: float) -> float:
    return BOTTOM - y.position(value) * (BOTTOM - TOP)


def _frame(x: Axis, y: Axis, across: str) -> list[str]:
    parts = []
    for value in y.ticks:
        height = _up(y, value)
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{height + 4:.1f}">{label(value)}</text>')
    for value in x.ticks:
        parts.append(f'<text class="middle" x="{_across(x, value):.1f}" y="{BOTTOM + 16}">{label(value)}</text>')
    parts.append(f'<text class="middle" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 3}">{escape(across)}</text>')
    return parts


def _line(series: Series, number: int, x: Axis, y: Axis, at: str) -> list[str]:
    points, parts = thin(series.points), []
    if series.noisy:
        parts.append(f'<path class="line s{number} faint" d="{path(points, x, y)}"/>')
        points = thin(smooth(series.points, (x.high - x.low) / 100))
    if not series.names:
        parts.append(f'<path class="line s{number}" d="{path(points, x, y)}"/>')
    if series.dots:
        parts += [
            f'<circle class="dot s{number}" cx="{_across(x, a):.1f}" cy="{_up(y, b):.1f}" r="3">'
            f"<title>{label(b)} at {escape(at.format(label(a)))}</title></circle>"
            for a, b in points
        ]
    for (a, b), name in zip(points, series.names, strict=False):
        left = x.position(a) < 0.5  # the name stays in the frame
        parts.append(
            f'<text class="{"" if left else "end"}" x="{_across(x, a) + (8 if left else -8):.1f}" '
            f'y="{_up(y, b) + 4:.1f}">{escape(name)}</text>'
        )
    return parts
