"""The report of a run: one HTML file that needs nothing else, no network and no scripts.

Here and in the modules beside it numbers become plain records of text. All markup but the charts'
is in templates/, where jinja2 escapes whatever a run's files hold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

from gvpo_jax.report.answers import held_out_answers, latest_groups
from gvpo_jax.report.curves import is_number, main_figures, metric_figures, other_figures
from gvpo_jax.report.scores import Tile, compare, score_tiles, task_ranges
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
from gvpo_jax.rundir.formats import compact, duration

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class _Run:
    name: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    last_step: int
    evaluations: list[Evaluation]
    completions: tuple[int, list[dict[str, Any]]]


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run's folder, finished or not, and give its path.

    Raises UserError where the folder holds no run.
    """
    run_dir = Path(run_dir)
    check_run(run_dir)
    path = run_dir / "report.html"
    write_text(path, _page(_read(run_dir)))
    return path


def _read(run_dir: Path) -> _Run:
    metrics, summary = read_metrics(run_dir), read_summary(run_dir)
    last_step = metrics[-1]["step"] if metrics else 0
    return _Run(
        name=run_dir.resolve().name,
        settings=read_settings(run_dir),
        summary=summary,
        metrics=metrics,
        last_step=last_step,
        evaluations=read_evaluations(run_dir, summary.get("steps", last_step)),
        completions=read_latest_completions(run_dir),
    )


def _page(run: _Run) -> str:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("gvpo_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared, total = compare(run.evaluations), _total_steps(run)
    finished = run.summary and run.summary.get("steps", run.last_step) >= run.last_step
    step = f"step {run.last_step}" + (f" of {total}" if total else "")
    page = templates.get_template("page.html").render(
        name=run.name,
        finished=finished,
        state="finished" if finished else step,
        model=_model(run),
        tiles=[*score_tiles(compared), *_training_tiles(run)],
        scores=task_ranges(compared),
        large=main_figures(run.metrics, run.evaluations),
        small=metric_figures(run.metrics),
        more=other_figures(run.metrics),
        samples=held_out_answers(compared),
        groups=latest_groups(*run.completions),
        settings=_settings(run),
    )
    return _NOT_XML.sub("\ufffd", page)


def _training_tiles(run: _Run) -> list[Tile]:
    total, tokens = _total_steps(run), _numbers(run.metrics, "num_tokens")
    note = f"{compact(tokens[-1])} tokens" if tokens else ""
    tiles = [Tile("Steps", f"{run.last_step}", note, unit=f"of {total}" if total else "")]
    times = _numbers(run.metrics, "step_time")
    seconds = run.summary.get("wall_seconds", sum(times) if times else None)
    if is_number(seconds):
        note = f"{duration(median(times))} a step (median)" if times else ""
        tiles.append(Tile("Wall time", duration(seconds), note))
    if rewards := _numbers(run.metrics, "reward"):
        part = -(-len(rewards) // 10)
        first, last = compact(fmean(rewards[:part])), compact(fmean(rewards[-part:]))
        note = f"means of the first and last {part} steps" if part > 1 else "first and last step"
        tiles.append(Tile("Training reward", last, note, first))
    return tiles


def _settings(run: _Run) -> dict[str, dict[str, str]]:
    """The tables of settings: caption -> name -> value."""
    general = {key: value for key, value in run.settings.items() if not isinstance(value, dict)}
    groups = {"General": _flat(general)}
    groups |= {key: _flat(value) for key, value in run.settings.items() if isinstance(value, dict)}
    groups["Summary of the run"] = _flat(run.summary)
    return {caption: rows for caption, rows in groups.items() if rows}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = _setting(value)
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


def _numbers(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if is_number(row.get(name))]
