"""SIGTERM, which schedulers send before they take a machine away: save, then end."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from gvpo_jax.parallel.distributed import max_over_hosts


class Preempted(SystemExit):
    """The run was saved and ended on SIGTERM; ends the process with status 143, as shells do."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Gives a function that tells whether the run shall save and end.

    All processes ask it equally often, and all hear True once one of them got the signal. JAX's own
    agreement on a step is not used: Orbax asks it too, with other numbers, and it misses a signal
    that comes in between. After the first signal the default action is back, so that a second one
    ends the process at once. Where the program has a handler of its own, or this is not its main
    thread, SIGTERM is left alone.
    """
    told = threading.Event()

    def on_signal(*_):
        told.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    in_main = threading.current_thread() is threading.main_thread()
    ours = in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, on_signal)
    try:
        yield lambda: bool(max_over_hosts(int(told.is_set())))
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
