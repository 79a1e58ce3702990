"""What each method did, as points over √KL: the data behind the picture."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from klimb.report.charts import Points
from klimb.report.load import Records, Run
from klimb.report.text import finite
from klimb.report.tracks import column, moving_mean

Quantity = Literal["proxy", "gold"]
METRIC: dict[Quantity, str] = {"proxy": "reward/mean", "gold": "gold/mean"}


@dataclass
class Path:
    """What one method did. All points are (√KL, value)."""

    method: str
    colour: int
    raw: dict[Quantity, Points] = field(default_factory=dict)
    smooth: dict[Quantity, list[Points]] = field(default_factory=dict)
    curve: dict[Quantity, list[tuple[float, float, str]]] = field(default_factory=dict)
    """A measured curve (best-of-n, evaluations on the way) with a label at each point."""

    def lines(self, quantity: Quantity) -> list[Points]:
        """Everything drawn as a line."""
        return [*self.smooth.get(quantity, []), [(x, y) for x, y, _ in self.curve.get(quantity, [])]]

    @property
    def reach(self) -> list[float]:
        """Every √KL that a line comes to."""
        return [x for quantity in METRIC for line in self.lines(quantity) for x, _ in line]


def paths_of(records: Records, colours: dict[str, int]) -> list[Path]:
    """One path per method, in the order of the table; those without a KL are empty."""
    paths = {row.method: Path(row.method, colours[row.method]) for row in records.rows}
    for run in records.runs:
        path = paths.setdefault(run.method, Path(run.method, colours[run.method]))
        for quantity, metric in METRIC.items():
            _add_steps(path, quantity, run, metric)
            points = _curve(run, quantity)
            # Curves of several seeds lie on the same n: one of them is enough beside the table's intervals.
            if points and quantity not in path.curve:
                path.curve[quantity] = points
    return list(paths.values())


def _add_steps(path: Path, quantity: Quantity, run: Run, metric: str) -> None:
    kl, values = column(run, "kl"), column(run, metric)
    known = [(k, v) for k, v in zip(kl, values) if k is not None and v is not None]
    if not known:
        return
    path.raw.setdefault(quantity, []).extend((math.sqrt(max(k, 0.0)), v) for k, v in known)
    smooth_kl, smooth = moving_mean([k for k, _ in known]), moving_mean([v for _, v in known])
    line = [(math.sqrt(max(k, 0.0)), v) for k, v in zip(smooth_kl, smooth) if k is not None and v is not None]
    path.smooth.setdefault(quantity, []).append(line)


def _curve(run: Run, quantity: Quantity) -> list[tuple[float, float, str]]:
    points = []
    entries = run.result.get("curve")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        kl, value, n = finite(entry.get("kl")), finite(entry.get(quantity)), finite(entry.get("n"))
        if kl is not None and value is not None:
            points.append((math.sqrt(max(kl, 0.0)), value, "" if n is None else f"n={n:.0f}"))
    return points
