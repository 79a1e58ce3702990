"""Several sources as one: what weight says how often the rows of each come in an epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from klimb.data.report import Loaded, Report
from klimb.data.source import Source
from klimb.data.store import Chosen, Item, Joined, occurrences
from klimb.errors import DataError


def parts_of(source: Any) -> list[tuple[Source, float]] | None:
    """`[a.jsonl, b.jsonl]` or `{a.jsonl: 1, b.jsonl: 0.5}` as sources and weights; None of a single source."""
    if isinstance(source, Mapping):
        parts = list(source.items())
    elif isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
        parts = [(path, 1.0) for path in source]
    else:
        return None
    for path, weight in parts:
        good = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight) and weight > 0
        if not isinstance(path, str | os.PathLike) or not good:
            raise DataError(
                f"the weight {weight!r:.40} of {path!r:.40}", where="data", why="a weight is a number above 0",
                fix="write {a.jsonl: 1, b.jsonl: 0.5}: how often the rows of each come in an epoch",
            )  # fmt: skip
    if len({os.fspath(path) for path, _ in parts}) < len(parts):
        raise DataError("a file is named twice", where="data", fix="give it a weight: {a.jsonl: 2}")
    return parts


def mixed(parts: Sequence[Loaded[Item]], weights: Sequence[float]) -> Loaded[Item]:
    """The rows of all parts in their order, those of a part of weight 2.5 twice, and half of them (by a hash of each)
    once more. A row that comes several times has an id of its own each time."""
    first = parts[0]
    for part in parts[1:]:
        if part.conversational != first.conversational:
            raise DataError(
                f"is {part.report.type}, but {first.report.source} is {first.report.type}", where=part.report.source,
                why="what is mixed is all strings or all messages", fix="bring them into one form",
            )  # fmt: skip
    joined = Joined([part.items.base for part in parts])
    ids, starts = joined.numbers("id"), np.cumsum([0, *(len(part.items) for part in parts)])
    index = np.concatenate([
        start + _picked(ids[start:end], weight) for start, end, weight in zip(starts, starts[1:], weights)
    ])  # fmt: skip
    items = Chosen(joined, index, occurrences(ids[index]))
    reports = [part.report for part in parts]
    report = Report(
        source=" + ".join(report.source for report in reports),
        type=" + ".join(dict.fromkeys(report.type for report in reports)),
        rows=sum(report.rows for report in reports),
        used=len(index),
        dropped=[problem for report in reports for problem in report.dropped],
        lengths=items.lengths(),
        parts=list(zip(reports, weights)),
        repeats=int((occurrences(ids) > 1).sum()),
    )
    return Loaded(items, report, first.conversational)


def _picked(ids: np.ndarray, weight: float) -> np.ndarray:
    """Numbers of the rows in their order, whole passes first."""
    whole, part = divmod(weight, 1.0)
    some = np.sort(np.argsort(ids, kind="stable")[: round(part * len(ids))])
    return np.concatenate([*[np.arange(len(ids))] * int(whole), some])
