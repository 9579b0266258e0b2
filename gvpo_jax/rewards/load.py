"""Reward functions by name: `module:function` or `path/to/file.py:function`."""

import importlib
import importlib.util
import inspect
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gvpo_jax.errors import UserError
from gvpo_jax.rewards.call import RewardFunc, describe
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class RewardConfig:
    """The reward functions."""

    funcs: list[str] = setting([], "module:function, or path/file.py:function.", path="functions")
    weights: list[float] = setting([], "One for each function; empty: all 1.")
    on_error: Literal["raise", "skip"] = setting(
        "raise", "skip leaves out, and counts, the completions on which a function fails."
    )
    skip_special_tokens: bool = setting(
        True,
        "Leave special tokens out of the texts that functions and records get; false: keep them "
        "all, such as <think> and the end token.",
    )

    def functions(self) -> list[RewardFunc]:
        """The functions.

        Raises:
            UserError: none is named, or one is not there.
        """
        if not self.funcs:
            raise UserError(
                "rewards.funcs is empty: name at least one, e.g. [my_rewards.py:correct]"
            )
        return [load_reward_func(spec) for spec in self.funcs]


def load_reward_func(spec: str) -> RewardFunc:
    """The function that `module:function` or `path/to/file.py:function` names.

    Raises `UserError` where there is no such thing.
    """
    where, _, name = spec.rpartition(":")
    if not (where and name):
        raise UserError(f"reward {spec!r}: write module:function or path/to/file.py:function")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    except UserError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"reward {spec!r}: importing it failed: {describe(error)}") from error
    func = getattr(module, name, None)
    if not callable(func):
        functions = {key: f for key, f in vars(module).items() if inspect.isfunction(f)}
        own = [key for key, f in functions.items() if f.__module__ == module.__name__]
        known = ", ".join(own) or "none"
        raise UserError(f"reward {spec!r}: no function {name!r} there; functions: {known}")
    return func


def _load_module(name: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UserError(f"reward module {name!r}: there is no such module; or give a file.py path")
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"reward file {path}: there is no such file")
    # A name of its own: a file may be called math.py, and two in different folders the same.
    name = f"gvpo_jax_reward_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    former = sys.modules.get(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if former:
            sys.modules[name] = former
        raise
    return module
