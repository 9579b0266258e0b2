"""A run folder in a bucket: written here, copied there, and held against other runs.

Objects can't be appended to, renamed or locked. So a run writes its files into a folder of this
machine, and copies what has changed whenever it saves or evaluates. Checkpoints go straight into
the bucket, from every process, by Orbax; whole is one with a file `commit_success.txt`.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gvpo_jax import buckets
from gvpo_jax.errors import UserError

_LOCK = ".lock"
# What is copied. Checkpoints go there by themselves.
_COPIED = (
    *("config.yaml", "metrics.jsonl", "summary.json", "report.html"),
    *("completions", "eval", "tensorboard", "profile"),
)
BEAT, SILENT = 20.0, 90.0  # seconds between two signs of life, and without any


def local(run_dir: str | Path) -> Path:
    """The folder on this machine that holds a run's files: the run's own, or that of a bucket."""
    return buckets.copy_of(str(run_dir), "runs") if buckets.is_address(run_dir) else Path(run_dir)


def pull(run_dir: str | Path) -> Path:
    """That folder, level with the bucket; nothing is done to a run's own.

    Raises:
        UserError: the bucket can't be reached.
    """
    if buckets.is_address(run_dir):
        buckets.Mirror(str(run_dir), local(run_dir), _COPIED).pull()
    return local(run_dir)


def push(run_dir: str | Path, *, only: str | None = None) -> None:
    """Copy what has changed in that folder into the bucket, if the run is in one.

    only: the one file that was written.

    Raises:
        UserError: the bucket can't be reached.
    """
    if buckets.is_address(run_dir):
        buckets.Mirror(str(run_dir), local(run_dir), _COPIED, only=only).push()


def entries(run_dir: str | Path) -> list[str]:
    """The names of what lies in a run's folder, here or in a bucket; none where there is none."""
    if buckets.is_address(run_dir):
        return buckets.entries(str(run_dir))
    folder = Path(run_dir)
    return [entry.name for entry in folder.iterdir()] if folder.exists() else []


class Hold:
    """A run in a bucket, kept to this process by an object that says whose it is, and is alive.

    Whoever finds one waits for a sign of life. Where none comes for `SILENT` seconds, its process
    was killed, and the run is free. A context manager.

    Args:
        run_dir: the run's address.
        note: is told in a line if there is something to wait for.
    """

    def __init__(self, run_dir: str, note: Callable[[str], None] = print):
        self._run_dir, self._note = run_dir, note
        self._address = f"{buckets.normal(run_dir)}/{_LOCK}"
        self._owner = {**_here(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self._sign: bytes | None = None  # the last that stands there
        self._beats, self._lock, self._ended = 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-lock")

    def __enter__(self) -> "Hold":
        sign = self._next()
        while not buckets.swap(self._address, None, sign):
            left = self._wait_until_silent()
            if left is not None and buckets.swap(self._address, left, sign):
                break
        self._sign = sign
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError):
            buckets.swap(self._address, self._sign, None)

    def check(self) -> None:
        """Give a sign of life now.

        Raises:
            UserError: the run is not this process's any more, or the bucket can't be reached.
        """
        with self._lock:
            sign = self._next()
            if not buckets.swap(self._address, self._sign, sign):
                who = _name(_read(buckets.read(self._address)))
                raise UserError(
                    f"{self._run_dir} has been taken over by {who}, which heard nothing of this "
                    "one; what is saved is there"
                )
            self._sign = sign

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(UserError):  # the next may get through; a save asks, too
                self.check()

    def _next(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._owner, "beat": self._beats, "time": time.time()}).encode()

    def _wait_until_silent(self) -> bytes | None:
        """What the object holds when it is nobody's any more; None: it is gone.

        Raises:
            UserError: it is somebody's.
        """
        first = buckets.read(self._address)
        owner = _read(first)
        same = {name: owner.get(name) for name in _here()} == _here()
        if first is None or (same and not _alive(owner.get("pid"))):
            return first
        self._note(
            f"{self._run_dir} is held by {_name(owner)}: waiting up to {SILENT:.0f} s for a sign "
            "of life"
        )
        end = time.monotonic() + SILENT
        while (now := buckets.read(self._address)) == first and time.monotonic() < end:
            time.sleep(min(BEAT / 4, 5))
        if now is not None and now != first:
            raise UserError(
                f"{_name(_read(now))} is training in {self._run_dir}; wait for it, or choose "
                "another run.dir"
            )
        return now


def _here() -> dict[str, str]:
    """What tells this machine, since it was started, and its processes' numbers from others."""
    boot, numbers = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbers = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": numbers}


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _read(content: bytes | None) -> dict[str, Any]:
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True
