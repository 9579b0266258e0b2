"""What this user has trained with here, which `gvpo-jax eval` uses without asking.

A run folder may come from somebody else, and its config names functions to call and servers to talk
to. Training leaves an empty file for each in ~/.local/state/gvpo-jax/trained_with, named by what it
is: a function's module, or its file's place and content; addresses, and whose key they get.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

# Of the functions that come with the package those that judge, and do nothing else.
OWN_REWARDS = (
    "gvpo_jax.rewards.debug:letter_share",
    "gvpo_jax.rewards.math:math_verify",
    "gvpo_jax.rewards.numbers:exact_number",
    "gvpo_jax.rewards.reasoning_gym:reasoning_gym_score",
    "gvpo_jax.rewards.shaping:think_format",
)


def remember(specs: Sequence[str]) -> None:
    """Of functions, as `module:function` or `path/file.py:function`, and other texts.

    Nothing where it can't.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            (folder / _key(spec)).touch()


def unknown(specs: Sequence[str]) -> list[str]:
    """Those that are not remembered."""
    found = []
    for spec in specs:
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
