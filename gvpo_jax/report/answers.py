"""The answers that the report shows: before and after training, and groups as they were sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from gvpo_jax.report.scores import Comparison, Rows, column, question_key
from gvpo_jax.rundir.formats import compact

_QUESTIONS, _ANSWERS, _GROUPS, _GROUP_ROWS = 6, 4, 3, 16


@dataclass(frozen=True)
class Answer:
    """One completion; centred: its reward minus the group's mean, where that is shown."""

    text: str
    reward: float | None
    centred: str = ""


@dataclass(frozen=True)
class Side:
    """Answers to a question; title: of which evaluation; mean: of all rewards there are."""

    answers: list[Answer]
    title: str = ""
    mean: str = ""


@dataclass(frozen=True)
class Question:
    """A prompt with its answers; expected: None where no solution is known."""

    task: str
    prompt: str
    prefix: str
    expected: str | None
    facts: list[str]
    sides: list[Side]


@dataclass(frozen=True)
class Answers:
    """A section of the report; without cards it is left out."""

    heading: str = ""
    lead: str = ""
    cards: list[Question] = field(default_factory=list)


def held_out_answers(compared: Comparison | None) -> Answers:
    """Answers to the same questions before and after training, side by side."""
    if compared is None:
        return Answers()
    first, *_ = found = [_by_question(evaluation.rows) for evaluation in compared.evaluations]
    shared = [key for key in first if all(key in rows for rows in found)]
    by_task = sorted(shared, key=lambda key: str(column(first[key][0], "task")))
    chosen = _evenly(by_task, _QUESTIONS)
    labels = [evaluation.label.capitalize() for evaluation in compared.evaluations]
    cards = [
        _question(
            first[key][0],
            [_side(title, rows[key]) for title, rows in zip(labels, found, strict=True)],
        )
        for key in chosen
    ]
    heading = "Before and after" if len(found) > 1 else "Held-out answers"
    lead = f"{len(chosen)} of {len(shared)} held-out questions, not chosen by their results."
    return Answers(heading, lead, cards)


def latest_groups(step: int, rows: Rows) -> Answers:
    """The first groups of the newest completions with each reward's distance from the mean."""
    groups = list(_by_question(rows).values())
    lead = (
        f"{min(len(groups), _GROUPS)} of the {len(groups)} groups sampled at step {step}. GVPO"
        " compares completions of one prompt: the signed number is reward minus the group's mean."
    )
    return Answers("Latest sampled groups", lead, [_group(rows) for rows in groups[:_GROUPS]])


def _group(rows: Rows) -> Question:
    rewards = _rewards(rows)
    mean = fmean(rewards) if rewards else 0.0
    facts = [f"{len(rows)} completions"]
    facts += [f"mean reward {compact(mean)}"] if rewards else []
    facts += [f"showing {_GROUP_ROWS}"] if len(rows) > _GROUP_ROWS else []
    answers = []
    for row in rows[:_GROUP_ROWS]:
        reward = _reward(row)
        centred = "" if reward is None else f"{reward - mean:+.2f}".replace("-", "\u2212")
        answers.append(Answer(_text(row.get("completion")), reward, centred))
    return _question(rows[0], [Side(answers)], facts)


def _side(title: str, rows: Rows) -> Side:
    rewards = _rewards(rows)
    answers = [Answer(_text(row.get("completion")), _reward(row)) for row in rows[:_ANSWERS]]
    return Side(answers, title, compact(fmean(rewards)) if rewards else "")


def _question(row: Mapping[str, Any], sides: list[Side], facts: Sequence[str] = ()) -> Question:
    solution = column(row, "solution")
    return Question(
        task=str(column(row, "task") or ""),
        prompt=_text(row.get("prompt")),
        prefix=_text(column(row, "answer_prefix")),
        expected=None if solution in (None, "") else _text(solution)[:200],
        facts=list(facts),
        sides=sides,
    )


def _by_question(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(question_key(row), []).append(row)
    return found


def _evenly(keys: Sequence[str], count: int) -> list[str]:
    if len(keys) <= count:
        return list(keys)
    return [keys[round(i * (len(keys) - 1) / (count - 1))] for i in range(count)]


def _reward(row: Mapping[str, Any]) -> float | None:
    reward = row.get("reward")
    return reward if isinstance(reward, int | float) else None


def _rewards(rows: Rows) -> list[float]:
    return [reward for row in rows if (reward := _reward(row)) is not None]


def _text(value: object) -> str:
    """A prompt or completion as text: strings as they are, chat messages as role: content."""
    if not isinstance(value, list):
        return "" if value is None else str(value).strip()
    messages = [m for m in value if isinstance(m, dict)]
    if len(messages) == 1:
        return str(messages[0].get("content", "")).strip()
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages).strip()
