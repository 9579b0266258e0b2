"""Small line charts as SVG text: axes, lines with gaps, bands, intervals, values to point at.

By hand, since a chart library would bring scripts into a page that shows a model's text. Colours
and line widths come from the style sheet around the chart, by class.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from typing import Literal


@dataclass(frozen=True)
class Line:
    """One line of a chart: `ys` over `xs`, with `titles`, which the pointer reads at each x."""

    xs: Sequence[float]
    ys: Sequence[float | None]  # None where there is no value: the line breaks there
    look: Literal["bold", "faint", "dots"] = "bold"  # dots: bold with a dot at each value
    # (low, high) for each x, drawn as whiskers under dots and as a band under a line.
    spans: Sequence[tuple[float, float] | None] = ()
    titles: Sequence[str] = ()
    color: str = ""  # the line's class; empty: the chart's


@dataclass(frozen=True)
class Chart:
    """Lines in one frame. color: the lines' class, "train" or "eval"; label: for screen readers."""

    lines: Sequence[Line]
    label: str
    color: str = "train"
    y_format: Callable[[float], str] = "{:g}".format
    include_y: Sequence[float] = ()
    x_range: tuple[float, float] | None = None
    size: tuple[int, int] = (340, 190)
    x_label: str = "step"


@dataclass(frozen=True)
class _Frame:
    """Where values lie in pixels; left, right, top and bottom are the edges of the axes."""

    x_low: float
    x_high: float
    y_ticks: list[float]
    right: int
    bottom: int
    left: int = 44
    top: int = 20

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(self.left + (self.right - self.left) * share, 2)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.bottom - (self.bottom - self.top) * (value - low) / (high - low), 2)


def ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps apart."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def chart(spec: Chart) -> str:
    """The chart as an <svg> element for an HTML page."""
    frame = _frame(spec)
    width, height = spec.size
    parts = [
        f'<svg class="chart {spec.color}" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(spec.label)}">',
        _axes(frame, spec),
    ]
    for line in spec.lines:
        drawn = _path(frame, line)
        if line.spans:
            drawn = (_whiskers if line.look == "dots" else _band)(frame, line) + drawn
        parts.append(f'<g class="{escape(line.color)}">{drawn}</g>' if line.color else drawn)
    told = [line for line in spec.lines if line.titles]
    parts += [_hover(frame, line, alone=len(told) == 1) for line in told]
    return "".join([*parts, "</svg>"])


def _frame(spec: Chart) -> _Frame:
    xs = [x for line in spec.lines for x in line.xs]
    ys = [y for line in spec.lines for y in line.ys if y is not None]
    ys += [y for line in spec.lines for span in line.spans if span for y in span]
    ys += spec.include_y
    x_low, x_high = spec.x_range or (min(xs, default=0), max(xs, default=1))
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_ticks, (width, height) = ticks(min(ys, default=0), max(ys, default=1)), spec.size
    return _Frame(x_low, x_high, y_ticks, right=width - 10, bottom=height - 26)


def _axes(frame: _Frame, spec: Chart) -> str:
    left, right, below = frame.left, frame.right, frame.bottom + 17
    parts = []
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_text("tick", left - 7, y + 4, spec.y_format(value)))
    steps = spec.x_label == "step"
    for value in ticks(frame.x_low, frame.x_high, count=5):
        if frame.x_low <= value <= frame.x_high and (value.is_integer() or not steps):
            x = frame.x(value)
            anchor = "end" if x > right - 12 else "middle"
            parts.append(_text("tick", x, below, f"{value:g}", anchor))
    parts.append(_text("tick axis", left - 7, below, spec.x_label))
    return "".join(parts)


def _text(look: str, x: float, y: float, text: str, anchor: str = "end") -> str:
    return f'<text class="{look}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _path(frame: _Frame, line: Line) -> str:
    parts = []
    values = zip(line.xs, line.ys, strict=True)
    for _, stretch in groupby(values, key=lambda value: value[1] is not None):
        points = [(frame.x(x), frame.y(y)) for x, y in stretch if y is not None]
        if not points:
            continue
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        # A stretch of one point has no length; with round caps a line to itself shows as a dot.
        path += f"L{points[0][0]} {points[0][1]}" if len(points) == 1 else ""
        parts.append(f'<path class="line {line.look}" d="{path}"/>')
        if line.look == "dots":
            parts += [f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in points]
    return "".join(parts)


def _whiskers(frame: _Frame, line: Line) -> str:
    return "".join(
        f'<line class="whisker" x1="{frame.x(x)}" x2="{frame.x(x)}"'
        f' y1="{frame.y(span[0])}" y2="{frame.y(span[1])}"/>'
        for x, span in zip(line.xs, line.spans, strict=True)
        if span
    )


def _band(frame: _Frame, line: Line) -> str:
    shown = [(frame.x(x), span) for x, span in zip(line.xs, line.spans, strict=True) if span]
    if not shown:
        return ""
    lows = [f"{x} {frame.y(low)}" for x, (low, _) in shown]
    highs = [f"{x} {frame.y(high)}" for x, (_, high) in reversed(shown)]
    return f'<path class="band" d="M{"L".join(lows + highs)}Z"/>'


def _hover(frame: _Frame, line: Line, *, alone: bool) -> str:
    """A strip around each value, which shows dot and text under the pointer.

    It has the full height where the line is alone; else others' values lie above and below.
    """
    values = zip(line.xs, line.ys, line.titles, strict=True)
    hits = [(frame.x(x), frame.y(y), escape(title)) for x, y, title in values if y is not None]
    edges = [frame.left, *((a + b) / 2 for (a, *_), (b, *_) in pairwise(hits)), frame.right]

    look = escape(f"hit {line.color}".strip())

    def strip(y: float) -> str:
        return f'height="{frame.bottom + 26}"' if alone else f'y="{y - 6:.1f}" height="12"'

    return "".join(
        f'<g class="{look}"><title>{title}</title>'
        f'<rect x="{start:.1f}" width="{end - start:.1f}" {strip(y)}/>'
        f'<line class="guide" x1="{x}" x2="{x}" y1="{frame.top}" y2="{frame.bottom}"/>'
        f'<circle cx="{x}" cy="{y}" r="4"/>'
        f'<text x="{frame.right}" y="11" text-anchor="end">{title}</text></g>'
        for (x, y, title), (start, end) in zip(hits, pairwise(edges), strict=False)
    )
