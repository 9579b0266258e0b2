"""The report of a run: one HTML file that needs nothing else, no network and no scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gvpo_jax.report.answers import (
    Comparison,
    compare,
    groups_section,
    samples_section,
    score_tiles,
    span,
    task_ranges,
)
from gvpo_jax.report.charts import Chart, chart, escape
from gvpo_jax.report.curves import (
    METRICS,
    REWARD,
    Metric,
    held_out_curve,
    held_out_line,
    metric_lines,
    series,
)
from gvpo_jax.report.page import page, section, tile
from gvpo_jax.report.picture import write_curves_svg
from gvpo_jax.rundir.files import (
    Evaluation,
    check_run,
    read_evaluations,
    read_latest_completions,
    read_metrics,
    read_settings,
    read_summary,
    to_json,
    write_text,
)
from gvpo_jax.rundir.formats import compact, duration, percent, percent_tick

__all__ = ["write_curves_svg", "write_report"]

_QUIET = (
    "rewards/failed",
    "rewards/abstained",
    "skipped_groups",
    "source/policy/staleness",
)  # drawn only where they ever happened


@dataclass(frozen=True)
class _Run:
    name: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    completions: tuple[int, list[dict[str, Any]]]

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run's folder, finished or not, and give its path.

    Raises UserError where the folder holds no run.
    """
    run_dir = Path(run_dir)
    check_run(run_dir)
    metrics, summary = read_metrics(run_dir), read_summary(run_dir)
    last_step = metrics[-1]["step"] if metrics else 0
    run = _Run(
        name=run_dir.resolve().name,
        settings=read_settings(run_dir),
        summary=summary,
        metrics=metrics,
        evaluations=read_evaluations(run_dir, summary.get("steps", last_step)),
        completions=read_latest_completions(run_dir),
    )
    path = run_dir / "report.html"
    write_text(path, page(f"{run.name}: GVPO run", _body(run)))
    return path


def _body(run: _Run) -> str:
    compared = compare(run.evaluations)
    sections = [
        ("results", "Results", _results(run, compared)),
        ("curves", "Curves", _curves(run)),
        ("samples", "Samples", samples_section(compared)),
        ("groups", "Groups", groups_section(*run.completions)),
        ("settings", "Settings", _settings(run)),
    ]
    links = "".join(
        f'<a href="#{anchor}">{name}</a>' for anchor, name, content in sections if content
    )
    body = "".join(content for _, _, content in sections)
    footer = "<footer>Drawn by gvpo-jax from the files of the run's folder.</footer>"
    return f'{_header(run)}<nav aria-label="Sections">{links}</nav></header>{body}{footer}'


def _header(run: _Run) -> str:
    finished = run.summary and run.summary.get("steps", run.last_step) >= run.last_step
    steps = f"step {run.last_step}" + (f" of {total}" if (total := _total_steps(run)) else "")
    pill = (
        '<span class="pill good">finished</span>'
        if finished
        else f'<span class="pill mid">{steps}</span>'
    )
    model = _model(run)
    about = f"GVPO post-training of {model}" if model else "GVPO post-training"
    return (
        f'<header><div class="line"><h1>{escape(run.name)}</h1>{pill}</div>'
        f'<p class="soft">{escape(about)}</p>'
    )


def _results(run: _Run, compared: Comparison | None) -> str:
    tiles = [*score_tiles(compared), *_training_tiles(run)]
    return (
        '<section id="results" aria-label="Results">'
        f'<div class="grid tiles">{"".join(tiles)}</div>{task_ranges(compared)}</section>'
    )


def _training_tiles(run: _Run) -> list[str]:
    total = _total_steps(run)
    steps = f"{run.last_step}" + (f" <small>of {total}</small>" if total else "")
    tokens = [row["num_tokens"] for row in run.metrics if _is_number(row.get("num_tokens"))]
    tiles = [tile("Steps", steps, f"{compact(tokens[-1])} tokens" if tokens else "")]
    times = [row["step_time"] for row in run.metrics if _is_number(row.get("step_time"))]
    seconds = run.summary.get("wall_seconds", sum(times) if times else None)
    if _is_number(seconds):
        note = f"{duration(median(times))} a step (median)" if times else ""
        tiles.append(tile("Wall time", duration(seconds), note))
    rewards = [row["reward"] for row in run.metrics if _is_number(row.get("reward"))]
    if rewards:
        part = -(-len(rewards) // 10)
        value = (
            f"<small>{compact(fmean(rewards[:part]))} →</small> {compact(fmean(rewards[-part:]))}"
        )
        note = f"means of the first and last {part} steps" if part > 1 else "first and last step"
        tiles.append(tile("Training reward", value, note))
    return tiles


def _curves(run: _Run) -> str:
    large = _metric_card(run.metrics, REWARD, size=(520, 260)) + _held_out_card(run)
    known = {metric.name for metric in METRICS} | {"step", "reward", "num_tokens", "eval/accuracy"}
    named = {name: None for row in run.metrics for name, v in row.items() if _is_number(v)}
    extra = [name for name in named if name not in known]
    functions = [name for name in extra if name.startswith("rewards/")]
    if len(functions) == 1:  # it is the reward itself
        extra.remove(functions[0])
    told = [m for m in METRICS if m.name not in _QUIET or any(r.get(m.name) for r in run.metrics)]
    small = "".join(_metric_card(run.metrics, metric) for metric in told)
    more = "".join(_metric_card(run.metrics, Metric(name, name, "")) for name in extra)
    content = ""
    if large:
        content += f'<div class="grid two">{large}</div>'
    if small:
        content += f'<div class="grid three">{small}</div>'
    if more:
        content += (
            '<details class="more"><summary>More metrics</summary>'
            f'<div class="grid three">{more}</div></details>'
        )
    lead = "Bold: running mean; faint: each step. Point at a curve to read its values."
    return section("curves", "Curves", lead, content)


def _metric_card(
    rows: Sequence[Mapping[str, Any]], metric: Metric, *, size: tuple[int, int] = (340, 190)
) -> str:
    found = series(rows, metric.name)
    finite = [value for value in found.values if value is not None]
    missing = sum(1 for row in rows if metric.name in row and not _is_number(row[metric.name]))
    if not found.steps:
        return ""
    label = f"{metric.title} over steps {found.steps[0]} to {found.steps[-1]}"
    if finite:
        label += f", from {metric.show(finite[0])} to {metric.show(finite[-1])}"
    picture = chart(
        Chart(metric_lines(found, metric), label, "train", metric.tick, metric.include, size=size)
    )
    last = f"{metric.show(finite[-1])} <small>last</small>" if finite else ""
    warning = (
        f'<p class="warn">Not finite at {missing} of {len(found.steps)} points.</p>'
        if missing
        else ""
    )
    return _card(metric.title, last, metric.note, picture, warning, wide=size[0] > 400)


def _held_out_card(run: _Run) -> str:
    curve = held_out_curve(run.metrics, run.evaluations)
    if not curve:
        return ""
    share = all(0 <= value <= 1 for value, _ in curve.values())
    show, tick = (percent, percent_tick) if share else (compact, compact)
    titles = [
        f"step {step}: {show(value)}" + (f" {span(interval, show)}" if interval else "")
        for step, (value, interval) in curve.items()
    ]
    values = [show(value) for value, _ in curve.values()]
    title = "Held-out accuracy" if share else "Held-out reward"
    label = f"{title} from {values[0]} to {values[-1]}"
    spec = Chart(
        [held_out_line(curve, titles=titles)],
        label,
        "eval",
        tick,
        x_range=(0, max(run.last_step, *curve, 1)),
        size=(520, 260),
    )
    note = "Questions never trained on. Pale bars: 95% intervals over the questions."
    return _card(title, f"{values[-1]} <small>last</small>", note, chart(spec), wide=True)


def _card(title: str, value: str, note: str, picture: str, warning: str = "", *, wide: bool) -> str:
    head = f'<h3>{escape(title)}</h3><span class="value">{value}</span>'
    return (
        f'<figure class="card{" wide" if wide else ""}"><figcaption><div class="head">{head}</div>'
        f"<p>{escape(note)}</p>{warning}</figcaption>{picture}</figure>"
    )


def _settings(run: _Run) -> str:
    general = {key: value for key, value in run.settings.items() if not isinstance(value, dict)}
    groups = {"General": _flat(general)}
    groups |= {key: _flat(value) for key, value in run.settings.items() if isinstance(value, dict)}
    groups["Summary of the run"] = _flat(run.summary)
    tables = "".join(_table(caption, rows) for caption, rows in groups.items() if rows)
    content = f'<div class="card settings">{tables}</div>' if tables else ""
    return section("settings", "Settings", "As resolved in config.yaml.", content)


def _table(caption: str, rows: Mapping[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(_setting(value))}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return to_json(value) if isinstance(value, list | dict) else str(value)


def _model(run: _Run) -> str:
    model = run.summary.get("model", run.settings.get("model", ""))
    return str(model.get("name", "") if isinstance(model, dict) else model)


def _total_steps(run: _Run) -> int | None:
    train = run.settings.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    return steps if isinstance(steps, int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
