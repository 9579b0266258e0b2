"""The examples of the loss in other people's code: each runs, learns, and fits a screen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "in_your_code"
SCRIPTS = sorted(FOLDER.glob("*.py"))
PAGE = (FOLDER / "README.md").read_text()
# What each prints, before and after: smaller is better for the distance, larger for the others.
LEARNED = {
    "plain_jax.py": lambda before, after: after < 0.002 < 1 < before,
    "optax_only.py": lambda before, after: before < 0.1 < 0.9 < after,
    "linen_model.py": lambda before, after: before < 0.2 < 0.9 < after,
    "nnx_lora.py": lambda before, after: before < 0.2 < 0.9 < after,
    "equinox_model.py": lambda before, after: before < -2 < -0.5 < after,
    "own_transformer.py": lambda before, after: before < 0.3 < 0.45 < after,
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs_and_learns(script):
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    number = r"(-?\d+\.\d+)"
    before, after = re.search(f"before {number}, after {number}", done.stdout).groups()
    assert LEARNED[script.name](float(before), float(after)), done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_short_and_on_the_page(script):
    code = script.read_text()
    whole_loop = script.name == "own_transformer.py"  # all others have the loss in a loop of theirs
    assert len(code.splitlines()) < (70 if whole_loop else 40)
    assert ("Trainer(" if whole_loop else "from gvpo_jax import gvpo_loss") in code
    assert f"[{script.name}]({script.name})" in PAGE


def test_the_page_names_no_other_script():
    named = set(re.findall(r"\((\w+\.py)\)", PAGE))
    assert named == {script.name for script in SCRIPTS} == set(LEARNED)
