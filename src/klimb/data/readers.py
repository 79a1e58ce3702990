"""Files of rows → (place, row) pairs: JSONL, JSON, CSV (each also .gz), Parquet, `datasets` folders, the hub, Python.

A reader accounts for every row: what cannot be parsed comes as a BadRow in its place, and nothing is skipped but
blank lines. All but a JSON list and rows from Python are read piece by piece, whatever their size. A file is refused
as a whole where its rows cannot be told apart: an archive or a table that is damaged, a JSON list that is cut off.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from klimb.data import tables
from klimb.data.source import (
    AS_JSONL,
    FILE_SUFFIXES,
    MAX_DEPTH,
    MAX_ROW,
    TOO_LONG,
    BadRow,
    Opened,
    Pairs,
    Source,
    counted,
    explained_open,
    hash_of,
)
from klimb.errors import DataError, one_line

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?")


def open_source(source: Source) -> Opened:
    """Raises DataError where there is no such source, or none that can be read."""
    if not isinstance(source, str | os.PathLike):
        return counted("rows", source, "rows[{}]", lambda: None)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return tables.folder(path, name)
    if path.exists():
        return _file(path, name)
    hub = HUB_NAME.fullmatch(name) if not name.startswith(".") else None
    if hub and not name.lower().endswith(FILE_SUFFIXES):
        return tables.hub(hub["name"], hub["config"], hub["split"] or "train")
    raise DataError("no such file", where=name, fix="give a path, or owner/name for a data set on the hub")


def _file(path: Path, name: str) -> Opened:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return tables.parquet_file(path, name)
    if not path.is_file():
        raise DataError("is no file that can be read twice", where=name, fix="write the rows to a file")
    if suffix in (".arrow", ".zip"):
        raise DataError(f"{suffix} files are not read", where=name, fix=f"name the folder it is in, or {AS_JSONL}")
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(suffix, _jsonl)
    before = path.stat()
    being_read: list[IO[bytes]] = []

    def pairs() -> Pairs:
        being_read.append(explained_open(path, name))
        yield from reader(being_read[0], name)
        after = path.stat()
        # Rows are kept under the hash of their file, so it has to stay what it was when it was hashed.
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError("was changed while it was read", where=name, fix="run again when nobody writes it")

    def fraction() -> float | None:
        return being_read[0].tell() / before.st_size if being_read and not being_read[0].closed else None

    return Opened(name, pairs(), fraction, lambda: hash_of(reader.__name__, [path]))


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    """By what the file is, not by what it is called: a .gz that was unpacked on the way is read, too."""
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw  # type: ignore[return-value]


def _lines(readline: Callable[[int], bytes]) -> Iterator[bytes | None]:
    """Split at \\n alone; None in the place of one that is too long, of which no more than its end is kept."""
    while line := readline(MAX_ROW):
        too_long = len(line) == MAX_ROW and not line.endswith(b"\n")
        while too_long and (line := readline(MAX_ROW)) and not line.endswith(b"\n"):
            pass
        yield None if too_long else line


@contextmanager
def _reading(raw: IO[bytes], name: str, where: Callable[[], str]) -> Iterator[IO[bytes]]:
    try:
        with raw, _unpacked(raw) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError("is UTF-16", where=name, fix="save it as UTF-8")
            file.seek(0)
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("the gzip stream is damaged", where=where(), why=error, fix="fetch it again") from error
    except OSError as error:
        raise DataError("cannot be read", where=name, why=error.strerror or error) from error


# --- JSON lines -------------------------------------------------------------------------------------------


def _jsonl(raw: IO[bytes], name: str) -> Pairs:
    number = 0
    with _reading(raw, name, lambda: f"{name}:{number + 1}") as file:
        # At \n alone, since U+2028 and the like are ordinary characters within a JSON string.
        for number, line in enumerate(_lines(file.readline), start=1):
            if line is None:
                yield f"{name}:{number}", BadRow(TOO_LONG)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield f"{name}:{number}", _row(line)


def _row(line: bytes) -> Any:
    try:
        return parsed(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 (byte {error.start + 1} of the line)")
    except BadRow as error:
        cut_off = str(error).startswith(MALFORMED) and not line.endswith(b"\n")
        return BadRow(f"{error} (the last line has no end: is the file cut off?)") if cut_off else error


def parsed(text: str) -> Any:
    """What the JSON says. Raises BadRow, also for what Python would read, and others not, or not alike."""
    try:
        return STRICT.decode(text)
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        raise BadRow(f"{MALFORMED} at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise BadRow(f"nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise BadRow(f"{MALFORMED}: {one_line(error)}") from None


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
        counts = Counter(key for key, _ in pairs)
        raise BadRow(f"the key {counts.most_common(1)[0][0]!r} occurs twice")
    return values


MALFORMED = "malformed JSON"
STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)

# --- a list in one JSON file ------------------------------------------------------------------------------

MAX_LIST = 2**30
SPACE = re.compile(r"[ \t\n\r]*")
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[][{}]', re.DOTALL)


def _json(raw: IO[bytes], name: str) -> Pairs:
    """Element by element: the text is held as a whole, its rows are not. JSON lines under this name are read, too."""
    with _reading(raw, name, lambda: name) as file:
        data = file.read(MAX_LIST + 1).removeprefix(codecs.BOM_UTF8)
    if len(data) > MAX_LIST:
        raise DataError(f"is longer than {MAX_LIST >> 30} GiB, and a list is read as a whole", where=name, fix=AS_JSONL)
    first = data.lstrip()[:1]
    if first == b"{" and _is_lines(data):
        yield from _jsonl(io.BytesIO(data), name)
        return
    if first != b"[":
        keys = ", ".join(map(repr, _lists_in(data)))
        why = f"its key {keys} holds one" if keys else ""
        raise DataError("holds no list of rows", where=name, why=why, fix=f"write [{{…}}, {{…}}], or {AS_JSONL}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", where=name, why=f"byte {error.start + 1}") from error
    del data
    yield from _elements(text, name)


def _is_lines(data: bytes) -> bool:
    """Is one of the first of several lines a row, and all of them not one object?"""
    several = data.lstrip().split(b"\n", 8)[:8] if b"\n{" in data else []
    return any(isinstance(_row(line), dict) for line in several) and not _lists_in(data)


def _lists_in(data: bytes) -> list[str]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return [key for key, value in values.items() if isinstance(value, list)] if isinstance(values, dict) else []


def _elements(text: str, name: str) -> Pairs:
    """Raises DataError where the text is no JSON: what follows such a place cannot be told apart."""
    at, line, seen = _after(text, text.index("[") + 1), 1, 0
    empty = text[at : at + 1] == "]"
    while not empty:
        line, seen = line + text.count("\n", seen, at), at
        row, end = _element(text, at)
        if end is None:
            fix = "is the file cut off?" if not text.rstrip().endswith("]") else AS_JSONL
            raise DataError(MALFORMED, where=f"{name}:{line}", why=str(row).removeprefix(f"{MALFORMED}: "), fix=fix)
        yield f"{name}:{line}", row
        at = _after(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise DataError(MALFORMED, where=f"{name}:{line}", why="no comma and no ] after this row", fix=AS_JSONL)
        at = _after(text, at + 1)
    if rest := text[_after(text, at + 1) :]:
        raise DataError(MALFORMED, where=name, why=f"{rest[:20]!r} follows the list", fix=AS_JSONL)


def _element(text: str, at: int) -> tuple[Any, int | None]:
    """The row that begins here, or why it is none, and where it ends, if that can be told."""
    try:
        row, end = STRICT.raw_decode(text, at)
    except RecursionError:
        return BadRow(f"nested more than {MAX_DEPTH} deep"), _closed(text, at)
    except ValueError as error:
        said = error if isinstance(error, BadRow) else BadRow(f"{MALFORMED}: {getattr(error, 'msg', error)}")
        return said, _closed(text, at)
    return (row, end) if end - at <= MAX_ROW else (BadRow(TOO_LONG), end)


def _closed(text: str, at: int) -> int | None:
    """Where the bracket that opens here is closed, whatever stands within; of no bracket: nowhere."""
    depth = 0
    for match in STRING_OR_BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return match.end() if match[0] in "]}" and text[at] in "[{" else None
    return None


def _after(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


# --- CSV --------------------------------------------------------------------------------------------------


def _csv(raw: IO[bytes], name: str) -> Pairs:
    """The first line names the columns; what separates them is the comma, semicolon or tab that it has most of."""
    csv.field_size_limit(2**31 - 1)
    line = characters = 0
    with _reading(raw, name, lambda: f"{name}:{line + 1}") as file:
        # Bytes that are no UTF-8 come through as half characters, and are reported with their row.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")

        def next_line() -> str:
            """A quote that is never closed takes in what follows, up to the length of a row."""
            nonlocal line, characters
            part = text.readline(MAX_ROW)
            line, characters = line + bool(part), characters + len(part)
            if characters < MAX_ROW:
                return part
            while part and part[-1] not in "\r\n":
                part = text.readline(MAX_ROW)
            raise BadRow(TOO_LONG)

        header, separator = _header(next_line, name)
        rows = csv.reader(iter(next_line, ""), delimiter=separator, strict=True)
        while True:
            first, characters = line + 1, 0
            try:
                cells = next(rows)
            except StopIteration:
                return
            except (csv.Error, BadRow) as error:
                yield f"{name}:{first}", _no_cells(error, first, line)
                continue
            if cells:
                yield f"{name}:{first}", _cells(header, cells)


def _header(next_line: Callable[[], str], name: str) -> tuple[list[str], str]:
    try:
        head = next_line()
    except BadRow as error:
        raise DataError(str(error), where=f"{name}:1", fix="the first line has to name the columns") from None
    usual = "\t,;" if name.lower().removesuffix(".gz").endswith(".tsv") else ",;\t"
    separator = max(usual, key=head.count)
    header = [cell.strip() for cell in next(csv.reader([head], delimiter=separator), [])]
    named = [cell for cell in header if cell]
    if len({*named}) < len(named):
        twice, _ = Counter(named).most_common(1)[0]
        raise DataError(f"two columns are called {twice!r}", where=f"{name}:1", fix="rename one")
    if any(map(_half_characters, named)):
        raise DataError("is not UTF-8", where=f"{name}:1", fix="save the file as UTF-8")
    return header, separator


def _no_cells(error: Exception, first: int, last: int) -> BadRow:
    lost = f"; lines {first} to {last} are lost with it" if last > first else ""
    if isinstance(error, BadRow):
        return BadRow(f"{error}{lost}")
    return BadRow(f"malformed CSV: {error} (is a quote opened and never closed?){lost}")


def _half_characters(cell: str) -> bool:
    return not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell)


def _cells(header: Sequence[str], cells: Sequence[str]) -> Any:
    if any(map(_half_characters, cells)):
        return BadRow("is not UTF-8")
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells where the first line names {len(header)} columns")
    return {name: cell for name, cell in zip(header, cells) if name}
