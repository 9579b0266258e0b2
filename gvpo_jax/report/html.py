"""The report of a run: one HTML file that needs nothing else, no network and no scripts.

Here and in the modules beside it numbers become plain records of text. All markup but the charts'
is in templates/, where jinja2 escapes whatever a run's files hold.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import jinja2

from gvpo_jax.report.advice import advice
from gvpo_jax.report.answers import held_out_answers, latest_groups
from gvpo_jax.report.curves import Rows, is_number, main_figures, metric_figures, other_figures
from gvpo_jax.report.scores import Tile, compare, score_tiles, task_ranges
from gvpo_jax.rundir.files import (
    check_run,
    read_evaluations,
    read_latest_completions,
    read_metrics,
    read_settings,
    read_summary,
    to_json,
    write_text,
)
from gvpo_jax.rundir.formats import compact, duration, left_out_text

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_report(run_dir: Path | str) -> Path:
    """Write `report.html` into a run's folder, finished or not, and give its path.

    Raises:
        UserError: the folder holds no run, or the file can't be written.
    """
    run_dir = Path(run_dir)
    check_run(run_dir)
    path = run_dir / "report.html"
    write_text(path, render("page.html", _contents(run_dir)))
    return path


def render(template: str, contents: Mapping[str, Any]) -> str:
    """A page of templates/ with these contents, escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("gvpo_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return _NOT_XML.sub("\ufffd", templates.get_template(template).render(contents))


def _contents(run_dir: Path) -> dict[str, Any]:
    """What page.html shows."""
    rows, summary, settings = read_metrics(run_dir), read_summary(run_dir), read_settings(run_dir)
    last, train = rows[-1]["step"] if rows else 0, settings.get("train")
    total = train.get("steps") if isinstance(train, dict) else None
    end = summary.get("steps")
    end = end if isinstance(end, int) else last
    finished = bool(summary) and end >= last
    model = summary.get("model", settings.get("model", ""))
    evaluations = read_evaluations(run_dir, end)
    compared = compare(evaluations)
    scores = score_tiles(compared) if compared else []
    return {
        "name": run_dir.resolve().name,
        "finished": finished,
        "state": "finished" if finished else f"step {last}" + (f" of {total}" if total else ""),
        "model": str(model.get("name", "") if isinstance(model, dict) else model),
        "tiles": [*scores, *_tiles(rows, summary, last, total)],
        "advice": advice(rows, settings),
        "left_out": _left_out(rows, summary),
        "scores": compared and task_ranges(compared),
        "large": main_figures(rows, evaluations),
        "small": metric_figures(rows),
        "more": other_figures(rows),
        "samples": compared and held_out_answers(compared),
        "groups": latest_groups(*read_latest_completions(run_dir)),
        "settings": _tables(settings, summary),
    }


def _left_out(rows: Rows, summary: Mapping[str, Any]) -> str:
    """What was left out so far, in words; empty where nobody counted it."""
    counts = {k: v for row in [*rows, summary] for k, v in row.items() if k[:9] == "left_out/"}
    text = left_out_text({name[9:]: count for name, count in counts.items() if is_number(count)})
    return text or ("nothing" if counts else "")


def _tiles(rows: Rows, summary: Mapping[str, Any], last: int, total: int | None) -> list[Tile]:
    tokens, times = _numbers(rows, "num_tokens"), _numbers(rows, "step_time")
    note = f"{compact(tokens[-1])} tokens" if tokens else ""
    tiles = [Tile("Steps", f"{last}", note, unit=f"of {total}" if total else "")]
    seconds = summary.get("wall_seconds", sum(times) if times else None)
    if is_number(seconds):
        note = f"{duration(median(times))} a step (median)" if times else ""
        tiles.append(Tile("Wall time", duration(seconds), note))
    if rewards := _numbers(rows, "reward"):
        part = -(-len(rewards) // 10)
        first, newest = compact(fmean(rewards[:part])), compact(fmean(rewards[-part:]))
        note = f"means of the first and last {part} steps" if part > 1 else "first and last step"
        tiles.append(Tile("Training reward", newest, note, first))
    return tiles


def _tables(settings: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The tables of settings: caption -> name -> value."""
    general = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    groups = {"General": flat_settings(general)}
    sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
    groups |= {key: flat_settings(value) for key, value in sections.items()}
    groups["Summary of the run"] = flat_settings(summary)
    return {caption: rows for caption, rows in groups.items() if rows}


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as text, by their full names."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value, 1)}
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flat_settings(value, f"{name}.")
        else:
            flat[name] = _setting(value)
    return flat


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return to_json(value) if isinstance(value, list | dict) else str(value)


def _numbers(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if is_number(row.get(name))]
