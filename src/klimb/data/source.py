"""What a source of rows is: where it comes from, what it gives, and how large a row may be."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from klimb.errors import DataError

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, a name on the hub (`owner/name[/config][:split]`), or rows."""

MAX_DEPTH = 100
MAX_ROW = 16 * 2**20
"""Bytes (characters, in CSV). Some four million tokens: what is longer is a file that lost its line ends."""
TOO_LONG = f"is longer than {MAX_ROW // 2**20} MiB (has the file lost its line ends?)"
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".txt", ".zip")
AS_JSONL = "write one JSON object a line (.jsonl)"

Pairs = Iterator[tuple[str, Any]]


class BadRow(ValueError):
    """One row's reason, on its way to a `Problem`."""


@dataclass
class Opened:
    """A source that is there. `pairs`: (place, row), once; `fraction`: how much of it was read, where that is known.

    identity: a hash of its content and of how it is read; None where rows come from Python.
    """

    name: str
    pairs: Pairs
    fraction: Callable[[], float | None]
    identity: Callable[[], str | None]


def counted(name: str, rows: Iterable[Any], place: str, identity: Callable[[], str | None]) -> Opened:
    """Rows that are known by their number."""
    total = len(rows) if isinstance(rows, Sized) else None
    read = 0

    def pairs() -> Pairs:
        nonlocal read
        for row in rows:
            yield place.format(read), row
            read += 1

    return Opened(name, pairs(), lambda: read / total if total else None, identity)


def explained_open(path: Path, name: str) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError("cannot be read", where=name, why=error.strerror or error) from error


def hash_of(reader: str, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(reader.encode())
    for path in paths:
        with explained_open(path, str(path)) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
