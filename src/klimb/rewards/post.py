"""One HTTP request with a deadline that holds whatever the server does: slow, dripping, endless, silent.

Standard library alone: the one request that is needed is shorter than a client's configuration, nothing is imported
from the network, and the deadline is for the whole exchange, where the usual clients' is for each read. Redirects are
not followed (a key would go elsewhere), proxies from the environment not used.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from klimb import __version__
from klimb.errors import one_line

MAX_REPLY = 16 << 20
"""Bytes; a longer reply is none."""
_LOOK = 0.2
"""Seconds between looks at whether somebody wants to leave."""


class Reply(NamedTuple):
    """What came back. retry_after: seconds that the server asks to wait, where it does."""

    status: int
    data: bytes
    retry_after: float | None = None


class NoReply(Exception):
    """Nothing that can be used came back, and why."""

    def __init__(self, kind: Literal["timeout", "error"], why: str) -> None:
        super().__init__(why)
        self.kind = kind


class TooLong(NoReply):
    """More than MAX_REPLY: what was asked is not at fault, and the next try would get the same."""


def post(url: str, body: Any, key: str | None, deadline: float, leaving: Callable[[], bool] = lambda: False) -> Reply:
    """POST `body` as JSON and read the reply. key: goes out as a bearer token and into no message.

    deadline: of `time.monotonic`. Only looking up the host's name may outlast it. leaving: asked now and then whether
    the reply is still wanted. Raises NoReply, and TypeError or ValueError where `body` is no JSON.
    """
    parts = urlsplit(url)
    payload = json.dumps(body, allow_nan=False).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close",
               "User-Agent": f"klimb/{__version__}"}  # fmt: skip
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
    if deadline <= time.monotonic():
        raise NoReply("timeout", "no time left to ask")
    expired, done = threading.Event(), threading.Event()
    connection = None
    try:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
        connection.sock = _connect(parts.scheme, parts.hostname or "", parts.port, deadline)
        _cut_at(deadline, connection.sock, expired, done, leaving)
        if isinstance(connection.sock, ssl.SSLSocket):
            connection.sock.do_handshake()
        connection.request("POST", target, payload, headers)
        response = connection.getresponse()
        data = response.read(MAX_REPLY + 1)
        if expired.is_set():  # what a cut connection gave so far may look like all of it
            raise NoReply("timeout", "no reply in time")
        if len(data) > MAX_REPLY:
            raise TooLong("error", f"a reply of more than {MAX_REPLY >> 20} MB")
        if response.length:  # announced, and not there
            raise NoReply("error", f"the reply broke off {response.length} bytes before its end")
        return Reply(response.status, data, _seconds(response.headers.get("Retry-After")))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise NoReply("timeout", "no reply in time") from None
        name = type(error).__name__
        raise NoReply("error", f"{name}: {one_line(error)[:200]}") from None
    finally:
        done.set()
        if connection is not None:
            connection.close()


def _connect(scheme: str, host: str, port: int | None, deadline: float) -> socket.socket:
    left = deadline - time.monotonic()
    plain = socket.create_connection((host, port or (443 if scheme == "https" else 80)), timeout=max(left, 0.001))
    if scheme != "https":
        return plain
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)


def _cut_at(
    deadline: float, sock: socket.socket, expired: threading.Event, done: threading.Event, leaving: Callable[[], bool]
) -> None:
    """A timeout of the socket is for each read alone: a server that drips would never exceed it."""

    def wait_and_cut() -> None:
        while (left := deadline - time.monotonic()) > 0 and not leaving():
            if done.wait(min(left, _LOOK)):
                return
        expired.set()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    threading.Thread(target=wait_and_cut, name="reply", daemon=True).start()


def _seconds(header: str | None) -> float | None:
    """Retry-After: seconds, or a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(header), 0.0) if float(header) < float("inf") else None
    try:
        return max((email.utils.parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None
