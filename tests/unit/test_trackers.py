"""Trackers get what metrics.jsonl has and hold up no run; traces, memory and MFU."""

import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from test_trainer import ROWS, assert_same_run, config, train

from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, override, to_yaml
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rundir import trackers
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.rundir.log import Counters, LogConfig, RunLog, device_memory
from gvpo_jax.rundir.traces import traced_updates
from gvpo_jax.rundir.trackers import AboutRun, Trackers, name_of_run, without_secrets
from gvpo_jax.tpu_compile import roofline
from gvpo_jax.tpu_compile.roofline import Shape, peak_of, shape_of, train_work, update_flops
from gvpo_jax.trainer import Trainer


def about(folder, **changes):
    plain = {"id": "a1", "resumed": False, "first_step": -1, "project": "p", "settings": {}}
    return AboutRun(**{"folder": folder, "name": folder.name, **plain, **changes})


def module(monkeypatch, name, **contents):
    """A package of this name, for who imports it."""
    stub = types.ModuleType(name)
    stub.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="made by a test")
    vars(stub).update(contents)
    monkeypatch.setitem(sys.modules, name, stub)


class TrackioRun:
    """Of trackio 0.43, with its methods' signatures."""

    def __init__(self):
        self.lines, self.finished = [], False

    def log(self, metrics: dict, step: int | None = None):
        self.lines.append((step, metrics))

    def finish(self):
        self.finished = True


def trackio_init(
    project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
    bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
    auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
    webhook_url=None, webhook_min_level=None,
):  # fmt: skip
    """The signature of trackio 0.43."""
    raise NotImplementedError


def trackio_that(monkeypatch, run):
    """A trackio whose runs are made by `run(**arguments)`; returns what it was called with."""
    calls = []

    def init(*args, **options):
        bound = inspect.signature(trackio_init).bind(*args, **options)
        calls.append(bound.arguments)
        return run()

    module(monkeypatch, "trackio", init=init)
    return calls


class WandbRun:
    def __init__(self, calls, arguments):
        self.arguments, self.lines, self.summary, self.exit_code = arguments, [], {}, None
        calls.append(self)

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, data):
        self.lines.append(data)

    def finish(self, exit_code=None):
        self.exit_code = exit_code


def wandb_that_keeps(monkeypatch):
    """A wandb whose runs come into the list that is returned."""
    runs = []

    class Settings:
        model_fields = ("console", "finish_timeout")

        def __init__(self, console, finish_timeout):
            self.console = console

    module(
        monkeypatch,
        "wandb",
        Settings=Settings,
        setup=lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")),
        login=lambda prompt=True, verify=True: not prompt,
        init=lambda **arguments: WandbRun(runs, arguments),
    )
    return runs


# What W&B writes offline: a LevelDB log of protocol buffers.
REAL_WANDB = """
import json, pathlib, struct, sys, time
from gvpo_jax.rundir.log import Counters, LogConfig, RunLog

folder, options = pathlib.Path(sys.argv[1]), LogConfig(trackers=["wandb"], project="mine")
settings = {"run": {"dir": str(folder)}, "servers": {"urls": ["http://me:pw@host:1/v1?key=k"]}}

def session(counters, steps):
    with RunLog(folder, counters, options, 9, 1, [], evaluated=True, settings=settings) as log:
        for step in steps:
            log.step({"loss": step / 8, "grad_norm": 1.0}, {"tokens": 1, "reward": float("nan")})
        log.flush()
        log.summary, log.patience = {"steps": counters.step}, 120.0

counters = Counters()
session(counters, (1, 2, 3))
saved = json.loads(json.dumps({"step": 2, "trackers": counters.trackers}))  # a checkpoint's
time.sleep(1.1)  # W&B names files by the second
session(Counters.of_checkpoint(saved), (3, 4))

from wandb.proto import wandb_internal_pb2 as pb

def records(file):
    data, block, at, parts = file.read_bytes(), 1 << 15, 7, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""

def items(many):
    return {x.key or "/".join(x.nested_key): json.loads(x.value_json) for x in many}

runs = []
for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    found = {"lines": [], "axes": {}, "summary": {}}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "name": run.display_name, "project": run.project}
            found["config"] = items(run.config.update)
        if kind == "history":
            found["lines"].append(items(record.history.item))
        if kind == "metric":
            found["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        if kind == "summary":
            found["summary"] |= items(record.summary.update)
        if kind == "exit":
            found["exit"] = record.exit.exit_code
    runs.append(found)
print("READ" + json.dumps(runs))
"""


def test_wandb_has_every_line_of_a_run_that_went_on_from_an_earlier_step(tmp_path):
    """Read back from what the real package writes, two sessions of one run."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    folder = tmp_path / "runs" / "beta02"
    done = subprocess.run(
        [sys.executable, "-c", REAL_WANDB, str(folder)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = json.loads(done.stdout.partition("READ")[2])
    assert first["id"] == second["id"]
    assert first["name"] == "beta02"
    assert first["project"] == "mine"
    assert first["config"]["servers"] == {"urls": ["http://***@host:1/v1?***"]}
    assert "pw" not in json.dumps([first, second])
    assert second["axes"]["*"] == "step"
    steps = [[(line["step"], line["loss"]) for line in run["lines"]] for run in (first, second)]
    assert steps == [[(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)], [(3, 3 / 8), (4, 4 / 8)]]
    assert math.isnan(first["lines"][0]["reward"])
    assert second["summary"]["steps"] == 4
    assert first["exit"] == second["exit"] == 0


def events(folder):
    """Of TensorBoard files: length and checksum, a protocol buffer, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + size])
            at += size + 16
            yield event


def test_tensorboard_gets_the_values_and_purges_on_resume(tmp_path):
    for first_step, told in ((-1, {1: 0.5, 2: 0.25}), (1, {2: 0.75})):
        followed = Trackers({"tensorboard": about(tmp_path, first_step=first_step)}, print)
        for step, reward in told.items():
            followed.log(step, {"reward": reward})
        followed.close({})
    found = list(events(tmp_path / "tensorboard"))
    scalars = [(e.step, e.summary.value[0].simple_value) for e in found if e.summary.value]
    assert sorted(scalars) == [(1, 0.5), (2, 0.25), (2, 0.75)]
    starts = [e.step for e in found if e.session_log.status == 1]  # drops what is from there on
    assert starts == [0, 2]


def test_trackio_is_called_as_it_wants_to_be(tmp_path, monkeypatch):
    runs = []
    calls = trackio_that(monkeypatch, lambda: runs.append(TrackioRun()) or runs[-1])
    for resumed in (False, True):
        followed = Trackers({"trackio": about(tmp_path / "r", resumed=resumed)}, print)
        followed.log(3, {"reward": 0.5})
        followed.close({"steps": 3})
    assert [call["resume"] for call in calls] == ["never", "allow"]
    assert {(call["project"], call["name"]) for call in calls} == {("p", "r")}
    assert all(run.lines == [(3, {"reward": 0.5})] and run.finished for run in runs)


class Hanging:
    def log(self, metrics, step):
        threading.Event().wait()

    def finish(self):
        pass


def fails(**_):
    raise ConnectionError("no route\nto host")


def test_a_run_is_the_same_with_trackers_that_hang_and_fail(tmp_path, monkeypatch, capsys):
    plain, _ = train(tmp_path / "plain", train__steps=3)
    start = time.monotonic()
    train(tmp_path / "again", train__steps=3)
    usual = time.monotonic() - start
    capsys.readouterr()
    wandb_that_keeps(monkeypatch)
    sys.modules["wandb"].init = fails
    trackio_that(monkeypatch, Hanging)
    monkeypatch.setattr("gvpo_jax.loop.PATIENCE", 1.0)
    start = time.monotonic()
    followed, _ = train(
        tmp_path / "followed",
        train__steps=3,
        log__trackers=["wandb", "trackio", "tensorboard"],
    )
    assert time.monotonic() - start < 1.0 + 2 * usual + 5  # the machine is shared
    assert_same_run(tmp_path / "plain", tmp_path / "followed", plain, followed)
    out = capsys.readouterr().out
    assert out.count("wandb: ConnectionError: no route to host; the run does without") == 1
    assert out.count("trackio was not done after 1 s; the run ends so") == 1
    lines = {e.step for e in events(tmp_path / "followed" / "tensorboard") if e.summary.value}
    assert lines == {0, 1, 2, 3}


def test_a_slow_tracker_loses_lines_and_not_time(tmp_path, monkeypatch):
    done, told = [], []

    class Slow(TrackioRun):
        def log(self, metrics, step):
            time.sleep(0.05)
            done.append(step)

    trackio_that(monkeypatch, Slow)
    monkeypatch.setattr(trackers, "WAITING", 4)
    followed = Trackers({"trackio": about(tmp_path)}, told.append)
    start = time.monotonic()
    for step in range(1, 101):
        followed.log(step, {"reward": 0.0})
    assert time.monotonic() - start < 2  # of 5 that all would take
    followed.close({})
    assert done == sorted(done)
    assert len(done) < 100
    (line,) = told
    assert line.startswith("trackio is behind by 4 lines of metrics: from step ")


def test_an_end_waits_for_all_trackers_together(tmp_path, monkeypatch):
    told = []
    trackio_that(monkeypatch, Hanging)
    module(monkeypatch, "tensorboardX", SummaryWriter=lambda *_, **__: threading.Event().wait())
    opened = {"trackio": about(tmp_path), "tensorboard": about(tmp_path)}
    followed = Trackers(opened, told.append)
    followed.log(1, {"reward": 0.5})
    start = time.monotonic()
    followed.close({}, patience=0.5)
    assert 0.4 < time.monotonic() - start < 1.5
    assert len(told) == 2


def test_a_tracker_that_fails_at_every_line_is_told_of_once(tmp_path, monkeypatch):
    told = []

    class Failing(TrackioRun):
        def log(self, metrics, step):
            raise OSError(f"step {step}")

        def finish(self):
            sys.exit(3)

    trackio_that(monkeypatch, Failing)
    followed = Trackers({"trackio": about(tmp_path)}, told.append)
    for step in (1, 2):
        followed.log(step, {})
    followed.close({})
    assert told == ["trackio: OSError: step 1; the run does without"]


def test_wandb_asks_for_no_key_on_the_terminal(tmp_path, monkeypatch):
    told = []
    wandb_that_keeps(monkeypatch)
    sys.modules["wandb"].login = lambda prompt=True, verify=True: prompt and pytest.fail("asked")
    Trackers({"wandb": about(tmp_path)}, told.append).close({})
    assert told[0].startswith("wandb: there is no API key: run wandb login, or set WANDB_API_KEY")


def test_a_run_goes_on_under_its_id_and_a_new_one_has_another(tmp_path, monkeypatch, capsys):
    runs = wandb_that_keeps(monkeypatch)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setitem(roofline._PEAKS, "cpu", 1e12)
    follow = {"log__trackers": ["wandb"], "train__steps": 4, "log__profile": "1:1"}
    train(tmp_path / "run", train__stop_at=2, **follow)
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"train_step" in traces[0].read_bytes()
    assert "updates 1 to 1 are traced" in capsys.readouterr().out
    _, summary = train(tmp_path / "run", **follow)
    assert "log.profile: no update from 1 to 1 in this session" in capsys.readouterr().out
    first, second = runs
    assert [line["step"] for line in first.lines + second.lines] == [0, 1, 2, 3, 4, 4]
    written = read_metrics(tmp_path / "run")
    assert first.lines[1].items() <= (written[1] | {"step": 1}).items()
    assert all(line["mfu"] > 0 for line in written[1:])
    assert first.arguments["id"] == second.arguments["id"]
    assert first.arguments["name"] == "run"
    assert first.arguments["dir"] == str(tmp_path / "run")
    assert first.arguments["config"]["loss"]["beta"] == 0.1
    assert second.summary == summary
    assert first.exit_code == second.exit_code == 0

    def broken(**_):
        raise RuntimeError("no more")

    trainer = Trainer(config(tmp_path / "run", run__overwrite=True, **follow), load_model("debug"))
    with pytest.raises(UserError, match="no more"):
        trainer.train(ROWS, broken, eval_dataset=ROWS[:2])
    assert runs[2].arguments["id"] != first.arguments["id"]
    assert runs[2].exit_code == 1


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"trackers": "wandbb"}, "must be one of wandb, trackio, tensorboard, got 'wandbb'; did"),
        ({"trackers": ["mlflow"]}, "must be one of wandb, trackio, tensorboard, got 'mlflow'$"),
        ({"trackers": ["wandb", "wandb"]}, "log.trackers names wandb twice; name it once"),
        ({"project": " "}, "log.project is empty"),
        ({"profile": "a:b"}, "log.profile=a:b: write START:COUNT, two numbers from 1 on"),
        ({"profile": "0:1"}, "log.profile=0:1: write START:COUNT"),
        ({"profile": "1:0"}, "log.profile=1:0: write START:COUNT"),
        ({"profile": "5"}, "log.profile=5: write START:COUNT"),
        ({"profile": ""}, "log.profile=: write START:COUNT"),
    ],
)
def test_what_is_wrong_is_told_with_the_settings(settings, line):
    with pytest.raises(UserError, match=line.replace(".", r"\.")):
        override(Config(), **{f"log__{name}": value for name, value in settings.items()})


def test_a_missing_tracker_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name)
    )
    settings = {"model__name": "no/such-model", "log__trackers": ["wandb"]}
    with pytest.raises(UserError, match=r'\(wandb\): pip install "gvpo-jax\[wandb\]"') as error:
        Trainer(config(tmp_path / "run", **settings))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_wandb_left_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    assert importlib.util.find_spec("wandb") is not None
    with pytest.raises(UserError, match=r"gvpo-jax\[wandb\]"):
        trackers.check_installed(["wandb"])


def test_the_older_name_of_tensorboard_holds(tmp_path):
    assert LogConfig(tensorboard=True).all_trackers() == ["tensorboard"]
    both = LogConfig(tensorboard=True, trackers=["tensorboard", "wandb"])
    assert both.all_trackers() == ["tensorboard", "wandb"]
    written = override(Config(), log__trackers=["trackio", "wandb"], log__profile="3:2")
    (tmp_path / "c.yaml").write_text(to_yaml(written))
    assert load_config(tmp_path / "c.yaml").log == written.log
    assert list(traced_updates(written.log.profile)) == [3, 4]


def test_addresses_lose_what_may_be_secret():
    given = {"urls": ["https://me:key@host/v1?token=k#x", "plain? text@home"], "n": [1, None]}
    assert without_secrets(given) == {
        "urls": ["https://***@host/v1?***", "plain? text@home"],
        "n": [1, None],
    }


def test_the_name_is_that_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_of_run("gs://bucket/some/beta02/") == "beta02"
    assert name_of_run("runs/beta02") == "beta02"
    assert name_of_run(".") == tmp_path.name


def test_only_the_first_process_follows(tmp_path, monkeypatch):
    runs = wandb_that_keeps(monkeypatch)
    monkeypatch.setattr("gvpo_jax.rundir.log.is_first", lambda: False)
    options = LogConfig(trackers=["wandb"], profile="1:1")
    with RunLog(tmp_path, Counters(), options, 3, 1, [], evaluated=False) as log:
        log.trace.begin(1)
        log.step({"loss": 1.0, "grad_norm": 1.0}, {"tokens": 1})
    assert runs == []
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_the_fullest_device_and_of_those_that_tell():
    def device(**stats):
        return types.SimpleNamespace(memory_stats=lambda: stats or None)

    gib = 2**30
    two = [device(bytes_in_use=gib, peak_bytes_in_use=3 * gib), device(bytes_in_use=2 * gib)]
    assert device_memory([*two, device()]) == {"memory_gib": 2.0, "memory_peak_gib": 3.0}
    assert device_memory(jax.local_devices()) == {}  # processors


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_of_an_update_are_those_of_its_tokens(frozen):
    shape = Shape(3, 50, 16, 70, frozen)
    prompts, lengths = np.array([5, 4, 1]), np.array([[3, 1], [2, 0], [0, 0]])
    products = pairs = head = 0
    for p, row in zip(prompts, lengths, strict=True):
        inputs = [t - 1 for t in row if t]  # of the last token nothing is asked
        if not inputs:
            continue
        products += 2 * 3 * 50 * (p + sum(inputs))
        pairs += 4 * 3 * 16 * (p * p + sum(n * (p + n) for n in inputs))
        head += 2 * 70 * sum(row)
    expected = 3 * pairs + (2 if frozen else 3) * (products + head)
    assert update_flops(shape, prompts, lengths) == expected
    uniform = np.full(2, 5), np.full((2, 3), 7)
    work = train_work(shape, groups=2, k=3, p=5, t=7, remat=False, two_passes=False)
    assert update_flops(shape, *uniform) == work.model


def test_mfu_is_the_time_at_peak_over_the_time_it_took(tmp_path):
    model = load_model("debug").config
    chips = [types.SimpleNamespace(device_kind=kind) for kind in ("TPU v5 lite", "TPU v5 lite")]
    peak = peak_of(chips, model, frozen=False)
    assert peak is not None
    assert peak.flops == 2 * 197e12
    prompts, lengths = np.array([5]), np.array([[3, 2]])
    flops = update_flops(shape_of(model, frozen=False), prompts, lengths)
    assert peak.seconds(prompts, lengths) == flops / (2 * 197e12)
    assert peak_of(jax.local_devices(), model, frozen=False) is None
    history = []
    with RunLog(tmp_path, Counters(), LogConfig(), 3, 1, history, evaluated=False) as log:
        log.step({"loss": 1.0, "grad_norm": 1.0}, {"tokens": 1}, at_peak=0.25)
        log.step({"loss": 1.0, "grad_norm": 1.0}, {"tokens": 1})
    assert math.isclose(history[0]["mfu"] * history[0]["step_time"], 0.25)
    assert not {"mfu", "memory_gib", "memory_peak_gib"} & history[1].keys()
