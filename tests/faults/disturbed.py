"""`gvpo-jax`, with something that happens to it: python disturbed.py PHASE WHEN COUNT WHAT -- ARGS

PHASE names a function of PHASES, WHEN is before or after, COUNT which of its calls, from 1 on. WHAT
is a signal's name, once or several times (SIGTERM+SIGTERM: 30 ms apart), or an error's (ENOSPC).
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# Where in a run: the module, and what it calls by this name.
PHASES = {
    "rollout": ("gvpo_jax.rollout.inprocess", "InProcessEngine.generate"),
    "reward": ("gvpo_jax.collect.collector", "compute_rewards"),
    "update": ("gvpo_jax.training.policy", "Policy.update"),
    "save": ("gvpo_jax.training.checkpoint", "Checkpoints.save"),
    "evaluation": ("gvpo_jax.loop", "evaluate"),
    "metrics": ("gvpo_jax.rundir.writers", "MetricsWriter.log"),
    "summary": ("gvpo_jax.loop", "write_text"),
    "report": ("gvpo_jax.loop", "write_report"),
}


def main() -> int:
    phase, when, count, what, _, *arguments = sys.argv[1:]
    import importlib

    module, name = PHASES[phase]
    owner: Any = importlib.import_module(module)
    *outer, name = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    setattr(owner, name, disturbed(getattr(owner, name), when, int(count), what))
    from gvpo_jax.cli import main as gvpo_jax

    return gvpo_jax(arguments)


def disturbed(function: Callable[..., Any], when: str, count: int, what: str):
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == count
        if now and when == "before":
            happen(what)
        result = function(*arguments, **options)
        if now and when == "after":
            happen(what)
        return result

    call.__name__ = getattr(function, "__name__", "call")
    call.__module__ = function.__module__
    return call


def happen(what: str) -> None:
    if hasattr(errno, what):
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))
    for name in what.split("+"):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.03)


if __name__ == "__main__":
    sys.exit(main())
