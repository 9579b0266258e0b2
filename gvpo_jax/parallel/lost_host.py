"""Another host's death: JAX ends this process too, and this says why and what to do.

A failing exchange between hosts raises an error in Python. Where JAX's runtime sees the death
first, it aborts the process, and no code in it can say a word. A small process beside it does.
"""

import atexit
import contextlib
import re
import subprocess
import sys

import jax

STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command may work if it is started again

_AGAIN = "start the same command again on all hosts: a run goes on from its last checkpoint"
_ABORTED = (
    "gvpo-jax: this process was ended by a signal, or by JAX because another host died or fell "
    f"silent; {_AGAIN}\n"
)
# Of the collectives on CPUs and GPUs, and of the coordination service.
_SIGNS = re.compile(
    r"\bgloo\b|\bnccl\b|coordination.?service|heartbeat|another task|"
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)",
    re.IGNORECASE,
)
_READ_ONE = "import sys; sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])"


def what_was_lost(error: BaseException) -> str | None:
    """A line for the user where this error is another host's death; None: it is not."""
    if not jax.distributed.is_initialized() or not _SIGNS.search(str(error)):
        return None
    reason = " ".join(str(error).split())[:200]
    return f"another host died or fell silent, so this one ends too; {_AGAIN} ({reason})"


_witnesses: list[subprocess.Popen[bytes]] = []


def call_witness() -> None:
    """Have a process beside this one say why this one was ended, unless it is dismissed."""
    if jax.process_count() == 1 or _witnesses:
        return
    # Not in this process group, whose signals are not for it.
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _READ_ONE, _ABORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    _witnesses.append(witness)
    atexit.register(dismiss_witness)


def dismiss_witness() -> None:
    """This process ends by itself, and has said why."""
    for witness in _witnesses:
        assert witness.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            witness.stdin.write(b".")
            witness.stdin.close()
        witness.wait()
    _witnesses.clear()
