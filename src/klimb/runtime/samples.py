"""Every completion of a step as a table: what was asked, what was answered, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

_COLUMNS = {
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "completion": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "logps": pa.list_(pa.float32()),
    "finish": pa.string(),
    "version": pa.int64(),
    "score": pa.float64(),
}
_LAST = {"gold": pa.float64()}


def sample_table(step: int, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row for each sample, with the keys of `_COLUMNS`, `reward.<component>` and `gold`.

    An absent key becomes null, a list of messages becomes JSON. Raises ValueError for other keys.
    """
    rewards = dict.fromkeys((key for row in rows for key in row if key.startswith("reward.")), pa.float64())
    schema = {**_COLUMNS, **rewards, **_LAST}
    if unknown := {key for row in rows for key in row} - schema.keys():
        raise ValueError(f"samples have no column {', '.join(sorted(unknown))}; known: {', '.join(schema)}")
    columns = {
        key: pa.array([_text(row.get(key)) if kind == pa.string() else row.get(key) for row in rows], type=kind)
        for key, kind in schema.items()
    }
    return pa.table({"step": pa.array([step] * len(rows), type=pa.int64()), **columns})


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate out of a JSON escape is no text to Arrow
