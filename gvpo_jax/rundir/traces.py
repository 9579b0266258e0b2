"""A trace of some updates of a run, taken by JAX's profiler, for xprof or TensorBoard to open."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gvpo_jax.errors import UserError


def traced_updates(text: str | None) -> range:
    """The updates, counted from 1, that START:COUNT means; none for None.

    Raises:
        UserError: it is something else, or one of the two is 0.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    start, count = map(int, found.groups()) if found else (0, 0)
    if not start or not count:
        raise UserError(
            f"log.profile={text}: write START:COUNT, two numbers from 1 on; 3:2 traces the updates "
            "3 and 4"
        )
    return range(start, start + count)


class Trace:
    """The trace of these updates, with the rollouts and evaluations between them.

    Args:
        folder: where it is written.
        updates: from the first to the last, counted from 1.
        attempt: calls a function, and shows a line where that fails.
        note: shows a line.
    """

    def __init__(
        self,
        folder: Path,
        updates: range,
        attempt: Callable[[Callable[[], Any]], None],
        note: Callable[[str], None],
    ):
        self._folder, self._updates = folder, updates
        self._attempt, self._note = attempt, note
        self._first = 0  # that is traced; 0: none so far
        self._running = False

    def begin(self, step: int) -> None:
        """Before update `step` and its rollout; may be called several times."""
        if step in self._updates and not self._first:
            self._first = step
            self._attempt(self._start)

    def end(self, step: int, results: Any) -> None:
        """After update `step` was sent off. It is waited for if it is the last to be traced."""
        if self._running and step + 1 not in self._updates:
            jax.block_until_ready(results)
            self._stop(step)

    def close(self, step: int) -> None:
        """At the end of a session, after update `step`."""
        if self._running:
            self._stop(step)
        elif self._updates and not self._first:
            first, last = self._updates[0], self._updates[-1]
            self._note(f"log.profile: no update from {first} to {last} in this session")

    def _start(self) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._running = True

    def _stop(self, step: int) -> None:
        self._running = False
        self._attempt(jax.profiler.stop_trace)
        self._note(f"updates {self._first} to {step} are traced: xprof --logdir {self._folder}")
