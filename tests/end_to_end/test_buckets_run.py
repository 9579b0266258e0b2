"""Runs whose folder, data and model lie in a bucket, against an emulator of Cloud Storage."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import gcsfs
import pytest
from gcs_emulator import BUCKET, emulator

from gvpo_jax.models import load_model
from gvpo_jax.models.export import export_model
from gvpo_jax.rundir.files import read_jsonl, read_metrics

SETTINGS = ["train.steps=8", "checkpoint.every=2", "eval.every=4", "log.completions_every=2"]
RUN = f"gs://{BUCKET}/runs/one"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """The environment of a machine with a bucket."""
    folder = tmp_path_factory.mktemp("cloud")
    with emulator(folder / "emulator.log") as environment:
        yield environment | {"XDG_CACHE_HOME": str(folder / "cache")}


@pytest.fixture
def files(cloud, monkeypatch):
    """That bucket, empty."""
    for name, value in cloud.items():
        monkeypatch.setenv(name, value)
    gcsfs.GCSFileSystem.clear_instance_cache()
    fs = gcsfs.GCSFileSystem(use_listings_cache=False)
    for path in fs.find(BUCKET):
        fs.rm_file(path)
    return fs


def start(cloud, *arguments, devices=1):
    flags = os.environ["GVPO_TESTS_XLA_FLAGS"]
    environment = os.environ | cloud
    environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "gvpo_jax", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(cloud, *arguments, status=0):
    process = start(cloud, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    if status == 0:
        return out
    return [line for line in err.splitlines() if not line.startswith("see https://")][-1]


def without_clocks(rows):
    return [
        {k: v for k, v in row.items() if not any(x in k for x in ("time", "second", "memory"))}
        for row in rows
    ]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_that_on_a_disk_killed_or_not(cloud, files, tmp_path):
    """Killed by SIGKILL, gone on with by name, then looked at; bit for bit the same."""
    run(cloud, "train", "debug", *SETTINGS, f"run.dir={tmp_path / 'disk'}")
    with start(cloud, "train", "debug", *SETTINGS, f"run.dir={RUN}") as process:
        errors = threading.Thread(target=process.stderr.read)  # so that nobody waits to write there
        errors.start()
        for line in process.stdout:  # the save at 4 is whole when that at 6 begins
            if line.startswith("step 7/8"):
                process.send_signal(signal.SIGKILL)
        errors.join()
    assert process.returncode == -signal.SIGKILL
    out = run(cloud, "train", RUN)
    assert "going on from step" in out
    assert f"report: {RUN}/report.html" in out

    copy = _copy(files, tmp_path / "copy")
    ours, disk = (without_clocks(read_metrics(x)) for x in (copy, tmp_path / "disk"))
    assert ours == disk
    for name in ("eval/after.jsonl", "completions/step_000003.jsonl"):
        assert read_jsonl(copy / name) == read_jsonl(tmp_path / "disk" / name)
    assert not files.exists(f"{BUCKET}/runs/one/.lock")
    names = {Path(path).name for path in files.ls(f"{BUCKET}/runs/one/checkpoints")}
    assert names == {"6", "8"}  # keep: 2

    cloud = cloud | {"XDG_CACHE_HOME": str(tmp_path / "another machine's")}
    assert f"{RUN}: 8 of 8 updates are saved" in run(cloud, "inspect", RUN)
    assert "nothing to do" in run(cloud, "train", f"{RUN}/")
    files.rm_file(f"{BUCKET}/runs/one/report.html")
    assert RUN in run(cloud, "report", RUN)
    assert files.exists(f"{BUCKET}/runs/one/report.html")
    scores = json.loads("{" + run(cloud, "eval", RUN).partition("{")[2])
    assert "eval/accuracy" in scores
    assert files.exists(f"{BUCKET}/runs/one/eval/latest.jsonl")
    run(cloud, "export", RUN, tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").is_file()
    said = run(cloud, "export", RUN, status=2)
    assert said.endswith("give the folder here that is to be written")
    said = run(cloud, "train", "debug", *SETTINGS, f"run.dir={RUN}", "loss.beta=0.3", status=2)
    assert "holds a run with other settings (loss.beta=" in said
    out = run(
        cloud, "train", "debug", *SETTINGS, f"run.dir={RUN}/", "run.overwrite=true",
        "loss.beta=0.3", "train.stop_at=2",
    )  # fmt: skip
    assert "is replaced" in out
    assert [x["step"] for x in read_metrics(_copy(files, tmp_path / "new")) if "loss" in x] == [
        1,
        2,
    ]
    assert [Path(x).name for x in files.ls(f"{BUCKET}/runs/one/checkpoints")] == ["2"]
    said = run(cloud, "train", "debug", f"run.dir=gs://{BUCKET}", status=2)
    assert f"gs://{BUCKET} exists and is not a run folder" in said


def _copy(files, folder):
    files.get(f"{BUCKET}/runs/one", str(folder), recursive=True)
    return folder


@pytest.mark.slow
def test_two_processes_share_a_run_a_model_and_rows_in_a_bucket(cloud, files, tmp_path):
    model = load_model("debug")
    export_model(tmp_path / "model", model, model.params)
    files.put(str(tmp_path / "model"), f"{BUCKET}/model", recursive=True)
    rows = "".join(json.dumps({"prompt": f"Spell {c * 3}:"}) + "\n" for c in "abcdefgh")
    files.pipe_file(f"{BUCKET}/rows/a.jsonl", rows.encode())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        "train.steps=2", "eval.every=0", "data.eval_size=0", "data.tasks=[]", "train.batch_size=2",
        f"model.name=gs://{BUCKET}/model", f"data.path=gs://{BUCKET}/rows/*.jsonl",
        f"run.dir={RUN}", f"distributed.coordinator_address=127.0.0.1:{port}",
        "distributed.num_processes=2",
    ]  # fmt: skip
    both = [
        start(cloud, "train", "debug", *settings, f"distributed.process_id={i}") for i in (0, 1)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    steps = files.cat_file(f"{BUCKET}/runs/one/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]
    assert files.exists(f"{BUCKET}/runs/one/checkpoints/2/commit_success.txt")


def test_a_bucket_that_is_not_there_is_one_line(cloud, files):
    said = run(cloud, "train", "debug", "run.dir=gs://no-such-bucket/run", status=2)
    assert said.startswith("gvpo-jax: error: ")
    assert "gs://no-such-bucket/run" in said
    start_ = time.monotonic()
    away = cloud | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}
    said = run(away, "inspect", RUN, status=2)
    assert f"can't use {RUN}: " in said
    assert time.monotonic() - start_ < 120
