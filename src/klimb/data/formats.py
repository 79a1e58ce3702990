"""Rows with their places, from JSONL (also .gz), Python rows, or a data set on the hub.

A reader turns its source into rows and problems, and both together account for every line: nothing is skipped
but blank lines. Further formats are further readers in `_reader`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from klimb.errors import DataError, one_line

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, a name on the hub (`owner/name[/config][:split]`), or rows."""

MAX_DEPTH = 100
LISTED = 20
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?")
NOT_YET = (".json", ".csv", ".tsv", ".parquet", ".arrow")
FILE_SUFFIXES = (".jsonl", ".gz", ".txt", ".zip", *NOT_YET)


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read. `where` is its place for errors: ``data.jsonl:17``."""

    where: str
    values: dict[str, Any]


class Problem(NamedTuple):
    """Why the row at `where` cannot be used."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRows(DataError):
    """Rows that cannot be used, each with its reason. The first line of the text stands alone."""

    def __init__(self, source: str, problems: list[Problem], total: int) -> None:
        self.problems = problems
        if len(problems) == total > 1 and len({problem.reason for problem in problems}) == 1:
            super().__init__(f"none of the {total} rows can be used: each {problems[0].reason}", where=source)
            return
        listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        super().__init__(
            f"{len(problems)} of {total} rows cannot be used, the first: {problems[0]}; "
            f"mend them or set on_bad=drop{listed if len(problems) > 1 else ''}{more}",
            where=source,
        )


class BadRow(ValueError):
    """One row's reason, on its way to a `Problem`."""


def source_name(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "rows"


def read_rows(source: Source, columns: Mapping[str, str] | None = None) -> tuple[list[Row], list[Problem]]:
    """All rows of `source`, and the problems of those that are malformed.

    columns: ``{"prompt": "question"}`` makes the file's `question` the row's `prompt`, also where it has
    a `prompt` of its own.

    Raises DataError where there is nothing to read at all: no such file, a broken archive, no rows.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for where, value in _reader(source):
        try:
            if isinstance(value, BadRow):
                raise value
            rows.append(Row(where, _renamed(_checked(value), columns or {})))
        except BadRow as error:
            problems.append(Problem(where, str(error)))
    if not rows and not problems:
        raise DataError("no rows", where=source_name(source), fix="give it at least one")
    return rows, problems


def _reader(source: Source) -> Iterator[tuple[str, Any]]:
    """(place, row) pairs; a row that could not be parsed is a BadRow in its place."""
    if not isinstance(source, str | os.PathLike):
        return _python_rows(source)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        raise DataError("is a directory", where=name, fix="name a .jsonl or .jsonl.gz file in it")
    if path.exists():
        if path.suffix.lower() in NOT_YET:
            fix = "write one JSON object a line (.jsonl)"
            raise DataError(f"{path.suffix} files are not read yet", where=name, fix=fix)
        return _jsonl(path, name)
    hub = HUB_NAME.fullmatch(name) if not name.startswith(".") else None
    if hub and not name.lower().endswith(FILE_SUFFIXES):
        return _hub(hub["name"], hub["config"], hub["split"] or "train")
    raise DataError("no such file", where=name, fix="give a path, or owner/name for a data set on the hub")


def _python_rows(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        yield f"rows[{index}]", row


def _hub(name: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, config, split=split)
    except Exception as error:
        raise DataError(
            "could not be loaded from the hub, and there is no such file",
            where=name,
            why=f"{type(error).__name__}: {error}",
            fix="owner/name/config:split names a part of it",
        ) from error
    for index, row in enumerate(data):
        yield f"{name}:{split}[{index}]", row


# --- JSONL ------------------------------------------------------------------------------------------------


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with _open(path) as file:
            # Bytes are split at \n alone: U+2028 and the like are ordinary characters within a JSON string.
            for number, line in enumerate(file, start=1):
                cut_off = not line.endswith(b"\n")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{name}:{number}", _parsed(line, cut_off)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = f"{name}:{number + 1}"
        raise DataError("the gzip stream is damaged", where=where, why=error, fix="fetch it again") from error
    except OSError as error:
        raise DataError("cannot be read", where=name, why=error.strerror or error) from error


def _open(path: Path) -> IO[bytes]:
    """By what the file is, not by what it is called: a .gz that was unpacked on the way is read, too."""
    file = path.open("rb")
    compressed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if compressed else file  # type: ignore[return-value]


def _parsed(line: bytes, cut_off: bool) -> Any:
    try:
        return json.loads(
            line.decode("utf-8"), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except BadRow as error:
        return error
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        reason = f"malformed JSON at column {error.colno}: {error.msg}"
        return BadRow(f"{reason} (the last line has no end: is the file cut off?)" if cut_off else reason)
    except RecursionError:
        return BadRow(f"nested more than {MAX_DEPTH} deep")
    except ValueError as error:
        return BadRow(f"malformed JSON: {one_line(error)}")


def _no_constant(literal: str) -> Any:
    raise BadRow(f"{literal} is not JSON")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise BadRow(f"the number {literal[:20]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return values


# --- any row ----------------------------------------------------------------------------------------------


def _checked(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadRow(f"is a {type(value).__name__}, not an object of columns")
    _check_text(value, 0)
    return dict(value)


def _check_text(value: Any, depth: int) -> None:
    """Lone surrogates would stop the tokenizer, and depth the hashing, far from the row that has them."""
    if depth > MAX_DEPTH:
        raise BadRow(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRow(f"has half a character (a lone surrogate) at position {error.start}") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadRow(f"the key {key!r} is not a string")
            _check_text(key, depth)
            _check_text(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_text(item, depth + 1)


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for column in columns.values():
        if column not in values:
            raise BadRow(f"has no column {column!r} (it has: {', '.join(values) or 'none'})")
    kept = {name: value for name, value in values.items() if name not in columns.values()}
    return {**kept, **{name: values[column] for name, column in columns.items()}}
