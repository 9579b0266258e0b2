"""Curves of a run: which metrics are drawn, and how."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from gvpo_jax.report.charts import Chart, Line, chart
from gvpo_jax.report.intervals import Interval, mean_interval
from gvpo_jax.report.scores import (
    ACCURACY,
    REWARD,
    Rows,
    Scale,
    Show,
    finite,
    scale_of,
    scores_by_question,
    span,
)
from gvpo_jax.rundir.files import Evaluation
from gvpo_jax.rundir.formats import compact, duration, percent, percent_tick

_MOST_POINTS = 160  # more than a chart has pixels to tell apart under the pointer
_LARGE = (520, 260)


@dataclass(frozen=True)
class Metric:
    """How one metric is drawn. kind: "noisy" ones get a running mean over the faint values."""

    name: str
    title: str
    note: str
    show: Show = compact
    tick: Show = compact
    include: tuple[float, ...] = ()
    kind: Literal["noisy", "exact"] = "noisy"


@dataclass(frozen=True)
class Figure:
    """A chart, which is SVG text, with its title, its newest value and what to know about it."""

    title: str
    last: str
    note: str
    chart: str
    warning: str = ""


# Drawn only where they ever happened.
_QUIET = ("rewards/failed", "rewards/abstained", "skipped_groups", "source/policy/staleness")
_HELD_OUT = {
    f"eval/{kind}{end}" for kind in ("accuracy", "reward") for end in ("", "_low", "_high")
}
_SHARE: Mapping[str, Any] = {"show": percent, "tick": percent_tick, "include": (0.0,)}
TRAINING_REWARD = Metric(
    "reward", "Training reward", "Mean reward of the completions sampled at each step."
)
METRICS = (
    Metric(
        "gvpo_mse",
        "GVPO objective (gvpo_mse)",
        "Squared distance of implicit from real rewards; starts near half the reward variance.",
        include=(0.0,),
    ),
    Metric("loss", "Loss", "Its gradient is the objective's; its value need not fall."),
    Metric("kl", "Divergence from the reference", "Estimated (kl), in nats per token."),
    Metric("log_ratio", "Log-ratio to the reference", "Mean, in nats per completion."),
    Metric(
        "reward_std", "Reward spread in a group", "Standard deviation over a group's completions."
    ),
    Metric(
        "frac_reward_zero_std",
        "Groups without contrast",
        "Share of groups whose completions all got the same reward.",
        **_SHARE,
    ),
    Metric("entropy_sampled", "Surprise", "Minus the mean log-prob of the sampled tokens."),
    Metric("grad_norm", "Gradient norm", "Before clipping.", include=(0.0,)),
    Metric("completions/mean_length", "Completion length", "Mean, in tokens.", include=(0.0,)),
    Metric(
        "completions/clipped_ratio",
        "Cut completions",
        "Share that reached the length limit.",
        **_SHARE,
    ),
    Metric(
        "router/aux_loss",
        "Load of experts",
        "Load balancing loss (router/aux_loss): an even load gives the experts of a token.",
    ),
    Metric(
        "router/max_share",
        "Busiest expert",
        "Share of a layer's tokens that one expert gets, at most.",
        **_SHARE,
    ),
    Metric(
        "router/disagreement",
        "Experts that differ",
        "Share of tokens and layers with other experts in sampling than in scoring.",
        **_SHARE,
    ),
    Metric("learning_rate", "Learning rate", "", include=(0.0,), kind="exact"),
    Metric("tokens_per_second", "Throughput", "Tokens per second.", include=(0.0,)),
    Metric("step_time", "Step time", "Seconds per step.", show=duration, include=(0.0,)),
    Metric("source/policy/staleness", "Age of new samples", "In updates.", include=(0.0,)),
    Metric("skipped_groups", "Groups left out", "With fewer than two rewards.", include=(0.0,)),
    Metric("rewards/failed", "Failed rewards", "Completions left out, per step.", include=(0.0,)),
    Metric("rewards/abstained", "No reward", "Completions left out, per step.", include=(0.0,)),
    Metric(
        "sync/logp_difference/mean",
        "Server against trainer",
        "Distance of a token's log-probs under the same weights: mean, in nats.",
        include=(0.0,),
    ),
    Metric(
        "sync/logp_difference/max", "Server against trainer, at most", "In nats.", include=(0.0,)
    ),
    Metric("sync/write_seconds", "Writing weights", "For servers.", show=duration, include=(0.0,)),
    Metric(
        "sync/load_seconds", "Loading weights", "Slowest server.", show=duration, include=(0.0,)
    ),
)


def main_figures(rows: Rows, evaluations: Sequence[Evaluation]) -> list[Figure]:
    """Training reward and held-out score, as far as there are any."""
    return [*_figures(rows, [TRAINING_REWARD], _LARGE), *_held_out_figure(rows, evaluations)]


def metric_figures(rows: Rows) -> list[Figure]:
    """The metrics that are known."""
    told = [m for m in METRICS if m.name not in _QUIET or any(row.get(m.name) for row in rows)]
    return _figures(rows, told)


def other_figures(rows: Rows) -> list[Figure]:
    """Whatever else the rows have numbers of."""
    known = {metric.name for metric in METRICS} | {"step", "reward", "num_tokens", *_HELD_OUT}
    names = dict.fromkeys(name for row in rows for name, v in row.items() if is_number(v))
    others = [name for name in names if name not in known and not name.startswith("left_out/")]
    functions = [name for name in others if name.startswith("rewards/")]
    if len(functions) == 1:  # it is the reward itself
        others.remove(functions[0])
    return _figures(rows, [Metric(name, name, "") for name in others])


def series(rows: Rows, name: str, show: Show = compact) -> Line:
    """A metric over steps, neighbouring ones joined to their mean where there are many.

    None where it was not finite; spans: the extremes of joined steps.
    """
    found = [(row["step"], finite(row[name])) for row in rows if name in row]
    size = -(-len(found) // _MOST_POINTS) or 1
    xs, ys, spans, titles = [], [], [], []
    for start in range(0, len(found), size):
        part = found[start : start + size]
        values = [value for _, value in part if value is not None]
        mean = fmean(values) if values else None
        xs.append(part[-1][0])
        ys.append(mean)
        spans.append((min(values), max(values)) if values and size > 1 else None)
        steps = f"step {part[0][0]}" if size == 1 else f"steps {part[0][0]} to {part[-1][0]}, mean"
        titles.append(f"{steps}: {'not finite' if mean is None else show(mean)}")
    return Line(xs, ys, "bold", spans, titles)


def running_mean(values: Sequence[float | None], *, window: int) -> list[float | None]:
    """Mean over a centred window; None stays None and counts for nothing.

    Toward the ends it narrows to half its width on both sides: whole, it would flatten a steep
    start; narrowed to one value, the line would end in that value's noise.
    """
    means: list[float | None] = []
    for i, value in enumerate(values):
        half = max(min(window // 2, i, len(values) - 1 - i), window // 4)
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        means.append(None if value is None else fmean(near))
    return means


def window_of(count: int) -> int:
    """Odd width of the running mean for `count` values: about a tenth of them, 1 for a few."""
    return count // 10 // 2 * 2 + 1 if count >= 30 else 3 if count >= 12 else 1


def held_out_scale(rows: Rows, evaluations: Sequence[Evaluation]) -> Scale:
    """Accuracy where all evaluations have it."""
    logged = [row for row in rows if "eval/accuracy" in row or "eval/reward" in row]
    accuracy = all("eval/accuracy" in row for row in logged)
    return scale_of(evaluations) if accuracy else REWARD


def held_out_curve(
    rows: Rows, evaluations: Sequence[Evaluation]
) -> dict[int, tuple[float, Interval | None]]:
    """Held-out score by step, with its interval where the answers themselves are there."""
    curve: dict[int, tuple[float, Interval | None]] = {}
    scale = held_out_scale(rows, evaluations)
    for row in rows:
        name = "eval/accuracy" if scale is ACCURACY else "eval/reward"
        if (value := finite(row.get(name))) is not None:
            curve[row["step"]] = (value, None)
    for evaluation in evaluations:
        if scores := scores_by_question(evaluation.rows, scale):
            interval = mean_interval(scores.values())
            curve[evaluation.step] = (interval.mean, interval)
    return dict(sorted(curve.items()))


def is_number(value: Any) -> bool:
    """Whether it is a number, finite or not; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figures(
    rows: Rows, metrics: Iterable[Metric], size: tuple[int, int] = (340, 190)
) -> list[Figure]:
    """Metrics that some row holds."""
    figures = []
    for metric in metrics:
        line = series(rows, metric.name, metric.show)
        if not line.xs:
            continue
        shown = [metric.show(value) for value in line.ys if value is not None]
        label = f"{metric.title} over steps {line.xs[0]} to {line.xs[-1]}"
        label += f", from {shown[0]} to {shown[-1]}" if shown else ""
        lines = _smoothed(line) if metric.kind == "noisy" else [line]
        picture = chart(Chart(lines, label, "train", metric.tick, metric.include, size=size))
        values = [finite(row[metric.name]) for row in rows if metric.name in row]
        missing = values.count(None)  # of all steps: the line may join some of them to a point
        warning = f"Not finite at {missing} of {len(values)} points." if missing else ""
        last = shown[-1] if shown else ""
        figures.append(Figure(metric.title, last, metric.note, picture, warning))
    return figures


def _held_out_figure(rows: Rows, evaluations: Sequence[Evaluation]) -> list[Figure]:
    curve = held_out_curve(rows, evaluations)
    if not curve:
        return []
    values, intervals = zip(*curve.values(), strict=True)
    scale = held_out_scale(rows, evaluations)
    shown = [scale.show(value) for value in values]
    titles = [
        f"step {step}: {value}" + (f" {span(interval, scale.show)}" if interval else "")
        for step, value, interval in zip(curve, shown, intervals, strict=True)
    ]
    label = f"{scale.title} from {shown[0]} to {shown[-1]}"
    spans = [(i.low, i.high) if i and i.known else None for i in intervals]
    line = Line(list(curve), values, "dots", spans, titles)
    ends = (0, max(1, *curve, *(row["step"] for row in rows[-1:])))
    picture = chart(Chart([line], label, "eval", scale.tick, x_range=ends, size=_LARGE))
    note = "Held-out questions. Pale bars: 95% intervals over the questions."
    return [Figure(scale.title, shown[-1], note, picture)]


def _smoothed(line: Line) -> list[Line]:
    """Its running mean, and the line itself behind it, which has the titles for the pointer."""
    window = window_of(len(line.ys))
    if window == 1:
        return [line]
    return [Line(line.xs, running_mean(line.ys, window=window)), replace(line, look="faint")]
