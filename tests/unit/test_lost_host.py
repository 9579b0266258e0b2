"""What a process says where another host of its run has died; the real thing is in tests/faults."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.parallel import lost_host

GLOO = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:2: Connection reset"


def in_a_save():
    try:
        try:
            raise ValueError(GLOO)
        except ValueError as error:
            raise UserError(f"could not write checkpoint 2 to runs/x: {error}") from None
    except UserError as error:
        return error


RUNTIME = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RUNTIME(GLOO), True),
        (ValueError(GLOO), True),
        (in_a_save(), True),
        (RUNTIME("UNAVAILABLE: Failed to send RPC to coordination service"), True),
        (RUNTIME("INTERNAL: NCCL operation failed: remote process exited"), True),
        (RUNTIME("RESOURCE_EXHAUSTED: Out of memory"), False),
        (RUNTIME("UNAVAILABLE: TPU initialization failed: Device or resource busy"), False),
        (RUNTIME("RESOURCE_EXHAUSTED: of NCCL scratch"), False),
        (ValueError("NCCL: ncclCommInitRankConfig failed: invalid usage"), False),
        (RuntimeError("DEADLINE_EXCEEDED: reward service timed out"), False),
        (KeyError("heartbeat"), False),
        (UserError("/data/heartbeat-qa/rows.jsonl:1: no column 'prompt'"), False),
        (UserError("http://localhost:8000 can't be reached: Connection refused"), False),
        (ValueError("shapes differ"), False),
    ],
)
def test_another_hosts_death_is_told_from_other_errors(error, lost, monkeypatch):
    assert lost_host.what_was_lost(error) is None  # this run is alone
    monkeypatch.setattr(lost_host, "_witness", [None])
    line = lost_host.what_was_lost(error)
    assert (line is not None) == lost
    if line:
        assert "another host died or fell silent" in line
        assert "\n" not in line
        assert len(line) < 450


AGAIN = "start the same command again on all hosts"
PROGRAM = """
import os, sys, time, jax
jax.process_count = lambda: 2
from gvpo_jax.parallel import lost_host
lost_host.call_witness()
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("os.abort()", -signal.SIGABRT, True),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, True),
        ("", 0, False),
        ("raise SystemExit(3)", 3, False),
        ("lost_host.dismiss_witness(); os._exit(75)", 75, False),
        # A fork holds the pipe open no longer, and ends without a word for its parent.
        ("os.fork() or time.sleep(9); os.abort()", -signal.SIGABRT, True),
        ("os.fork() or sys.exit(); os.wait(); os.abort()", -signal.SIGABRT, True),
    ],
)
def test_a_process_that_can_say_nothing_has_a_witness(tmp_path, end, status, said):
    environment = os.environ | {"PYTHONFAULTHANDLER": ""}
    with (tmp_path / "errors").open("w") as errors:  # which a fork that sleeps keeps open
        done = subprocess.run([sys.executable, "-c", PROGRAM + end], stderr=errors, env=environment)
    assert done.returncode == status
    deadline = time.monotonic() + (20 if said else 1)
    while not (told := (tmp_path / "errors").read_text().count(AGAIN)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert told == said


@pytest.mark.parametrize("python", ["", "/no/such/python"])
def test_without_a_python_to_start_there_is_no_witness(python):
    code = f"import sys; sys.executable = {python!r}\n{PROGRAM}\nprint('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "on\n", done.stderr
