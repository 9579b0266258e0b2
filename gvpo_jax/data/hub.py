"""Datasets of the Hugging Face hub, through `datasets` (extra `hub`)."""

import contextlib
import importlib
import os
import re
import socket
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from gvpo_jax.data.files import SUFFIXES, NoSuchFile
from gvpo_jax.errors import Page, UserError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_NOT_HERE = "there is no such file or folder here"
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def is_hub_name(path: str) -> bool:
    """Whether it can only be a name such as openai/gsm8k: nothing lies there on this machine."""
    is_file = path.lower().endswith(SUFFIXES)
    return bool(_NAME.fullmatch(path)) and not is_file and not os.path.exists(path)


def read_hub(
    path: str,
    name: str | None,
    split: str,
    settings: tuple[str, str],
    *,
    streaming: bool = False,
) -> Iterator[tuple[str, Any]]:
    """The rows of a split, each with its place.

    They are downloaded once, into `datasets`' own cache, or each time as they are asked for, where
    they are streamed. `settings` are what give name and split.

    Raises:
        UserError: there is no such dataset, name or split, or it can't be had from here.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f'{path}: datasets is missing: pip install "gvpo-jax[hub]"', page=Page.EXTRAS
        ) from None
    try:
        with _at_once_if_offline():
            how = {"streaming": True} if streaming else {}
            rows = datasets.load_dataset(path, name, split=split, **how)
    except Exception as error:  # each of its versions and file formats has its own
        reason = _reason(error, *settings)
        kind = NoSuchFile if reason.startswith(_NOT_HERE) else UserError
        raise kind(f"{path}: {reason}") from None
    return _placed(path, split, rows)


def _placed(path: str, split: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{path} ({split}): row {number}", row
    except Exception as error:  # of the network, say
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"{path} ({split}): can't be read after row {number}: {reason}") from None


def _reason(error: Exception, name: str, split: str) -> str:
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    if isinstance(error, ConnectionError):
        return (
            f"{_NOT_HERE}, nor such a dataset in the cache, and the hub "
            "can't be reached: load it where there is a network, and give its files in place of "
            "the name"
        )
    if kind == "DatasetNotFoundError":
        return (
            f"{_NOT_HERE}, and no such dataset on the hub, or it is "
            f"private or gated: then log in with hf auth login ({text})"
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"{name} says which of its parts: {text}"
    if "split" in text.lower():
        return f"{split} says which of its splits: {text}"
    return f"can't be read: {kind}: {text}"


@contextlib.contextmanager
def _at_once_if_offline() -> Iterator[None]:
    """Spares the half minute in which `datasets` tries again to reach a hub that is not there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or any(os.environ.get(proxy) for proxy in _PROXIES):
        yield
        return
    where = urllib.parse.urlsplit(constants.ENDPOINT)
    port = where.port or (443 if where.scheme == "https" else 80)
    config: Any = importlib.import_module("datasets").config
    with contextlib.ExitStack() as stack:
        try:
            socket.create_connection((where.hostname or "", port), timeout=10).close()
        except OSError:
            for module in (constants, config):
                stack.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
                setattr(module, "HF_HUB_OFFLINE", True)  # noqa: B010
        yield
