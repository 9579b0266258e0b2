"""Asking servers over HTTP: so many at once, for so long, and again where that may help."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.http import (
    Answer,
    BadReply,
    TryAgain,
    check_address,
    client_options,
    describe_failure,
    exchange,
    load_httpx,
    one_short_line,
    pause,
    read_answer,
)

T = TypeVar("T")


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
        self._httpx = load_httpx()
        self.url = self.url.rstrip("/").removesuffix("/v1")
        check_address(self.url)
        self._options = client_options({"Connection": "close"} | dict(self.headers))

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
                return read_answer(self.run(self._exchange, path, body), read, if_missing)
            except (TryAgain, OSError, self._httpx.HTTPError) as error:
                reason = describe_failure(error, self.timeout)
            except BadReply as error:
                raise UserError(one_short_line(f"{where}: {error}")) from None
            except CancelledError:
                raise UserError(f"{where}: stopped") from None
        tries = f"tried {self.retries + 1} times" if self.retries else "tried once"
        raise UserError(one_short_line(f"{where}: {reason}") + f" ({tries})")

    async def _exchange(self, path: str, body: Any) -> Answer:
        async with self._httpx.AsyncClient(**self._options) as client:
            return await exchange(client, self.url + path, body, self.timeout)


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
