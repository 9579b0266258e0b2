"""What a process says where another host of its run has died; the real thing is in tests/faults."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.parallel.lost_host import what_was_lost

GLOO = "UNKNOWN: Gloo AllGather failed: [pair.cc:538] Read error [127.0.0.1]:2: Connection reset"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError(GLOO), True),
        (ValueError(GLOO), True),
        (UserError(f"could not write checkpoint 2 to runs/x: {GLOO}"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Failed to send RPC to coordinator"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (UserError("http://localhost:8000 can't be reached: Connection refused"), False),
        (ValueError("shapes differ"), False),
    ],
)  # fmt: skip
def test_another_hosts_death_is_told_from_other_errors(error, lost, monkeypatch):
    assert what_was_lost(error) is None  # this run is alone
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    line = what_was_lost(error)
    assert (line is not None) == lost
    if line:
        assert "another host died or fell silent" in line
        assert "\n" not in line
        assert len(line) < 450


PROGRAM = """
import os, jax
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
    ],
)
def test_a_process_that_can_say_nothing_has_a_witness(end, status, said):
    environment = os.environ | {"PYTHONFAULTHANDLER": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + end], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert done.returncode == status
    assert done.stderr.count("start the same command again on all hosts") == said
