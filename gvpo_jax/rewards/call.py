"""Calling reward functions as TRL does, and adding up what they say.

A reward function is called as `f(prompts=, completions=, completion_ids=, **columns)` with flat
lists of n = G * k entries, and returns a list or array of n numbers. None abstains; an exception in
a row's place says that this row could not be scored. It may be an `async def`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from math import isfinite  # by name: `math` and `numbers` are files of this package
from typing import Any, Literal, NamedTuple

import numpy as np

from gvpo_jax.data.reward_values import FLOAT32_MAX, as_number
from gvpo_jax.errors import Page, UserError
from gvpo_jax.rewards.attempt import attempt, describe, needs_loop, result_within, submit, within
from gvpo_jax.rewards.functions import RewardFunc, check_columns, function_names, is_async


class RewardError(UserError):
    """A reward function failed; the message names the function and, where it is known, the row."""

    page = Page.REWARD_FAILED


class Scores(NamedTuple):
    """Rewards [n] (NaN: none), each function's own rewards [n], and why rows have none.

    `abstained` counts the rows on which every function abstained, `failed` those on which one
    failed; `problem` tells of the first of those.
    """

    rewards: np.ndarray
    by_func: dict[str, np.ndarray]
    abstained: int
    failed: int
    problem: str = ""


def compute_rewards(
    reward_funcs: Sequence[RewardFunc],
    weights: Sequence[float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    on_error: Literal["raise", "skip"] = "raise",
    places: Sequence[str] | None = None,
    deadline: float | None = None,
    kind: str = "reward",
) -> Scores:
    """The weighted sum (weights default to 1) of what the functions give, row by row.

    A function that abstains leaves the sum to the others. An exception, NaN, or a number that
    float32 can't hold fails the row (an exception out of the call: all rows). Each function gets
    copies of its own. Async functions run concurrently, with each other and with the rest, in one
    event loop for the whole process.

    Args:
        reward_funcs: n functions.
        weights: n numbers; None: all 1.
        prompts: one for each completion; so are all the lists.
        completions: texts, or lists of chat messages.
        completion_ids: their tokens.
        columns: further lists, by name.
        on_error: `raise` raises `RewardError` where a row fails; `skip` makes the row's reward NaN,
            since a sum that lacks a term compares with no other.
        places: what messages call the rows; None: "row 0" and so on.
        deadline: seconds in which a function must answer, or all rows fail; None: there is none.
            With one, functions are called in threads.
        kind: what messages call the functions.

    Returns:
        The rewards, and what there is to tell about them.

    Raises:
        UserError: a function lacks a column, or does not take one; or weights that don't fit.
        RewardError: a row failed, or an answer has not one entry for each row.
    """
    names = function_names(reward_funcs)
    factors = check_weights(weights, reward_funcs)
    lists = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    check_columns(reward_funcs, columns, kind=kind)
    n = _check_lists(lists, columns)
    places = [f"row {row}" for row in range(n)] if places is None else places
    answers = _call_all(reward_funcs, {**lists, **columns}, deadline)
    by_func: dict[str, np.ndarray] = {}
    problems: dict[int, str] = {}  # by row
    total, answered = np.zeros(n), np.zeros(n, bool)
    for name, factor, answer in zip(names, factors, answers, strict=True):
        by_func[name], failed = _read_answer(f"{kind} {name!r}", answer, places, on_error)
        problems = failed | problems  # a row keeps its first
        given = ~np.isnan(by_func[name])
        with np.errstate(over="ignore", invalid="ignore"):  # it is told of below
            total[given] += factor * by_func[name][given]
        answered |= given
    for row in np.flatnonzero(answered & ~(np.abs(total) <= FLOAT32_MAX)):
        if row not in problems:
            problem = (
                f"the weighted sum of the rewards on {places[int(row)]} is {total[row]:g}, which "
                "float32 can't hold; give smaller rewards.weights"
            )
            if on_error == "raise":
                raise RewardError(problem)
            problems[int(row)] = problem
    failed = np.isin(np.arange(n), list(problems))
    rewards = np.where(answered & ~failed, total, np.nan)
    first = problems[min(problems)] if problems else ""
    abstained = int((~answered & ~failed).sum())
    return Scores(rewards, by_func, abstained, len(problems), first)


def check_weights(
    weights: Sequence[float] | None, reward_funcs: Sequence[RewardFunc]
) -> list[float]:
    """A number for each function.

    Raises:
        UserError: there is no function, or not one finite weight for each.
    """
    if not reward_funcs:
        raise UserError("no reward function given")
    names = function_names(reward_funcs)
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names) or not all(isfinite(weight) for weight in weights):
        raise UserError(
            f"rewards.weights: give a finite weight per reward function: {len(names)} "
            f"({', '.join(names)}), got {list(weights)}"
        )
    return [float(weight) for weight in weights]


def _check_lists(lists: Mapping[str, Sequence[Any]], columns: Mapping[str, Sequence[Any]]) -> int:
    lengths = {name: len(values) for name, values in {**lists, **columns}.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"lists of unequal length given to compute_rewards: {lengths}")
    return len(lists["prompts"])


def _call_all(
    reward_funcs: Sequence[RewardFunc], arguments: Mapping[str, Any], deadline: float | None
) -> list[Any]:
    """Every function's answer, or the exception it raised; async ones run beside the others."""
    order = sorted(range(len(reward_funcs)), key=lambda i: not is_async(reward_funcs[i]))
    answers: dict[int, Any] = {}
    waiting: dict[int, Future] = {}
    try:
        for i in order:
            own = {name: _copies(name, values) for name, values in arguments.items()}
            call = partial(attempt, reward_funcs[i], **own)
            answers[i] = call() if deadline is None else within(deadline, call)
            if needs_loop(answers[i]):
                waiting[i] = submit(answers[i])
        answers |= {i: result_within(deadline, future) for i, future in waiting.items()}
    finally:
        for future in waiting.values():
            future.cancel()  # Ctrl-C came, or one took too long: the others need not end
    return [answers[i] for i in range(len(reward_funcs))]


def _copies(name: str, values: Sequence[Any]) -> list[Any]:
    """Of each value: what a function does to them is seen by no other, nor in the records."""
    if name == "completion_ids":  # long lists, of numbers only
        return [list(ids) for ids in values]
    return [_copy(value) for value in values]


def _copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, or a client that holds one
        return value


def _read_answer(
    name: str, answer: Any, places: Sequence[str], on_error: Literal["raise", "skip"]
) -> tuple[np.ndarray, dict[int, str]]:
    """Values [n] (NaN: none), and by row what failed."""
    n = len(places)
    if isinstance(answer, UserError) and not isinstance(answer, RewardError):
        raise answer  # a missing package, say: skipping would hide it on every row
    if isinstance(answer, BaseException):
        problem = f"{name} failed on the call with rows 0 to {n - 1}: {_told(answer)}"
        if on_error == "raise":
            raise RewardError(problem) from answer
        return np.full(n, np.nan), dict.fromkeys(range(n), problem)
    entries = _entries(answer)
    if entries is None or len(entries) != n:
        got = repr(answer) if entries is None else f"{len(entries)} entries"
        raise RewardError(
            f"{name} must return a list with one entry per completion, {n}; got {got}"
        )
    values, problems = np.full(n, np.nan), {}
    for row, value in enumerate(entries):
        if value is None:
            continue
        problem = _problem(value)
        if problem is None:
            values[row] = as_number(value)
            continue
        problems[row] = f"{name} failed on {places[row]}: {problem}"
        if on_error == "raise":
            cause = value if isinstance(value, BaseException) else None
            raise RewardError(problems[row]) from cause
    return values, problems


def _entries(answer: Any) -> list[Any] | None:
    """Of a list, or an array of any library; None: it is neither."""
    if isinstance(answer, str | bytes | Mapping | set | frozenset):
        return None
    try:
        len(answer)
    except TypeError:  # an iterator, or an array without axes
        return None
    # At once: reading an array on a device costs as much for one entry as for all.
    flat = getattr(answer, "ndim", None) == 1 and hasattr(answer, "tolist")
    return answer.tolist() if flat else list(answer)


def _problem(value: Any) -> str | None:
    if isinstance(value, BaseException):
        return _told(value)
    number = as_number(value)
    if number is None:
        return f"it gave {value!r}, not a number"
    if not isfinite(number):
        return f"it gave {number}"
    return None if abs(number) <= FLOAT32_MAX else f"it gave {number}, which float32 can't hold"


def _told(error: BaseException) -> str:
    """An exception on one line, with what to do where that is known."""
    told = str(error) if isinstance(error, RewardError) else describe(error)
    if "signal" in told and "main thread" in told:
        told += (
            "; rewards run in another thread with rollout.lookahead or rewards.deadline, and where "
            "they are async, and it can't set signals: limit the time with rewards.deadline, or "
            "row by row with gvpo_jax.rewards.workers.run_each"
        )
    return told
