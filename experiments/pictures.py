"""The pictures of all experiments: one look, drawn by matplotlib, that reads on white and black.

An experiment's script finds this file by `sys.path.append(str(Path(__file__).parents[1]))`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gvpo_jax.errors import UserError
from gvpo_jax.report.curves import (
    held_out_curve,
    held_out_scale,
    running_mean,
    series,
    window_of,
)
from gvpo_jax.report.intervals import Interval
from gvpo_jax.report.scores import ACCURACY, REWARD, Scale
from gvpo_jax.rundir.files import (
    Evaluation,
    check_run,
    read_evaluations,
    read_metrics,
    read_summary,
)

GREEN, ORANGE, GREY = "#14998c", "#d9722b", "#868d96"
COLORS = [GREEN, ORANGE, "#7a6fd0", "#c2509b", "#4f8fd6", "#8aa336"]
COLORS += ["#c9a227", "#9a6b4f", GREY, "#d05050", "#3fae5a", "#a05fd6"]
_TEXT = "#7a818a"

matplotlib.rcParams |= {
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": _TEXT,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _TEXT,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": GREY,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gvpo",  # the same picture is the same file
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
}

THIN, BOLD = {"linewidth": 1, "alpha": 0.5}, {"linewidth": 2, "markersize": 4}

Curve = Mapping[int, float | None]
HeldOut = Mapping[int, tuple[float, Interval | None]]


def panels(
    rows: int, columns: int, *, width: float = 4.4, height: float = 2.8
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, in reading order; width and height: of one, in inches."""
    figure = Figure(figsize=(columns * width, rows * height))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write the figure as SVG; title: for screen readers. The same figure is the same file."""
    figure.savefig(path, format="svg", metadata={"Date": None, "Title": title})


def curves(run_dirs: Sequence[Path]) -> Figure:
    """Training reward and, where there are evaluations, held-out accuracy of one or several runs.

    Several runs are drawn thin, and bold their mean over the steps that all have. Raises UserError
    where a folder is no run or no step has a reward.
    """
    rewards = {run_dir: _rewards(run_dir) for run_dir in map(Path, run_dirs)}
    held_out = [found for run_dir in rewards if (found := _held_out(run_dir))]
    figure, (first, *second) = panels(1, 2 if held_out else 1)
    _draw_rewards(first, list(rewards.values()))
    first.set(title="Training reward", xlabel="step")
    for panel in second:
        _draw_held_out(panel, held_out)
        accuracy = all(_scale(run_dir) is ACCURACY for run_dir in rewards)
        title = ACCURACY.title if accuracy else REWARD.title
        panel.set(title=title, xlabel="step", xlim=first.get_xlim())
        if accuracy:
            panel.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _rewards(run_dir: Path) -> Curve:
    check_run(run_dir)
    line = series(read_metrics(run_dir), "reward")
    if not any(value is not None for value in line.ys):
        raise UserError(f"{run_dir} has no step with a reward yet; draw it after its first steps")
    return {int(step): reward for step, reward in zip(line.xs, line.ys, strict=True)}


def _held_out(run_dir: Path) -> HeldOut:
    return held_out_curve(*_evaluations(run_dir))


def _scale(run_dir: Path) -> Scale:
    return held_out_scale(*_evaluations(run_dir))


def _evaluations(run_dir: Path) -> tuple[list[dict[str, Any]], list[Evaluation]]:
    rows = read_metrics(run_dir)
    end = read_summary(run_dir).get("steps", rows[-1]["step"])
    return rows, read_evaluations(run_dir, end)


def _draw_rewards(panel: Axes, runs: Sequence[Curve]) -> None:
    smooth = []
    for run in runs:
        means = running_mean(list(run.values()), window=window_of(len(run)))
        smooth.append(dict(zip(run, means, strict=True)))
    if len(runs) > 1:
        _draw_mean(panel, smooth, GREEN)
    else:
        _plot(panel, runs[0], GREEN, label="each step", **THIN)
        _plot(panel, smooth[0], GREEN, label="running mean", **BOLD)
    panel.legend()


def _draw_held_out(panel: Axes, runs: Sequence[HeldOut]) -> None:
    means = [{step: value for step, (value, _) in run.items()} for run in runs]
    if len(runs) > 1:
        _draw_mean(panel, means, ORANGE, marker="o")
    else:
        _plot(panel, means[0], ORANGE, marker="o", **BOLD)
        known = {step: i for step, (_, i) in runs[0].items() if i and i.known}
        lows, highs = [i.low for i in known.values()], [i.high for i in known.values()]
        label = "95% interval over the questions"
        panel.vlines(list(known), lows, highs, ORANGE, alpha=0.4, linewidth=5, label=label)
    panel.legend()


def _draw_mean(panel: Axes, runs: Sequence[Curve], color: str, marker: str = "") -> None:
    for n, run in enumerate(runs):
        _plot(panel, run, color, label="each run" if n == 0 else None, **THIN)
    found = {step: [y for run in runs if (y := run.get(step)) is not None] for step in runs[0]}
    means = {step: fmean(ys) for step, ys in found.items() if len(ys) == len(runs)}
    _plot(panel, means, color, marker=marker, label=f"mean of {len(runs)} runs", **BOLD)


def _plot(panel: Axes, curve: Curve, color: str, **look: Any) -> None:
    """The line breaks where there is no value."""
    panel.plot(
        list(curve), [math.nan if y is None else y for y in curve.values()], color=color, **look
    )
