"""Tokenised rows in one file: an Arrow table that is mapped into memory and read row by row, whatever its size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, overload

import numpy as np
import pyarrow as pa

from klimb.types import Example, Judged, Labelled, Preference, Prompt

Item = TypeVar("Item", Prompt, Example, Preference, Labelled, Judged)

TOKENS, MASK = pa.list_(pa.int32()), pa.list_(pa.bool_())
SCHEMAS: dict[type, dict[str, pa.DataType]] = {
    Prompt: {"tokens": TOKENS, "text": pa.large_string(), "columns": pa.large_string()},
    Example: {"prompt": TOKENS, "completion": TOKENS, "mask": MASK},
    Preference: {
        "prompt": TOKENS, "chosen": TOKENS, "rejected": TOKENS,
        "chosen_mask": MASK, "rejected_mask": MASK, "margin": pa.float64(), "strength": pa.float64(),
        "gold": TOKENS, "gold_mask": MASK,
    },
    Labelled: {"prompt": TOKENS, "completion": TOKENS, "mask": MASK, "label": pa.bool_()},
    Judged: {"prompt": TOKENS, "tokens": TOKENS, "lengths": TOKENS, "values": pa.list_(pa.float64())},
}  # fmt: skip
"""Beside these: `id` and `key`, 64 bits each. What is text or of any form is kept as JSON."""
LENGTHS = {Prompt: {"prompt": "tokens"}, Example: {"prompt": "prompt", "completion": "completion"}}
LENGTHS[Labelled] = LENGTHS[Example]
LENGTHS[Judged] = {"prompt": "prompt", "completion": "tokens"}
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


class Stored(Generic[Item]):
    """The items of a file, made when they are asked for. Raises pyarrow's errors where it is not such a file."""

    def __init__(self, path: Path, kind: type[Item]) -> None:
        self._kind: type[Item] = kind
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def item(self, at: int) -> Item:
        number = int(np.searchsorted(self._ends, at, side="right"))
        batch = self._batches[number]
        row = at - (int(self._ends[number]) - batch.num_rows)
        values = {name: _value(batch.column(name), row, name) for name in SCHEMAS[self._kind]}
        return self._kind(id=f"{batch.column('id')[row].as_py():016x}", **values)

    def numbers(self, name: str) -> np.ndarray:
        """The 64 bits `id` or `key` of every item."""
        return _end_to_end([batch.column(name).to_numpy() for batch in self._batches], np.uint64)

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each part of every item."""
        return {
            part: _end_to_end([np.diff(batch.column(name).offsets.to_numpy()) for batch in self._batches], np.int32)
            for part, name in LENGTHS[self._kind].items()
        }


class Held(Generic[Item]):
    """The same for items in memory."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items: Sequence[Item] = items

    def __len__(self) -> int:
        return len(self._items)

    def item(self, at: int) -> Item:
        return self._items[at]

    def numbers(self, name: str) -> np.ndarray:
        of = {"id": lambda item: int(item.id, 16), "key": prompt_key}[name]
        return np.array([of(item) for item in self._items], np.uint64)

    def lengths(self) -> dict[str, np.ndarray]:
        parts = LENGTHS[type(self._items[0])] if self._items else {}
        return {part: np.array([len(getattr(item, name)) for item in self._items]) for part, name in parts.items()}


class Joined(Generic[Item]):
    """Several of them, one behind the other."""

    def __init__(self, parts: Sequence[Base[Item]]) -> None:
        self._parts: Sequence[Base[Item]] = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def item(self, at: int) -> Item:
        number = int(np.searchsorted(self._ends, at, side="right"))
        return self._parts[number].item(at - int(self._ends[number]) + len(self._parts[number]))

    def numbers(self, name: str) -> np.ndarray:
        return np.concatenate([part.numbers(name) for part in self._parts])

    def lengths(self) -> dict[str, np.ndarray]:
        each = [part.lengths() for part in self._parts]
        return {name: np.concatenate([lengths[name] for lengths in each]) for name in each[0]}


def _value(column: Any, row: int, name: str) -> Any:
    if isinstance(column, pa.ListArray):
        return column[row].values.to_numpy(zero_copy_only=False).tolist()
    value = column[row].as_py()
    return json.loads(value) if name in AS_JSON else value


Base: TypeAlias = Stored[Item] | Held[Item] | Joined[Item]
"""Items by number, as they were read: those of rows that are the same have the same id."""


class Chosen(Sequence[Item]):
    """Items by their numbers, as a sequence. A copy of an item has an id of its own: `copies` counts from 1."""

    def __init__(self, base: Base[Item], index: np.ndarray, copies: np.ndarray | None = None) -> None:
        self.base: Base[Item] = base
        self._index = index
        self._copies = np.ones(len(index), np.int64) if copies is None else copies

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, at: int) -> Item: ...
    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...
    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        item, copy = self.base.item(int(self._index[at])), int(self._copies[at])
        return item if copy == 1 else replace(item, id=f"{item.id}-{copy}")

    def part(self, index: np.ndarray) -> Chosen[Item]:
        return Chosen(self.base, self._index[index], self._copies[index])

    def keys(self) -> np.ndarray:
        """`prompt_key` of each."""
        return self.base.numbers("key")[self._index]

    def lengths(self) -> dict[str, np.ndarray]:
        return {name: lengths[self._index] for name, lengths in self.base.lengths().items()}


def occurrences(ids: np.ndarray) -> np.ndarray:
    """For each value the how-manieth of its kind it is, from 1."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ids) else np.zeros(0, np.int64)
    counts = np.diff(np.r_[starts, len(ids)])
    numbers = np.empty(len(ids), np.int64)
    numbers[order] = np.arange(len(ids)) - np.repeat(starts, counts) + 1
    return numbers


def prompt_tokens(item: Prompt | Example | Preference | Labelled | Judged) -> list[int]:
    """What tells one prompt from another. Plain text has none but BOS or its own first token: there it is all of it."""
    if isinstance(item, Prompt):
        return item.tokens
    if isinstance(item, Example) and len(item.prompt) <= 1:
        return item.prompt + item.completion
    return item.prompt


def prompt_key(item: Prompt | Example | Preference | Labelled | Judged) -> int:
    """64 bits that two items share when they have the same prompt (or, once in 10^19, by chance)."""
    digest = hashlib.blake2b(np.array(prompt_tokens(item), np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _end_to_end(parts: list[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, kind)
