"""Tokenised rows in one file: an Arrow table that is mapped into memory and read row by row, whatever its size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from klimb.types import Example, Preference, Prompt

Item = TypeVar("Item", Prompt, Example, Preference)

TOKENS, MASK = pa.list_(pa.int32()), pa.list_(pa.bool_())
SCHEMAS: dict[type, dict[str, pa.DataType]] = {
    Prompt: {"tokens": TOKENS, "text": pa.large_string(), "columns": pa.large_string()},
    Example: {"prompt": TOKENS, "completion": TOKENS, "mask": MASK},
    Preference: {
        "prompt": TOKENS, "chosen": TOKENS, "rejected": TOKENS,
        "chosen_mask": MASK, "rejected_mask": MASK, "margin": pa.float64(),
    },
}  # fmt: skip
"""Beside these: `id` and `key`, 64 bits each. What is text or of any form is kept as JSON."""
LENGTHS = {Prompt: {"prompt": "tokens"}, Example: {"prompt": "prompt", "completion": "completion"}}
LENGTHS[Preference] = {name: name for name in ("prompt", "chosen", "rejected")}
AS_JSON = ("text", "columns")


class Writer(Generic[Item]):
    """Writes items to a file that a `Stored` reads."""

    def __init__(self, path: Path, kind: type[Item]) -> None:
        self._columns = SCHEMAS[kind]
        self._schema = pa.schema({"id": pa.uint64(), "key": pa.uint64(), **self._columns})
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def add(self, items: Sequence[Item]) -> None:
        columns: list[Any] = [[int(item.id, 16) for item in items], [prompt_key(item) for item in items]]
        for name in self._columns:
            values = [getattr(item, name) for item in items]
            columns.append([json.dumps(value, ensure_ascii=False) for value in values] if name in AS_JSON else values)
        arrays = [pa.array(values, type=field.type) for values, field in zip(columns, self._schema)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
        self._file.close()


class Stored(Sequence[Item]):
    """The items of a file, made when they are asked for. Raises pyarrow's errors where it is not such a file."""

    def __init__(self, path: Path, kind: type[Item]) -> None:
        self._kind: type[Item] = kind
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = at + len(self) if at < 0 else at
        if not 0 <= at < len(self):
            raise IndexError(at)
        number = int(np.searchsorted(self._ends, at, side="right"))
        batch = self._batches[number]
        row = at - (int(self._ends[number]) - batch.num_rows)
        values = {name: _value(batch.column(name), row, name) for name in SCHEMAS[self._kind]}
        return self._kind(id=f"{batch.column('id')[row].as_py():016x}", **values)

    def numbers(self, name: str) -> np.ndarray:
        """The 64 bits `id` or `key` of every row."""
        columns = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, np.uint64)

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each part of every row."""
        return {
            part: np.concatenate([np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches])
            for part, name in LENGTHS[self._kind].items()
        }


def _value(column: Any, row: int, name: str) -> Any:
    if isinstance(column, pa.ListArray):
        return column[row].values.to_numpy(zero_copy_only=False).tolist()
    value = column[row].as_py()
    return json.loads(value) if name in AS_JSON else value


class Chosen(Sequence[Item]):
    """Items of a sequence by their numbers. A copy of an item has an id of its own: `copies` counts from 1."""

    def __init__(self, base: Sequence[Item], index: np.ndarray, copies: np.ndarray | None = None) -> None:
        self._base: Sequence[Item] = base
        self._index, self._copies = index, copies

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        item = self._base[int(self._index[at])]
        copy = 1 if self._copies is None else int(self._copies[at])
        return item if copy == 1 else replace(item, id=f"{item.id}-{copy}")

    def keys(self) -> np.ndarray:
        return prompt_keys(self._base)[self._index]


def occurrences(ids: np.ndarray) -> np.ndarray:
    """For each value the how-manieth of its kind it is, from 1."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ids) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(ids)])
    numbers = np.empty(len(ids), np.int64)
    numbers[order] = np.arange(len(ids)) - np.repeat(starts, counts) + 1
    return numbers


def prompt_tokens(item: Prompt | Example | Preference) -> list[int]:
    """What tells one prompt from another. Plain text has none but BOS or its own first token: there it is all of it."""
    if isinstance(item, Prompt):
        return item.tokens
    if isinstance(item, Example) and len(item.prompt) <= 1:
        return item.prompt + item.completion
    return item.prompt


def prompt_key(item: Prompt | Example | Preference) -> int:
    """64 bits that two items share when they have the same prompt (or, once in 10^19, by chance)."""
    digest = hashlib.blake2b(np.array(prompt_tokens(item), np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def prompt_keys(items: Iterable[Prompt | Example | Preference]) -> np.ndarray:
    """`prompt_key` of each; without making the items where a file knows them."""
    if isinstance(items, Stored):
        return items.numbers("key")
    if isinstance(items, Chosen):
        return items.keys()
    return np.array([prompt_key(item) for item in items], np.uint64)
