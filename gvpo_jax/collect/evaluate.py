"""Accuracy or mean reward on held-out prompts: sample, judge, count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_jax.collect.collector import Judge, sample_records
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import Row
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import gather, my_items
from gvpo_jax.report.intervals import mean_interval
from gvpo_jax.report.scores import task_names
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
    success_reward: float | None = setting(
        None,
        "A completion with at least this reward counts as right; null: 1 where all rewards are 0 "
        "or 1, and else the mean reward is given in place of accuracy.",
    )
    pass_at: list[int] = setting(
        [],
        "Numbers k for eval/pass@k: the chance that one of k completions is right, estimated from "
        "all num_generations of them.",
    )

    def check(self) -> None:
        """Raise UserError where a k of `pass_at` is none, or more than there are completions."""
        for k in self.pass_at:
            if not 1 <= k <= self.num_generations:
                raise UserError(
                    f"eval.pass_at has {k}: give numbers from 1 to eval.num_generations, which is "
                    f"{self.num_generations}"
                )


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

    A completion is right when its reward reaches `success_reward`. Without that setting, 1 is right
    where all rewards are 0 or 1, and there is no accuracy where they are not. A completion without
    a reward is wrong, is counted in `eval/unscored`, and does not enter the mean reward.

    Returns:
        Metrics, and one record per completion. The metrics are `eval/reward`, the mean over prompts
        of their mean rewards, and `eval/unscored`; where there is accuracy, `eval/accuracy` and an
        `eval/pass@K` for each of `pass_at`. With `_low` and `_high` behind their names they have
        95% intervals over prompts, if there are two prompts or more; with `/TASK`, accuracy or
        reward is that of a task, see `task_names`.

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
    given = [r["reward"] for r in records if r["reward"] is not None]
    if not given:
        raise UserError("no held-out completion got a reward; look at the reward functions")
    least = options.success_reward
    if least is None and set(given) <= {0, 1}:
        least = 1
    for r in records:
        r.pop("correct", None)  # a column of that name would be taken for ours
        if least is not None:
            r["correct"] = r["reward"] is not None and r["reward"] >= least
    return _summary(records, options.pass_at) | {
        "eval/unscored": float(len(records) - len(given))
    }, records


def pass_at_k(completions: int, right: int, k: int) -> float:
    """The chance that one of k is right, of so many completions of which so many are right.

    Over all choices of k of them, so its mean is the true one (Chen et al., 2107.03374, eq. 1).
    """
    return 1 - math.comb(completions - right, k) / math.comb(completions, k)


def _summary(records: Sequence[Row], pass_at: Sequence[int]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    main, *more = ("correct", "reward") if "correct" in records[0] else ("reward",)
    found = {_NAMES[column]: _by_prompt(records, column) for column in (main, *more)}
    if more:
        right = found[_NAMES[main]]
        for k in pass_at:
            each = [[pass_at_k(len(r), round(sum(r)), k)] for r in right]
            found[f"eval/pass@{k}"] = right if k == 1 else each  # with accuracy's interval
    for name, scores in found.items():
        interval = mean_interval(scores)
        metrics[name] = interval.mean
        if interval.known:
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    for task in task_names(records):
        if scores := _by_prompt([r for r in records if r.get("task") == task], main):
            metrics[f"{_NAMES[main]}/{task}"] = mean_interval(scores).mean
    return metrics


_NAMES = {"correct": "eval/accuracy", "reward": "eval/reward"}


def _by_prompt(records: Sequence[Row], column: str) -> list[list[float]]:
    """A column's values, those of a prompt together, without prompts that have none."""
    scores: dict[int, list[float]] = {}
    for r in records:
        if r[column] is not None:
            scores.setdefault(r["group"], []).append(float(r[column]))
    return list(scores.values())
