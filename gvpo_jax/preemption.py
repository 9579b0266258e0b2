"""SIGTERM, which schedulers send before they take a machine away: save, then end."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# JAX lets its processes agree on one of these numbers, which have to follow each other.
_questions = itertools.count()


class Preempted(SystemExit):
    """The run was saved and ended on SIGTERM; ends the process with status 143, as shells do."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether the run shall save and end.

    All processes ask it equally often, and all hear True at the same question. A process that
    joined no others gets SIGTERM's default action back after the first, so that a second one ends
    it at once; where the program has a handler of its own, or this is not its main thread, SIGTERM
    is left alone.
    """
    if jax.distributed.is_initialized():
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_questions))
        return
    told = threading.Event()

    def on_signal(*_):
        told.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield told.is_set
        return
    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield told.is_set
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
