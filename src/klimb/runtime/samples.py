"""Every completion of a step as a table: what was asked, what was answered, and what it was worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import pyarrow as pa

from klimb.types import Group, Sample

_COLUMNS = {
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "sample": pa.int64(),
    "completion": pa.string(),
    "tokens": pa.list_(pa.int32()),
    "logps": pa.list_(pa.float32()),
    "finish": pa.string(),
    "version": pa.int64(),
    "trained": pa.bool_(),
    "score": pa.float64(),
}
_LAST = {"gold": pa.float64()}


def sample_records(learnt: Sequence[Group], refused: Sequence[Group] = ()) -> list[dict[str, Any]]:
    """Rows for `sample_table`: what was learnt from, then what was sampled, scored and `trained` on: no."""
    return [_record(group, sample, trained) for groups, trained in ((learnt, True), (refused, False))
            for group in groups for sample in group.samples]  # fmt: skip


def _record(group: Group, sample: Sample, trained: bool) -> dict[str, Any]:
    return {
        "prompt_id": group.prompt.id, "prompt": group.prompt.text, "sample": sample.index,
        "completion": sample.text, "tokens": sample.tokens, "logps": sample.logps, "finish": sample.finish,
        "version": max((v for s in sample.segments for v in s.versions), default=0), "trained": trained,
        "score": sample.score, "gold": sample.rewards.get("gold"),
        **{f"reward.{name}": value for name, value in sample.rewards.items() if name != "gold"},
    }  # fmt: skip


def sample_table(step: int, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row for each sample, with the keys of `_COLUMNS`, `reward.<component>` and `gold`.

    An absent key becomes null, a list of messages becomes JSON. Raises ValueError for other keys.
    """
    rewards = dict.fromkeys((key for row in rows for key in row if key.startswith("reward.")), pa.float64())
    schema = {**_COLUMNS, **rewards, **_LAST}
    if unknown := {key for row in rows for key in row} - schema.keys():
        raise ValueError(f"samples have no column {', '.join(sorted(unknown))}; known: {', '.join(schema)}")
    columns = {
        key: _array([_text(row.get(key)) if kind == pa.string() else row.get(key) for row in rows], kind)
        for key, kind in schema.items()
    }
    return pa.table({"step": _array([step] * len(rows), pa.int64()), **columns})


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """What `pa.array(values, kind)` gives. That one loads pandas where it is installed: 40 MB and half a second."""
    known = [value is not None for value in values]
    validity = None if all(known) else pa.py_buffer(np.packbits(known, bitorder="little"))
    if pa.types.is_string(kind):
        texts = [b"" if value is None else value.encode() for value in values]
        return pa.Array.from_buffers(kind, len(values), [validity, _offsets(texts), pa.py_buffer(b"".join(texts))])
    if pa.types.is_list(kind):
        lists = [value or [] for value in values]
        items = _array([item for part in lists for item in part], kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [validity, _offsets(lists)], children=[items])
    filled = [value if here else 0 for value, here in zip(values, known, strict=True)]
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(
            kind, len(values), [validity, pa.py_buffer(np.packbits(np.array(filled, dtype=bool), bitorder="little"))]
        )
    numbers = np.array(filled, dtype=kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [validity, pa.py_buffer(numbers)])


def _offsets(parts: Sequence[Sized]) -> pa.Buffer:
    """Where each part begins among all that were joined, and where the last one ends."""
    return pa.py_buffer(np.cumsum([0, *map(len, parts)], dtype=np.int32))


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()  # a lone surrogate out of a JSON escape is no text to Arrow
