"""Asking servers over HTTP: so many at once, for so long, and again where that may help."""

import asyncio
import contextlib
import functools
import json
import random
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gvpo_jax.errors import Page, UserError, explained_by

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


@dataclass(eq=False, repr=False)  # the headers hold the key
class Client:
    """Sends JSON to one server of a `Fleet`.

    Connection errors, answers cut short, time-outs and statuses 429 and 5xx are tried again after a
    pause that doubles each time, with jitter.
    """

    url: str  # e.g. "http://host:8000"
    timeout: float = 600.0  # seconds that one try may take
    retries: int = 6  # tries after the first
    first_pause: float = 0.5  # seconds before the second try
    headers: Mapping[str, str] = field(default_factory=dict)  # sent along, e.g. an authorization
    run: Any = None  # a fleet's, which gives the result of an async function with arguments

    def __post_init__(self):
        self._httpx = _httpx()
        self.url = self.url.rstrip("/").removesuffix("/v1")
        _check(self.url, self._httpx)
        self._options = {
            "headers": {"Connection": "close"} | dict(self.headers),
            "timeout": self._httpx.Timeout(None, connect=_CONNECT_SECONDS),
            "verify": _tls(),
            "trust_env": False,  # no proxies
        }

    @explained_by(Page.SERVERS)
    def post(
        self,
        path: str,
        body: Any,
        read: Callable[[Any], T] | None = None,
        *,
        about: str,
        if_missing: str | Exception = "",
    ) -> T | None:
        """What `read` makes of the answer's JSON, None where it is empty; without it, None.

        `body` becomes JSON, and `read` may raise `TryAgain` and `BadReply`. For the messages:
        `about` is what is asked for, `if_missing` what to do where the server lacks the path; an
        exception is raised then.

        Raises:
            UserError: no usable answer; names server, `about` and the last error.
        """
        where, reason = f"{self.url}{path}, {about}", ""
        for attempt in range(self.retries + 1):
            try:
                if attempt:
                    self.run(asyncio.sleep, pause(self.first_pause, attempt))
                return _read(self.run(self._exchange, path, body), read, if_missing)
            except (TryAgain, OSError, self._httpx.HTTPError) as error:
                reason = self._describe(error)
            except BadReply as error:
                raise UserError(_one_line(f"{where}: {error}")) from None
            except CancelledError:
                raise UserError(f"{where}: stopped") from None
        tries = f"tried {self.retries + 1} times" if self.retries else "tried once"
        raise UserError(_one_line(f"{where}: {reason}") + f" ({tries})")

    async def _exchange(self, path: str, body: Any) -> "_Answer":
        """The whole answer, in `timeout` seconds for everything together."""
        async with (
            asyncio.timeout(self.timeout),
            self._httpx.AsyncClient(**self._options) as client,
            client.stream("POST", self.url + path, json=body) as response,
        ):
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > _LARGEST:
                    raise BadReply(f"the answer is larger than {_LARGEST >> 20} MiB")
            return _Answer(response.status_code, bytes(content))

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, TryAgain):
            return str(error)
        if isinstance(error, TimeoutError):
            return f"no answer within {self.timeout:g} s"
        if isinstance(error, self._httpx.ConnectTimeout):
            return f"no connection within {_CONNECT_SECONDS:g} s"
        error = _below(error)
        return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class _Answer:
    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class Fleet:
    """Servers, each asked for at most `concurrency` things at a time; the rest waits here.

    `api_key` is sent as a bearer token; `client` are further options of `Client`.
    """

    def __init__(
        self, urls: list[str], *, concurrency: int = 64, api_key: str | None = None, **client: Any
    ):
        if not urls:
            raise UserError("no servers are given")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.clients = [Client(url, headers=headers, run=self._run, **client) for url in urls]
        self._concurrency, self._one_at_a_time = concurrency, threading.Lock()
        self._portal: Any = None
        self._under_way: set[Future[Any]] = set()
        self._stopped = False

    def map(self, tasks: Sequence[tuple[int, Callable[[Client], T]]]) -> list[T]:
        """The result of each (number of a server, work there), in order.

        The first error ends everything that is still under way, and is raised.
        """
        from anyio.from_thread import start_blocking_portal  # httpx needs it too

        with self._one_at_a_time, contextlib.ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal(name="rollout requests"))
            self._stopped = False
            pools = [ThreadPoolExecutor(self._concurrency, "rollout") for _ in self.clients]
            threads = [stack.enter_context(pool) for pool in pools]
            futures = [threads[n].submit(work, self.clients[n]) for n, work in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop()
                raise
            return [future.result() for future in futures]

    def each(self, work: Callable[[Client], T]) -> list[T]:
        """What `work` gives at every server, in their order."""
        return self.map([(number, work) for number in range(len(self.clients))])

    def close(self) -> None:
        """Make what other threads have under way fail, and wait for its end."""
        while not self._one_at_a_time.acquire(timeout=0.01):
            self._stop()
        self._one_at_a_time.release()

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of an async function, for the threads of `map`, from the portal's loop."""
        future = self._portal.start_task_soon(function, *args)
        self._under_way.add(future)
        if self._stopped:  # only now, so that `_stop` misses none
            future.cancel()
        try:
            return future.result()
        finally:
            self._under_way.discard(future)

    def _stop(self) -> None:
        """End what is under way, from another thread, and what comes until the next `map`."""
        self._stopped = True
        for future in self._under_way.copy():
            future.cancel()


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise UserError(
            'servers are asked with httpx2: pip install "gvpo-jax[servers]"', page=Page.EXTRAS
        ) from None
    return httpx2


def _check(url: str, httpx: Any) -> None:
    if set("@?#") & set(url):  # not shown: it may hold a password
        raise UserError(
            "a server's address holds no name, key or query (@, ?, #): use servers.api_key_env"
        )
    try:
        parts, _ = urlsplit(url), httpx.URL(url)
        host, _ = (parts.hostname or "").encode("idna"), parts.port
        if parts.scheme in ("http", "https") and host and url.isascii():
            return
    except (ValueError, httpx.InvalidURL):  # also where a host or a port can be none
        pass
    raise UserError(f"{url!r} is not the address of a server, such as http://localhost:8000")


def pause(first: float, attempt: int) -> float:
    """Seconds before try number `attempt`: they double each time, with jitter."""
    return min(first * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1)


def _below(error: BaseException) -> BaseException:
    """The system's own error, of which httpx says little; that of a host's first address."""
    if isinstance(error, ExceptionGroup):
        return _below(error.exceptions[0])
    below = error.__cause__ or error.__context__
    return _below(below) if below else error


def _read(
    answer: _Answer, read: Callable[[Any], T] | None, if_missing: str | Exception
) -> T | None:
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


def _said(answer: _Answer) -> str:
    said = answer.text
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        reply = json.loads(answer.content)
        error = reply.get("error", reply)
        said = error if isinstance(error, str) else error.get("message") or said
    return f"HTTP {answer.status}: {said}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
