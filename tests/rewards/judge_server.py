"""A server that speaks OpenAI's chat completions, small and faulty on demand: one behaviour for each request."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behave = Callable[["Handler", dict[str, Any]], None]


@dataclass
class Served:
    """What came in. `behave` answers; `behaviours` are used up first, one a request."""

    url: str
    behave: Behave
    behaviours: list[Behave] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def requests(self) -> int:
        return len(self.bodies)


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.served.lock:
            self.served.bodies.append(body)
            self.served.keys.append(self.headers.get("Authorization"))
            behave = self.served.behaviours.pop(0) if self.served.behaviours else self.served.behave
        with contextlib.suppress(OSError):  # a client that gave up
            behave(self, body)

    def say(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def write(self, content: str | None, **choice: Any) -> None:
        """A chat completion."""
        message = {"role": "assistant", "content": content}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self.say(200, json.dumps({"choices": [{"message": message, **choice}], "usage": usage}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(behave: Behave, *behaviours: Behave, certificate: tuple[str, str] | None = None) -> Iterator[Served]:
    """certificate: files of it and of its key, for https."""
    served = Served("", behave, [*behaviours])
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        served.url = f"https://localhost:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# What a request asks ------------------------------------------------------------------------------------------------


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def tag_of(body: dict[str, Any]) -> str:
    """The last text of the user has the form of the reply."""
    found = re.search(r'"tag": "([0-9a-f]{16})"', body["messages"][-1]["content"])
    assert found
    return found[1]


def block(body: dict[str, Any], name: str) -> str:
    """A judge that obeys the delimiters finds the material like this."""
    tag = tag_of(body)
    found = re.search(rf"{tag} {name}\n(.*?)\n{tag} END OF {name}", asked(body), re.S)
    assert found, name
    return found[1]


# Judges ------------------------------------------------------------------------------------------------


def honest(handler: Handler, body: dict[str, Any]) -> None:
    """Counts the word "good", up to the scale's end; prefers more of it."""
    handler.write(honest_reply(body))


def honest_reply(body: dict[str, Any]) -> str:
    if "ANSWER A" not in asked(body):
        return json.dumps({"tag": tag_of(body), "score": min(1 + block(body, "ANSWER").split().count("good"), 10)})
    first, second = (block(body, f"ANSWER {name}").split().count("good") for name in "AB")
    better = "A" if first > second else "B" if second > first else "tie"
    return json.dumps({"tag": tag_of(body), "better": better})


def always(**fields: Any) -> Behave:
    """The same verdict, whatever is asked."""
    return lambda handler, body: handler.write(json.dumps({"tag": tag_of(body), **fields}))


def status(code: int, text: str = "busy", **headers: str) -> Behave:
    data = json.dumps({"error": {"message": text}}).encode()
    return lambda handler, body: handler.say(code, data, **headers)


def raw(data: bytes) -> Behave:
    return lambda handler, body: handler.say(200, data)


def slow(seconds: float) -> Behave:
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        honest(handler, body)

    return behave


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """A byte now and then, for ever: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(2000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def drip_headers(handler: Handler, body: dict[str, Any]) -> None:
    for letter in b"HTTP/1.0 200 OK\r\nX: " + b"y" * 2000:
        handler.wfile.write(bytes([letter]))
        handler.wfile.flush()
        time.sleep(0.02)


def huge(handler: Handler, body: dict[str, Any]) -> None:
    """Says nothing of its length."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(50):
        handler.wfile.write(b" " * 100_000)


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.close()
