"""Whether the functions that a config names are where it says; none of their code is run."""

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gvpo_jax.doctor.findings import Finding
from gvpo_jax.errors import Page, UserError

if TYPE_CHECKING:
    from gvpo_jax.config import Config


def about_functions(config: "Config") -> Iterator[Finding]:
    """What is wrong with rewards, checker and filter, and reward models that are here."""
    from gvpo_jax.rewards.load import is_reward_model

    samples = config.data.groups_path is None and config.loss.name != "sft"
    if samples and not config.rewards.funcs:
        yield _wrong("rewards.funcs", "it is empty: name a reward, as [my_rewards.py:correct]")
    named = [("rewards.funcs", spec) for spec in config.rewards.funcs]
    named += [("eval.checker", config.eval.checker), ("data.filter", config.data.filter)]
    for setting, spec in named:
        if spec is None:
            continue
        if setting == "rewards.funcs" and is_reward_model(spec):
            yield _reward_model(spec)
        elif (problem := _problem(spec)) is not None:
            yield _wrong(setting, f"{spec}: {problem}")


def _problem(spec: str) -> str | None:
    """Why a function can't be found, as far as that can be told without running anything."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        return "write module:function or path/to/file.py:function"
    if not where.endswith(".py"):
        try:
            there = importlib.util.find_spec(where.partition(".")[0]) is not None
        except (ImportError, ValueError):
            there = False
        return None if there else f"there is no module {where.partition('.')[0]}"
    if not os.path.isfile(where):
        return "there is no such file"
    try:
        tree = ast.parse(Path(where).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        return f"the file is no Python{f', line {line}' if line else ''}"
    names, open_ended = _names(tree)
    if name in names or open_ended:
        return None
    return f"the file has no {name}; it has {', '.join(sorted(names)) or 'nothing'}"


def _names(tree: ast.Module) -> tuple[set[str], bool]:
    """What a module's text gives names to, anywhere but inside functions; and whether to others."""
    found: set[str] = set()
    for node in _outside_functions(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found, "*" in found or "__getattr__" in found


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
        ):
            yield from _outside_functions(child)


def _reward_model(spec: str) -> Finding:
    from gvpo_jax.models.reward_model import open_reward_model

    if not os.path.isdir(spec):
        return Finding("config", "reward model", f"{spec}: looked for when the run starts")
    try:
        count = open_reward_model(spec).weights
    except UserError as error:
        return _wrong("rewards.funcs", str(error), error.page)
    told = f"{spec}: it is here, {count / 1e9:.2g} billion weights"
    return Finding("config", "reward model", told)


def _wrong(setting: str, told: str, page: Page | None = Page.REWARDS) -> Finding:
    return Finding("config", setting, "not usable", "problem", f"{setting}: {told}", page)
