"""What a source held, for a person and for a manifest."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np

from klimb.data.formats import Problem
from klimb.data.store import Chosen, Item


@dataclass(frozen=True)
class Report:
    """What a source held. Lengths are in tokens. `used`: rows an epoch; `cache`: "hit: FILE", "miss, kept: FILE", or
    nothing where none was asked for."""

    source: str
    type: str
    rows: int
    used: int
    dropped: list[Problem]
    lengths: dict[str, np.ndarray] = field(repr=False)
    notes: list[str] = field(default_factory=list)
    repeats: int = 0
    cache: str = ""
    parts: list[tuple[Report, float]] = field(default_factory=list)
    """Of a mixture: its sources with their weights."""
    labels: dict[str, int] = field(default_factory=dict)
    """How many are true and how many false, where rows (or their steps) have labels."""
    columns: list[str] = field(default_factory=list)
    """What rows hold beside the columns of their type."""

    def spread(self, name: str) -> tuple[int, int, int]:
        """(min, median, max)"""
        lengths = np.sort(self.lengths[name])
        return int(lengths[0]), int(lengths[(len(lengths) - 1) // 2]), int(lengths[-1])

    def facts(self) -> dict[str, Any]:
        """For a manifest: what was there, what was dropped and why (the numbers in a reason as n)."""
        reasons = Counter(re.sub(r"\d+", "n", problem.reason) for problem in self.dropped)
        parts = [{"weight": weight, **report.facts()} for report, weight in self.parts]
        return {
            "source": self.source, "type": self.type, "rows": self.rows, "used": self.used,
            "dropped": dict(reasons.most_common()), "repeats": self.repeats, "notes": self.notes,
            "tokens": {name: list(self.spread(name)) for name in self.lengths}, "cache": self.cache,
            **({"parts": parts} if parts else {}),
        }  # fmt: skip

    def __str__(self) -> str:
        spreads = [
            f"{name} {low}…{middle}…{high}" for name in self.lengths for low, middle, high in [self.spread(name)]
        ]
        lines = [f"{self.source}: {self.rows:,} rows, {self.type}; tokens (min…median…max): {', '.join(spreads)}"]
        if self.dropped:
            lines.append(f"  {len(self.dropped):,} of them dropped, the first: {self.dropped[0]}")
        if self.repeats:
            lines.append(f"  {self.repeats:,} rows repeat an earlier one exactly")
        lines += [f"  {note}" for note in self.notes]
        if self.parts:
            lines.append(f"  mixed: {self.used:,} rows an epoch")
        lines += [f"  {weight:g} × {report}".replace("\n", "\n  ") for report, weight in self.parts]
        return "\n".join([*lines, *([f"  cache {self.cache}"] if self.cache else [])])


@dataclass(frozen=True)
class Loaded(Generic[Item]):
    items: Chosen[Item]
    report: Report
    conversational: bool
