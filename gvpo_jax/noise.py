"""What libraries print of a failed write, beside the one line that gvpo-jax tells the user."""

import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

# Orbax's threads and TensorStore's callbacks outlive the save that failed.
_AFTERMATH = ("Event loop is closed", "cannot schedule new futures after shutdown")


def without_tracebacks() -> None:
    """For a command: Orbax logs a failure in one line, and not what follows from it."""
    logging.getLogger("absl").addFilter(_shorten)
    logging.getLogger("asyncio").addFilter(_of_others)
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        setattr(module, name, _without_aftermath(getattr(module, name)))


def _without_aftermath(show: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A hook of Python's that shows what `show` does, but for that."""

    def hook(told: Any) -> None:
        if str(told.exc_value) not in _AFTERMATH:
            show(told)

    return hook


def _of_others(record: logging.LogRecord) -> bool:
    """False for a write of Orbax's that failed beside the one that is told."""
    text = record.getMessage()
    unread = "exception was never retrieved" in text
    return not (unread and ("orbax" in text or "OCDBT" in text))


def _shorten(record: logging.LogRecord) -> bool:
    text = " ".join(record.getMessage().split())
    if any(after in text for after in _AFTERMATH):
        return False
    record.msg, record.args = text if len(text) <= 300 else f"{text[:297]}...", None
    record.exc_info = record.exc_text = None
    return True
