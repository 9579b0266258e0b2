"""Reward functions by name: `module:function` or `path/to/file.py:function`."""

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.rewards.call import RewardFunc, describe


def load_reward_func(spec: str) -> RewardFunc:
    """The function that `module:function` or `path/to/file.py:function` names.

    Raises `UserError` where there is no such thing.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f"reward {spec!r}: write module:function or path/to/file.py:function")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    except UserError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"reward {spec!r}: importing it failed: {describe(error)}") from error
    func = getattr(module, name, None)
    if not callable(func):
        known = ", ".join(key for key, value in vars(module).items() if _is_own(value, module))
        raise UserError(
            f"reward {spec!r}: no function {name!r} there; functions: {known or 'none'}"
        )
    return func


def _load_module(name: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UserError(f"reward module {name!r}: there is no such module; or give a file.py path")
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"reward file {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_own(value: Any, module: Any) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__
