"""Two processes of four CPU devices each, through the command line, beside one process of eight."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hub_stub import TOKEN, StubHub

from gvpo_jax.config_file import load_config
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.parallel import distributed
from gvpo_jax.parallel.distributed import DistributedConfig
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.trainer import Trainer

# Plain descent, because Adam makes much of the rounding of tiny gradients. A draw that lies within
# rounding of the boundary between two tokens may fall on either side, one in some ten thousand
# here: this seed has none.
SETTINGS = [
    "train.steps=2", "data.eval_size=4", "checkpoint.every=1", "log.samples=0", "mesh.data=2",
    "mesh.fsdp=4", "replay.completions=2", "replay.groups=2", "data.train_size=8",
    "optimizer.name=sgd", "optimizer.learning_rate=0.1", "run.seed=3",
]  # fmt: skip
CLOCKS = re.compile("time|second|memory")
# Nothing but rounding is left of these, which is of its own in programs of different shapes.
ROUNDING = ("sync/logp_difference/mean", "sync/logp_difference/max")
# What JAX's collectives on CPUs print, from several threads at once: lines come mixed up.
GLOO = {"Gloo", "Rank", "is", "connected", "to", "peer", "ranks", "Expected", "number", "of"}


def start(arguments, *, devices, program=("-m", "gvpo_jax")):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['GVPO_TESTS_XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={devices}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = [f"distributed.coordinator_address=127.0.0.1:{port}", "distributed.num_processes=2"]
    return [start([*arguments, *join, f"distributed.process_id={i}"], devices=4) for i in (0, 1)]


def run_two(*arguments):
    """Exit status, output and errors of both processes."""
    return [(p.wait(300), *p.communicate()) for p in start_two(*arguments)]


def train_two(run_dir, *settings):
    ended = run_two("train", "debug", *SETTINGS, f"run.dir={run_dir}", *settings)
    assert [status for status, *_ in ended] == [0, 0], ended
    return [out for _, out, _ in ended]


def train_one(run_dir, *settings):
    process = start(["train", "debug", *SETTINGS, f"run.dir={run_dir}", *settings], devices=8)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def assert_same(a: Path, b: Path, *, step: int):
    for x, y in zip(read_metrics(a), read_metrics(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if name in ROUNDING:
                assert max(x[name], y[name]) < 1e-5, name
            elif not CLOCKS.search(name):
                np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for x, y in zip(
        read_jsonl(a / "eval" / "after.jsonl"), read_jsonl(b / "eval" / "after.jsonl"), strict=True
    ):
        assert x == y
    trainers = []
    for run in (a, b):
        trainer = Trainer(load_config(run / "config.yaml"), load_model("debug"))
        assert trainer.restore(run) == step
        trainers.append(trainer)
    for x, y in zip(*(jax.tree.leaves(t.policy.state.params) for t in trainers), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("data", [[], ["data.streaming=true", "data.shuffle_buffer=5"]])
def test_two_processes_train_as_one_which_goes_on_alone_and_as_two_again(tmp_path, data):
    """Without replay: a buffer is dealt out over the processes, so it draws other groups."""
    plain = ["replay.completions=0", "replay.groups=0", "train.steps=3", *data]
    train_one(tmp_path / "one", *plain)
    first, second = train_two(tmp_path / "mixed", *plain, "train.stop_at=1")
    assert "step" in first
    assert set(re.findall("[A-Za-z]+", second)) <= GLOO
    assert "process_id: null" in (tmp_path / "mixed" / "config.yaml").read_text()
    train_one(tmp_path / "mixed", *plain, "train.stop_at=2")
    train_two(tmp_path / "mixed", *plain)
    assert_same(tmp_path / "one", tmp_path / "mixed", step=3)


@pytest.mark.slow
def test_prompts_that_do_not_divide_are_filled_up_on_every_host():
    """Eight completions would divide over the devices, but not without tearing groups apart."""
    command = ["eval", "debug", "mesh.fsdp=8", "data.eval_size=6", "eval.num_generations=8"]
    process = start(command, devices=8)
    alone, err = process.communicate()
    assert process.returncode == 0, err
    ended = run_two(*command)
    assert [status for status, *_ in ended] == [0, 0], ended
    told = re.search(r".*accuracy.*", alone)
    assert told
    assert told[0] in ended[0][1]


@pytest.mark.slow
def test_a_replay_buffer_moves_between_topologies(tmp_path):
    train_two(tmp_path / "run", "train.stop_at=1")
    train_one(tmp_path / "run")
    shares = [line.get("source/replay/share", 0) for line in read_metrics(tmp_path / "run")]
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2]
    assert shares[-1] > 0


@pytest.mark.slow
def test_sigterm_to_one_host_has_both_save_the_same_step(tmp_path):
    """Two updates a round, and a checkpoint after each."""
    settings = [
        *SETTINGS, "train.steps=5000", "train.num_iterations=2", "data.eval_size=0",
        "checkpoint.keep=1", f"run.dir={tmp_path}",
    ]  # fmt: skip
    processes = start_two("train", "debug", *settings)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if metrics.exists() and len(read_metrics(tmp_path)) >= 2:
            break
        time.sleep(0.05)
    processes[1].terminate()
    ended = [(p.wait(300), *p.communicate()) for p in processes]
    assert [status for status, *_ in ended] == [143, 143], ended
    last = read_metrics(tmp_path)[-1]["step"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(last)]
    assert 2 <= last < 5000
    ended = run_two("train", "debug", *settings, f"train.stop_at={last + 2}")
    assert [status for status, *_ in ended] == [0, 0], ended
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, last + 3))


FAILING = """
def broken(prompts, completions, **_):
    import jax
    if jax.process_index() == 1:
        raise ZeroDivisionError("on purpose")
    return [0.0] * len(prompts)
"""


@pytest.mark.slow
def test_an_error_on_one_host_ends_all_with_one_line(tmp_path):
    (tmp_path / "broken.py").write_text(FAILING)
    ended = run_two(
        "train", "debug", *SETTINGS, f"run.dir={tmp_path / 'run'}", "data.eval_size=0",
        f"rewards.funcs=[{tmp_path / 'broken.py'}:broken]",
    )  # fmt: skip
    for status, _, err in ended:
        assert status == 2
        lines = [line for line in err.splitlines() if line.startswith("gvpo-jax: error: ")]
        assert len(lines) == 1
        assert "on purpose" in lines[0]
        assert "Traceback" not in err


@pytest.mark.parametrize(
    ("process_id", "message"),
    [(1, "could not reach the coordinator at {}"), (0, "the other processes did not come to {}")],
)
def test_who_does_not_come_is_a_line_after_a_bounded_wait(tmp_path, process_id, message):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    process = start(
        [
            "train", "debug", f"run.dir={tmp_path}", f"distributed.coordinator_address={address}",
            "distributed.num_processes=2", f"distributed.process_id={process_id}",
            "distributed.initialization_timeout=2",
        ],
        devices=4,
    )  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.count("error: ") == 1
    assert f"{message.format(address)} within 2 s" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "write HOST:PORT"),
        ({"coordinator_address": "a:1"}, "belong together"),
        ({"num_processes": 2, "process_id": 0}, "belong together"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            "process_id=2 must be less than distributed.num_processes=2",
        ),
    ],
)
def test_half_of_the_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        DistributedConfig(**settings).start()


def test_alone_nothing_is_gathered_or_shared(monkeypatch):
    x = np.arange(3)
    assert distributed.gather(x) is x
    assert distributed.my_slice(6) == slice(0, 6)
    assert distributed.my_items([1, 2, 3]) == [1, 2, 3]
    assert distributed.raise_together(lambda: 5) == 5
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    assert distributed.my_slice(8) == slice(6, 8)
    assert distributed.my_items([1, 2, 3, 4, 5]) == [5, 5]
    with pytest.raises(UserError, match="6 new groups do not divide over 4 processes"):
        distributed.my_slice(6)


def test_the_environment_tells_of_a_cluster(monkeypatch):
    names = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS",
             "MEGASCALE_COORDINATOR_ADDRESS", "TPU_WORKER_HOSTNAMES")  # fmt: skip
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not distributed._in_a_cluster()
    for name, alone, several in (
        ("SLURM_NTASKS", "1", "2"),
        ("TPU_WORKER_HOSTNAMES", "a", "a,b"),
        ("JAX_COORDINATOR_ADDRESS", None, "a:1"),
    ):
        if alone:
            monkeypatch.setenv(name, alone)
            assert not distributed._in_a_cluster(), name
        monkeypatch.setenv(name, several)
        assert distributed._in_a_cluster(), name
        monkeypatch.delenv(name)


def test_pathways_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "proxy,cpu")
    with pytest.raises(UserError, match="pip install pathwaysutils"):
        DistributedConfig().start()


SAVE = """
import sys
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.trainer import Trainer

address, process, folder = sys.argv[1:]
config = override(
    Config(), mesh__fsdp=8, distributed__coordinator_address=address,
    distributed__num_processes=2, distributed__process_id=int(process),
)
config.distributed.start()
trainer = Trainer(config)
print(trainer.push_to_hub("me/name", folder))
rows = [{"prompt": "a"}, {"prompt": "a longer prompt, for the other process"}]
print(trainer.evaluate(rows, lambda prompts, **_: [1.0] * len(prompts))[0]["eval/accuracy"])
"""


@pytest.mark.slow
def test_two_processes_write_and_send_one_model_and_judge_prompts_of_different_lengths(
    tmp_path, monkeypatch
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tmp_path / "model"
    with StubHub() as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        for name, value in (there | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}).items():
            monkeypatch.setenv(name, value)
        processes = [start([address, i, folder], devices=4, program=["-c", SAVE]) for i in (0, 1)]
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            assert "1.0" in out
            assert f"{hub.url}/me/name" in out
    assert [path for _, path in hub.requests].count("/api/repos/create") == 1
    sent = {k: v for k, v in hub.repositories["me/name"].items() if k != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    for a, b in zip(
        jax.tree.leaves(load_model(str(folder)).params),
        jax.tree.leaves(load_model("debug").params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
