"""The picture of results.json: KL over updates on a logarithmic axis, a panel for each outcome."""

import math
from pathlib import Path

from gvpo_jax.report.charts import Chart, Line, chart_content, escape

SIZE, GAP, HEAD, ROW = (460, 300), 24, 44, 19
COLORS = ["#14998c", "#d9722b", "#7a6fd0", "#c2509b", "#4f8fd6", "#8aa336"]
COLORS += ["#c9a227", "#9a6b4f", "#868d96", "#d05050", "#3fae5a", "#a05fd6"]
STYLE = """
text { fill: #7a818a;
  font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #868d96; stroke-width: 1; opacity: .25; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.series .grid, .series .tick { display: none; }
"""
PANELS = (  # title, kinds of conditions, decades
    ("GVPO, whoever wrote the samples", ("samples",), (-15.0, 0.0)),
    ("Support cut, and other objectives", ("support cut", "control"), (-4.0, 2.0)),
)


def draw(report: dict, path: Path) -> None:
    """Panels side by side, each with its legend below: where the lines end, highest first."""
    rows = sorted(report["conditions"].items(), key=lambda item: -item[1]["worst"])
    panels = [{name: row for name, row in rows if row["kind"] in kinds} for _, kinds, _ in PANELS]
    width = len(panels) * SIZE[0] + (len(panels) - 1) * GAP
    height = HEAD + SIZE[1] + 8 + ROW * max(map(len, panels))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
        f' aria-labelledby="title" width="{width}" height="{height}"><title id="title">'
        f"KL(pi* || pi) over the updates</title><style>{STYLE}</style>"
    ]
    note = f"KL(pi* || pi) over the updates, worst of {report['settings']['seeds']} seeds"
    for n, ((title, _, decades), shown) in enumerate(zip(PANELS, panels, strict=True)):
        parts.append(
            f'<g transform="translate({n * (SIZE[0] + GAP)} 0)">'
            f'<text class="title" x="4" y="18">{escape(title)}</text>'
            f'<text x="4" y="38">{escape(note)}</text>'
            f"{_panel(shown, decades, report['settings']['steps'])}</g>"
        )
    path.write_text("".join([*parts, "</svg>\n"]))


def number(kl: float) -> str:
    return "< 1e-16" if kl < 1e-16 else f"{kl:.1e}" if kl < 0.01 else f"{kl:.2g}"


def _panel(rows: dict[str, dict], decades: tuple[float, float], steps: int) -> str:
    parts = [f'<g transform="translate(0 {HEAD - 4})">{_content([], decades, steps)}']
    for color, row in zip(COLORS, rows.values(), strict=False):
        series = _content([_line(row["curve"], decades[0], steps)], decades, steps)
        parts.append(f'<g class="series" stroke="{color}">{series}</g>')
    parts.append("</g>")
    for n, (color, (name, row)) in enumerate(zip(COLORS, rows.items(), strict=False)):
        y = HEAD + SIZE[1] + 14 + ROW * n
        end = escape(number(row["worst"]))
        parts.append(f'<path class="line" stroke="{color}" d="M44 {y - 4}L72 {y - 4}"/>')
        parts.append(f'<text x="136" y="{y}" text-anchor="end">{end}</text>')
        parts.append(f'<text x="148" y="{y}">{escape(name)}</text>')
    return "".join(parts)


def _content(lines: list[Line], decades: tuple[float, float], steps: int) -> str:
    """One series at a time in the same frame, since a chart has one colour for all its lines."""
    spec = Chart(
        lines, "", y_format=_power, include_y=decades, x_range=(0, steps), x_title="", size=SIZE
    )
    return chart_content(spec)


def _line(curve: list[float], lowest: float, steps: int) -> Line:
    """It ends where it leaves the frame."""
    decades = [math.log10(max(kl, 1e-300)) for kl in curve]
    xs = [steps * n / (len(curve) - 1) for n in range(len(curve))]
    return Line(xs, [y if y >= lowest else None for y in decades])


def _power(decade: float) -> str:
    return f"1e{decade:g}"
