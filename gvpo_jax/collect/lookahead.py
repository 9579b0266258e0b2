"""Rounds drawn ahead: while the trainer works on one, a thread samples and scores the next."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass
class Lookahead(Generic[T]):
    """Draws round n + ahead when round n is taken, so that a round is at most `ahead` rounds stale.

    The schedule is fixed: which policy draws which round does not depend on how fast anything runs.
    So a resumed run is that of an uninterrupted one, if it `load`s what was pending.
    """

    # (number of a round, parameters) -> the round; called in one other thread, in order
    draw: Callable[[int, Any], T]
    snapshot: Callable[[], Any]  # the current parameters, in a copy that training won't overwrite
    ahead: int  # rounds, at least 1
    last: int  # number of the last round
    interrupt: Callable[[], None] = lambda: None  # makes what is being drawn fail soon, if it can

    def __post_init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self._pending: dict[int, Future[T]] = {}

    def take(self, number: int) -> T:
        """Round `number`; rounds after the `last` are not begun."""
        wanted = range(number, min(number + self.ahead, self.last) + 1)
        missing = [n for n in wanted if n not in self._pending]
        if missing:
            params = self.snapshot()
            for n in missing:
                self._pending[n] = self._thread.submit(self.draw, n, params)
        return self._pending.pop(number).result()

    def pending(self) -> dict[int, T]:
        """The rounds that were begun and not yet taken, once they are done.

        Without one that failed: its error is for `take`, and what came before can be saved.
        """
        done = sorted(self._pending.items())
        return {n: future.result() for n, future in done if future.exception() is None}

    def load(self, rounds: Mapping[int, T]) -> None:
        """Take over what `pending` gave."""
        for number, drawn in rounds.items():
            self._pending[number] = future = Future()
            future.set_result(drawn)

    def close(self) -> None:
        """Drop what was not begun, and interrupt what is being drawn."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.interrupt()
        while not all(future.done() for future in self._pending.values()):
            time.sleep(0.05)
            self.interrupt()  # again: the last one may have come between two requests
        self._thread.shutdown(wait=True)
