"""Accuracy on held-out prompts: sample, score, count."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gvpo_jax.errors import UserError

Row = dict[str, Any]
# Indices of the rows to do -> rewards [n, k] (NaN: none) and the completions' texts, n lists of k.
SampleAndScore = Callable[[Sequence[int]], tuple[np.ndarray, list[list[str]]]]


def evaluate(
    rows: Sequence[Row], sample_and_score: SampleAndScore, *, batch_size: int, success_reward: float
) -> tuple[dict[str, float], list[Row]]:
    """Accuracy and mean reward over `rows`, overall and by the column `task`, and what was sampled.

    A completion is right when its reward reaches `success_reward`; one without a reward is wrong,
    and does not enter the mean reward.

    Returns:
        Metrics `eval/accuracy`, `eval/reward`, `eval/accuracy/TASK`, and one record per completion.
    """
    records: list[Row] = []
    for start in range(0, len(rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows)))
        rewards, texts = sample_and_score(indices)
        records += _records(rows, indices, rewards, texts, success_reward)
    return _summary(records), records


def _records(rows, indices, rewards, texts, success_reward) -> Iterator[Row]:
    for index, row_rewards, row_texts in zip(indices, rewards, texts, strict=True):
        for reward, text in zip(row_rewards, row_texts, strict=True):
            yield {
                **rows[index],
                "group": index,
                "completion": text,
                "reward": None if np.isnan(reward) else float(reward),
                "correct": None if np.isnan(reward) else bool(reward >= success_reward),
            }


def _summary(records: Sequence[Row]) -> dict[str, float]:
    scored = [r for r in records if r["reward"] is not None]
    if not scored:
        raise UserError("no held-out completion got a reward; look at the reward functions")
    metrics = {
        "eval/accuracy": float(np.mean([r["correct"] for r in scored])),
        "eval/reward": float(np.mean([r["reward"] for r in scored])),
        "eval/unscored": float(len(records) - len(scored)),
    }
    tasks = sorted({r["task"] for r in scored if "task" in r})
    if len(tasks) > 1:
        for task in tasks:
            right = [r["correct"] for r in scored if r.get("task") == task]
            metrics[f"eval/accuracy/{task}"] = float(np.mean(right))
    return metrics
