"""Another host's death: JAX ends this process too, and this says why and what to do.

A failing exchange between hosts raises an error in Python. Where JAX's runtime sees the death
first, it aborts the process, and no code in it can say a word. A small process beside it does.
"""

import atexit
import contextlib
import os
import re
import subprocess
import sys

import jax

from gvpo_jax.errors import UserError

STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may work if it is started again

_AGAIN = "start the same command again on all hosts: a run goes on from its last checkpoint"
_ABORTED = (
    "gvpo-jax: this process was ended by a signal, or by JAX because another host died or fell "
    f"silent; {_AGAIN}\n"
)
# Of the collectives on CPUs and GPUs, and of the coordination service.
_SIGNS = re.compile(
    r"\bGloo \w+ failed|NCCL.*remote process|coordination.?service|another task died", re.IGNORECASE
)
_READ_ONE = "import sys; sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])"


# This process's witness, once it runs with others.
_witness: list[subprocess.Popen[bytes] | None] = []


def what_was_lost(error: BaseException) -> str | None:
    """A line for the user where this error is another host's death; None: it is not."""
    cause = error.__cause__ or error.__context__ if isinstance(error, UserError) else error
    known = isinstance(cause, jax.errors.JaxRuntimeError | ValueError)
    if not _witness or not known or isinstance(cause, UserError):
        return None
    if not _SIGNS.search(str(cause)):
        return None
    reason = " ".join(str(cause).split())[:200]
    return f"another host died or fell silent, so this one ends too; {_AGAIN} ({reason})"


def call_witness() -> None:
    """Have a process beside this one say why this one was ended, unless it is dismissed."""
    if jax.process_count() == 1 or _witness:
        return
    _witness.append(None)
    with contextlib.suppress(OSError):  # there is no Python to start: it would be of use, no more
        # Not in this process group, whose signals are not for it.
        _witness[0] = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _READ_ONE, _ABORTED],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(dismiss_witness)
        os.register_at_fork(after_in_child=_leave_to_parent)


def dismiss_witness() -> None:
    """This process ends by itself, and has said why."""
    for witness in filter(None, _witness):
        assert witness.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            witness.stdin.write(b".")
            witness.stdin.close()
        witness.wait()
    _witness.clear()


def _leave_to_parent() -> None:
    """In a forked process: it must neither dismiss the witness nor keep it waiting."""
    for witness in filter(None, _witness):
        assert witness.stdin is not None
        with contextlib.suppress(OSError):
            os.close(witness.stdin.fileno())
    _witness.clear()
