"""The parts of the report that show answers: accuracy before and after, samples, sampled groups."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo_jax.report.charts import escape
from gvpo_jax.report.curves import column, question_key, scores_by_question
from gvpo_jax.report.intervals import Interval, difference_interval, mean_interval
from gvpo_jax.report.page import plain_text, reward_pill, section, text_block, tile
from gvpo_jax.rundir.files import Evaluation
from gvpo_jax.rundir.formats import compact, percent, percent_tick, points

_QUESTIONS, _ANSWERS, _GROUPS, _GROUP_ROWS = 6, 4, 3, 16

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Comparison:
    """The first and the last evaluation of a run with their scores by question."""

    before: Evaluation
    after: Evaluation
    scores_before: Scores
    scores_after: Scores

    @property
    def is_share(self) -> bool:
        """Whether every score lies in [0, 1], so that their mean reads as an accuracy."""
        scores = [*self.scores_before.values(), *self.scores_after.values()]
        return all(0 <= score <= 1 for group in scores for score in group)

    @property
    def show(self) -> Callable[[float], str]:
        """How a mean score is written."""
        return percent if self.is_share else compact

    @property
    def name(self) -> str:
        """What a mean score is called."""
        return "accuracy" if self.is_share else "reward"


def compare(evaluations: Sequence[Evaluation]) -> Comparison | None:
    """First against last evaluation with any scored answer; the same twice if there is just one."""
    scored = [(e, s) for e in evaluations if (s := scores_by_question(e.rows))]
    if not scored:
        return None
    (before, scores_before), (after, scores_after) = scored[0], scored[-1]
    return Comparison(before, after, scores_before, scores_after)


def span(interval: Interval, show: Callable[[float], str]) -> str:
    """An interval as [low, high]; empty where it has none."""
    return f"[{show(interval.low)}, {show(interval.high)}]" if interval.low == interval.low else ""


def score_tiles(compared: Comparison | None) -> list[str]:
    """Headline numbers of the held-out answers: before, after and the paired change."""
    if compared is None:
        return []
    show, size = compared.show, _size(compared.scores_after)
    first = mean_interval(list(compared.scores_before.values()))
    title = f"Held-out {compared.name}"
    if compared.before is compared.after:
        note = f"{compared.before.label}; 95% interval {span(first, show)}; {size}"
        return [tile(title, show(first.mean), note, look="main")]
    last = mean_interval(list(compared.scores_after.values()))
    value = f"<small>{show(first.mean)} →</small> {show(last.mean)}"
    when = "" if compared.after.label == "after" else f", {compared.after.label}"
    note = f"95% intervals {span(first, show)} and {span(last, show)}; {size}"
    return [tile(title + when, value, note, look="main"), *_change_tile(compared)]


def task_ranges(compared: Comparison | None) -> str:
    """Means and intervals before and after, over all questions and for each task."""
    if compared is None:
        return ""
    lanes = []
    for name in ["", *_tasks(compared.after.rows)]:
        pair = [_of_task(e.rows, name) for e in (compared.before, compared.after)]
        if all(pair):
            first = mean_interval(list(pair[0].values()))
            single = compared.before is compared.after
            last = first if single else mean_interval(list(pair[1].values()))
            lanes.append((name or "all", first, last, len(pair[1])))
    if len(lanes) == 2:  # a single task is all there is
        lanes = lanes[:1]
    body = "".join(_lane(lane, _range(compared, lanes), compared.show) for lane in lanes)
    low, high = _range(compared, lanes)
    tick = percent_tick if compared.is_share else compact
    ends = "".join(f"<span>{tick(v)}</span>" for v in (low, (low + high) / 2, high))
    body += f'<span></span><span class="ends soft">{ends}</span><span></span>'
    title = f"Held-out {compared.name}" + (" by task" if len(lanes) > 1 else "")
    key = f'<span class="key"></span> {escape(compared.before.label)} '
    if compared.before is not compared.after:
        key += f'&nbsp; <span class="key a"></span> {escape(compared.after.label)} '
    return (
        f'<div class="card lanes"><div class="head"><h3>{title}</h3>'
        f'<span class="soft small">{key}&nbsp; bars: 95% intervals</span></div>'
        f'<div class="ranges">{body}</div></div>'
    )


def samples_section(compared: Comparison | None) -> str:
    """Answers to the same questions before and after training, side by side."""
    if compared is None:
        return ""
    sides = [(e, _by_question(e.rows)) for e in (compared.before, compared.after)]
    sides = sides[:1] if compared.before is compared.after else sides
    shared = [key for key in sides[0][1] if all(key in rows for _, rows in sides)]
    by_task = sorted(shared, key=lambda key: str(column(sides[0][1][key][0], "task")))
    chosen = _evenly(by_task, _QUESTIONS)
    cards = [_question([(e, rows[key]) for e, rows in sides]) for key in chosen]
    heading = "Before and after" if len(sides) > 1 else "Held-out answers"
    lead = f"{len(chosen)} of {len(shared)} held-out questions, not chosen by their results."
    return section("samples", heading, lead, "".join(cards))


def groups_section(step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """The first groups of the newest completions with each reward's distance from the mean."""
    groups = list(_by_question(rows).values())
    cards = []
    for group in groups[:_GROUPS]:
        rewards = [row["reward"] for row in group if isinstance(row.get("reward"), int | float)]
        mean = fmean(rewards) if rewards else 0.0
        shown = "".join(_answer(row, mean) for row in group[:_GROUP_ROWS])
        meta = f"<span>{len(group)} completions</span>"
        meta += f"<span>mean reward {compact(mean)}</span>" if rewards else ""
        meta += f"<span>showing {_GROUP_ROWS}</span>" if len(group) > _GROUP_ROWS else ""
        cards.append(_card(group[0], meta, f'<div class="side">{shown}</div>'))
    lead = (
        f"{min(len(groups), _GROUPS)} of the {len(groups)} groups sampled at step {step}. GVPO"
        " compares completions of one prompt: the signed number is reward minus the group's mean."
    )
    return section("groups", "Latest sampled groups", lead, "".join(cards))


def _change_tile(compared: Comparison) -> list[str]:
    before, after = compared.scores_before, compared.scores_after
    shared = [key for key in before if key in after]
    if len(shared) < 2:
        return []
    gain = difference_interval(
        [fmean(before[k]) for k in shared], [fmean(after[k]) for k in shared]
    )
    show = points if compared.is_share else compact
    unit = " <small>points</small>" if compared.is_share else ""
    low, high = gain.low, gain.high
    if compared.is_share:  # Student's interval does not know that shares end at 0 and 1
        low, high = max(low, -1.0), min(high, 1.0)
    note = f"95% interval {show(low)} to {show(high)}, paired by question"
    return [tile("Change", show(gain.mean) + unit, note)]


def _size(scores: Scores) -> str:
    counts = {len(group) for group in scores.values()}
    questions = f"{len(scores)} question" + ("s" if len(scores) > 1 else "")
    samples = sum(map(len, scores.values()))
    if len(counts) > 1:
        return f"{questions}, {samples} samples"
    return questions if counts == {1} else f"{questions} \u00d7 {counts.pop()} samples"


def _tasks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(task) for row in rows if (task := column(row, "task"))))


def _of_task(rows: Sequence[Mapping[str, Any]], task: str) -> Scores:
    return scores_by_question([row for row in rows if not task or str(column(row, "task")) == task])


def _range(
    compared: Comparison, lanes: Sequence[tuple[str, Interval, Interval, int]]
) -> tuple[float, float]:
    if compared.is_share:
        return 0.0, 1.0
    ends = [v for _, b, a, _ in lanes for i in (b, a) for v in (i.mean, i.low, i.high) if v == v]
    return (min(ends), max(ends)) if min(ends) < max(ends) else (min(ends) - 1, max(ends) + 1)


def _lane(
    lane: tuple[str, Interval, Interval, int],
    ends: tuple[float, float],
    show: Callable[[float], str],
) -> str:
    name, before, after, count = lane
    text = f"{name}: {show(before.mean)} {span(before, show)}"
    if after is not before:
        text += f" to {show(after.mean)} {span(after, show)}"
    marks = '<line class="rail" x1="0" x2="100%" y1="15" y2="15"/>'
    pair = ((before, "b", 10), (after, "a", 20))
    for interval, look, y in pair if after is not before else (((before, "b", 15),)):
        x, low, high = (
            f"{100 * (v - ends[0]) / (ends[1] - ends[0]):.2f}%"
            for v in (interval.mean, interval.low, interval.high)
        )
        if interval.low == interval.low:
            marks += f'<line class="span {look}" x1="{low}" x2="{high}" y1="{y}" y2="{y}"/>'
        marks += f'<circle class="{look}" cx="{x}" cy="{y}" r="5"/>'
    first = f'<span class="soft">{show(before.mean)} →</span> ' if after is not before else ""
    questions = f"{count} question" + ("s" if count > 1 else "")
    return (
        f'<span>{escape(name)} <span class="soft">{questions}</span></span>'
        f'<svg role="img" aria-label="{escape(text)}"><title>{escape(text)}</title>{marks}</svg>'
        f'<span class="numbers">{first}<b>{show(after.mean)}</b></span>'
    )


def _by_question(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(question_key(row), []).append(row)
    return found


def _evenly(keys: Sequence[str], count: int) -> list[str]:
    if len(keys) <= count:
        return list(keys)
    return [keys[round(i * (len(keys) - 1) / (count - 1))] for i in range(count)]


def _question(sides: Sequence[tuple[Evaluation, Sequence[Mapping[str, Any]]]]) -> str:
    columns = []
    for evaluation, rows in sides:
        rewards = [row["reward"] for row in rows if isinstance(row.get("reward"), int | float)]
        mean = f'<span class="pill">mean {compact(fmean(rewards))}</span>' if rewards else ""
        answers = "".join(_answer(row) for row in rows[:_ANSWERS])
        title = escape(evaluation.label.capitalize())
        columns.append(f'<div class="side"><h3>{title} {mean}</h3>{answers}</div>')
    return _card(sides[0][1][0], "", f'<div class="sides">{"".join(columns)}</div>')


def _card(row: Mapping[str, Any], meta: str, content: str) -> str:
    task, solution = column(row, "task"), column(row, "solution")
    meta = (f"<span>{escape(task)}</span>" if task else "") + meta
    if solution not in (None, ""):
        meta += f"<span>expected <b>{escape(plain_text(solution)[:200])}</b></span>"
    prefix = column(row, "answer_prefix")
    ask = text_block(row.get("prompt"))
    if prefix:
        ask += (
            f'<div class="prefix"><span class="soft">answer begins</span>{text_block(prefix)}</div>'
        )
    return (
        f'<article class="card question"><div class="meta">{meta}</div>'
        f'<div class="ask">{ask}</div>{content}</article>'
    )


def _answer(row: Mapping[str, Any], group_mean: float | None = None) -> str:
    reward, centred = row.get("reward"), ""
    if group_mean is not None and isinstance(reward, int | float):
        text = f"{reward - group_mean:+.2f}".replace("-", "\u2212")
        centred = f'<span class="soft" title="reward minus the group\'s mean">{text}</span>'
    return (
        f'<div class="answer">{text_block(row.get("completion"))}'
        f'<div class="score">{centred}{reward_pill(reward)}</div></div>'
    )
