"""Imports: arrows point down only, and `import gvpo_jax` brings nothing but what jax brings."""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gvpo_jax"

# Floors from the ground up; a string is a room, or several. A module may import the rooms of lower
# floors and its own room's; on CORRIDORS all rooms of the floor.
HOUSE = {
    "core": [
        "gvpo_jax",
        "loss",
        "baselines",
        "groups",
        "attention",
        "logprobs",
        "packing",
        "precision",
    ],
    "ground": [
        "errors config config_check mesh kernels distributed preemption batch plan samples "
        "runfiles formats intervals"
    ],
    "models": ["models"],
    "stages": [
        "data tasks",
        "offline",
        "rollout",
        "replay",
        "lookahead",
        "rewards",
        "train_step objectives",
        "optimizer",
        "checkpoint",
        "metrics",
        "evaluate",
        "report svg curves report_page report_answers",
        "hlo",
        "roofline",
    ],
    "story": [
        "programs policy remote sampler feed loop trainer runlog runfolder runs lowering "
        "compile_report cli __main__",
    ],
    "doors": ["integrations"],
}
CORRIDORS = ("core", "ground", "story")
FLOORS = list(HOUSE)


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def place(module: str) -> tuple[str, str]:
    """Floor and room of a module; a folder's modules all live in the folder's room."""
    name = module.removeprefix("gvpo_jax.").split(".")[0]
    found = [(floor, room) for floor in HOUSE for room in HOUSE[floor] if name in room.split()]
    assert len(found) == 1, f"{module} needs exactly one place in HOUSE, it has {found}"
    return found[0]


def imports(module: str) -> set[str]:
    """Everything a module imports, at its top, inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write the import of {node.module} in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules or {node.module}
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "gvpo_jax"}


def test_every_module_has_a_place():
    assert len(MODULES) > 40
    for module in MODULES:
        place(module)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    floor, room = place(module)
    for target in own_imports(module):
        assert target in MODULES, f"{module} imports {target}, which does not exist"
        target_floor, target_room = place(target)
        beside = target_floor == floor and (target_room == room or floor in CORRIDORS)
        below = FLOORS.index(target_floor) < FLOORS.index(floor)
        assert beside or below, f"{module} ({floor}) must not import {target} ({target_floor})"


def test_core_needs_nothing_but_jax():
    allowed = {"jax", "numpy", "gvpo_jax", *sys.stdlib_module_names}
    for module in MODULES:
        if place(module)[0] == "core":
            strangers = {name.split(".")[0] for name in imports(module)} - allowed
            assert not strangers, f"{module} imports {strangers}"


def test_only_the_story_sees_the_config():
    for module in MODULES:
        if place(module)[0] != "story":
            assert "gvpo_jax.config" not in own_imports(module), module


def test_no_import_goes_round_in_a_circle():
    graph = {module: own_imports(module) - {module} for module in MODULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


IMPORT = """
import json, sys, time
start = time.process_time()
{statement}
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(sys.modules)]))
"""


def fresh_import(statement: str) -> tuple[float, set[str]]:
    """Processor seconds, and the modules there are, after an import in a process of its own."""
    code = IMPORT.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


def test_importing_gvpo_jax_loads_nothing_that_jax_does_not():
    _, by_jax = fresh_import("import jax, jax.numpy")
    _, by_us = fresh_import("import gvpo_jax")
    assert {"gvpo_jax", "gvpo_jax.loss", "jax"} <= by_us
    strangers = {name for name in by_us - by_jax if name.split(".")[0] != "gvpo_jax"}
    assert not strangers


def test_a_model_is_loaded_and_trained_without_pytorch():
    """Where it is installed too: it takes seconds to come, and 200 MB."""
    statement = "from gvpo_jax.config import Config; from gvpo_jax.trainer import Trainer"
    _, modules = fresh_import(f"{statement}; Trainer(Config())")
    assert "gvpo_jax.policy" in modules
    assert "torch" not in modules


def test_importing_gvpo_jax_takes_no_longer_than_jax():
    """Alternating, and the best of each: what else the machine does can only add time."""
    jax_seconds, our_seconds = [], []
    for _ in range(12):
        jax_seconds.append(fresh_import("import jax, jax.numpy")[0])
        our_seconds.append(fresh_import("import gvpo_jax")[0])
        if len(our_seconds) >= 3 and min(our_seconds) <= 1.1 * min(jax_seconds):
            break
    assert min(our_seconds) <= 1.1 * min(jax_seconds)
