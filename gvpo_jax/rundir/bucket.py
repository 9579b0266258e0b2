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
from collections.abc import Callable, Iterator
from pathlib import Path

from gvpo_jax import buckets
from gvpo_jax.errors import UserError

_LOCK = ".lock"
# What is copied. Checkpoints go there by themselves.
_COPIED = (
    *("config.yaml", "metrics.jsonl", "summary.json", "report.html"),
    *("completions", "eval", "tensorboard"),
)
BEAT, SILENT = 20.0, 90.0  # seconds between two signs of life, and without any


def local(run_dir: str | Path) -> Path:
    """The folder on this machine that holds a run's files: the run's own, or that of a bucket."""
    return buckets.copy_of(str(run_dir)) if buckets.is_address(run_dir) else Path(run_dir)


def pull(run_dir: str | Path) -> Path:
    """That folder, level with the bucket; nothing is done to a run's own.

    Raises:
        UserError: the bucket can't be reached.
    """
    folder = local(run_dir)
    if buckets.is_address(run_dir):
        with buckets.alone(folder):
            buckets.Mirror(str(run_dir), folder, _COPIED).pull()
    return folder


def push(run_dir: str | Path) -> None:
    """Copy what has changed in that folder into the bucket, if the run is in one.

    Raises:
        UserError: the bucket can't be reached.
    """
    if buckets.is_address(run_dir):
        buckets.Mirror(str(run_dir), local(run_dir), _COPIED).push()


def entries(run_dir: str | Path) -> list[str]:
    """The names of what lies in a run's folder, here or in a bucket; none where there is none."""
    if buckets.is_address(run_dir):
        return buckets.entries(str(run_dir))
    folder = Path(run_dir)
    return [entry.name for entry in folder.iterdir()] if folder.exists() else []


@contextlib.contextmanager
def hold(run_dir: str, note: Callable[[str], None] = print) -> Iterator[None]:
    """Keep a run in a bucket to this process: by an object that says whose it is, and is alive.

    Whoever finds one waits for a sign of life. Where none comes for `SILENT` seconds, its process
    was killed, and the run is free.

    Raises:
        UserError: another process trains there, or the bucket can't be reached.
    """
    address = f"{run_dir.rstrip('/')}/{_LOCK}"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}

    def sign(beat: int) -> bytes:
        return json.dumps({**mine, "beat": beat, "time": time.time()}).encode()

    while not buckets.create(address, sign(0)):
        _wait_until_silent(address, run_dir, note)
        buckets.remove(address)
        taken = buckets.create(address, sign(0))
        time.sleep(1)  # another one that waited, too, may have removed ours
        if taken and _owner(buckets.read(address)).get("token") == mine["token"]:
            break
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            with contextlib.suppress(UserError):  # the next one may get through
                if _owner(buckets.read(address)).get("token") == mine["token"]:
                    buckets.write(address, sign(count))

    thread = threading.Thread(target=beat, daemon=True, name="run-lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(UserError):
            if _owner(buckets.read(address)).get("token") == mine["token"]:
                buckets.remove(address)


def _wait_until_silent(address: str, run_dir: str, note: Callable[[str], None]) -> None:
    """Returns when the lock is nobody's any more; raises UserError when it is somebody's."""
    first = buckets.read(address)
    owner = _owner(first)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    if owner.get("host") == socket.gethostname() and not _alive(owner.get("pid")):
        return
    age = max(time.time() - owner.get("time", time.time()), 0)
    if age < 10 * SILENT:  # else it died long ago
        note(
            f"{run_dir} was held by {who} {age:.0f} s ago: waiting up to {SILENT:.0f} s for a sign "
            "of life"
        )
        end = time.monotonic() + SILENT
        while time.monotonic() < end and buckets.read(address) == first:
            time.sleep(min(BEAT / 4, 5))
    now = buckets.read(address)
    if now is not None and now != first:
        raise UserError(f"{who} is training in {run_dir}; wait for it, or choose another run.dir")


def _owner(content: bytes | None) -> dict:
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
