"""Rewards by reasoning-gym's own scorers, for rows that carry the columns `task` and `entry`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from gvpo_jax.errors import Page, UserError
from gvpo_jax.rewards import completion_text
from gvpo_jax.rewards.workers import WorkerPool

# Their scorers hand the answer to eval or to sympy's parse_expr, which is eval: whatever the model
# writes is run as Python.
RUNS_ANSWERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)


def reasoning_gym_reward(
    *,
    credit: Literal["full", "partial"] = "full",
    allow_code: Collection[str] = (),
    deadline: float = 10.0,
    workers: int = 2,
) -> Callable[..., list[Any]]:
    """Make a reward function that asks the task's scorer, in child processes.

    `full` gives 1.0 for full marks and 0.0 for less; `partial` passes on the scorer's value, which
    for most tasks rewards a wrong answer that merely contains the right one. `allow_code` names the
    tasks of `RUNS_ANSWERS` that may be scored though doing so runs the answer as code. A call past
    `deadline` seconds fails its row.
    """
    if unknown := set(allow_code) - RUNS_ANSWERS:
        raise UserError(f"allow_code: {min(unknown)!r} is no task that runs answers as code")
    pool = WorkerPool(
        f"{__name__}:score_answer", deadline=deadline, workers=workers, imports=["reasoning_gym"]
    )

    def reasoning_gym_score(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        task: Sequence[str],
        entry: Sequence[str],
        **_: Any,
    ) -> list[Any]:
        """Scores [n] of n completions; the answer is the completion without outer whitespace."""
        if importlib.util.find_spec("reasoning_gym") is None:
            raise UserError(
                'reasoning-gym is missing: pip install "gvpo-jax[tasks]"', page=Page.EXTRAS
            )
        if denied := sorted(set(task) & RUNS_ANSWERS - set(allow_code)):
            raise UserError(
                f"the scorer of {', '.join(denied)} runs the answer as Python code; leave it out, "
                "or make a reward with reasoning_gym_reward(allow_code=...) if that is safe here"
            )
        texts = [completion_text(completion).strip() for completion in completions]
        scores = pool.map(list(zip(task, texts, entry, strict=True)))
        if credit == "partial":
            return scores
        return [float(x >= 1.0) if isinstance(x, int | float) else x for x in scores]

    return reasoning_gym_score


def score_answer(task: str, answer: str, entry: str) -> float:
    """The task's own score of one answer; may run the answer as code (see `RUNS_ANSWERS`)."""
    return float(_scorer(task)(answer, json.loads(entry)))


@functools.lru_cache
def _scorer(task: str) -> Callable[[str, dict], float]:
    return importlib.import_module("reasoning_gym").get_score_answer_fn(task)


reasoning_gym_score = reasoning_gym_reward()
