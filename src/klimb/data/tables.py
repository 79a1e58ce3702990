"""Tables in Arrow's formats, read in batches: Parquet, folders of `datasets`, the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klimb.data.source import FILE_SUFFIXES, MAX_ROW, TOO_LONG, BadRow, Opened, Pairs, counted, hash_of
from klimb.errors import DataError, one_line

BATCH = 1024


def parquet_file(path: Path, name: str) -> Opened:
    from pyarrow import parquet

    with _table(name):
        file = parquet.ParquetFile(path)

    def batches() -> Iterator[Any]:
        with _table(name), file:
            yield from file.iter_batches(BATCH)

    return _batches(name, batches(), file.metadata.num_rows, lambda: hash_of("parquet", [path]))


@contextmanager
def _table(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = one_line(error)[:200]
        raise DataError("is damaged or cut off, or no table", where=name, why=why, fix="fetch it again") from error


def folder(path: Path, name: str) -> Opened:
    """What `Dataset.save_to_disk` wrote; of a DatasetDict the split `train` where none is named."""
    if (path / "dataset_dict.json").is_file():
        if (path / "train").is_dir():
            return folder(path / "train", f"{name.rstrip('/')}/train")
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

    return _batches(name, batches(), None, lambda: hash_of("folder", files))


def _batches(name: str, batches: Iterator[Any], total: int | None, identity: Callable[[], str]) -> Opened:
    read = 0

    def pairs() -> Pairs:
        nonlocal read
        for batch in batches:
            _check_names(name, batch.schema.names)
            for start in range(0, batch.num_rows, BATCH):
                for row in _rows(batch.slice(start, BATCH)):
                    yield f"{name}[{read}]", row
                    read += 1

    return Opened(name, pairs(), lambda: read / total if total else None, identity)


def _check_names(name: str, columns: list[str]) -> None:
    """A row holds one value a name: the other column's would be lost."""
    if len({*columns}) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"two columns are called {twice!r}", where=name, fix="rename one")


def _rows(batch: Any) -> Iterator[Any]:
    """In halves, down to the row, where they are too large or Python cannot hold one: a text that is no UTF-8, say."""
    reason = TOO_LONG
    if batch.nbytes <= MAX_ROW:
        try:
            yield from [_as_json(row) for row in batch.to_pylist()]
            return
        except UnicodeDecodeError:
            reason = "is not UTF-8"
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            reason = f"cannot be read: {one_line(error)}"
    if batch.num_rows == 1:
        yield BadRow(reason)
        return
    half = batch.num_rows // 2
    yield from _rows(batch.slice(0, half))
    yield from _rows(batch.slice(half))


def _as_json(row: Any) -> Any:
    """A table's dates and decimals as text, its bytes as their number: a row is what a line of JSON can hold."""
    return json.loads(
        json.dumps(row, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    )


# --- the hub ----------------------------------------------------------------------------------------------


def hub(name: str, config: str | None, split: str) -> Opened:
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
    rows = counted(f"{name}:{split}", data, f"{name}:{split}[{{}}]", lambda: getattr(data, "_fingerprint", None))
    rows.pairs = ((where, _as_json(row)) for where, row in rows.pairs)
    return rows
