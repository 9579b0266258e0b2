"""SIGTERM, which schedulers send before they take a machine away, and Ctrl-C: save, then end."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from gvpo_jax.parallel.distributed import max_over_hosts
from gvpo_jax.parallel.lost_host import dismiss_witness

_DEFAULTS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_AT_ONCE = 0.5  # seconds in which two signals are one, sent to a process and its group say
_TOLD = b"\ninterrupted: finishing this update, then saving; Ctrl-C again ends at once\n"


class Preempted(SystemExit):
    """The run was saved and ended on SIGTERM; ends the process with status 143, as shells do."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was ended with Ctrl-C; its text says what is saved, and has been shown."""


class Abandoned(KeyboardInterrupt):
    """A signal came while something ran that may be left undone."""


class _Told:
    """A handler that keeps what it was told; a second signal ends the process."""

    def __init__(self) -> None:
        self.signal, self._since = 0, 0.0
        self.abandons = False  # raises, where it interrupts

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._since = number, time.monotonic()
            if number == signal.SIGINT:
                with contextlib.suppress(OSError):  # nobody reads it
                    os.write(2, _TOLD)  # print may be what was interrupted
            if self.abandons:
                raise Abandoned
        elif time.monotonic() - self._since > _AT_ONCE:
            signal.signal(number, _DEFAULTS[signal.Signals(number)])
            signal.raise_signal(number)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], int]]:
    """Gives a function that tells whether the run shall save and end: the signal, or 0.

    All processes ask it equally often, and all hear of the signal once one of them got it. JAX's
    own agreement on a step is not used: Orbax asks it too, with other numbers, and it misses a
    signal that comes in between. A second one, half a second later or more, ends the process at
    once. Where the program has a handler of its own, or this is not
    its main thread, the signal is left alone.
    """
    told = _Told()
    in_main = threading.current_thread() is threading.main_thread()
    ours = [s for s, default in _DEFAULTS.items() if in_main and signal.getsignal(s) is default]
    for number in ours:
        signal.signal(number, told)
    try:
        yield lambda: max_over_hosts(told.signal)
    finally:
        for number in ours:
            signal.signal(number, _DEFAULTS[number])


@contextlib.contextmanager
def abandoned_on_signal() -> Iterator[None]:
    """What takes any time, and is done again when the run goes on: it keeps no signal waiting.

    In the main thread of a run that is alone; of several processes all must agree to end.

    Raises:
        Abandoned: a signal came that `watch` looks for.
    """
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    handlers = map(signal.getsignal, _DEFAULTS) if alone else ()
    told = [handler for handler in handlers if isinstance(handler, _Told)][:1]
    for handler in told:
        handler.abandons = True
    try:
        yield
    finally:
        for handler in told:
            handler.abandons = False


@contextlib.contextmanager
def nothing_to_save() -> Iterator[None]:
    """Signals that `watch` looks for end the process at once, also while a program is compiled.

    Of several processes all must agree to end, so there nothing changes.
    """
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    watched = {s: signal.getsignal(s) for s in _DEFAULTS if alone}
    watched = {s: told for s, told in watched.items() if isinstance(told, _Told)}
    for number in watched:
        signal.signal(number, _DEFAULTS[number])
    try:
        yield
    finally:
        for number, told in watched.items():
            signal.signal(number, told)


@contextlib.contextmanager
def end_when_stuck(message: str, *, seconds: float = 5) -> Iterator[None]:
    """Ends the process on a signal that Python does not get to, say while XLA compiles.

    That is on Ctrl-C, or a second signal for a run that saves on the first, if the `with` block is
    not left within some seconds. The status is 128 + the signal. For a command, in the main thread:
    the process ends without cleaning up.

    Args:
        message: what standard error is told then.
        seconds: how long the block may take to end.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    left = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def look() -> None:
        seen, last = Counter[int](), dict[int, float]()
        while not left.is_set():
            if not select.select([reading], [], [], 0.5)[0]:
                continue
            for number in os.read(reading, 100):
                now = time.monotonic()
                seen[number] += now - last.get(number, 0) > _AT_ONCE
                last[number] = now
                unwatched = signal.getsignal(number) is signal.default_int_handler
                at_once = number in _DEFAULTS and (unwatched or seen[number] > 1)
                if at_once and not left.wait(seconds):
                    with contextlib.suppress(OSError):
                        os.write(2, f"{message}\n".encode())
                    dismiss_witness()
                    os._exit(128 + number)
        os.close(reading)
        os.close(writing)

    threading.Thread(target=look, daemon=True, name="end when stuck").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
