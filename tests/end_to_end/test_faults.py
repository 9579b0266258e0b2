"""One case of each fault of the matrix, and that the saved long form passed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "faults"


@pytest.mark.slow
def test_a_run_goes_on_after_each_kind_of_fault(tmp_path):
    command = [sys.executable, str(FAULTS / "run.py"), "--short", "--out", tmp_path / "x.json"]
    environment = os.environ | {"XLA_FLAGS": os.environ["GVPO_TESTS_XLA_FLAGS"]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    results = json.loads((tmp_path / "x.json").read_text())
    assert {fault: [x for x in found.values() if x] for fault, found in results.items()} == {
        fault: [] for fault in results
    }, done.stdout
    assert len(results) == 9
    assert done.returncode == 0, done.stderr


def test_the_saved_matrix_passed():
    saved = json.loads((FAULTS / "results.json").read_text())
    assert {
        name: problem for found in saved.values() for name, problem in found.items() if problem
    } == {}
    assert sum(map(len, saved.values())) > 150
    page = (FAULTS / "README.md").read_text()
    for fault, found in saved.items():
        assert f"| {fault} |" in page
        assert f"| {len(found)} | {len(found)} |" in page
