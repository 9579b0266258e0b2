"""JSON over HTTP: one question, its answer, and what is worth asking again.

Certificates are verified, no proxy is used, no redirect followed, and an answer has a largest size.
"""

import asyncio
import contextlib
import functools
import json
import random
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gvpo_jax.errors import Page, UserError

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_SHOWN = 300  # characters of what a server said
_LARGEST = 2**28  # bytes of an answer; 32 completions of 8,000 tokens with log-probs are 2**25
_tls = functools.cache(ssl.create_default_context)  # reads all certificates of the system


class TryAgain(Exception):
    """A failure that a second try may not meet."""


class BadReply(Exception):
    """An answer that can't be used, and would be no better a second time."""


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode(errors="replace")


def load_httpx(what: str = "servers are") -> Any:
    """The module httpx2.

    Raises:
        UserError: it is not installed; `what` is asked with it.
    """
    try:
        import httpx2
    except ImportError:
        raise UserError(
            f'{what} asked with httpx2: pip install "gvpo-jax[servers]"', page=Page.EXTRAS
        ) from None
    return httpx2


def check_address(url: str, setting: str = "servers.api_key_env") -> None:
    """Raise UserError where a text is no address of a server, or holds a secret.

    setting: where the key belongs, for the message.
    """
    if set("@?#") & set(url):  # not shown: it may hold a password
        raise UserError(f"a server's address holds no name, key or query (@, ?, #): use {setting}")
    httpx = load_httpx()
    try:
        parts, _ = urlsplit(url), httpx.URL(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
        if parts.scheme in ("http", "https") and host and url.isascii():
            return
    except (ValueError, httpx.InvalidURL):  # also where a host or a port can be none
        pass
    raise UserError(f"{url!r} is not the address of a server, such as http://localhost:8000")


def client_options(headers: Mapping[str, str]) -> dict[str, Any]:
    """Of an `AsyncClient` that sends these headers along."""
    return {
        "headers": dict(headers),
        "timeout": load_httpx().Timeout(None, connect=_CONNECT_SECONDS),
        "verify": _tls(),
        "trust_env": False,  # no proxies
    }


async def exchange(client: Any, url: str, body: Any, seconds: float) -> Answer:
    """The whole answer to JSON that is posted, in so many seconds for everything together.

    Raises:
        TimeoutError: it took longer.
        BadReply: the answer is too large.
    """
    async with asyncio.timeout(seconds), client.stream("POST", url, json=body) as response:
        content = bytearray()
        async for part in response.aiter_bytes():
            content += part
            if len(content) > _LARGEST:
                raise BadReply(f"the answer is larger than {_LARGEST >> 20} MiB")
        return Answer(response.status_code, bytes(content))


def read_answer(
    answer: Answer, read: Callable[[Any], T] | None, if_missing: str | Exception = ""
) -> T | None:
    """What `read` makes of an answer's JSON, None where it is empty; without it, None.

    if_missing: what to do where the server lacks the path; an exception is raised then.

    Raises:
        TryAgain: the server is busy or broken, or it has sent no JSON.
        BadReply: it refuses, or its answer has another form.
    """
    status = answer.status
    if isinstance(if_missing, Exception) and status == 404 and "error" not in answer.text:
        raise if_missing  # where there is the path, an error of its own says what is missing
    if status == 429 or status >= 500:
        raise TryAgain(_said(answer))
    if not 200 <= status < 300:
        remedy = f"; {if_missing}" if if_missing and status == 404 else ""
        raise BadReply(_said(answer) + remedy)
    if read is None:
        return None
    try:
        reply = json.loads(answer.content) if answer.content else None
    except (ValueError, RecursionError):
        raise TryAgain(f"the answer is not JSON: {answer.text[:60]!r}") from None
    try:
        return read(reply)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"an answer of another form ({type(error).__name__}: {error})") from None


def describe_failure(error: BaseException, seconds: float) -> str:
    """Why there is no answer within so many seconds."""
    if isinstance(error, TryAgain | BadReply):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"no answer within {seconds:g} s"
    if isinstance(error, load_httpx().ConnectTimeout):
        return f"no connection within {_CONNECT_SECONDS:g} s"
    error = _below(error)
    return f"{type(error).__name__}: {error}"


def pause(first: float, attempt: int) -> float:
    """Seconds before try number `attempt`: they double each time, with jitter."""
    return min(first * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1)


def one_short_line(text: str) -> str:
    """What a server said, cut to a line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def _below(error: BaseException) -> BaseException:
    """The system's own error, of which httpx says little; that of a host's first address."""
    if isinstance(error, ExceptionGroup):
        return _below(error.exceptions[0])
    below = error.__cause__ or error.__context__
    return _below(below) if below else error


def _said(answer: Answer) -> str:
    said = answer.text
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        reply = json.loads(answer.content)
        error = reply.get("error", reply)
        said = error if isinstance(error, str) else error.get("message") or said
    return f"HTTP {answer.status}: {said}"
