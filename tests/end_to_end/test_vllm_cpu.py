"""experiments/vllm_cpu: the saved figures, and on request a real vLLM server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "vllm_cpu"
PYTHON = "GVPO_VLLM_PYTHON"


def check(results):
    for name in ("sampled", "sampled_at_temperature_0.7_top_p_0.9", "sampled_after_the_change"):
        assert results[name]["mean"] < 1e-4
        assert results[name]["largest"] < 1e-3
        assert results[name]["tokens"] >= results["completions"]
    assert results["first_sync"]["difference"] < 1e-4
    assert results["sync_after_a_change"]["difference"] < 1e-4
    assert results["same_seed_same_samples"]
    assert "did not load version 3" in results["old_weights_instead"]


def test_saved_results_are_in_order():
    check(json.loads((HERE / "results.json").read_text()))


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON not in os.environ,
    reason=f"needs a vLLM: {PYTHON}=/path/to/its/python, see experiments/vllm_cpu/README.md",
)
def test_a_real_server(tmp_path):
    out = tmp_path / "results.json"
    command = [sys.executable, str(HERE / "run.py"), "--python", os.environ[PYTHON]]
    subprocess.run([*command, "--small", "--out", str(out)], check=True, cwd=ROOT)
    check(json.loads(out.read_text()))
