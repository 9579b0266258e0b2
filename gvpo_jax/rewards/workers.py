"""Processes that run one function call at a time, each call under a deadline that holds.

A reward may hang in C code or wait forever: no thread, signal or event loop ends that, ending its
process does. The processes are plain `python` children, so the caller's script is not run again in
them, and nothing of JAX's threads is forked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from gvpo_jax.rewards import RewardError, describe, load_reward_func
from gvpo_jax.rewards.load import file_of, importable_name

_START_SECONDS = 120.0
_CHILD = "import sys; sys.path[:] = {path!r}; from gvpo_jax.rewards import workers; workers.serve()"


class WorkerPool:
    """Runs `function` ("module:name" or "path/to/file.py:name") in child processes.

    The processes start with the first call and stay. A call that takes longer than `deadline`
    seconds has its process killed, and the next call gets a new one. Arguments and results are
    pickled. The children load the modules `imports` before their first call, outside its deadline.
    """

    def __init__(
        self, function: str, *, deadline: float, workers: int = 2, imports: Sequence[str] = ()
    ) -> None:
        if deadline <= 0 or workers < 1:
            raise ValueError(f"need deadline > 0 and workers >= 1, got {deadline} and {workers}")
        self._function, self._imports = function, list(imports)
        self._deadline, self._workers = deadline, workers
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._idle)

    def map(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The function's result for each tuple of arguments, in order.

        A call that raised, died or ran out of time has a `RewardError` in its place. Raises
        `RewardError` where the function can't be imported in a child.
        """
        results: list[Any] = [None] * len(calls)
        waiting = deque(enumerate(calls))
        busy: list[_Worker] = []
        with self._lock:
            try:
                while waiting or busy:
                    while waiting and len(busy) < self._workers:
                        row, arguments = waiting.popleft()
                        try:
                            message = pickle.dumps(arguments)
                        except Exception as error:
                            told = f"its arguments can't be sent to a process: {describe(error)}"
                            results[row] = RewardError(told)
                        else:
                            busy.append(self._begin(row, message))
                    if busy:
                        self._wait(busy, results)
            finally:
                _kill_all(busy)
        return results

    def close(self) -> None:
        """End the processes; a later `map` starts new ones."""
        with self._lock:
            _kill_all(self._idle)

    def _begin(self, row: int, message: bytes) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                worker.row, worker.message = row, message
                worker.call(self._deadline)
                return worker
            worker.kill()
        process, pipe = _start(self._function, self._imports, self._deadline)
        # Importing takes seconds and is not the call's fault: it has a deadline of its own.
        return _Worker(process, pipe, row, message, time.monotonic() + _START_SECONDS)

    def _wait(self, busy: list[_Worker], results: list[Any]) -> None:
        """Wait for the next message or deadline; take the workers that are done out of the list."""
        seconds = min(worker.ends for worker in busy) - time.monotonic()
        ready = wait([worker.pipe for worker in busy], timeout=max(0.0, seconds))
        for worker in list(busy):
            if worker.pipe in ready:
                status, value = worker.receive()
            elif time.monotonic() >= worker.ends:
                limit = self._deadline if worker.started else _START_SECONDS
                status, value = "killed", f"gave no answer within {limit:g} s"
            else:
                continue
            if status == "ready":
                worker.call(self._deadline)
                continue
            if not worker.started:
                raise RewardError(f"the worker for {self._function} did not start: {value}")
            results[worker.row] = value if status == "result" else RewardError(value)
            busy.remove(worker)
            if status == "killed":
                worker.kill()
            else:
                self._idle.append(worker)


def run_each(function: str, *, deadline: float, workers: int = 2) -> Callable[..., list[Any]]:
    """Make a reward function of `function`, called in child processes once per completion.

    The function is "module:name" or "path/to/file.py:name" of a plain
    `(prompt, completion) -> float | None`. A call past `deadline` seconds fails its row only.
    """
    pool = WorkerPool(function, deadline=deadline, workers=workers)

    def each(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[Any]:
        return pool.map(list(zip(prompts, completions, strict=True)))

    made: Any = each
    made.__name__ = function.rpartition(":")[2]
    made.runs_file = file_of(function)  # whose code this is
    return made


def serve() -> None:
    """The life of a child: import the function, then answer calls until the pipe closes."""
    pipe, (function, imports, deadline) = Connection(int(sys.argv[1])), json.loads(sys.argv[2])
    os.dup2(2, 1)  # what the function prints must not mix with the trainer's output
    try:
        for module in imports:
            importlib.import_module(module)
        func = load_reward_func(function)
    except Exception as error:
        pipe.send(("failed", describe(error)))
        return
    pipe.send(("ready", None))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the trainer is gone
        while True:
            arguments = pipe.recv()
            # If the trainer dies while a call hangs, only the CPU time limit ends this process.
            signal.setitimer(signal.ITIMER_PROF, 60 + 10 * deadline)
            pipe.send(_answer(func, arguments))
            signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(func: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        result = func(*arguments)
        pickle.dumps(result)
    except Exception as error:
        return "raised", describe(error)
    return "result", result


@dataclass(eq=False)
class _Worker:
    """A child process, and the call that it is at: of which row, and when its time is over."""

    process: subprocess.Popen
    pipe: Connection
    row: int
    message: bytes  # the arguments, pickled
    ends: float
    started: bool = False

    def call(self, deadline: float) -> None:
        self.started, self.ends = True, time.monotonic() + deadline
        with contextlib.suppress(BrokenPipeError):  # the child died: receive() says so
            self.pipe.send_bytes(self.message)

    def receive(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return "killed", f"its process died with status {self.process.wait()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def _start(function: str, imports: list[str], deadline: float) -> tuple[Any, Connection]:
    ours, theirs = Pipe()
    if (where := function.rpartition(":")[0]).endswith(".py"):
        importable_name(Path(where))  # here: a process that is killed would leave files behind
    child = _CHILD.format(path=[entry for entry in sys.path if isinstance(entry, str)])
    settings = json.dumps([function, imports, deadline])
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", child, str(theirs.fileno()), settings],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # the accelerator is the trainer's
            start_new_session=True,  # Ctrl-C is the trainer's to handle
        )
    return process, ours


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
