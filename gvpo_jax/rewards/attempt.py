"""Calling and awaiting functions that may fail: an exception becomes the answer.

There is one event loop for all async rewards of a process. A client or a semaphore binds itself to
the loop in which it is first awaited, and then works in no other. The loop has a thread of its own,
because the caller may be inside an event loop already, as notebooks are.
"""

import asyncio
import functools
import os
import sysconfig
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from inspect import isawaitable
from pathlib import Path
from typing import Any

_THREAD = "async rewards"


def attempt(func: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
    """What the function returns, or the exception it raised."""
    process = os.getpid()
    try:
        return func(*args, **named)
    except BaseException as error:
        return failure(error)
    finally:
        if os.getpid() != process:  # it forked, and this is the child: it must not train on
            os._exit(0)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, or a TimeoutError where it takes longer.

    It runs in a thread of its own, which is left behind then: nothing ends a thread from outside.
    """
    answer: Future = Future()
    run = threading.Thread(target=lambda: answer.set_result(call()), daemon=True, name="reward")
    run.start()
    return result_within(seconds, answer)


def result_within(seconds: float | None, future: Future) -> Any:
    """The future's result, or a TimeoutError where it takes longer; None: there is no limit."""
    done, _ = wait([future], seconds)
    return future.result() if done else TimeoutError(f"it took longer than {seconds:g} seconds")


def failure(error: BaseException) -> Exception:
    """The error as a row's failure: some functions take theirs for the program's, and exit.

    Raises:
        KeyboardInterrupt: it is one.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    return error if isinstance(error, Exception) else RuntimeError(describe(error))


def describe(error: BaseException) -> str:
    """An exception's type and message on one line, and the line of the user's file, if any."""
    told = " ".join(f"{type(error).__name__}: {error}".split())
    lines = traceback.extract_tb(error.__traceback__)
    theirs = [line for line in lines if not _is_not_theirs(line.filename)]
    return f"{told} ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else told


_PACKAGE = str(Path(__file__).parents[1])
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def _is_not_theirs(file: str) -> bool:
    """This package's, another library's, or no file."""
    return file.startswith((_PACKAGE, *_LIBRARIES, "<"))


def needs_loop(answer: Any) -> bool:
    """Whether an answer, or an entry of a list, has to be awaited."""
    return isawaitable(answer) or (
        isinstance(answer, list | tuple) and any(map(isawaitable, answer))
    )


def submit(answer: Any) -> Future:
    """Await it, or the entries of a list at the same time; an exception becomes the result."""
    here = threading.current_thread().name  # an async reward may call others: theirs run elsewhere
    name = f"{here}, within" if here.startswith(_THREAD) else _THREAD
    return asyncio.run_coroutine_threadsafe(finish(answer), _loop(os.getpid(), name))


async def finish(answer: Any) -> Any:
    """As `submit`, within a loop."""
    try:
        answer = await answer if isawaitable(answer) else answer
        return await finish_all(answer) if needs_loop(answer) else answer
    except BaseException as error:
        return failure(error)


async def finish_all(answers: Sequence[Any]) -> list[Any]:
    """`finish` of each, at the same time."""
    return await asyncio.gather(*map(finish, answers))


@functools.cache
def _loop(process: int, name: str) -> asyncio.AbstractEventLoop:
    """That of this process: a forked one has none of its parent's threads."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        while True:
            try:
                loop.run_forever()
            except BaseException:  # sys.exit in a task ends the loop; the task's result tells of it
                continue

    threading.Thread(target=run, name=name, daemon=True).start()
    return loop
