"""Asking servers over HTTP: so many at once, for so long, and again where that may help.

The standard library does it: of the HTTP clients around, none is sure to be installed.
"""

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gvpo_jax.errors import UserError

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_SHOWN = 300  # characters of what a server said


class TryAgain(Exception):
    """A failure that a second try may not meet."""


class BadReply(Exception):
    """An answer that can't be used, and would be no better a second time."""


class _NotThere(BadReply):
    """Status 404."""


class Client:
    """Sends JSON to one server.

    Connection errors, answers cut short, time-outs and statuses 429 and 5xx are tried again after a
    pause that doubles each time, with jitter.

    Args:
        url: e.g. "http://host:8000".
        timeout: seconds that one try may take.
        retries: tries after the first.
        first_pause: seconds before the second try.
        headers: sent along, e.g. an authorization.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 600.0,
        retries: int = 6,
        first_pause: float = 0.5,
        headers: Mapping[str, str] | None = None,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        scheme, self._host, self._port, self._prefix = _parts(self.url)
        secure = scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._timeout, self._retries, self._first_pause = timeout, retries, first_pause
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        self._headers |= headers or {}
        self._open: set[socket.socket] = set()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def post(
        self,
        path: str,
        body: Any,
        read: Callable[[Any], T] | None = None,
        *,
        about: str,
        if_missing: str = "",
    ) -> T | None:
        """What `read` makes of the answer; without it, None.

        Args:
            path: of the address.
            body: becomes JSON.
            read: takes the JSON of the answer, None where it is empty; may raise `TryAgain` and
                `BadReply`.
            about: what is asked for, for the messages.
            if_missing: what to do where the server does not know the path.

        Raises:
            UserError: no usable answer; names server, `about` and the last error.
        """
        payload, reason = json.dumps(body).encode(), ""
        for attempt in range(self._retries + 1):
            if attempt:
                self._wait(attempt)
            try:
                return _read(self._exchange(path, payload), read)
            except TryAgain as error:
                reason = str(error)
            except (OSError, http.client.HTTPException) as error:
                reason = _describe(error, self._timeout)
            except BadReply as error:
                remedy = f"; {if_missing}" if if_missing and isinstance(error, _NotThere) else ""
                raise UserError(_one_line(f"{self.url}{path}, {about}: {error}{remedy}")) from None
            if self._stopped.is_set():
                break
        tries = f"tried {self._retries + 1} times" if self._retries else "tried once"
        raise UserError(_one_line(f"{self.url}{path}, {about}: {reason}") + f" ({tries})")

    def stop(self) -> None:
        """End what is under way, from another thread; it fails with some error, at once."""
        self._stopped.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # closed by the other side
                    sock.shutdown(socket.SHUT_RDWR)

    def resume(self) -> None:
        """Be of use again after `stop`."""
        self._stopped.clear()

    def _wait(self, attempt: int) -> None:
        pause = min(self._first_pause * 2 ** (attempt - 1), _LONGEST_PAUSE)
        self._stopped.wait(pause * random.uniform(0.5, 1))

    def _exchange(self, path: str, payload: bytes) -> bytes:
        """The body of a good answer, in `timeout` seconds for everything together."""
        ends = time.monotonic() + self._timeout
        with self._connected() as (connection, sock):
            sock.settimeout(self._timeout)
            connection.request("POST", self._prefix + path, payload, self._headers)
            with connection.getresponse() as response:
                parts = []
                while part := _before(ends, sock, response):
                    parts.append(part)
        body = b"".join(parts)
        if response.status == 429 or response.status >= 500:
            raise TryAgain(_status(response, body))
        if not 200 <= response.status < 300:
            failure = _NotThere if response.status == 404 else BadReply
            raise failure(_status(response, body))
        if response.length:  # of a body that was cut short
            raise TryAgain(f"{response.length} bytes of the answer are missing")
        return body

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[http.client.HTTPConnection, socket.socket]]:
        seconds = min(_CONNECT_SECONDS, self._timeout)
        connection = self._connection(self._host, self._port, timeout=seconds)
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock
            with self._lock:
                if self._stopped.is_set():
                    raise TryAgain("stopped")
                self._open.add(sock)
            try:
                yield connection, sock
            finally:
                with self._lock:
                    self._open.discard(sock)


class Fleet:
    """Servers, each asked for at most `concurrency` things at a time; the rest waits here.

    Args:
        urls: their addresses.
        concurrency: requests under way at each.
        api_key: sent as a bearer token.
        client: further options of `Client`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int = 64,
        api_key: str | None = None,
        **client: Any,
    ):
        if not urls:
            raise UserError("no servers are given")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.clients = [Client(url, headers=headers, **client) for url in urls]
        self._concurrency = concurrency
        self._threads = self._new_threads()

    def map(self, tasks: Sequence[tuple[int, Callable[[Client], T]]]) -> list[T]:
        """The result of each (number of a server, work there), in order.

        The first error ends everything that is still under way, and is raised.
        """
        futures = [self._threads[n].submit(work, self.clients[n]) for n, work in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((f for f in futures if f in done and f.exception()), None)
            if failed:
                failed.result()
            return [future.result() for future in futures]
        except BaseException:
            self._abandon(futures)
            raise

    def each(self, work: Callable[[Client], T]) -> list[T]:
        """What `work` gives at every server, in their order."""
        return self.map([(number, work) for number in range(len(self.clients))])

    def close(self) -> None:
        """End the threads; what is under way fails. They start again when they are needed."""
        for client in self.clients:
            client.stop()
        for pool in self._threads:
            pool.shutdown()
        self._threads = self._new_threads()
        for client in self.clients:
            client.resume()

    def _new_threads(self) -> list[ThreadPoolExecutor]:
        return [
            ThreadPoolExecutor(self._concurrency, thread_name_prefix="rollout")
            for _ in self.clients
        ]

    def _abandon(self, futures: Sequence[Future[Any]]) -> None:
        for future in futures:
            future.cancel()
        for client in self.clients:
            client.stop()
        wait(futures)
        for client in self.clients:
            client.resume()


def _parts(url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path of an address."""
    if "@" in url:  # not shown: it may hold a password
        raise UserError("a server's address holds no name or key: use servers.api_key_env")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        host.encode("idna")
        if parts.scheme in ("http", "https") and host and url.isascii():
            return parts.scheme, host, parts.port, parts.path
    except ValueError:  # also where a host or a port can be none
        pass
    raise UserError(f"'{url}' is not the address of a server, such as http://localhost:8000")


def _before(ends: float, sock: socket.socket, response: http.client.HTTPResponse) -> bytes:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
    return response.read1(1 << 16)


def _read(body: bytes, read: Callable[[Any], T] | None) -> T | None:
    if read is None:
        return None
    try:
        reply = json.loads(body) if body else None
    except ValueError:
        shown = body[:60].decode(errors="replace")
        raise TryAgain(f"the answer is not JSON: {shown!r}") from None
    try:
        return read(reply)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise BadReply(f"an answer of another form ({type(error).__name__}: {error})") from None


def _status(response: http.client.HTTPResponse, body: bytes) -> str:
    said = body.decode(errors="replace")
    with contextlib.suppress(ValueError, AttributeError):
        reply = json.loads(said)
        error = reply.get("error", reply)
        said = error if isinstance(error, str) else error.get("message") or said
    return f"HTTP {response.status}: {said}"


def _describe(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout:g} s"
    return f"{type(error).__name__}: {error}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
