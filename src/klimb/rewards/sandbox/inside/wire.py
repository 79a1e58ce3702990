"""Values by value: what a test can send to the candidate and what it can get back, as JSON in frames.

None, bools, numbers, strings, bytes, lists, tuples, dicts, sets, complex numbers, fractions, decimals; iterators
(ranges and generators too) travel as what they yield. Nothing that has behaviour of its own comes out of `decode`, so
that no __eq__ of the candidate's ever runs where the answers are.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

LENGTH = struct.Struct(">I")
MAX_FRAME = 1 << 20
"""Bytes that a candidate may answer with, and that a test may ask with."""
MAX_ITEMS = 100_000
"""What is taken of an iterator."""


class NotPlain(BaseException):
    """A value that cannot travel. Not an Exception, so that no test catches it by chance."""


class TooLarge(Exception):
    """A value of more than MAX_FRAME bytes."""


def encode(value: Any) -> Any:
    """`value` as JSON knows it; what JSON does not know becomes {"its type": …}. Raises NotPlain, TooLarge."""
    if isinstance(value, int) and value.bit_length() > 4000:
        return {"int": hex(value)}  # Python writes no longer ones in decimals
    if isinstance(value, str | bytes) and len(value) > MAX_FRAME:
        raise TooLarge(f"{len(value)} characters, more than {MAX_FRAME}")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(entry) for entry in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(entry)] for key, entry in value.items()]}
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(entry) for entry in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Fraction | Decimal):
        return {type(value).__name__: str(value)}
    if isinstance(value, Iterator | range):
        entries = [encode(entry) for entry in itertools.islice(value, MAX_ITEMS + 1)]
        if len(entries) > MAX_ITEMS:
            raise TooLarge(f"an iterator of more than {MAX_ITEMS} entries")
        return {"iterator": entries}
    raise NotPlain(f"a {type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """The inverse. Raises ValueError or TypeError for what `encode` never writes, RecursionError for deep nesting."""
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    [(kind, inner)] = value.items()
    if kind == "dict":
        return {decode(key): decode(entry) for key, entry in inner}
    if kind == "int":
        return int(inner, 16)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "complex":
        return complex(float(inner[0]), float(inner[1]))
    if kind == "Fraction":
        numerator, _, denominator = inner.partition("/")
        return Fraction(int(numerator), int(denominator or 1))
    if kind == "Decimal":
        return Decimal(inner)
    entries = [decode(entry) for entry in inner]
    makers: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
    if kind not in makers:
        raise ValueError(f"unknown kind {str(kind)[:40]!r}")
    return makers[kind](entries)


def write_frame(fd: int, message: Any) -> None:
    """Raises TooLarge before anything is written."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise TooLarge(f"{len(body)} bytes, more than {MAX_FRAME}")
    write_all(fd, LENGTH.pack(len(body)) + body)


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def read_frame(fd: int) -> Any:
    """The next message. Raises EOFError where there is none, ValueError where it is nonsense."""
    (length,) = LENGTH.unpack(read_exactly(fd, LENGTH.size))
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return json.loads(read_exactly(fd, length))


def read_exactly(fd: int, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = os.read(fd, min(count - len(received), 1 << 16))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)
