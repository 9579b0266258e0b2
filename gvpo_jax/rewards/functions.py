"""What a reward function is: what it takes, what it is called, and its code."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.data.fingerprints import source_of, stable_json
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.rewards.attempt import attempt, finish_all

RewardFunc = Callable[..., Any]
LISTS = ("prompts", "completions", "completion_ids")  # given to every function, beside the columns

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def per_sample(func: Callable[..., Any], columns: Sequence[str] | None = ()) -> RewardFunc:
    """Make a reward function of a plain `(prompt, completion) -> float`, which may be async.

    Args:
        func: called for each completion.
        columns: that it is given too, by name, where there are such; None: all, and
            `completion_ids`. Where a row has none, or None, a parameter's default is kept.

    Returns:
        The reward function, async where `func` is.
    """

    def each(prompts: Sequence[Any], completions: Sequence[Any], **lists: Any) -> list[Any]:
        named = list(lists) if columns is None else [name for name in columns if name in lists]
        samples = zip(prompts, completions, *(lists[name] for name in named), strict=True)

        def given(values: Sequence[Any]) -> dict[str, Any]:
            pairs = zip(named, values, strict=True)
            return {name: x for name, x in pairs if x is not None or name not in defaults}

        return [
            attempt(func, prompt, completion, **given(values))
            for prompt, completion, *values in samples
        ]

    known = _known_parameters(func).values()
    defaults = {p.name for p in known if p.default is not p.empty}

    async def each_async(prompts: Sequence[Any], completions: Sequence[Any], **lists: Any):
        return await finish_all(each(prompts, completions, **lists))

    made: Any = functools.wraps(func)(each_async if is_async(func) else each)
    made.__name__ = function_name(func)
    made.__signature__ = _of_lists(_known_parameters(func), columns)
    return made


def batched(func: RewardFunc) -> RewardFunc:
    """The function itself, or `per_sample` of it if it begins with `(prompt, completion)`.

    A wrapper that takes anything is judged by what it wraps.
    """
    parameters = _known_parameters(func)
    names = list(parameters)
    if names[:2] != ["prompt", "completion"]:
        return func
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return per_sample(func, None if takes_all else names[2:])


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion: the string itself, or the content of the last chat message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def function_names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    """A name for each, with a number where an earlier one has it."""
    names = [function_name(func) for func in reward_funcs]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}#{n + 1}" if n else name for name, n in zip(names, earlier, strict=True)]


def function_name(func: Any) -> str:
    """The function's own name, also inside functools.partial."""
    while not hasattr(func, "__name__") and hasattr(func, "func"):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def is_async(func: Any) -> bool:
    """Whether calling it gives something to await, as far as that can be told beforehand."""
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004  an object whose __call__ is async
    )


@explained_by(Page.REWARDS)
def check_columns(
    reward_funcs: Sequence[RewardFunc],
    columns: Collection[str],
    what: str = "the data",
    *,
    kind: str = "reward",
) -> None:
    """See that every function takes the columns there are, and finds those that it needs.

    Args:
        reward_funcs: as they are called, on lists.
        columns: the names of those there are.
        what: has them, for the message.
        kind: what the functions are called there.

    Raises:
        UserError: one does not; names it and the columns.
    """
    if taken := [name for name in LISTS if name in columns]:
        raise UserError(
            f"{what} has a column {taken[0]!r}, which is the name of an argument of reward "
            "functions: rename it"
        )
    for name, func in zip(function_names(reward_funcs), reward_funcs, strict=True):
        if inspect.isclass(func):
            raise UserError(f"{kind} {name!r} is a class: give an object of it, {name}()")
        parameters = _parameters(func)
        given = [*LISTS, *columns]
        missing = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind in _BY_NAME and p.name not in given
        ]
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        strange = [x for x in given if x not in parameters or parameters[x].kind not in _BY_NAME]
        if parameters and strange and not takes_all:
            raise UserError(
                f"{kind} {name!r} does not take {', '.join(strange)}: add **kwargs to its "
                "parameters; or begin them with prompt, completion, for one sample at a time"
            )
        if {"prompt", "completion"} & set(missing):
            raise UserError(
                f"{kind} {name!r} takes one sample at a time: let it begin with prompt, completion"
            )
        if missing:
            raise UserError(
                f"{kind} {name!r} needs {', '.join(missing)}, which {what} does not have as a "
                f"column; the columns are {', '.join(columns) or 'none but the prompt'}"
            )


def code_fingerprint(func: RewardFunc) -> str:
    """A short text that tells a function's code from others.

    That of its module's file. A script that is run is more than its functions, and may grow: there
    it is the function's own. The functions of this package keep their meaning, and have their name.
    """
    return hashlib.sha256(_code(func).encode()).hexdigest()[:16]


def changed_code(reward_funcs: Sequence[RewardFunc], earlier: Mapping[str, str]) -> list[str]:
    """Names, with their files, of the functions whose code is another than it was.

    earlier: `code_fingerprint`s by name, which `function_names` gives.
    """
    changed = []
    for name, func in zip(function_names(reward_funcs), reward_funcs, strict=True):
        if earlier.get(name) != code_fingerprint(func):
            file = _file(func)
            changed.append(f"{name} ({Path(file).name})" if file else name)
    return changed


def _file(func: Any) -> str | None:
    """In which the function is written."""
    func = inspect.unwrap(func)
    while isinstance(func, functools.partial):
        func = inspect.unwrap(func.func)
    named = func if hasattr(func, "__qualname__") else type(func)
    own = getattr(func, "runs_file", None)  # see run_each
    return own or getattr(sys.modules.get(named.__module__ or ""), "__file__", None)


def _code(func: Any) -> str:
    func = inspect.unwrap(func)
    if isinstance(func, functools.partial):
        return stable_json([_code(func.func), func.args, func.keywords])
    named = func if hasattr(func, "__qualname__") else type(func)
    module = named.__module__ or ""  # some functions written in C have none
    if isinstance(own := getattr(func, "own_code", None), str):  # of reward models and judges
        return f"{module}.{named.__qualname__} {own}"
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    if ours and not hasattr(func, "runs_file"):
        return f"{module}.{named.__qualname__}"
    file = _file(func)
    try:
        assert file
        assert module != "__main__"
        return named.__qualname__ + Path(file).read_bytes().decode(errors="replace")
    except (AssertionError, OSError):
        return source_of(func)


def _known_parameters(func: RewardFunc) -> Mapping[str, inspect.Parameter]:
    """Of what is called, or, where that takes anything, of what it wraps."""
    parameters = _parameters(func)
    if all(parameter.kind in _VARIADIC for parameter in parameters.values()):
        return _parameters(func, follow_wrapped=True)
    return parameters


def _parameters(
    func: RewardFunc, *, follow_wrapped: bool = False
) -> Mapping[str, inspect.Parameter]:
    """Of what is called, or of what it wraps; none where that is not known."""
    try:
        return inspect.signature(func, follow_wrapped=follow_wrapped).parameters
    except (TypeError, ValueError):  # some callables written in C
        return {}


def _of_lists(
    parameters: Mapping[str, inspect.Parameter], columns: Sequence[str] | None
) -> inspect.Signature:
    """What `per_sample` of a function with these parameters takes: lists, and its columns."""
    kind = inspect.Parameter.KEYWORD_ONLY
    wanted = [
        p.replace(kind=kind)
        for name, p in parameters.items()
        if p.kind in _BY_NAME
        and name not in ("prompt", "completion", "prompts", "completions")
        and (columns is None or name in columns)
    ]
    lists = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in LISTS[:2]]
    rest = inspect.Parameter("_", inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature([*lists, *wanted, rest])
