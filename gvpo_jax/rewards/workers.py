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
from typing import Any

from gvpo_jax.rewards import RewardError, describe, load_reward_func

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
        jobs: list[_Job] = []
        with self._lock:
            try:
                while waiting or jobs:
                    while waiting and len(jobs) < self._workers:
                        jobs.append(self._begin(*waiting.popleft()))
                    self._wait(jobs, results)
            finally:
                _kill_all([job.worker for job in jobs])
        return results

    def close(self) -> None:
        """End the processes; a later `map` starts new ones."""
        with self._lock:
            _kill_all(self._idle)

    def _begin(self, row: int, arguments: tuple[Any, ...]) -> _Job:
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                worker.send(arguments)
                return _Job(worker, row, arguments, time.monotonic() + self._deadline)
            worker.kill()
        # Importing takes seconds and is not the call's fault: it has a deadline of its own.
        worker = _start(self._function, self._imports, self._deadline)
        return _Job(worker, row, arguments, time.monotonic() + _START_SECONDS, begun=False)

    def _wait(self, jobs: list[_Job], results: list[Any]) -> None:
        """Wait for the next message or deadline; take the jobs that are over out of the list."""
        seconds = min(job.ends for job in jobs) - time.monotonic()
        ready = wait([job.worker.pipe for job in jobs], timeout=max(0.0, seconds))
        for job in list(jobs):
            if job.worker.pipe in ready:
                status, value = job.worker.receive()
            elif time.monotonic() >= job.ends:
                limit = self._deadline if job.begun else _START_SECONDS
                status, value = "killed", f"gave no answer within {limit:g} s"
            else:
                continue
            if status == "ready":
                job.begun, job.ends = True, time.monotonic() + self._deadline
                job.worker.send(job.arguments)
                continue
            if not job.begun:
                raise RewardError(f"the worker for {self._function} did not start: {value}")
            results[job.row] = value if status == "result" else RewardError(value)
            jobs.remove(job)
            if status == "killed":
                job.worker.kill()
            else:
                self._idle.append(job.worker)


def run_each(function: str, *, deadline: float, workers: int = 2) -> Callable[..., list[Any]]:
    """Make a reward function of `function`, called in child processes once per completion.

    The function is "module:name" or "path/to/file.py:name" of a plain
    `(prompt, completion) -> float | None`. A call past `deadline` seconds fails its row only.
    """
    pool = WorkerPool(function, deadline=deadline, workers=workers)

    def each(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[Any]:
        return pool.map(list(zip(prompts, completions, strict=True)))

    each.__name__ = function.rpartition(":")[2]
    return each


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


@dataclass
class _Worker:
    process: subprocess.Popen
    pipe: Connection

    def send(self, arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the child died: receive() says so
            self.pipe.send(arguments)

    def receive(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return "killed", f"its process died with status {self.process.wait()}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


@dataclass
class _Job:
    worker: _Worker
    row: int
    arguments: tuple[Any, ...]
    ends: float
    begun: bool = True


def _start(function: str, imports: list[str], deadline: float) -> _Worker:
    ours, theirs = Pipe()
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
    return _Worker(process, ours)


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
