"""SIGTERM: a run is saved, ends with 143, and goes on as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gvpo_jax import loop
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.models.load import load_model
from gvpo_jax.parallel.preemption import Preempted, nothing_to_save, watch
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.policy import Policy

ROWS = [{"prompt": f"Spell {word}: ", "word": word} for word in ("ash", "birch", "cedar")]


def steps(run_dir):
    file = run_dir / "metrics.jsonl"
    return (
        [line["step"] for line in read_metrics(run_dir) if "loss" in line] if file.exists() else []
    )


def saved(run_dir):
    return sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_run_is_saved_on_sigterm_and_goes_on(tmp_path):
    command = [
        sys.executable, "-m", "gvpo_jax", "train", "debug", "train.steps=5000", "mesh.fsdp=1",
        "checkpoint.every=1000", "data.eval_size=0", f"run.dir={tmp_path}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(steps(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "saved, the same command goes on" in out
    assert not (tmp_path / "summary.json").exists()
    last = steps(tmp_path)[-1]
    assert saved(tmp_path) == [last]
    assert 3 <= last < 5000
    subprocess.run([*command, f"train.stop_at={last + 2}"], check=True, capture_output=True)
    assert steps(tmp_path) == list(range(1, last + 3))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_is_saved_though_nobody_reads_what_it_prints(tmp_path, number):
    """As under `2>&1 | tee`, which Ctrl-C ends first."""
    command = [
        sys.executable, "-m", "gvpo_jax", "train", "debug", "train.steps=5000", "mesh.fsdp=1",
        "checkpoint.every=5000", "data.eval_size=0", f"run.dir={tmp_path}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    deadline = time.monotonic() + 120
    while len(steps(tmp_path)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(120) == 128 + number
    assert saved(tmp_path) == [steps(tmp_path)[-1]]


def train(run_dir, reward=letter_share, **more):
    settings = {
        "run__dir": str(run_dir),
        "rollout__num_generations": 4,
        "rollout__max_completion_length": 6,
        "data__max_prompt_length": 32,
        "train__steps": 4,
        "train__batch_size": 2,
        "train__num_iterations": 2,
        "eval__success_reward": 0.5,
        "mesh__fsdp": 1,
    }
    trainer = Trainer(override(Config(), **settings | more), load_model("debug"))
    return trainer.train(ROWS, reward, eval_dataset=ROWS[:2])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that nothing stops, and its summary."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(folder)


@pytest.mark.parametrize("updates", [0, 1, 2, 3])
def test_it_ends_as_if_nothing_had_happened(uninterrupted, tmp_path, monkeypatch, updates):
    """Told after so many updates, of which two make a round; 0 is before the first one."""
    folder, whole = uninterrupted
    asked = []  # before each round, and before each update but a round's first
    answers = [False, False, False, False][: 2 * (updates // 2) + updates % 2]
    answers += [True] * 3

    def told():
        asked.append(answers[len(asked)])
        return asked[-1]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "watch", lambda: contextlib.nullcontext(told))
        with pytest.raises(Preempted) as ended:
            train(tmp_path / "parts")
    assert ended.value.code == 143
    assert saved(tmp_path / "parts") == [updates] * bool(updates)
    parts = train(tmp_path / "parts")
    for name in ("steps", "num_tokens", "eval/accuracy_before", "eval/accuracy_after"):
        assert parts[name] == whole[name], name
    for a, b in zip(read_metrics(folder), read_metrics(tmp_path / "parts"), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_array_equal(a.get("loss"), b.get("loss"))
    for file in (folder / "completions").iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / "completions" / file.name).read_bytes()


CALLS = {"done": 0, "hangs": 0}


def share_or_hang(prompts, **columns):
    """As `letter_share`; one call is sent a signal, and does not end."""
    CALLS["done"] += 1
    if CALLS["done"] == CALLS["hangs"]:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(60)
    return letter_share(prompts=prompts, **columns)


@pytest.mark.parametrize("deadline", [None, 50.0])
@pytest.mark.parametrize(("call", "updates"), [(3, 2), (4, 4)])
def test_a_reward_that_hangs_is_abandoned(uninterrupted, tmp_path, call, updates, deadline):
    """In the second round, and in the evaluation at the end."""
    folder, whole = uninterrupted
    CALLS.update(done=0, hangs=call)
    began = time.monotonic()
    with pytest.raises(Preempted):
        train(tmp_path, share_or_hang, rewards__deadline=deadline)
    assert time.monotonic() - began < 40
    assert saved(tmp_path) == [updates]
    assert not (tmp_path / "summary.json").exists()
    parts = train(tmp_path, share_or_hang, rewards__deadline=deadline)
    assert parts["eval/accuracy_after"] == whole["eval/accuracy_after"]
    for a, b in zip(read_metrics(folder), read_metrics(tmp_path), strict=True):
        np.testing.assert_array_equal(a.get("loss"), b.get("loss"))


def test_a_signal_that_is_sent_twice_is_one_signal():
    """Schedulers send it to a process and to its group."""
    with watch() as told_to_end:
        assert not told_to_end()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert told_to_end() == signal.SIGTERM
    with watch() as told_to_end:
        assert not told_to_end()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_program_with_a_handler_of_its_own_keeps_it():
    def own(*_):
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with watch() as told_to_end:
            assert signal.getsignal(signal.SIGTERM) is own
            assert not told_to_end()
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_outside_the_main_thread_the_signal_is_left_alone():
    seen = []

    def run():
        with watch() as told_to_end:
            seen.extend([told_to_end(), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False, signal.SIG_DFL]


def interrupt_after(monkeypatch, updates, *, times=1):
    """Ctrl-C, as the terminal sends it, when so many updates have been sent off."""
    update, seen = Policy.update, []

    def interrupted(self, *arguments):
        result = update(self, *arguments)
        seen.append(1)
        if len(seen) == updates:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.6 * (times > 1))
        return result

    monkeypatch.setattr(Policy, "update", interrupted)


def test_ctrl_c_saves_the_last_whole_update(uninterrupted, tmp_path, monkeypatch, capfd):
    folder, whole = uninterrupted
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="interrupted: saved, the same command goes on"):
            train(tmp_path / "parts")
    out, err = capfd.readouterr()
    assert "Ctrl-C again ends at once" in err
    assert "interrupted: saved, the same command goes on" in out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert saved(tmp_path / "parts") == [3]
    assert not (tmp_path / "parts" / "summary.json").exists()
    parts = train(tmp_path / "parts")
    assert parts["eval/accuracy_after"] == whole["eval/accuracy_after"]
    for a, b in zip(read_metrics(folder), read_metrics(tmp_path / "parts"), strict=True):
        np.testing.assert_array_equal(a.get("loss"), b.get("loss"))


def test_a_second_ctrl_c_ends_at_once_and_says_where_it_goes_on(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, times=2)
        with pytest.raises(KeyboardInterrupt, match="goes on from the checkpoint of step 2"):
            train(tmp_path, checkpoint__every=2)
    assert "same command goes on from the checkpoint of step 2" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert saved(tmp_path) == [2]
    assert train(tmp_path, checkpoint__every=2)["steps"] == 4


def test_before_the_first_update_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt, match="the same command starts over"):
            train(tmp_path)
    assert saved(tmp_path) == []
    assert train(tmp_path)["steps"] == 4


def test_signals_end_the_process_where_nothing_is_to_save():
    with watch() as told_to_end:
        watched = signal.getsignal(signal.SIGTERM)
        with nothing_to_save():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is watched
        os.kill(os.getpid(), signal.SIGINT)
        assert told_to_end() == signal.SIGINT
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


STUCK = """
import hashlib
from gvpo_jax.parallel.preemption import end_when_stuck, nothing_to_save, watch

with end_when_stuck("it was stuck", seconds=0.2), watch():
    print("ready", flush=True)
    {block}hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(
    ("block", "sent", "status"),
    [
        ("with nothing_to_save(): ", [signal.SIGINT], 130),
        ("with nothing_to_save(): ", [signal.SIGTERM], -signal.SIGTERM),
        ("", [signal.SIGINT, signal.SIGINT], 130),
        ("", [signal.SIGTERM, signal.SIGTERM], 143),
    ],
)
def test_a_signal_ends_what_does_not_come_back_to_python(block, sent, status):
    """Many rounds of a hash run in C for minutes, without the interpreter: like a compiler."""
    command = [sys.executable, "-c", STUCK.format(block=block)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    for number in sent:
        time.sleep(0.7)
        assert process.poll() is None
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status
    assert ("it was stuck" in err) == (status > 0)
