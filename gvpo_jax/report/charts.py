"""Small line charts as SVG text: axes, lines with gaps, bands, intervals, values to point at.

Colours and line widths come from the style sheet around the chart, by class.
"""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Line:
    """One line of a chart: `ys` over `xs`, None where there is no value (the line breaks there).

    look: "bold", "faint" or "dots" (a bold line with a dot at each value). spans: (low, high) for
    each x, drawn as whiskers under dots and as a band under a line. titles: what the pointer
    reads at each x.
    """

    xs: Sequence[float]
    ys: Sequence[float | None]
    look: Literal["bold", "faint", "dots"] = "bold"
    spans: Sequence[tuple[float, float] | None] = ()
    titles: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """Lines in one frame. color: the lines' class, "train" or "eval"; label: for screen readers."""

    lines: Sequence[Line]
    label: str
    color: str = "train"
    y_format: Callable[[float], str] = "{:g}".format
    include_y: Sequence[float] = ()
    x_range: tuple[float, float] | None = None
    x_title: str = "step"
    size: tuple[int, int] = (340, 190)


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_ticks: list[float]
    size: tuple[int, int]
    margins: tuple[int, int, int, int] = field(default=(20, 10, 26, 44))  # top, right, bottom, left

    def x(self, value: float) -> float:
        _, right, _, left = self.margins
        width = self.size[0] - left - right
        return round(left + width * (value - self.x_low) / (self.x_high - self.x_low), 2)

    def y(self, value: float) -> float:
        top, _, bottom, _ = self.margins
        low, high = self.y_ticks[0], self.y_ticks[-1]
        share = (value - low) / (high - low)
        return round(self.size[1] - bottom - (self.size[1] - top - bottom) * share, 2)


def escape(value: object) -> str:
    """Text that is safe in HTML and XML, between tags and in quoted attributes."""
    return html.escape(_NOT_XML.sub("\ufffd", str(value)), quote=True)


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
    width, height = spec.size
    return (
        f'<svg class="chart {spec.color}" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(spec.label)}">{chart_content(spec)}</svg>'
    )


def chart_content(spec: Chart) -> str:
    """What is inside the <svg> of a chart, to be placed in a larger drawing."""
    frame = _frame(spec)
    parts = [_axes(frame, spec)]
    for line in spec.lines:
        if line.spans:
            parts.append(_whiskers(frame, line) if line.look == "dots" else _band(frame, line))
        parts.append(_path(frame, line))
    parts += [_hover(frame, line) for line in spec.lines if line.titles]
    return "".join(parts)


def _frame(spec: Chart) -> _Frame:
    xs = [x for line in spec.lines for x in line.xs]
    ys = [y for line in spec.lines for y in line.ys if y is not None]
    ys += [y for line in spec.lines for span in line.spans if span for y in span]
    ys += spec.include_y
    x_low, x_high = spec.x_range or (min(xs, default=0), max(xs, default=1))
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    return _Frame(x_low, x_high, ticks(min(ys, default=0), max(ys, default=1)), spec.size)


def _axes(frame: _Frame, spec: Chart) -> str:
    _, right, _, left = frame.margins
    width, height = frame.size
    parts = []
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y}" y2="{y}"/>')
        label = escape(spec.y_format(value))
        parts.append(
            f'<text class="tick" x="{left - 7}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    for value in _step_ticks(frame.x_low, frame.x_high):
        x = frame.x(value)
        anchor = "end" if x > width - right - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{x}" y="{height - 9}" text-anchor="{anchor}">{value:g}</text>'
        )
    parts.append(f'<text class="tick axis" x="{left - 7}" y="{height - 9}" text-anchor="end">')
    parts.append(f"{escape(spec.x_title)}</text>")
    return "".join(parts)


def _step_ticks(low: float, high: float) -> list[float]:
    return [x for x in ticks(low, high, count=5) if low <= x <= high and x == int(x)]


def _runs(line: Line) -> list[list[int]]:
    """Indices of the unbroken stretches of a line."""
    runs: list[list[int]] = [[]]
    for i, y in enumerate(line.ys):
        if y is not None:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _path(frame: _Frame, line: Line) -> str:
    parts = []
    for run in _runs(line):
        points = [(frame.x(line.xs[i]), frame.y(line.ys[i] or 0.0)) for i in run]
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


def _hover(frame: _Frame, line: Line) -> str:
    """A strip around each value, of full height, which shows dot and text under the pointer."""
    top, right, bottom, left = frame.margins
    width, height = frame.size
    at = [i for i, y in enumerate(line.ys) if y is not None]
    xs = [frame.x(line.xs[i]) for i in at]
    edges = [left, *((a + b) / 2 for a, b in pairwise(xs)), width - right]
    parts = []
    for n, i in enumerate(at):
        x, y, title = xs[n], frame.y(line.ys[i] or 0.0), escape(line.titles[i])
        parts.append(
            f'<g class="hit"><title>{title}</title>'
            f'<rect x="{edges[n]:.1f}" width="{edges[n + 1] - edges[n]:.1f}" height="{height}"/>'
            f'<line class="guide" x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}"/>'
            f'<circle cx="{x}" cy="{y}" r="4"/>'
            f'<text x="{width - right}" y="11" text-anchor="end">{title}</text></g>'
        )
    return "".join(parts)
