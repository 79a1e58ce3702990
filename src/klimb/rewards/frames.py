"""What trainer and worker send each other: JSON behind four bytes of length."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

LENGTH = struct.Struct(">I")


def frame(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return LENGTH.pack(len(body)) + body


def write_frame(fd: int, message: dict[str, Any]) -> None:
    rest = memoryview(frame(message))
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_frame(fd: int) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = _read_exactly(fd, LENGTH.size)
    body = _read_exactly(fd, LENGTH.unpack(head)[0]) if head else None
    return json.loads(body) if body else None


def _read_exactly(fd: int, count: int) -> bytes | None:
    received = bytearray()
    while len(received) < count:
        chunk = os.read(fd, min(count - len(received), 1 << 20))
        if not chunk:
            return None
        received += chunk
    return bytes(received)
