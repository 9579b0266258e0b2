"""Reward functions by name: `module:function` or `path/to/file.py:function`."""

import ast
import atexit
import functools
import importlib
import importlib.util
import inspect
import os
import shutil
import sys
import tempfile
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gvpo_jax.buckets import is_address
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.rewards.attempt import describe
from gvpo_jax.rewards.functions import RewardFunc
from gvpo_jax.rewards.model import RewardModel, RewardModelConfig
from gvpo_jax.settings import setting


@dataclass(frozen=True)
class RewardConfig:
    """The reward functions."""

    funcs: list[str] = setting(
        [],
        "module:function, or path/file.py:function; or a reward model: a folder, or its hub name.",
        path="functions",
    )
    weights: list[float] = setting([], "One for each function; empty: all 1.")
    on_error: Literal["raise", "skip"] = setting(
        "raise",
        "skip leaves out, and counts, the completions on which a function fails.",
        free=True,
    )
    deadline: float | None = setting(
        None,
        "Seconds in which a function must answer a call, or it has failed on all of its rows. "
        "Functions are then called in threads. null: they may take any time.",
        above=0,
        free=True,
    )
    allow_changed_code: bool = setting(
        False,
        "Go on with a run though a function's code has changed; old and new rewards then mix.",
        free=True,
    )
    skip_special_tokens: bool = setting(
        True,
        "Leave special tokens out of the texts that functions and records get; false: keep them "
        "all, the end token too.",
    )
    model: RewardModelConfig = field(default_factory=RewardModelConfig)

    @explained_by(Page.REWARDS)
    def functions(self) -> list[RewardFunc]:
        """The functions.

        Raises:
            UserError: none is named, or one is not there.
        """
        if not self.funcs:
            raise UserError(
                "rewards.funcs is empty: name at least one, e.g. [my_rewards.py:correct]"
            )
        return [load_reward_func(spec, self.model) for spec in self.funcs]


def load_reward_func(spec: str, model: RewardModelConfig | None = None) -> RewardFunc:
    """The function that `module:function` or `path/to/file.py:function` names, or a reward model.

    Args:
        spec: its name; a reward model's is a folder's, or that on the Hugging Face hub.
        model: how a reward model is computed; None: as by default.

    Raises:
        UserError: there is no such thing.
    """
    if is_reward_model(spec):
        return RewardModel(spec, model)
    return load_function(spec, "reward")


def is_reward_model(spec: str) -> bool:
    """Whether a reward's name is that of a model: of a folder, or org/name on the hub."""
    if os.path.isdir(spec) or is_address(spec):
        return True
    return "/" in spec and ":" not in spec and not spec.endswith(".py")


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The same for any function; `what` it is, say a reward, opens the messages."""
    where, _, name = spec.rpartition(":")
    if not (where and name):
        model = "; or give a reward model's folder, or its hub name" if what == "reward" else ""
        if model and not where:
            model += f" (there is no folder {spec} here)"
        raise UserError(
            f"{what} {spec!r}: write module:function or path/to/file.py:function{model}"
        )
    if "," in where:
        raise UserError(f"{what} {spec!r}: put several in brackets: rewards.funcs=[a.py:f, b.py:g]")
    try:
        is_file = where.endswith(".py")
        module = _load_file(Path(where), what) if is_file else _load_module(where, what)
    except UserError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise UserError(f"{what} {spec!r}: importing it failed: {describe(error)}") from error
    func = getattr(module, name, None)
    if not callable(func):
        found = [(key, f) for key, f in vars(module).items() if callable(f)]
        own = [
            key
            for key, f in found
            if not inspect.isclass(f) and getattr(f, "__module__", "") == module.__name__
        ]
        known = ", ".join(own) or "none"
        raise UserError(f"{what} {spec!r}: no function {name!r} there; functions: {known}")
    if isinstance(getattr(func, "take_name", None), types.MethodType):
        func.take_name(name)
    return func


def file_of(spec: str) -> str | None:
    """The file in which what `load_reward_func` takes is written; None: that is not known."""
    where = spec.rpartition(":")[0]
    if where.endswith(".py"):
        return str(Path(where).absolute())
    found = _find(where)
    return found.origin if found else None


def _load_module(name: str, what: str) -> Any:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UserError(f"{what} module {name!r}: there is no such module; or give a file.py path")
    return importlib.import_module(name)


def _load_file(path: Path, what: str) -> Any:
    if not os.path.isfile(path):
        raise UserError(f"{what} file {path}: there is no such file")
    name, source = importable_name(path), path.read_bytes()
    former = sys.modules.get(name)
    if former and getattr(former, _SOURCE, source) == source:
        return former  # so that the functions of a file share what it made
    _check_neighbours(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    setattr(module, _SOURCE, source)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        if former:
            sys.modules[name] = former
        raise
    return module


_SOURCE = "_gvpo_jax_source"  # a module's attribute: what it was made of
_folders: set[str] = set()  # of reward files


def importable_name(path: Path) -> str:
    """The name under which any process with this one's sys.path imports a file.

    The file's folder joins sys.path, at the end: a file called like a package must not hide it. A
    file whose own name is taken, as those of math.py and of the second rewards.py are, gets another
    one, and a file of that name that stands in for it.
    """
    path = path.absolute()
    _folders.add(str(path.parent))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # the file may be newer than what is known of its folder
    found = _find(path.stem)
    if found and found.origin and Path(found.origin).resolve() == path.resolve():
        return path.stem
    stem = "".join(c if c.isalnum() else "_" for c in path.stem)
    name = f"gvpo_jax_reward_{stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    if _find(name) is None:
        run = "exec(compile(open(__file__, 'rb').read(), __file__, 'exec'))"
        (_stand_ins() / f"{name}.py").write_text(f"__file__ = {str(path)!r}\n{run}\n", "utf-8")
    return name


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except Exception:  # a dot in the name; a module that was not imported; a package that fails
        return None


@functools.cache
def _stand_ins() -> Path:
    folder = tempfile.mkdtemp(prefix="gvpo_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sys.path.append(folder)
    return Path(folder)


def _check_neighbours(path: Path, source: bytes) -> None:
    """See that no file beside this one, which it imports, has the name of another folder's."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            beside = path.absolute().parent / f"{name.partition('.')[0]}.py"
            theirs = getattr(sys.modules.get(beside.stem), "__file__", None) or str(beside)
            other = str(Path(theirs).parent)
            if beside.is_file() and other in _folders - {str(beside.parent)}:
                raise UserError(
                    f"reward file {path} imports {beside.name}, and so does one in {other}; Python "
                    "takes both for one module: rename one of them"
                )
