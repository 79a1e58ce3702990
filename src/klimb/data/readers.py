"""Files of rows → (place, row) pairs: JSONL, JSON, CSV (each also .gz), Parquet, `datasets` folders, the hub, Python.

A reader accounts for every row: what cannot be parsed comes as a BadRow in its place, and nothing is skipped but
blank lines. All but a JSON list and rows from Python are read piece by piece, whatever their size.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from klimb.errors import DataError, one_line

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A path, a name on the hub (`owner/name[/config][:split]`), or rows."""

MAX_DEPTH = 100
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:+-]+))?")
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


def open_source(source: Source) -> Opened:
    """Raises DataError where there is no such source, or none that can be read."""
    if not isinstance(source, str | os.PathLike):
        return _counted("rows", source, "rows[{}]", lambda: None)
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, name)
    if path.exists():
        return _file(path, name)
    hub = HUB_NAME.fullmatch(name) if not name.startswith(".") else None
    if hub and not name.lower().endswith(FILE_SUFFIXES):
        return _hub(hub["name"], hub["config"], hub["split"] or "train")
    raise DataError("no such file", where=name, fix="give a path, or owner/name for a data set on the hub")


def _counted(name: str, rows: Iterable[Any], place: str, identity: Callable[[], str | None]) -> Opened:
    """Rows that are known by their number."""
    total = len(rows) if isinstance(rows, Sized) else None
    read = 0

    def pairs() -> Pairs:
        nonlocal read
        for row in rows:
            yield place.format(read), row
            read += 1

    return Opened(name, pairs(), lambda: read / total if total else None, identity)


def _file(path: Path, name: str) -> Opened:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return _parquet(path, name)
    if suffix in (".arrow", ".zip"):
        raise DataError(f"{suffix} files are not read", where=name, fix=f"name the folder it is in, or {AS_JSONL}")
    reader = {".json": _json, ".csv": _csv, ".tsv": _csv}.get(suffix, _jsonl)
    before = path.stat()
    being_read: list[IO[bytes]] = []

    def pairs() -> Pairs:
        being_read.append(_explained_open(path, name))
        yield from reader(being_read[0], name)
        after = path.stat()
        # Rows are kept under the hash of their file, so it has to stay what it was when it was hashed.
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError("was changed while it was read", where=name, fix="run again when nobody writes it")

    def fraction() -> float | None:
        return being_read[0].tell() / before.st_size if being_read and not being_read[0].closed else None

    return Opened(name, pairs(), fraction, lambda: _hash(reader.__name__, [path]))


def _explained_open(path: Path, name: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError("cannot be read", where=name, why=error.strerror or error) from error


def _hash(reader: str, paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(reader.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _unpacked(raw: IO[bytes]) -> IO[bytes]:
    """By what the file is, not by what it is called: a .gz that was unpacked on the way is read, too."""
    compressed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[return-value]


@contextmanager
def _reading(raw: IO[bytes], name: str, where: Callable[[], str]) -> Iterator[IO[bytes]]:
    try:
        with raw, _unpacked(raw) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError("the gzip stream is damaged", where=where(), why=error, fix="fetch it again") from error
    except OSError as error:
        raise DataError("cannot be read", where=name, why=error.strerror or error) from error


# --- JSON lines -------------------------------------------------------------------------------------------


def _jsonl(raw: IO[bytes], name: str) -> Pairs:
    number = 0
    with _reading(raw, name, lambda: f"{name}:{number + 1}") as file:
        # Bytes are split at \n alone: U+2028 and the like are ordinary characters within a JSON string.
        for number, line in enumerate(file, start=1):
            cut_off = not line.endswith(b"\n")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{name}:{number}", _parsed(line, cut_off)


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


# --- a list in one JSON file ------------------------------------------------------------------------------

STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
LENIENT = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")


def _json(raw: IO[bytes], name: str) -> Pairs:
    """Element by element: the text is held as a whole, its rows are not. JSON lines under this name are read, too."""
    with _reading(raw, name, lambda: name) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    first = data.lstrip()[:1]
    if first == b"{" and isinstance(_parsed(data.lstrip().split(b"\n", 1)[0], False), dict) and b"\n{" in data:
        yield from _jsonl(io.BytesIO(data), name)
        return
    if first != b"[":
        keys = ", ".join(map(repr, _lists_in(data)))
        why = f"its key {keys} holds one" if keys else ""
        raise DataError("holds no list of rows", where=name, why=why, fix=f"write [{{…}}, {{…}}], or {AS_JSONL}")
    try:
        yield from _elements(data.decode("utf-8"), name)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8", where=name, why=f"byte {error.start + 1}") from error


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
        try:
            _, end = LENIENT.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else f"nested more than {MAX_DEPTH} deep"
            fix = "is the file cut off?" if not text.rstrip().endswith("]") else AS_JSONL
            raise DataError("malformed JSON", where=f"{name}:{line}", why=why, fix=fix) from None
        try:
            yield f"{name}:{line}", STRICT.raw_decode(text, at)[0]
        except BadRow as error:
            yield f"{name}:{line}", error
        at = _after(text, end)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise DataError(
                "malformed JSON", where=f"{name}:{line}", why="no comma and no ] after this row", fix=AS_JSONL
            )
        at = _after(text, at + 1)
    if rest := text[_after(text, at + 1) :]:
        raise DataError("malformed JSON", where=name, why=f"{rest[:20]!r} follows the list", fix=AS_JSONL)


def _after(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


# --- CSV --------------------------------------------------------------------------------------------------


def _csv(raw: IO[bytes], name: str) -> Pairs:
    """The first line names the columns; what separates them is the comma, semicolon or tab that it has most of."""
    csv.field_size_limit(2**31 - 1)
    line = 1
    with _reading(raw, name, lambda: f"{name}:{line}") as file:
        # Bytes that are no UTF-8 come through as half characters, and are reported with their row.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        head = text.readline()
        separator = max(",;\t", key=head.count)
        header = [cell.strip() for cell in next(csv.reader([head], delimiter=separator), [])]
        named = [cell for cell in header if cell]
        if len({*named}) < len(named):
            twice = next(cell for cell in named if named.count(cell) > 1)
            raise DataError(f"two columns are called {twice!r}", where=f"{name}:1", fix="rename one")
        rows = csv.reader(text, delimiter=separator, strict=True)
        while True:
            line = rows.line_num + 2
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{name}:{line}", BadRow(f"malformed CSV: {error} (is a quote opened and never closed?)")
                continue
            if cells:
                yield f"{name}:{line}", _cells(header, cells)


def _cells(header: Sequence[str], cells: Sequence[str]) -> Any:
    if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell if character > "\ud7ff"):
        return BadRow("is not UTF-8")
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells where the first line names {len(header)} columns")
    return {name: cell for name, cell in zip(header, cells) if name}


# --- tables in Arrow's formats ----------------------------------------------------------------------------

BATCH = 1024


def _parquet(path: Path, name: str) -> Opened:
    from pyarrow import parquet

    with _table(name):
        file = parquet.ParquetFile(path)

    def batches() -> Iterator[Any]:
        with _table(name), file:
            yield from file.iter_batches(BATCH)

    return _batches(name, batches(), file.metadata.num_rows, lambda: _hash("parquet", [path]))


@contextmanager
def _table(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = one_line(error)[:200]
        raise DataError("is damaged or cut off, or no table", where=name, why=why, fix="fetch it again") from error


def _folder(path: Path, name: str) -> Opened:
    """What `Dataset.save_to_disk` wrote; of a DatasetDict the split `train` where none is named."""
    if (path / "dataset_dict.json").is_file():
        if (path / "train").is_dir():
            return _folder(path / "train", f"{name.rstrip('/')}/train")
        splits = sorted(each.name for each in path.iterdir() if each.is_dir())
        raise DataError("has no split train", where=name, fix=f"name one of its splits: {name}/{' | '.join(splits)}")
    if not (path / "state.json").is_file():
        here = sorted(each.name for each in path.iterdir() if each.name.lower().endswith(FILE_SUFFIXES))[:3]
        raise DataError(
            "is a directory, and none of `datasets`", where=name,
            fix=f"name a file in it{': ' + ', '.join(here) if here else ''}",
        )  # fmt: skip
    import pyarrow

    try:
        state = json.loads((path / "state.json").read_bytes())
        files = [path / Path(each["filename"]).name for each in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            "its state.json cannot be read", where=name, why=one_line(error), fix="save it again"
        ) from error

    def batches() -> Iterator[Any]:
        with _table(name):
            for file in files:
                with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
                    yield from stream

    return _batches(name, batches(), None, lambda: _hash("folder", files))


def _batches(name: str, batches: Iterator[Any], total: int | None, identity: Callable[[], str]) -> Opened:
    read = 0

    def pairs() -> Pairs:
        nonlocal read
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    yield f"{name}[{read}]", _as_json(row)
                    read += 1

    return Opened(name, pairs(), lambda: read / total if total else None, identity)


def _as_json(row: Any) -> Any:
    """A table's dates and decimals as text, its bytes as their number: a row is what a line of JSON can hold."""
    return json.loads(
        json.dumps(row, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    )


# --- the hub ----------------------------------------------------------------------------------------------


def _hub(name: str, config: str | None, split: str) -> Opened:
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
    rows = _counted(f"{name}:{split}", data, f"{name}:{split}[{{}}]", lambda: getattr(data, "_fingerprint", None))
    rows.pairs = ((where, _as_json(row)) for where, row in rows.pairs)
    return rows
