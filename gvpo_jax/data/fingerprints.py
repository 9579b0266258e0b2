"""Texts that tell values and code from others, the same in every process."""

import functools
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def stable_json(value: Any) -> str:
    """A value as JSON, with texts for what JSON does not know.

    Raises:
        ValueError: it contains itself. RecursionError is another sign of that.
    """
    try:
        return json.dumps(value, sort_keys=True, default=stable_text)
    except TypeError:  # keys of several types, or of one that JSON does not know
        return json.dumps(_with_text_keys(value), sort_keys=True, default=stable_text)


def stable_text(value: Any) -> str:
    """A value as text, which depends neither on the order in a set nor on an address."""
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(stable_json, value))) + "}"
    text = str(value)
    if not _ADDRESS.search(text):
        return text
    return source_of(value) if callable(value) else _ADDRESS.sub("", text)


def source_of(func: Any) -> str:
    """A function's source, with the arguments that functools.partial gave it; else its name."""
    if isinstance(func, functools.partial):
        return stable_json([source_of(func.func), func.args, func.keywords])
    func = inspect.unwrap(func)
    named = func if hasattr(func, "__qualname__") else type(func)
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):  # typed in, or written in C
        return f"{named.__module__}.{named.__qualname__}"


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else f"({stable_json(key)})": _with_text_keys(item)
            for key, item in value.items()
        }
    return list(map(_with_text_keys, value)) if isinstance(value, list | tuple) else value
