"""kill -9: a run goes on as if nothing had happened."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_trainer import assert_same_run

from gvpo_jax.config_file import load_config
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer


@pytest.mark.slow
def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path):
    """Killed in the middle, twice; the third start ends like a run that was never killed."""
    arguments = [
        sys.executable, "-m", "gvpo_jax", "train", "debug", "train.steps=30", "checkpoint.every=5",
        "eval.every=0", "data.eval_size=0", "log.completions_every=5", "mesh.fsdp=1",
        "train.packing=false",  # fewer programs to compile
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    subprocess.run([*arguments, f"run.dir={whole}"], check=True, capture_output=True)
    for goal in (7, 17):
        process = subprocess.Popen(
            [*arguments, f"run.dir={parts}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while _last_step(parts) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
        process.wait()
    subprocess.run([*arguments, f"run.dir={parts}"], check=True, capture_output=True)
    trainers = []
    for run in (whole, parts):
        trainer = Trainer(load_config(run / "config.yaml"))
        assert trainer.restore(run) == 30
        trainers.append(trainer)
    (parts / "eval").mkdir(exist_ok=True)
    (whole / "eval").mkdir(exist_ok=True)
    assert_same_run(whole, parts, *trainers)


def _last_step(run: Path) -> int:
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0
