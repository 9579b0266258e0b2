"""Calling reward functions as TRL does, and adding up what they say.

A reward function is called as `f(prompts=, completions=, completion_ids=, **columns)` with flat
lists of n = G * k entries, and returns a list of n numbers. None abstains; an exception in a row's
place says that this row could not be scored. It may be an `async def`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite  # by name: `math` and `numbers` are files of this package
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np

from gvpo_jax.errors import UserError

RewardFunc = Callable[..., Any]


class RewardError(UserError):
    """A reward function failed; the message names the function and, where it is known, the row."""


class Scores(NamedTuple):
    """Rewards [n] (NaN: none), each function's own rewards [n], and why rows have none.

    `abstained` counts the rows on which every function abstained, `failed` those on which one
    failed.
    """

    rewards: np.ndarray
    by_func: dict[str, np.ndarray]
    abstained: int
    failed: int


def compute_rewards(
    reward_funcs: Sequence[RewardFunc],
    weights: Sequence[float] | None = None,
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    on_error: Literal["raise", "skip"] = "raise",
) -> Scores:
    """The weighted sum (weights default to 1) of what the functions give, row by row.

    A function that abstains leaves the sum to the others. An exception, NaN or an infinity fails
    the row (an exception out of the call: all rows): `raise` raises `RewardError`, `skip` makes the
    row's reward NaN, since a sum that lacks a term compares with no other. Anything but one entry
    per row always raises. Async functions run concurrently, with each other and with the rest.
    """
    names = _names(reward_funcs)
    factors = _weights(weights, names)
    lists = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    n = _check_lists(lists, columns)
    for name, func in zip(names, reward_funcs, strict=True):
        _check_parameters(name, func, [*lists, *columns])
    answers = _call_all(reward_funcs, {**lists, **columns})
    by_func: dict[str, np.ndarray] = {}
    total, answered, failed = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
    for name, factor, answer in zip(names, factors, answers, strict=True):
        values, failed_rows = _read_answer(name, answer, n, on_error)
        by_func[name] = values
        given = ~np.isnan(values)
        total[given] += factor * values[given]
        answered |= given
        failed |= failed_rows
    rewards = np.where(answered & ~failed, total, np.nan)
    return Scores(rewards, by_func, int((~answered & ~failed).sum()), int(failed.sum()))


def per_sample(func: Callable[..., float | None], columns: Sequence[str] = ()) -> RewardFunc:
    """Make a reward function of a plain `(prompt, completion) -> float`.

    columns: that it is given too, by name, where there are such.
    """

    @functools.wraps(func)
    def each(prompts: Sequence[Any], completions: Sequence[Any], **lists: Any) -> list[Any]:
        named = [name for name in columns if name in lists]
        samples = zip(prompts, completions, *(lists[name] for name in named), strict=True)
        return [
            _attempt(func, prompt, completion, **dict(zip(named, values, strict=True)))
            for prompt, completion, *values in samples
        ]

    each.__name__ = _name(func)
    return each


def batched(func: RewardFunc) -> RewardFunc:
    """The function itself, or `per_sample` of it if it begins with `(prompt, completion)`.

    A wrapper that takes anything is judged by what it wraps.
    """
    names = list(_parameters(func))
    if not set(names) - {"args", "kwargs"}:
        names = list(_parameters(func, follow_wrapped=True))
    return per_sample(func, names[2:]) if names[:2] == ["prompt", "completion"] else func


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of the last chat message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def describe(error: BaseException) -> str:
    """An exception's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _attempt(func: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    try:
        return func(*args, **named)
    except SystemExit as error:  # some libraries take a row's failure for the program's
        return RuntimeError(f"SystemExit: {error}")
    except Exception as error:
        return error


def _names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    if not reward_funcs:
        raise UserError("no reward function given")
    names = [_name(func) for func in reward_funcs]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}#{n + 1}" if n else name for name, n in zip(names, earlier, strict=True)]


def _name(func: Any) -> str:
    while not hasattr(func, "__name__") and hasattr(func, "func"):  # functools.partial
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def _weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names) or not all(isfinite(weight) for weight in weights):
        raise UserError(
            f"give a finite weight per reward function: {len(names)} ({', '.join(names)}), "
            f"got {list(weights)}"
        )
    return [float(weight) for weight in weights]


def _check_lists(lists: Mapping[str, Sequence[Any]], columns: Mapping[str, Sequence[Any]]) -> int:
    for name in lists:
        if name in columns:
            raise UserError(f"column {name!r} has the name of a reward argument; rename it")
    lengths = {name: len(values) for name, values in {**lists, **columns}.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"lists of unequal length given to compute_rewards: {lengths}")
    return len(lists["prompts"])


def _check_parameters(name: str, func: RewardFunc, given: Sequence[str]) -> None:
    """That the function takes what it is given: that it doesn't is no row's failure."""
    parameters = _parameters(func)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    kinds = [parameter.kind for parameter in parameters.values()]
    if not kinds or inspect.Parameter.VAR_KEYWORD in kinds:
        return
    strange = [x for x in given if x not in parameters or parameters[x].kind not in by_name]
    if strange:
        raise UserError(
            f"reward {name!r} does not take {', '.join(strange)}; let it take prompts, "
            "completions, **kwargs, or (prompt, completion) for one sample at a time"
        )


def _parameters(
    func: RewardFunc, *, follow_wrapped: bool = False
) -> Mapping[str, inspect.Parameter]:
    """Of what is called, or of what it wraps; none where that is not known."""
    try:
        return inspect.signature(func, follow_wrapped=follow_wrapped).parameters
    except (TypeError, ValueError):  # some callables written in C
        return {}


def _call_all(reward_funcs: Sequence[RewardFunc], arguments: Mapping[str, Any]) -> list[Any]:
    """Every function's answer, or the exception it raised; the async ones run in one event loop."""
    waiting = {i: func for i, func in enumerate(reward_funcs) if _is_async(func)}

    async def call(func: RewardFunc) -> Any:
        return await func(**arguments)

    async def gather() -> list[Any]:
        return await asyncio.gather(*map(call, waiting.values()), return_exceptions=True)

    # A thread of its own: the caller may be inside an event loop already (notebooks are).
    with ThreadPoolExecutor(1) as thread:
        later = thread.submit(asyncio.run, gather()) if waiting else None
        answers = {
            i: _attempt(func, **arguments)
            for i, func in enumerate(reward_funcs)
            if i not in waiting
        }
        answers |= zip(waiting, later.result() if later else (), strict=True)
    return [answers[i] for i in range(len(reward_funcs))]


def _is_async(func: Any) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004  an object whose __call__ is async
    )


def _read_answer(
    name: str, answer: Any, n: int, on_error: Literal["raise", "skip"]
) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] (NaN: none) and the rows [n] that failed."""
    if isinstance(answer, UserError) and not isinstance(answer, RewardError):
        raise answer  # a missing package, say: skipping would hide it on every row
    if isinstance(answer, BaseException):
        if on_error == "raise":
            raise RewardError(
                f"reward {name!r} failed on the call with rows 0 to {n - 1}: {describe(answer)}"
            ) from answer
        return np.full(n, np.nan), np.ones(n, bool)
    if isinstance(answer, str | Mapping) or not hasattr(answer, "__len__") or len(answer) != n:
        got = f"{len(answer)} entries" if isinstance(answer, list | tuple | np.ndarray) else answer
        raise RewardError(
            f"reward {name!r} must return a list with one entry per completion, {n}; got {got!r}"
        )
    values, failed = np.full(n, np.nan), np.zeros(n, bool)
    for row, value in enumerate(answer):
        if value is None:
            continue
        problem = _problem(value)
        if problem is None:
            values[row] = float(value)
        elif on_error == "skip":
            failed[row] = True
        else:
            cause = value if isinstance(value, Exception) else None
            raise RewardError(f"reward {name!r} failed on row {row}: {problem}") from cause
    return values, failed


def _problem(value: Any) -> str | None:
    if isinstance(value, Exception):
        return str(value) if isinstance(value, RewardError) else describe(value)
    if getattr(value, "ndim", None) == 0:  # of NumPy, JAX or PyTorch
        value = value.item()
    if not isinstance(value, Real):
        return f"it gave {value!r}, not a number"
    try:
        return None if isfinite(value) else f"it gave {float(value)}"
    except OverflowError:
        return "it gave a number too large for a float"
