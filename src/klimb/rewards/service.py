"""A service elsewhere: one POST of JSON within a deadline, and what to do while nobody answers.

Who cannot be reached, or says "later" (429, 502, 503, 504), is waited for: 1, 2, 4 … 60 s, or as long as Retry-After
says, with jitter that no random stream of the run feels. After TRIES tries the run says that it waits, and after
`patience` seconds it ends. A service that has never answered gets the tries alone: its address may be wrong. Who
answers is there: an error or nonsense is a verdict on what was asked.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import json
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from klimb import __version__
from klimb.errors import RewardError, one_line
from klimb.rewards.calling import CallFailed, printable

TRIES = 4
LONGEST_WAIT = 60.0
MAX_REPLY = 1 << 24
"""Bytes; a longer reply is nonsense."""
LATER = (408, 425, 429, 502, 503, 504)
NEVER = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 407, 410)
"""Answers that are the same for every request: the address or the key is wrong."""

T = TypeVar("T")
_JITTER = random.SystemRandom()


class Down(Exception):
    """No answer that counts; the same request may have one later. `after`: seconds that the service asked for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(printable(reason))
        self.after = after


class Address(NamedTuple):
    secure: bool
    host: str
    port: int
    netloc: str
    target: str
    """Path and query."""
    shown: str
    """Without the query."""


class Service:
    """JSON in, JSON out, from several threads at once.

    timeout: seconds of one request, all of its reply included. patience: seconds to wait for a service that stopped
    answering. key: the environment variable with its API key. `tell` gets lines for a person, `leaving` says whether
    somebody wants to end the run.
    """

    def __init__(
        self, url: Any, *, timeout: float, patience: float = 600.0, key: str | None = None, where: str
    ) -> None:
        self.where = where
        self.timeout = timeout
        self.tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self.leaving: Callable[[], bool] = lambda: False
        self._address = _address(url, where)
        self._patience = patience
        self._key = _key(key, where) if key is not None else ""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._answered = False
        self._waiting_since: float | None = None

    def ask(self, payload: Any, seconds: float) -> Any:
        """One try. Raises Down, CallFailed where the service answers but not as it should, and RewardError where it
        never will."""
        try:
            body = json.dumps(payload, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError("a column cannot be sent as JSON", where=self.where, why=error,
                              fix="name those that can in `columns`") from error  # fmt: skip
        headers = {"Content-Type": "application/json", "User-Agent": f"klimb/{__version__}"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            status, told, reply = post(self._address, body, headers, seconds, self._closed.is_set)
        except CallFailed as failed:
            raise CallFailed(failed.kind, self._clean(failed.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise Down(self._clean(one_line(error) or type(error).__name__)) from None
        self._heard(status)
        if self._key:
            reply = reply.replace(self._key.encode(), b"***")  # should the service repeat it, into errors and scores
        if status == 200:
            return _value(reply)
        said = one_line(reply[:200].decode("utf-8", "replace"))
        reason = f"answered {status} {http.client.responses.get(status, '')}".strip() + (f": {said}" if said else "")
        if status in LATER:
            raise Down(reason, _retry_after(told))
        if status in NEVER:
            raise RewardError(reason, where=f"{self.where}: {self._address.shown}", fix="correct its url or key")
        raise CallFailed("raised", reason)

    def _heard(self, status: int) -> None:
        if status in LATER:
            return
        with self._lock:
            since, self._waiting_since, self._answered = self._waiting_since, None, True
        if since is not None and not self._closed.is_set():
            self.tell(f"{self.where}: it answers again, after {time.monotonic() - since:.0f} s")

    def persist(self, attempt: Callable[[bool], T]) -> T:
        """What `attempt` gives as soon as it does not raise Down; it is told whether its first tries are used up.

        Raises RewardError once patience is at an end, the reward was closed, or the run is to end.
        """
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return attempt(tries >= TRIES)
            except Down as down:
                self._wait(down, tries, began)

    def _wait(self, down: Down, tries: int, began: float) -> None:
        where = f"{self.where}: {self._address.shown}"
        if tries >= TRIES and not self._answered:
            raise RewardError(
                f"no answer in {tries} tries", where=where, why=down, fix="is it running, is this its url?"
            )
        left = began + self._patience - time.monotonic()
        if left <= 0 and tries >= TRIES:  # not after one try alone, should this process have slept
            raise RewardError(f"no answer for {self._patience:.3g} s", where=where, why=down, fix="start it again")
        if tries >= TRIES:
            with self._lock:
                first, self._waiting_since = self._waiting_since is None, self._waiting_since or began
            if first:
                self.tell(f"{where}: {down}: the run waits for it, {left:.0f} s more at most")
        jitter = _JITTER.uniform(0.5, 1.0)
        self._sleep(min(left, max(down.after, jitter * min(2.0 ** (tries - 1), LONGEST_WAIT))), where)

    def _sleep(self, seconds: float, where: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._closed.wait(min(left, 0.1)) or self.leaving():
                raise RewardError("left while it was waited for", where=where)

    def _clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        """Ends all waiting."""
        self._closed.set()


def post(
    address: Address, body: bytes, headers: Mapping[str, str], seconds: float, closed: Callable[[], bool]
) -> tuple[int, Any, bytes]:
    """(status, headers, body). Raises OSError and HTTPException where nothing whole came back, and CallFailed where it
    did not within `seconds`, however slowly it trickled, or is too long.
    """
    deadline = time.monotonic() + seconds

    def left() -> float:
        if (rest := deadline - time.monotonic()) <= 0:
            raise CallFailed("timeout", f"no answer within {seconds:.3g} s")
        return rest

    lines = [f"POST {address.target} HTTP/1.1", f"Host: {address.netloc}", "Connection: close",
             f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]  # fmt: skip
    request = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
    received = bytearray()
    with _connected(address, left()) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read everything
            _send(connection, request, left)
        while len(received) <= MAX_REPLY and not _is_whole(received):
            connection.settimeout(min(left(), 0.5))
            try:
                chunk = connection.recv(1 << 16)
            except TimeoutError:
                if closed():
                    raise
                continue
            if not chunk:
                break
            received += chunk
    if len(received) > MAX_REPLY:
        raise CallFailed("length", f"the reply is longer than {MAX_REPLY >> 20} MB")
    if not received:
        raise OSError("it closed the connection without an answer")
    response = http.client.HTTPResponse(_Received(bytes(received)), method="POST")  # type: ignore[arg-type]
    response.begin()
    return response.status, response.headers, response.read()


def _connected(address: Address, seconds: float) -> socket.socket:
    connection = socket.create_connection((address.host, address.port), seconds)
    if not address.secure:
        return connection
    try:
        return ssl.create_default_context().wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise


def _send(connection: socket.socket, request: bytes, left: Callable[[], float]) -> None:
    connection.settimeout(left())
    try:
        connection.sendall(request)
    except TimeoutError:
        left()  # says so
        raise


class _Received:
    """A socket of which everything has been read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _is_whole(received: bytearray) -> bool:
    """Has all arrived that the headers announce? For servers that keep the connection although told to close it."""
    head, _, body = bytes(received[: 1 << 16]).partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length" and value.strip().isdigit() and len(head) < len(received):
            return len(received) >= len(head) + 4 + int(value)
    return len(body) > 0 and b"chunked" in head.lower() and received.endswith(b"\r\n0\r\n\r\n")


def _value(reply: bytes) -> Any:
    try:
        return json.loads(reply)
    except (ValueError, RecursionError):
        said = one_line(reply[:80].decode("utf-8", "replace"))
        raise CallFailed("length", f"answered no JSON: {said!r}") from None


def _retry_after(headers: Any) -> float:
    """Seconds, which the header gives as such or as a date; 0 where it makes no sense."""
    said = str(headers.get("Retry-After", "0")).strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _address(url: Any, where: str) -> Address:
    fix = "write http://HOST:PORT/PATH or https://…"
    try:
        parts = urlsplit(str(url))
        secure, host, port = parts.scheme == "https", parts.hostname, parts.port
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        f"{parts.netloc}{target}".encode("ascii")
    except ValueError as error:
        raise RewardError(f"{url!r} is no url", where=where, why=error, fix=fix) from None
    if parts.username or parts.password:
        raise RewardError("a url with a password in it", where=where, why="it would stand in the config",
                          fix="put an API key into an environment variable, and name it in `key_env`")  # fmt: skip
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in str(url)):
        raise RewardError(f"{url!r} is no url", where=where, fix=fix)
    shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
    return Address(secure, host, port or (443 if secure else 80), parts.netloc, target, shown)


def _key(name: str, where: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise RewardError(f"the environment variable {name} is not set", where=where, fix=f"export {name}=…")
    if not (key.isascii() and key.isprintable()):
        raise RewardError(f"what the environment variable {name} holds is no key", where=where)
    return key
