"""Held-out scores before and after training: headline numbers, and ranges task by task."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo_jax.report.intervals import Interval, difference_interval, mean_interval
from gvpo_jax.rundir.files import Evaluation, to_json
from gvpo_jax.rundir.formats import compact, percent, percent_tick, points

Rows = Sequence[Mapping[str, Any]]
Show = Callable[[float], str]
Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Tile:
    """A headline number: `before` → `value` `unit`; look: "main" for the one that matters most."""

    name: str
    value: str
    note: str
    before: str = ""
    unit: str = ""
    look: str = ""


@dataclass(frozen=True)
class Mark:
    """A mean and, where there is one, its interval; x and span: per cent of the lane."""

    look: str
    y: int
    x: str
    span: tuple[str, str] | None


@dataclass(frozen=True)
class Lane:
    """One task; label: all of it in words, for screen readers."""

    name: str
    size: str
    label: str
    marks: list[Mark]
    before: str
    value: str


@dataclass(frozen=True)
class Ranges:
    """Lanes over one axis with these ends; keys: (look, label) of each evaluation."""

    title: str
    keys: list[tuple[str, str]]
    lanes: list[Lane]
    ends: list[str]


@dataclass(frozen=True)
class Scale:
    """What a mean score is called, and how it is written in text and at an axis."""

    title: str
    show: Show
    tick: Show


ACCURACY = Scale("Held-out accuracy", percent, percent_tick)
REWARD = Scale("Held-out reward", compact, compact)
_MOST_TASKS = 64


@dataclass(frozen=True)
class Comparison:
    """The first and the last evaluation of a run, or only one; scores: of each, by question."""

    evaluations: list[Evaluation]
    scores: list[Scores]
    scale: Scale


def scale_of(evaluations: Iterable[Evaluation]) -> Scale:
    """Accuracy where all answers are told to be right or wrong, or all rewards are 0 or 1."""
    return ACCURACY if all(_tell_accuracy(each.rows) for each in evaluations) else REWARD


def _tell_accuracy(rows: Rows) -> bool:
    told = all(isinstance(row.get("correct"), bool) for row in rows)
    return told or {finite(row.get("reward")) for row in rows} <= {0, 1, None}


def scores_by_question(rows: Rows, scale: Scale) -> Scores:
    """Scores of answers by question; answers without one are left out.

    Of accuracy it is `correct` as 1 or 0 where rows tell it, else their reward.
    """
    scores: Scores = {}
    for row in rows:
        told = scale is ACCURACY and isinstance(row.get("correct"), bool)
        if (score := finite(row["correct"] if told else row.get("reward"))) is not None:
            scores.setdefault(question_key(row), []).append(score)
    return scores


def task_names(rows: Rows) -> list[str]:
    """The tasks that rows name in their column `task`, if it is such a column.

    That is where there are several tasks, but not one for each prompt, and every one is a short
    text; a row may lack one. Else there are none.
    """
    tasks = {to_json(column(row, "task")): column(row, "task") for row in rows}
    given = [task for task in tasks.values() if task is not None]
    if not all(isinstance(task, str) and task.isprintable() and len(task) <= 64 for task in given):
        return []
    prompts = len({question_key(row) for row in rows})
    return sorted(given) if 1 < len(given) <= min(_MOST_TASKS, prompts / 2) else []


def question_key(row: Mapping[str, Any]) -> str:
    """What makes two rows answers to the same question; `group` may number them."""
    names = ("task", "answer_prefix", "group")
    return to_json([row.get("prompt"), *(column(row, name) for name in names)])


def column(row: Mapping[str, Any], name: str) -> Any:
    """A data set's column of a row, beside the prompt or under "columns"; None without it."""
    nested = row.get("columns")
    return row.get(name, nested.get(name) if isinstance(nested, Mapping) else None)


def finite(value: Any) -> float | None:
    """A finite number as a float; None for everything else."""
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None


def compare(evaluations: Sequence[Evaluation]) -> Comparison | None:
    """First against last evaluation with any scored answer; None where there is none."""
    scored = [e for e in evaluations if scores_by_question(e.rows, REWARD)]
    if not scored:
        return None
    ends = [*scored[:1], *scored[1:][-1:]]
    scale = scale_of(ends)
    return Comparison(ends, [scores_by_question(e.rows, scale) for e in ends], scale)


def span(interval: Interval, show: Show) -> str:
    """An interval as [low, high]; empty where it has none."""
    return f"[{show(interval.low)}, {show(interval.high)}]" if interval.known else ""


def score_tiles(compared: Comparison) -> list[Tile]:
    """Headline numbers of the held-out answers: before, after and the paired change."""
    title, show, label = compared.scale.title, compared.scale.show, compared.evaluations[-1].label
    intervals = [mean_interval(scores.values()) for scores in compared.scores]
    spans = " and ".join(span(interval, show) for interval in intervals)
    *before, mean = (show(interval.mean) for interval in intervals)
    size = _size(compared.scores[-1]) + _unscored(compared.evaluations[-1].rows)
    if not before:
        return [Tile(title, mean, f"{label}; 95% interval {spans}; {size}", look="main")]
    title += "" if label == "after" else f", {label}"
    main = Tile(title, mean, f"95% intervals {spans}; {size}", before[0], look="main")
    return [main, *_change(compared)]


def task_ranges(compared: Comparison) -> Ranges:
    """Means and intervals before and after, over all questions and for each task."""
    found = []
    scale = compared.scale
    for task in ["", *task_names(compared.evaluations[-1].rows)]:
        scores = [scores_by_question(_of_task(e.rows, task), scale) for e in compared.evaluations]
        if all(scores):
            intervals = [mean_interval(of_one.values()) for of_one in scores]
            found.append((task or "all", intervals, len(scores[-1])))
    found = found[:1] if len(found) == 2 else found  # a single task is all there is
    low, high = (0.0, 1.0) if scale is ACCURACY else _ends([i for _, two, _ in found for i in two])
    return Ranges(
        title=scale.title + (" by task" if len(found) > 1 else ""),
        keys=list(zip("ba", (e.label for e in compared.evaluations), strict=False)),
        lanes=[_lane(*each, show=scale.show, low=low, high=high) for each in found],
        ends=[scale.tick(value) for value in (low, (low + high) / 2, high)],
    )


def _change(compared: Comparison) -> list[Tile]:
    before, after = compared.scores
    shared = [key for key in before if key in after]
    if len(shared) < 2:
        return []
    gain = difference_interval(
        [fmean(before[key]) for key in shared], [fmean(after[key]) for key in shared]
    )
    show, unit, low, high = compact, "", gain.low, gain.high
    if compared.scale is ACCURACY:  # Student's interval does not know that shares end at 0 and 1
        show, unit, low, high = points, "points", max(low, -1.0), min(high, 1.0)
    note = f"95% interval {show(low)} to {show(high)}, paired by question"
    return [Tile("Change", show(gain.mean), note, unit=unit)]


def _questions(count: int) -> str:
    return f"{count} question" + ("s" if count > 1 else "")


def _size(scores: Scores) -> str:
    counts = {len(group) for group in scores.values()}
    if len(counts) > 1:
        return f"{_questions(len(scores))}, {sum(map(len, scores.values()))} samples"
    samples = counts.pop()
    return _questions(len(scores)) + (f" \u00d7 {samples} samples" if samples > 1 else "")


def _unscored(rows: Rows) -> str:
    count = sum(finite(row.get("reward")) is None for row in rows)
    return f"; {count} of {len(rows)} completions without a reward" if count else ""


def _of_task(rows: Rows, task: str) -> Rows:
    return [row for row in rows if not task or column(row, "task") == task]


def _ends(intervals: Sequence[Interval]) -> tuple[float, float]:
    ends = [v for i in intervals for v in ((i.low, i.mean, i.high) if i.known else (i.mean,))]
    low, high = min(ends), max(ends)
    return (low, high) if low < high else (low - 1, high + 1)


def _lane(
    name: str, intervals: Sequence[Interval], count: int, *, show: Show, low: float, high: float
) -> Lane:
    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    heights = (10, 20) if len(intervals) > 1 else (15,)
    marks = [
        Mark(look, y, place(i.mean), (place(i.low), place(i.high)) if i.known else None)
        for look, y, i in zip("ba", heights, intervals, strict=False)
    ]
    label = f"{name}: " + " to ".join(f"{show(i.mean)} {span(i, show)}" for i in intervals)
    *before, value = (show(interval.mean) for interval in intervals)
    return Lane(name, _questions(count), label, marks, "".join(before), value)
