"""A small server for rewards, with faults to be injected; on a port of this machine, in a thread."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Fault = Callable[["Handler", Any], None]


def lengths(asked: dict[str, Any]) -> Any:
    return [float(len(text)) for text in asked["completions"]]


class RewardServer:
    """Answers by `score`, unless `faults` says for the n-th request (from 0) what happens instead."""

    def __init__(self, score: Callable[[dict[str, Any]], Any] = lengths, port: int = 0) -> None:
        self.score = score
        self.faults: Callable[[int, Any], Fault | None] = lambda number, asked: None
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._port = port
        self.start()

    def start(self) -> None:
        """On the port that it had, if it had one."""
        outer = self

        class Own(Handler):
            server_of = outer

        self._server = Server(("127.0.0.1", self._port), Own)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/score"

    def always(self, fault: Fault) -> None:
        self.faults = lambda number, asked: fault

    def first(self, n: int, fault: Fault) -> None:
        """The next n requests."""
        begun = len(self.asked)
        self.faults = lambda number, asked: fault if number < begun + n else None

    def on(self, text: str, fault: Fault) -> None:
        """Requests with this completion."""
        self.faults = lambda number, asked: fault if text in asked["completions"] else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.stop()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up has its reasons."""


class Handler(BaseHTTPRequestHandler):
    server_of: RewardServer

    def do_POST(self) -> None:
        server = self.server_of
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(asked)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.times.append(time.monotonic())
        fault = server.faults(number, asked)
        if fault is not None:
            fault(self, asked)
        else:
            self.reply(json.dumps(server.score(asked)).encode())

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


# Faults --------------------------------------------------------------------------------------------------------------


def answers(status: int, body: bytes = b"", **headers: str) -> Fault:
    return lambda handler, asked: handler.reply(body, status, **headers)


def hangs(handler: Handler, asked: Any) -> None:
    handler.server_of.closing.wait(30)


def drips(handler: Handler, asked: Any) -> None:
    """A byte every 50 ms, from the first line on: no single wait is long."""
    body = b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + b" " * 4000
    for byte in body:
        if handler.server_of.closing.wait(0.05):
            return
        handler.wfile.write(bytes([byte]))


def hangs_up(handler: Handler, asked: Any) -> None:
    handler.close_connection = True


def cuts(handler: Handler, asked: Any) -> None:
    """Less than was announced."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n[1.0, ")


def speaks_otherwise(handler: Handler, asked: Any) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


def floods(handler: Handler, asked: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n[")
    for _ in range(100):
        handler.wfile.write(b"1.0, " * 200_000)


def chunked(handler: Handler, asked: Any) -> None:
    """As servers do that do not know the length, and keep the connection."""
    body = json.dumps(lengths(asked)).encode()
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for byte in body:
        handler.wfile.write(b"1\r\n" + bytes([byte]) + b"\r\n")
    handler.wfile.write(b"0\r\n\r\n")
    handler.server_of.closing.wait(30)
