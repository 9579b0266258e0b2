"""The examples of the loss in other people's code: each runs, learns, and fits a screen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "in_your_code"
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
# In trainers that cannot be installed beside ours: `.ci/beside` runs them, and checks the gradient.
BESIDE = {"maxtext_step.py": "maxtext", "easydel_trainer.py": "easydel"}
LONGEST = {"own_transformer.py": 70, "maxtext_step.py": 60, "easydel_trainer.py": 80}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_it_runs_and_learns(name):
    script = FOLDER / name
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    number = r"(-?\d+\.\d+)"
    before, after = re.search(f"before {number}, after {number}", done.stdout).groups()
    assert LEARNED[name](float(before), float(after)), done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_short_and_on_the_page(script):
    code = script.read_text()
    whole_loop = script.name == "own_transformer.py"  # all others have the loss in a loop of theirs
    assert len(code.splitlines()) < LONGEST.get(script.name, 40)
    loss = r"from gvpo_jax import .*\bgvpo_loss\b"
    assert re.search(r"Trainer\(" if whole_loop else loss, code)
    assert f"[{script.name}]({script.name})" in PAGE


def test_the_page_names_no_other_script():
    named = set(re.findall(r"\((\w+\.py)\)", PAGE))
    assert named == {script.name for script in SCRIPTS} == set(LEARNED) | set(BESIDE)


@pytest.mark.parametrize("script", BESIDE)
def test_what_runs_elsewhere_is_run_and_checked_there(script):
    name = BESIDE[script]
    assert f'"{script}"' in (ROOT / "tests" / "beside" / f"check_{name}.py").read_text()
    assert f"    {name})\n" in (ROOT / ".ci" / "beside").read_text()
    assert re.search(rf"^\.ci/beside {name} ", (ROOT / ".ci" / "run").read_text(), re.M)
