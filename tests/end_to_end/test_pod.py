"""experiments/pod: the script with a stand-in for gcloud and one host, and the manifest's form."""

import math
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
POD = ROOT / "experiments" / "pod"
GCLOUD = """#!/bin/bash
# runs what `gcloud ... ssh ... --command X` would run on the hosts
cd "$HOME"; while [ $# -gt 0 ]; do [ "$1" = --command ] && exec bash -c "$2"; shift; done
"""
# sudo, python3.11, pip and the rest of what an installation calls, written down instead
TOOL = """#!/bin/bash
echo "$(basename "$0") $*" >> "$HOME/called"
"""
TRAINER = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/arguments"
trap 'echo saved; exit 0' TERM
echo started; while true; do sleep 0.1; done
"""


@pytest.fixture
def pod(tmp_path):
    """gcloud.sh on a host that has a trainer installed."""
    for name, text in (("bin/gcloud", GCLOUD), ("venv/bin/gvpo-jax", TRAINER)):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    (tmp_path / "gvpo-jax").mkdir()
    names = {"TPU": "t", "ZONE": "z", "PROJECT": "p", "BUCKET": "gs://b"}
    names |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def call(*arguments):
        command = [str(POD / "gcloud.sh"), *arguments]
        env = os.environ | names | {"PATH": path}
        return subprocess.run(command, env=env, cwd=POD, capture_output=True, text=True)

    yield call
    call("stop")


def test_a_run_is_started_once_and_stopped(pod, tmp_path):
    given = ["configs/debug.yaml", "data.template={a} 'b'", "run.dir=/bucket/x"]
    assert "started" in pod("train", *given).stdout
    sent = (tmp_path / "arguments").read_text().splitlines()
    assert sent == ["train", *given, "distributed.initialize=always"]
    again = pod("train", *given)
    assert again.returncode == 1
    assert "a run is under way" in again.stderr
    assert pod("stop").returncode == 0
    for _ in range(50):
        if "saved" in (tmp_path / "train.log").read_text():
            break
        time.sleep(0.1)
    assert (tmp_path / "train.log").read_text() == "started\nsaved\n"


def test_the_whole_checkout_is_installed(pod, tmp_path):
    """Wherever the script is called from."""
    for name in ("sudo", "python3.11", "gcsfuse", "mountpoint", "../venv/bin/pip"):
        (tmp_path / "bin" / name).write_text(TOOL)
        (tmp_path / "bin" / name).chmod(0o755)
    done = pod("install")
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert "python3.11 -m venv venv" in called
    assert "pip install -q jax[tpu] ./gvpo-jax[tasks,math]" in called
    assert called[-1] == "mountpoint -q /bucket"
    assert (tmp_path / "gvpo-jax" / "gvpo_jax" / "loss.py").exists()
    with tarfile.open(tmp_path / "gvpo-jax.tar.gz") as archive:
        assert {"pyproject.toml", "gvpo_jax/loss.py"} <= set(archive.getnames())


def test_other_words_are_refused(pod):
    for arguments, said in ((("create", "v9-64"), "none of v5litepod-N"), ((), "")):
        done = pod(*arguments)
        assert done.returncode == 2
        assert said in done.stderr


def test_the_planning_page_has_the_scripts_table():
    printed = subprocess.run(
        [sys.executable, str(POD / "plan.py")], capture_output=True, text=True, check=True
    )
    assert printed.stdout in (POD / "planning.md").read_text()


def test_the_manifests_hosts_have_the_chips_of_its_topology():
    manifest = yaml.safe_load((POD / "gke.yaml").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"]
    assert spec["parallelism"] * chips == math.prod(int(n) for n in topology.split("x"))
    config = pod["containers"][0]["args"][1]
    assert (ROOT / config).is_file()
