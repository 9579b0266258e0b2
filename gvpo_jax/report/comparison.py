"""Several runs on one page: those that differ in their seed alone are one curve, with a band."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.report.charts import Chart, Line, chart
from gvpo_jax.report.curves import (
    METRICS,
    TRAINING_REWARD,
    Figure,
    Metric,
    Rows,
    held_out_curve,
    held_out_scale,
    is_number,
    running_mean,
    window_of,
)
from gvpo_jax.report.html import flat_settings, render
from gvpo_jax.report.intervals import Interval
from gvpo_jax.report.scores import ACCURACY, REWARD, finite, span
from gvpo_jax.rundir.files import (
    check_run,
    read_evaluations,
    read_metrics,
    read_settings,
    read_summary,
    write_text,
)
from gvpo_jax.rundir.formats import compact

COLORS = 8  # that the style sheet has; further curves are dashed
_SEED = "run.seed"
# What says where a run lies or how it is computed, not what it learns.
_NOT_COMPARED = (
    "run.dir", "run.compilation_cache", "log.", "mesh.", "distributed.", "checkpoint.", "servers.",
    "train.stop_at", "rewards.deadline",
)  # fmt: skip
_SHOWN = ("gvpo_mse", "log_ratio", "entropy_sampled", "completions/mean_length")
_LARGE = (520, 260)


@dataclass(frozen=True)
class Run:
    """One run's files."""

    name: str
    rows: Rows
    settings: Mapping[str, str]
    curve: Mapping[int, tuple[float, Interval | None]]  # held-out scores by step
    accuracy: bool  # that is what they are


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: list[Run]
    look: str  # the class of its lines


@dataclass(frozen=True)
class RunRow:
    """A variant's line in the table, as text."""

    label: str
    look: str
    runs: str
    steps: str
    reward: str
    score: str
    distance: str


def write_comparison(run_dirs: Sequence[Path | str], path: Path | str) -> Path:
    """Write a page that compares runs, finished or not, to `path`, and give it.

    Raises:
        UserError: a folder holds no run, or is named twice; or the file can't be written.
    """
    folders = [Path(run_dir) for run_dir in run_dirs]
    for folder in folders:
        check_run(folder)
    resolved = [folder.resolve() for folder in folders]
    if twice := [str(x) for i, x in enumerate(folders) if resolved[i] in resolved[:i]]:
        raise UserError(f"{twice[0]} is given twice: name each run once")
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} can't be written: give the name of a file in a folder that exists")
    names = _names(resolved)
    runs = [_read(*each) for each in zip(folders, names, strict=True)]
    write_text(path, render("comparison.html", _contents(runs)))
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with what is above them where these are not unlike."""
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    common = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(common)) for folder in folders]


def _read(folder: Path, name: str) -> Run:
    rows, summary = read_metrics(folder), read_summary(folder)
    last = summary.get("steps")
    last = last if isinstance(last, int) else rows[-1]["step"] if rows else 0
    evaluations = read_evaluations(folder, last)
    accuracy = held_out_scale(rows, evaluations) is ACCURACY
    settings = flat_settings(read_settings(folder))
    return Run(name, rows, settings, held_out_curve(rows, evaluations), accuracy)


def _contents(runs: Sequence[Run]) -> dict[str, Any]:
    """What comparison.html shows."""
    differing = _differing(runs)
    variants = _variants(runs, [key for key in differing if key != _SEED])
    figures = [
        _curves(variants, TRAINING_REWARD, _smoothed(TRAINING_REWARD.name), _LARGE),
        _held_out(variants),
        _reward_by_distance(variants),
    ]
    known = {metric.name: metric for metric in METRICS}
    more = [_curves(variants, known[name], _smoothed(name)) for name in _SHOWN]
    return {
        "count": len(runs),
        "variants": variants,
        "table": [_row(variant) for variant in variants],
        "score": _score_title(runs),
        "large": [figure for figure in figures if figure],
        "small": [figure for figure in more if figure],
        "names": [run.name for run in runs],
        "differing": {key: [run.settings.get(key, "") for run in runs] for key in differing},
    }


def _differing(runs: Sequence[Run]) -> list[str]:
    """The settings that are not alike in all runs, but for those that change no result."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [
        key
        for key in keys
        if not key.startswith(_NOT_COMPARED) and len({run.settings.get(key) for run in runs}) > 1
    ]


def _variants(runs: Sequence[Run], keys: Sequence[str]) -> list[Variant]:
    """Runs that are alike in these settings together, in the order of the first of each."""
    together: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        together.setdefault(tuple(run.settings.get(key) for key in keys), []).append(run)
    short = [key.rpartition(".")[2] for key in keys]
    names = [s if short.count(s) == 1 else key for key, s in zip(keys, short, strict=True)]
    found = []
    for number, (values, members) in enumerate(together.items()):
        told = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        label = told if 0 < len(told) <= 80 else members[0].name
        dashed = " dashed" * (number // COLORS % 2)
        found.append(Variant(label, members, f"c{number % COLORS}{dashed}"))
    return found


def _smoothed(name: str) -> Callable[[Run], dict[int, float]]:
    """A run's running mean of a metric, by step."""

    def of(run: Run) -> dict[int, float]:
        found = [(row["step"], finite(row[name])) for row in run.rows if is_number(row.get(name))]
        means = running_mean([y for _, y in found], window=window_of(len(found)))
        return {step: y for (step, _), y in zip(found, means, strict=True) if y is not None}

    return of


def _curves(
    variants: Sequence[Variant],
    metric: Metric,
    of: Callable[[Run], Mapping[int, float]],
    size: tuple[int, int] = (340, 190),
    dots: bool = False,
) -> Figure | None:
    """Each variant's mean over its runs at each step, with a band from the least to the most."""
    lines = []
    for variant in variants:
        curves = [of(run) for run in variant.runs]
        steps = sorted({step for curve in curves for step in curve})
        if not steps:
            continue
        at = [[curve[step] for curve in curves if step in curve] for step in steps]
        means = [fmean(values) for values in at]
        spans = [(min(values), max(values)) if len(values) > 1 else None for values in at]
        titles = [
            f"{variant.label}, step {step}: {metric.show(mean)}"
            for step, mean in zip(steps, means, strict=True)
        ]
        look = "dots" if dots else "bold"
        spans = spans if any(spans) else []
        lines.append(Line(steps, means, look, spans, titles, variant.look))
    if not lines:
        return None
    label = f"{metric.title} over steps, of {len(lines)} settings"
    picture = chart(Chart(lines, label, "", metric.tick, metric.include, size=size))
    return Figure(metric.title, "", metric.note, picture)


def _held_out(variants: Sequence[Variant]) -> Figure | None:
    scale = ACCURACY if _all_accuracy(variants) else REWARD
    note = "Mean over the runs; pale: from the least to the most."
    metric = Metric("", scale.title, note, scale.show, scale.tick)

    def of(run: Run) -> dict[int, float]:  # accuracies stay out of a chart of rewards
        alike = run.accuracy == (scale is ACCURACY)
        return {step: value for step, (value, _) in run.curve.items()} if alike else {}

    return _curves(variants, metric, of, _LARGE, dots=True)


def _reward_by_distance(variants: Sequence[Variant]) -> Figure | None:
    """How much reward each run has for its distance from the reference."""
    lines, reward, distance = [], _smoothed("reward"), _smoothed("log_ratio")
    for variant in variants:
        for run in variant.runs:
            far, good = distance(run), reward(run)
            shared = [step for step in good if step in far]
            if shared:
                points = [far[step] for step in shared], [good[step] for step in shared]
                lines.append(Line(*points, look="bold", color=variant.look))
    if not lines:
        return None
    picture = chart(
        Chart(
            lines,
            "Training reward over the log-ratio to the reference",
            "",
            compact,
            x_label="nats",
            size=_LARGE,
        )
    )
    note = "Running means. Higher at the same distance is better: more reward for less change."
    return Figure("Reward against distance from the reference", "", note, picture)


def _score_title(runs: Sequence[Run]) -> str:
    kinds = {
        run.accuracy: (ACCURACY if run.accuracy else REWARD).title for run in runs if run.curve
    }
    return " or ".join(kinds[kind] for kind in sorted(kinds, reverse=True)) or REWARD.title


def _all_accuracy(variants: Sequence[Variant]) -> bool:
    return all(run.accuracy for variant in variants for run in variant.runs if run.curve)


def _row(variant: Variant) -> RunRow:
    steps = [run.rows[-1]["step"] if run.rows else 0 for run in variant.runs]
    told = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
    seeds = [run.settings.get(_SEED, "?") for run in variant.runs]
    show = (ACCURACY if variant.runs[0].accuracy else REWARD).show
    ends = [list(run.curve.values())[-1] for run in variant.runs if run.curve]
    score = ""
    if len(ends) == 1:
        value, interval = ends[0]
        score = show(value) + (f" {span(interval, show)}" if interval else "")
    elif ends:
        values = sorted(value for value, _ in ends)
        score = f"{show(fmean(values))} ({show(values[0])} to {show(values[-1])})"
    return RunRow(
        variant.label,
        variant.look,
        f"{len(seeds)} (seeds {', '.join(seeds)})" if len(seeds) > 1 else variant.runs[0].name,
        told,
        _at_the_end(variant, "reward"),
        score,
        _at_the_end(variant, "log_ratio"),
    )


def _at_the_end(variant: Variant, name: str) -> str:
    """A metric's mean over the last tenth of the updates, of all runs, with its range."""
    means = []
    for run in variant.runs:
        values = [finite(row.get(name)) for row in run.rows if name in row]
        known = [value for value in values if value is not None]
        means += [fmean(known[-max(len(known) // 10, 1) :])] if known else []
    if not means:
        return ""
    told = compact(fmean(means))
    return told if len(means) == 1 else f"{told} ({compact(min(means))} to {compact(max(means))})"
