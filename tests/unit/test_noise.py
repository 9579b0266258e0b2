"""What a command leaves out of what libraries log of a failed write, and what it does not."""

import asyncio
import logging
import sys
import threading

import pytest

from gvpo_jax.noise import without_tracebacks


@pytest.fixture
def told(monkeypatch, caplog):
    """What is logged while a command runs."""
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [list(logger.filters) for logger in loggers]
    without_tracebacks()
    with caplog.at_level(logging.ERROR):
        yield lambda: caplog.text
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


def leave_failed_task(message):
    """A task whose exception nobody reads, as asyncio tells of it."""

    async def fail():
        raise ValueError(message)

    async def leave():
        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(0)
        del task

    asyncio.run(leave())


def test_writes_that_fail_beside_the_first_are_not_told(told):
    leave_failed_task('OUT_OF_RANGE: Error writing "kernel/0.0" in OCDBT database: File too large')
    assert told() == ""


def test_a_failed_task_of_somebody_else_is_told(told):
    leave_failed_task("the judge did not answer")
    assert "the judge did not answer" in told()
    assert "Traceback" in told()


def test_a_failure_of_orbax_is_one_line(told):
    try:
        raise OSError("no space left\n" + "x" * 1_000)
    except OSError as error:
        logging.getLogger("absl").exception("saving failed: %s", error)
    assert "saving failed: no space left" in told()
    assert "Traceback" not in told()
    assert len(told()) < 400
