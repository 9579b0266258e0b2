"""Imports: arrows point down only, and `import gvpo_jax` brings nothing but what jax brings."""

import ast
import graphlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gvpo_jax

PACKAGE = Path(__file__).parents[2] / "gvpo_jax"

# The house: one line a folder, from the ground up. A module may import its own folder and those
# above it in this list, never one below it.
HOUSE = (
    ("gvpo_jax loss baselines logprobs precision", "nothing but jax"),
    ("errors settings buckets http installed machine noise", "what all others may use"),
    ("parallel", "the mesh, the layout of arrays, and several processes"),
    ("ops", "attention, packing and products"),
    ("models", "decoder, and Hugging Face files in and out"),
    ("data", "rows, groups of completions, batches"),
    ("rewards", "reward functions, called and found"),
    ("rollout", "engines that sample"),
    ("rundir", "the files of a run folder"),
    ("training", "what an update is"),
    ("report", "the page of a run"),
    ("collect", "where an update's samples come from"),
    (
        "config config_file config_trl config_values",
        "all sections together: what lies above sees them, what lies below its own",
    ),
    ("tpu_compile", "programs compiled without a TPU"),
    (
        "commands trainer loop callbacks memory notebook prepared publish starter",
        "the story of a run, top to bottom",
    ),
    ("doctor", "what is there, and what will not work"),
    ("cli cli_arguments __main__", "the command line"),
    ("integrations", "other people's trainers"),
)
FOLDERS = [names.split() for names, _ in HOUSE]


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def floor(module: str) -> int:
    """The line of HOUSE that a module belongs to."""
    name = module.removeprefix("gvpo_jax.").split(".")[0]
    found = [number for number, names in enumerate(FOLDERS) if name in names]
    listed = "".join(f"\n  {names}: {what}" for names, what in HOUSE)
    assert len(found) == 1, f"{module} has no place; put it into the folder it fits:{listed}"
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
        floor(module)


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module):
    here = floor(module)
    for target in own_imports(module):
        assert target in MODULES, f"{module} imports {target}, which does not exist"
        there = floor(target)
        assert there <= here, (
            f"{module} ({HOUSE[here][1]}) must not import {target}: move what needs it up to "
            f"{HOUSE[there][0]!r} ({HOUSE[there][1]}) or higher, or what it needs down"
        )


def test_core_needs_nothing_but_jax():
    allowed = {"jax", "numpy", "gvpo_jax", *sys.stdlib_module_names}
    for module in MODULES:
        if floor(module) == 0:
            strangers = {name.split(".")[0] for name in imports(module)} - allowed
            assert not strangers, f"{module} imports {strangers}"


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
    assert "gvpo_jax.training.policy" in modules
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


@pytest.mark.parametrize("name", ["Trainer", "GVPOTrainer", "GVPOConfig", "load_model", "train"])
def test_what_lives_elsewhere_is_pointed_to(name):
    """In both ways to ask; what it names can be imported."""
    with pytest.raises(AttributeError, match=f"^{name} is not here: from gvpo_jax") as attribute:
        getattr(gvpo_jax, name)
    with pytest.raises(ImportError) as imported:
        exec(f"from gvpo_jax import {name}")
    assert str(imported.value) == str(attribute.value)
    assert not hasattr(gvpo_jax, name)


def test_all_that_is_pointed_to_is_there():
    for text in gvpo_jax._ELSEWHERE.values():
        exec(text.partition(",")[0])


def test_pointing_elsewhere_loads_nothing():
    ask = "import gvpo_jax; hasattr(gvpo_jax, 'Trainer'); hasattr(gvpo_jax, 'trainer')"
    _, modules = fresh_import(ask)
    assert "gvpo_jax.loss" in modules
    assert not {"flax", "transformers", "gvpo_jax.trainer"} & modules


def test_a_module_that_is_not_imported_yet_is_called_one():
    code = "import gvpo_jax; gvpo_jax.report"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.endswith("no attribute 'report'; it is a module: import gvpo_jax.report\n")
    exec("from gvpo_jax import report")  # which asks for it in the same way


def test_an_unknown_name_is_an_ordinary_mistake():
    with pytest.raises(AttributeError, match=r"^module 'gvpo_jax' has no attribute 'gvpo_los'$"):
        gvpo_jax.gvpo_los  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'gvpo_los' from 'gvpo_jax'"):
        exec("from gvpo_jax import gvpo_los")


@pytest.mark.parametrize("name", ["loss", "baselines", "logprobs", "rewards"])
def test_tab_completion_offers_what_is_public_alone(name):
    module = importlib.import_module(f"gvpo_jax.{name}")
    offered = dir(module)
    assert offered == sorted(module.__all__)
    for public in offered:
        assert hasattr(module, public)
        assert not public.startswith("_")
    private = {"jax", "jnp", "check_positive", "count_groups", "CHUNK_BYTES", "einsum_f32", "call"}
    assert not private & set(offered)


def test_nobody_is_told_to_install_pytorch():
    """Without it transformers says at its import that it was not found."""
    code = "import sys; sys.modules['torch'] = None; import gvpo_jax.trainer"
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
