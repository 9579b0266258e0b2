"""Training reward and held-out accuracy of one or several runs, as one SVG picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Literal

from gvpo_jax.errors import UserError
from gvpo_jax.report.charts import Chart, Line, chart_content, escape
from gvpo_jax.report.curves import (
    REWARD,
    Points,
    held_out_curve,
    held_out_line,
    running_mean,
    series,
    window_of,
)
from gvpo_jax.report.intervals import Interval
from gvpo_jax.rundir.files import (
    check_run,
    read_evaluations,
    read_metrics,
    read_summary,
    write_text,
)
from gvpo_jax.rundir.formats import compact, percent_tick


def write_curves_svg(run_dirs: Sequence[Path], path: Path) -> Path:
    """Draw training reward and held-out accuracy of one or several runs as one SVG file.

    Several runs are drawn thin, and bold their mean over the steps that all have. The background
    is transparent and the colours read on white and on black pages. Raises UserError where a
    folder is no run or no step has a reward.
    """
    rewards, held_out = [], []
    for run_dir in map(Path, run_dirs):
        check_run(run_dir)
        rows = read_metrics(run_dir)
        points = series(rows, REWARD.name)
        if not any(value is not None for value in points.values):
            raise UserError(
                f"{run_dir} has no step with a reward yet; draw it after its first steps"
            )
        rewards.append(points)
        end = read_summary(run_dir).get("steps", rows[-1]["step"])
        curve = held_out_curve(rows, read_evaluations(run_dir, end))
        held_out.append(curve)
    panels = [(_reward_panel(rewards), "Training reward", "train")]
    if any(held_out):
        panels.append((_held_out_panel(held_out), "Held-out accuracy", "eval"))
    last = max(points.steps[-1] for points in rewards)
    write_text(path, _picture(panels, (0, last), _legends(len(rewards))))
    return path


def _reward_panel(runs: Sequence[Points]) -> list[Line]:
    smooth = [running_mean(points.values, window=window_of(len(points.values))) for points in runs]
    if len(runs) == 1:
        return [Line(runs[0].steps, runs[0].values, "faint"), Line(runs[0].steps, smooth[0])]
    curves = [
        {step: value for step, value in zip(points.steps, values, strict=True) if value is not None}
        for points, values in zip(runs, smooth, strict=True)
    ]
    return [*(_line(curve, "faint") for curve in curves), _line(_mean_curve(curves), "bold")]


def _held_out_panel(runs: Sequence[Mapping[int, tuple[float, Interval | None]]]) -> list[Line]:
    curves = [{step: value for step, (value, _) in run.items()} for run in runs if run]
    if len(curves) > 1:
        return [*(_line(curve, "faint") for curve in curves), _line(_mean_curve(curves), "dots")]
    run = next(run for run in runs if run)
    return [held_out_line(run)]


def _line(curve: Mapping[int, float], look: Literal["bold", "faint", "dots"]) -> Line:
    return Line(list(curve), list(curve.values()), look)


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    steps = set(curves[0]).intersection(*curves[1:])
    return {step: fmean(curve[step] for curve in curves) for step in sorted(steps)}


def _legends(count: int) -> tuple[str, str]:
    if count > 1:
        legend = f"bold: mean of {count} runs, thin: each run"
        return legend, legend
    return ("bold: running mean, thin: each step", "bars: 95% interval over the questions")


_PICTURE_STYLE = """
text { fill: #7a818a;
  font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #868d96; stroke-width: 1; opacity: .25; }
.train { --color: #14998c; } .eval { --color: #d9722b; }
.line { fill: none; stroke: var(--color); stroke-width: 2.4; stroke-linejoin: round;
  stroke-linecap: round; }
.faint { stroke-width: 1.2; opacity: .6; }
.whisker { stroke: var(--color); stroke-width: 6; opacity: .38; stroke-linecap: round; }
.dot { fill: var(--color); }
"""


def _picture(
    panels: Sequence[tuple[list[Line], str, str]],
    x_range: tuple[float, float],
    legends: tuple[str, str],
) -> str:
    width, height, gap, head = 440, 270, 24, 40
    total = len(panels) * width + (len(panels) - 1) * gap
    title = " and ".join(name for _, name, _ in panels) + f" over {x_range[1]:g} training steps"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + head}" role="img"'
        f' aria-labelledby="title" width="{total}" height="{height + head}">'
        f'<title id="title">{escape(title)}</title><style>{_PICTURE_STYLE}</style>'
    ]
    for n, (lines, name, color) in enumerate(panels):
        tick = percent_tick if color == "eval" and _is_share(lines) else compact
        spec = Chart(lines, name, color, tick, x_range=x_range, size=(width, height))
        parts.append(
            f'<g class="{color}" transform="translate({n * (width + gap)} 0)">'
            f'<text class="title" x="4" y="18">{escape(name)}</text>'
            f'<text x="4" y="38">{escape(legends[n])}</text>'
            f'<g transform="translate(0 {head - 4})">{chart_content(spec)}</g></g>'
        )
    return "".join([*parts, "</svg>\n"])


def _is_share(lines: Sequence[Line]) -> bool:
    return all(0 <= y <= 1 for line in lines for y in line.ys if y is not None)
