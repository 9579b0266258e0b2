"""Accuracy or mean reward on held-out prompts: sample, judge, count."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo_jax.collect.collector import Judge, sample_records
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import Row
from gvpo_jax.errors import UserError, tell
from gvpo_jax.parallel.distributed import gather, is_first, my_items
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
    checker: str | None = setting(
        None,
        "module:function, or path/file.py:function: says in place of the rewards which answers are "
        "right, at success_reward or 1; so a reward that is tricked shows.",
        path="function",
    )
    answer_pattern: str | None = setting(
        None,
        "A regular expression for the answer in a completion: its last match votes in eval/maj@k, "
        "where the answer that most of num_generations give counts.",
    )
    pass_at: list[int] = setting(
        [],
        "Numbers k for eval/pass@k: the chance that one of k completions is right, estimated from "
        "all num_generations of them.",
    )

    def check(self) -> None:
        """Raise UserError where a k of `pass_at` or the pattern is none."""
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UserError(
                f"eval.answer_pattern={self.answer_pattern} is no regular expression: {error}"
            ) from None
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
    checker: Judge | None = None,
) -> tuple[dict[str, float], list[Row]]:
    """Accuracy and mean reward on held-out prompts, with the same random keys every time.

    A completion is right when its reward reaches `success_reward`. Without that setting, 1 is right
    where all rewards are 0 or 1, and there is no accuracy where they are not. A completion without
    a reward is wrong, is counted in `eval/unscored`, and does not enter the mean reward. With a
    checker its values take the rewards' place in this, but for the mean.

    Returns:
        Metrics, and one record per completion. The metrics are `eval/reward`, the mean over prompts
        of their mean rewards, and `eval/unscored`; where there is accuracy, `eval/accuracy`, an
        `eval/pass@K` for each of `pass_at`, and with an `answer_pattern` `eval/maj@K`. With `_low`
        and `_high` behind their names they have 95% intervals over prompts, if there are two
        prompts or more; with `/TASK`, accuracy or reward is that of a task, see `task_names`.

    Raises:
        UserError: no completion got a reward, or a reward function failed.
    """
    records: list[Row] = []
    verdicts: list[float | None] = []  # of the checker, or else the rewards
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
        checks = checker.judge(held_out, here, groups)[1] if checker else scores
        # Not the prompts: they are as wide as each process's longest.
        given = (groups.completions, groups.lengths, scores.rewards, scores.by_func)
        *drawn, rewards, by_func, checked = gather((*given, checks.rewards))
        texts, rows = judge.texts(*drawn), held_out.rows[start : start + size]
        records += sample_records(rows, texts, rewards, by_func, start)
        verdicts += [None if math.isnan(x) else x for x in checked[: len(rows)].ravel().tolist()]
    given = [r["reward"] for r in records if r["reward"] is not None]
    if not given:
        raise UserError("no held-out completion got a reward; look at the reward functions")
    least = options.success_reward
    if least is None and (checker or set(given) <= {0, 1}):
        least = 1
    for r, verdict in zip(records, verdicts, strict=True):
        r.pop("correct", None)  # a column of that name would be taken for ours
        if least is not None:
            r["correct"] = verdict is not None and verdict >= least
    if is_first() and (problem := _useless(records, options)):
        tell(f"warning: {problem}", error=True)
    return _summary(records, options) | {"eval/unscored": float(len(records) - len(given))}, records


def _useless(records: Sequence[Row], options: EvalConfig) -> str:
    """What was asked for and says nothing; empty: all does."""
    asked = [name for name in ("pass_at", "answer_pattern") if getattr(options, name)]
    if asked and "correct" not in records[0]:
        return (
            f"{' and '.join(f'eval.{name}' for name in asked)} need right and wrong answers, and "
            "rewards are graded: give eval.success_reward or eval.checker"
        )
    pattern = options.answer_pattern
    if pattern and not any(_answer(pattern, r["completion"]) for r in records):
        return f"eval.answer_pattern={pattern} matches none of {len(records)} completions"
    return ""


def pass_at_k(completions: int, right: int, k: int) -> float:
    """The chance that one of k is right, of so many completions of which so many are right.

    Over all choices of k of them, so its mean is the true one (Chen et al., 2107.03374, eq. 1).
    """
    return 1 - math.comb(completions - right, k) / math.comb(completions, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """The chance that the answer which most completions of a prompt give is right.

    Where several are given equally often, it is the mean over them; and so it is over completions
    with the same answer that are judged otherwise. None is no answer; without any it is 0.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    chances = [
        fmean(ok for answer, ok in zip(answers, right, strict=True) if answer == winner)
        for winner, count in votes.items()
        if count == most
    ]
    return fmean(chances) if chances else 0.0


def _majorities(records: Sequence[Row], pattern: str) -> list[list[float]]:
    """By prompt."""
    by_prompt: dict[int, list[Row]] = {}
    for r in records:
        by_prompt.setdefault(r["group"], []).append(r)
    return [
        [majority([_answer(pattern, r["completion"]) for r in rs], [r["correct"] for r in rs])]
        for rs in by_prompt.values()
    ]


def _answer(pattern: str, text: str) -> str | None:
    """What the first group of the last match is, or all of it, without spaces around it."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    answer = matches[-1][1 if matches[-1].re.groups else 0]
    return None if answer is None else answer.strip()


def _summary(records: Sequence[Row], options: EvalConfig) -> dict[str, float]:
    metrics: dict[str, float] = {}
    main, *more = ("correct", "reward") if "correct" in records[0] else ("reward",)
    found = {_NAMES[column]: _by_prompt(records, column) for column in (main, *more)}
    if more:
        right = found[_NAMES[main]]
        for k in options.pass_at:
            each = [[pass_at_k(len(r), round(sum(r)), k)] for r in right]
            found[f"eval/pass@{k}"] = right if k == 1 else each  # with accuracy's interval
        if options.answer_pattern is not None:
            name = f"eval/maj@{options.num_generations}"
            found[name] = _majorities(records, options.answer_pattern)
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
