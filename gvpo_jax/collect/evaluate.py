"""Accuracy on held-out prompts: sample, judge, count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_jax.collect.collector import Judge, sample_records
from gvpo_jax.data.rows import EncodedPrompts, Row
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import gather, my_items
from gvpo_jax.rollout import Engine, SamplingParams
from gvpo_jax.settings import setting

_SEED = 2**31  # above any run.seed: keeps the keys of evaluation apart from those of training


@dataclass(frozen=True)
class EvalConfig:
    """How the policy is judged on held-out rows."""

    every: int = setting(0, "Updates between evaluations; 0: only before and after.", least=0)
    num_generations: int = setting(4, "Completions per held-out prompt.", least=1)
    temperature: float = setting(1.0, "Of sampling; 0 takes the likeliest token.", least=0)
    batch_size: int = setting(16, "Prompts sampled at a time.", least=1, free=True)
    success_reward: float = setting(1.0, "A completion with at least this reward counts as right.")


def evaluate(
    held_out: EncodedPrompts,
    engine: Engine,
    params: Any,
    judge: Judge,
    options: EvalConfig,
    *,
    max_completion_length: int,
) -> tuple[dict[str, float], list[Row]]:
    """Accuracy and mean reward on held-out prompts, with the same random keys every time.

    A completion is right when its reward reaches `success_reward`. One without a reward is wrong,
    is counted in `eval/unscored`, and does not enter the mean reward.

    Returns:
        Metrics `eval/accuracy`, `eval/reward`, `eval/unscored`, `eval/accuracy/TASK` by the column
        `task`, and one record per completion.

    Raises:
        UserError: no completion got a reward, or a reward function failed.
    """
    records: list[Row] = []
    numbers, size = range(len(held_out.rows)), options.batch_size
    for start in numbers[::size]:
        here = my_items(numbers[start : start + size])
        groups = engine.generate(
            params,
            [held_out.token_ids[i] for i in here],
            here,
            num_generations=options.num_generations,
            max_completion_length=max_completion_length,
            sampling=SamplingParams(temperature=options.temperature),
            seed=_SEED,
            longest_prompt=held_out.longest,
        )
        _, scores = judge.judge(held_out, here, groups)
        # Not the prompts: they are as wide as each process's longest.
        given = (groups.completions, groups.lengths, scores.rewards, scores.by_func)
        *drawn, rewards, by_func = gather(given)
        texts, rows = judge.texts(*drawn), held_out.rows[start : start + size]
        records += sample_records(rows, texts, rewards, by_func, start)
    for r in records:
        r["correct"] = r["reward"] is not None and r["reward"] >= options.success_reward
    return _summary(records), records


def _summary(records: Sequence[Row]) -> dict[str, float]:
    given = [r["reward"] for r in records if r["reward"] is not None]
    if not given:
        raise UserError("no held-out completion got a reward; look at the reward functions")
    metrics = {
        "eval/accuracy": float(np.mean([r["correct"] for r in records])),
        "eval/reward": float(np.mean(given)),
        "eval/unscored": float(len(records) - len(given)),
    }
    tasks = sorted({r["task"] for r in records if "task" in r})
    if len(tasks) > 1:
        for task in tasks:
            right = [r["correct"] for r in records if r.get("task") == task]
            metrics[f"eval/accuracy/{task}"] = float(np.mean(right))
    return metrics
