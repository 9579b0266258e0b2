"""Accuracy or mean reward on held-out prompts: sample, judge, count."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo_jax.collect.collector import Judge, sample_records
from gvpo_jax.data.eval_sets import EvalSet, check_sets
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
    sets: list[EvalSet] = setting(
        [],
        "Evaluation sets in place of data.eval_path, each with name, path, subset, split, columns, "
        "answer_pattern, size, num_generations and temperature of its own.",
        path="sets",
    )

    def sampling_of(self, name: Any) -> tuple[int, float]:
        """How many completions a row gets, and the temperature; name: of its set, in `task`."""
        for each in self.sets:
            if each.name == name:
                own = each.num_generations, each.temperature
                return own[0] or self.num_generations, self.temperature if own[1] is None else own[
                    1
                ]
        return self.num_generations, self.temperature

    @property
    def most_generations(self) -> int:
        """Completions of a prompt, at most."""
        return max(self.sampling_of(name)[0] for name in (None, *(x.name for x in self.sets)))

    def check(self) -> None:
        """Raise UserError where a k of `pass_at`, the pattern or a set is none."""
        check_sets(self.sets)
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise UserError(
                f"eval.answer_pattern={self.answer_pattern} is no regular expression: {error}"
            ) from None
        for k in self.pass_at:
            if not 1 <= k <= self.most_generations:
                raise UserError(
                    f"eval.pass_at has {k}: give numbers from 1 to eval.num_generations, which is "
                    f"{self.most_generations}"
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
    for (k, temperature), numbers in _batches(held_out.rows, options):
        here = my_items(numbers)
        groups = engine.generate(
            params,
            [held_out.token_ids[i] for i in here],
            here,
            num_generations=k,
            max_completion_length=max_completion_length,
            sampling=SamplingParams(temperature=temperature),
            seed=_SEED,
            longest_prompt=held_out.longest,
        )
        _, scores = judge.judge(held_out, here, groups)
        checks = checker.judge(held_out, here, groups)[1] if checker else scores
        # Not the prompts: they are as wide as each process's longest.
        given = (groups.completions, groups.lengths, scores.rewards, scores.by_func)
        *drawn, rewards, by_func, checked = gather((*given, checks.rewards))
        texts, rows = judge.texts(*drawn), [held_out.rows[i] for i in numbers]
        records += sample_records(rows, texts, rewards, by_func, numbers[0])
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
    problem = _useless(records, options) or (_never_right(verdicts, options) if checker else "")
    if is_first() and problem:
        tell(f"warning: {problem}", error=True)
    return _summary(records, options) | {"eval/unscored": float(len(records) - len(given))}, records


def _batches(
    rows: Sequence[Row], options: EvalConfig
) -> Iterator[tuple[tuple[int, float], Sequence[int]]]:
    """Rows that are sampled together, by their numbers, and how: those of one set or of none."""
    of_rows = [options.sampling_of(row.get("task")) for row in rows]
    for sampling, places in itertools.groupby(range(len(rows)), key=of_rows.__getitem__):
        numbers = list(places)
        for start in range(0, len(numbers), options.batch_size):
            yield sampling, numbers[start : start + options.batch_size]


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


def _never_right(verdicts: Sequence[float | None], options: EvalConfig) -> str:
    """What to do about a checker whose values have grades, of which none is enough."""
    values = {x for x in verdicts if x is not None}
    if options.success_reward is not None or values <= {0} or max(values) >= 1:
        return ""
    return (
        f"eval.checker gives values up to {max(values):g}, and only 1 counts as right: "
        "eval.success_reward says from which value on an answer is right"
    )


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
    return [
        [majority([_answer(pattern, r["completion"]) for r in rs], [r["correct"] for r in rs])]
        for rs in _prompts(records)
    ]


def _prompts(records: Sequence[Row]) -> list[list[Row]]:
    """The records of each prompt."""
    by_prompt: dict[int, list[Row]] = {}
    for r in records:
        by_prompt.setdefault(r["group"], []).append(r)
    return list(by_prompt.values())


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
    found |= _of_several(records, options) if more else {}
    for name, scores in found.items():
        interval = mean_interval(scores)
        metrics[name] = interval.mean
        if interval.known:
            metrics |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    sets = [each.name for each in options.sets]
    for task in sets or task_names(records):
        of_task = [r for r in records if r.get("task") == task]
        if scores := _by_prompt(of_task, main):
            metrics[f"{_NAMES[main]}/{task}"] = mean_interval(scores).mean
        if task in sets and more and of_task:
            for name, scores in _of_several(of_task, options).items():
                metrics[f"{name}/{task}"] = mean_interval(scores).mean
    means = [metrics[name] for x in sets if (name := f"{_NAMES[main]}/{x}") in metrics]
    return metrics | ({"eval/mean_of_sets": fmean(means)} if len(means) > 1 else {})


def _of_several(records: Sequence[Row], options: EvalConfig) -> dict[str, list[list[float]]]:
    """pass@k and maj@k by prompt: those for which all prompts have completions enough."""
    prompts = _prompts(records)
    rights, counts = [[r["correct"] for r in rs] for rs in prompts], {len(rs) for rs in prompts}
    found: dict[str, list[list[float]]] = {}
    for k in options.pass_at:
        if k <= min(counts):
            each = [[pass_at_k(len(right), sum(right), k)] for right in rights]
            # With accuracy's interval where it is accuracy.
            found[f"eval/pass@{k}"] = [[*map(float, x)] for x in rights] if k == 1 else each
    if (
        options.answer_pattern is not None
        and len(counts) == 1
        and not (options.sets and counts == {1})
    ):
        k = max(counts)
        found[f"eval/maj@{k}"] = _majorities(records, options.answer_pattern)
    return found


_NAMES = {"correct": "eval/accuracy", "reward": "eval/reward"}


def _by_prompt(records: Sequence[Row], column: str) -> list[list[float]]:
    """A column's values, those of a prompt together, without prompts that have none."""
    scores: dict[int, list[float]] = {}
    for r in records:
        if r[column] is not None:
            scores.setdefault(r["group"], []).append(float(r[column]))
    return list(scores.values())
