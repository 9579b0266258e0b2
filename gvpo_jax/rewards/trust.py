"""The code that this user has trained with here, which `gvpo-jax eval` runs without asking.

A run folder may come from somebody else, and its config names functions to call. Training leaves an
empty file for each function in ~/.local/state/gvpo-jax/trained_with, named by what the function is:
its module, or its file's place and content.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path


def remember(specs: Sequence[str]) -> None:
    """Of functions, as `module:function` or `path/file.py:function`; nothing where it can't."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            (folder / _key(spec)).touch()


def unknown(specs: Sequence[str]) -> list[str]:
    """Those of the functions that are neither this package's own nor remembered."""
    foreign = [spec for spec in specs if spec.partition(".")[0] != __name__.partition(".")[0]]
    found = []
    for spec in foreign:
        try:
            known = (_folder() / _key(spec)).exists()
        except (OSError, RuntimeError):
            known = False
        if not known:
            found.append(spec)
    return found


def _folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "gvpo-jax" / "trained_with"


def _key(spec: str) -> str:
    where, _, name = spec.rpartition(":")
    what = [spec]
    if where.endswith(".py"):
        file = Path(where).resolve()
        what = [str(file), name, hashlib.sha256(file.read_bytes()).hexdigest()]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
