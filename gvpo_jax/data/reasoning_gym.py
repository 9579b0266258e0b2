"""Rows drawn from reasoning-gym: questions with answers that a program can check."""

import difflib
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gvpo_jax.errors import UserError
from gvpo_jax.settings import setting

_CHUNK = 1000
_MISSES = 2000
_EVAL_FRACTION = 0.3


@dataclass(frozen=True)
class TaskConfig:
    """A reasoning-gym task; needs the extra `tasks`.

    `question` and `answer_prefix` are format strings over the item's metadata (lists joined by ",
    ") and `{question}`, the task's own question.
    """

    name: str = setting("", "The task.")
    settings: dict[str, Any] = setting({}, "The task's own options.")
    question: str = setting("", "The prompt; empty: the task's own question.")
    answer_prefix: str = setting("", "Text put at the start of the answer.")
    weight: float = setting(1.0, "Share of the rows.")


def reasoning_gym_rows(
    tasks: Sequence[TaskConfig], *, size: int, seed: int, split: Literal["train", "eval"]
) -> list[dict[str, Any]]:
    """Draw `size` different questions.

    The columns are `prompt`, `answer_prefix`, `solution`, `task` and `entry`, the item as JSON for
    the task's own scorer.

    A hash of the question alone decides its split: three in ten of all questions are never
    trained on, whatever the sizes, tasks and seeds. Questions that differ only in case, spacing or
    the order of the numbers in a sum, a product or a list fall into the same split.

    Raises:
        UserError: a task, setting or format field that doesn't exist, and where a task has fewer
            questions than asked for.
    """
    if not tasks or size < len(tasks):
        raise UserError(f"{size} rows can't hold {len(tasks)} tasks; ask for more rows")
    seen: set[str] = set()
    placed_rows = []
    counts = _shares([task.weight for task in tasks], size)
    for task, count in zip(tasks, counts, strict=True):
        rows = _draw(task, count, seed, split, seen)
        # Sorting by the place within the task spreads every task evenly over the rows.
        placed_rows += [((i + 0.5) / count, row) for i, row in enumerate(rows)]
    return [row for _, row in sorted(placed_rows, key=lambda placed: placed[0])]


def _draw(
    task: TaskConfig, count: int, seed: int, split: str, seen: set[str]
) -> list[dict[str, Any]]:
    """The first `count` rows that belong to the split and are new; `seen` grows."""
    rows: list[dict[str, Any]] = []
    items, misses = _items(task, seed, split), 0
    while len(rows) < count:
        row = next(items)
        text = _normalise(row["prompt"])
        misses += 1
        if text not in seen and _is_eval(text) == (split == "eval"):
            misses = 0
            seen.add(text)
            rows.append(row)
        if misses == _MISSES:
            raise UserError(
                f"task {task.name!r} has about {len(rows)} different questions for {split}, "
                f"not {count}; widen its settings or lower its weight or the size"
            )
    return rows


def _shares(weights: Sequence[float], size: int) -> list[int]:
    """Whole numbers that add up to size, in proportion to the weights (largest remainders)."""
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"task weights must be positive numbers, got {list(weights)}")
    exact = [size * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: size - sum(counts)]:
        counts[i] += 1
    return counts


def _items(task: TaskConfig, seed: int, split: str) -> Iterator[dict[str, Any]]:
    identity = json.dumps([task.name, task.settings, seed, split], sort_keys=True, default=str)
    first = _hashed(identity, size=4) // 2
    while True:
        # Item i draws from seed + i, so consecutive chunks don't overlap.
        dataset = _dataset(task, first)
        for i in range(_CHUNK):
            item = dataset[i]
            row = _row(task, item)
            if i == 0:
                _check_scorable(task, dataset, item, row)
            yield row
        first = (first + _CHUNK) % 2**31


def _dataset(task: TaskConfig, seed: int) -> Any:
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError:
        raise UserError('reasoning-gym is missing: pip install "gvpo-jax[tasks]"') from None
    known = sorted(gym.factory.DATASETS)
    if task.name not in known:
        near = difflib.get_close_matches(task.name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        raise UserError(f"reasoning-gym has no task {task.name!r}{hint}")
    if taken := {"seed", "size"} & task.settings.keys():
        raise UserError(f"task {task.name!r}: {min(taken)!r} can't be a setting; it is chosen here")
    try:
        return gym.create_dataset(task.name, seed=seed, size=_CHUNK, **task.settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"task {task.name!r}: bad settings: {error}") from error


def _row(task: TaskConfig, item: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: _as_text(value) for name, value in item["metadata"].items()}
    fields["question"] = item["question"]
    question = task.question or "{question}"
    if "{" not in question:
        raise UserError(f"task {task.name!r}: the question {question!r} is the same for every item")
    return {
        "prompt": _fill(task, question, fields),
        "answer_prefix": _fill(task, task.answer_prefix, fields),
        "solution": item["answer"],
        "task": task.name,
        "entry": json.dumps(item),
    }


def _fill(task: TaskConfig, text: str, fields: Mapping[str, str]) -> str:
    try:
        return text.format_map(fields)
    except (KeyError, AttributeError, IndexError):
        raise UserError(
            f"task {task.name!r}: {text!r} names a field that isn't there; "
            f"the fields are {', '.join(fields)}"
        ) from None
    except ValueError as error:
        raise UserError(f"task {task.name!r}: {text!r} is no format string: {error}") from None


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_scorable(task: TaskConfig, dataset: Any, item: Any, row: Mapping[str, Any]) -> None:
    # A few tasks compare tuples, which JSON turns into lists: every answer would be wrong.
    answer = item["answer"]
    if answer is not None and dataset.score_answer(answer, item) == 1.0:
        entry = json.loads(row["entry"])
        if dataset.score_answer(answer, entry) != 1.0:
            raise UserError(f"task {task.name!r} can't be scored from saved rows; use another one")


def _normalise(question: str) -> str:
    return " ".join(re.findall(r"\w+|[^\w\s]", question.casefold()))


def _is_eval(text: str) -> bool:
    number = r"\d+(?: \. \d+)?"
    operands = rf"{number} ([,+*]) {number}(?: \1 {number})*"
    key = re.sub(operands, lambda m: m[1].join(sorted(m[0].split(f" {m[1]} "))), text)
    return _hashed(key, size=8) / 2**64 < _EVAL_FRACTION


def _hashed(text: str, *, size: int) -> int:
    """A number of `size` bytes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")
