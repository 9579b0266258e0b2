"""The answers that the report shows: before and after training, and groups as they were sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from gvpo_jax.report.scores import Comparison, Rows, column, finite, question_key
from gvpo_jax.rundir.formats import compact

_QUESTIONS, _ANSWERS, _GROUPS, _GROUP_ROWS = 6, 4, 3, 16


@dataclass(frozen=True)
class Answer:
    """One completion; centred: its reward minus the mean of its side."""

    text: str
    reward: float | None
    centred: str


@dataclass(frozen=True)
class Side:
    """Answers to a question; title: of which evaluation; mean: of all rewards there are."""

    answers: list[Answer]
    title: str
    mean: str


@dataclass(frozen=True)
class Question:
    """A prompt with its answers; expected: None where no solution is known."""

    task: str
    prompt: str
    prefix: str
    expected: str | None
    facts: Sequence[str]
    sides: list[Side]


@dataclass(frozen=True)
class Answers:
    """A section of the report; without cards it is left out."""

    heading: str
    lead: str
    cards: list[Question]


def held_out_answers(compared: Comparison) -> Answers:
    """Answers to the same questions before and after training, side by side."""
    first, *_ = found = [_by_question(evaluation.rows) for evaluation in compared.evaluations]
    shared = [key for key in first if all(key in rows for rows in found)]
    by_task = sorted(shared, key=lambda key: str(column(first[key][0], "task")))
    labels = [evaluation.label.capitalize() for evaluation in compared.evaluations]
    cards = []
    for place in np.linspace(0, len(shared) - 1, min(len(shared), _QUESTIONS)).round():
        key = by_task[int(place)]
        sides = [
            _side(rows[key], _ANSWERS, label) for rows, label in zip(found, labels, strict=True)
        ]
        cards.append(_question(first[key][0], sides))
    heading = "Before and after" if len(found) > 1 else "Held-out answers"
    lead = f"{len(cards)} of {len(shared)} held-out questions, not chosen by their results."
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
    side = _side(rows, _GROUP_ROWS)
    facts = [f"{len(rows)} completions"]
    facts += [f"mean reward {side.mean}"] if side.mean else []
    facts += [f"showing {_GROUP_ROWS}"] if len(rows) > _GROUP_ROWS else []
    return _question(rows[0], [side], facts)


def _side(rows: Rows, most: int, title: str = "") -> Side:
    rewards = [finite(row.get("reward")) for row in rows]
    known = [reward for reward in rewards if reward is not None]
    mean = fmean(known) if known else 0.0
    answers = []
    for row, reward in zip(rows[:most], rewards, strict=False):
        centred = "" if reward is None else f"{reward - mean:+.2f}".replace("-", "\u2212")
        answers.append(Answer(_text(row.get("completion")), reward, centred))
    return Side(answers, title, compact(mean) if known else "")


def _question(row: Mapping[str, Any], sides: list[Side], facts: Sequence[str] = ()) -> Question:
    solution = column(row, "solution")
    return Question(
        task=str(column(row, "task") or ""),
        prompt=_text(row.get("prompt")),
        prefix=_text(column(row, "answer_prefix")),
        expected=None if solution in (None, "") else _text(solution)[:200],
        facts=facts,
        sides=sides,
    )


def _by_question(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(question_key(row), []).append(row)
    return found


def _text(value: object) -> str:
    """A prompt or completion as text: strings as they are, chat messages as role: content."""
    if not isinstance(value, list):
        return "" if value is None else str(value).strip()
    messages = [m for m in value if isinstance(m, dict)]
    if len(messages) == 1:
        return str(messages[0].get("content", "")).strip()
    return "\n\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in messages).strip()
