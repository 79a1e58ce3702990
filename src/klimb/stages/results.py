"""What `klimb.run` returns: a recipe's stages by name, for every seed, and what each left in its run directory."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from klimb.errors import did_you_mean
from klimb.report.text import cell, columns, visible

_TABLE = ("method", "proxy", "gold", "gold_low", "gold_high", "kl", "seconds")
_PAIRS = ("seed", "method", "accuracy", "accuracy_low", "accuracy_high", "pairs")
_OWN = ("proxy", "gold", "kl", "accuracy")


@dataclass(frozen=True)
class StageResult:
    """One finished stage. `result`: what its result.json holds."""

    path: Path
    result: Mapping[str, Any]

    @property
    def method(self) -> str:
        return str(self.result["method"])

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @property
    def seconds(self) -> float:
        return float(self.result["seconds"])

    @property
    def model(self) -> str | None:
        """The directory of what was trained (of a measurement: of what was measured), as `model=` takes it."""
        return self.result.get("model")

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """What was measured when training was over, with intervals; empty where nothing was."""
        return self.result.get("evaluation") or {}

    @property
    def metrics(self) -> dict[str, list[float | None]]:
        """metrics.jsonl as columns of one length, None where a step lacks a figure. `pandas.DataFrame` takes it."""
        rows = self._lines("metrics.jsonl")
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    @property
    def last(self) -> dict[str, float]:
        """The metrics of the last step."""
        return next(reversed(self._lines("metrics.jsonl")), {})

    @property
    def events(self) -> list[dict[str, Any]]:
        """Alarms, drops and retries, with their reasons."""
        return self._lines("events.jsonl")

    def samples(self, step: int | None = None) -> list[dict[str, Any]]:
        """Every completion of a step (None: the last one), with its prompt, tokens and scores.

        Empty where the stage keeps none. Raises FileNotFoundError for a step that there was not.
        """
        files = sorted((self.path / "samples").glob("step-*.parquet"))
        if step is not None:
            files = [self.path / "samples" / f"step-{step:06d}.parquet"]
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(files[-1]).to_pylist() if files else []
        manifest = json.loads((self.path / "manifest.json").read_text())
        if manifest["decisions"].get("conversational"):  # messages are kept as JSON
            rows = [{**row, **{key: json.loads(row[key]) for key in ("prompt", "completion")}} for row in rows]
        return rows

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def __repr__(self) -> str:
        figures = {**self.result, **self.evaluation}
        told = [f"{key} {figures[key]:.4g}" for key in _OWN if isinstance(figures.get(key), int | float)]
        return f"<{self.method}, seed {self.seed}: {', '.join([*told, f'{self.seconds:.3g} s'])}, {self.path}>"


@dataclass(frozen=True, repr=False)
class Result:
    """A finished recipe. ``result["grpo"]`` is its stage grpo (of the first seed), `by_seed` has those of all.

    out: its directory. summary: what summary.json there holds.
    """

    out: Path
    summary: Mapping[str, Any]
    by_seed: Mapping[int, Mapping[str, StageResult]]

    @property
    def stages(self) -> Mapping[str, StageResult]:
        """Those of the first seed."""
        return next(iter(self.by_seed.values()))

    def __getitem__(self, stage: str) -> StageResult:
        if stage not in self.stages:
            raise KeyError(f"no stage {stage!r}; {did_you_mean(stage, self.stages)}")
        return self.stages[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    @property
    def table(self) -> list[dict[str, Any]]:
        """What was measured, a row for each method: of several seeds the means."""
        return [{key: row.get(key) for key in _TABLE} for row in self.summary["rows"]]

    @property
    def report(self) -> Path:
        """The page with curves and replies."""
        return self.out / "report.html"

    def __repr__(self) -> str:
        tables = [columns(rows, names) for rows, names in self._tables()]
        stages = "" if tables else "\n".join(map(repr, self.stages.values()))
        return "\n".join([*tables, *filter(None, [stages]), f"report: {self.report}"])

    def _repr_html_(self) -> str:
        """For notebooks. What stages and methods are called is the user's own text, and shown as text."""
        tables = [
            f"<table><tr>{_cells('th', names)}</tr>"
            + "".join(f"<tr>{_cells('td', [cell(row[name]) for name in names])}</tr>" for row in rows)
            + "</table>"
            for rows, names in self._tables()
        ]
        return "".join(tables) or f"<pre>{html.escape(visible(repr(self)))}</pre>"

    def _tables(self) -> list[tuple[list[dict[str, Any]], Sequence[str]]]:
        found = [(self.table, _TABLE), (list(self.summary["accuracies"]), _PAIRS)]
        return [(rows, names) for rows, names in found if rows]


def result_of(summary: Mapping[str, Any], stages: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Result:
    """stages: the results by seed and name."""
    by_seed = {
        seed: {name: StageResult(Path(found["run"]), found) for name, found in of_seed.items()}
        for seed, of_seed in stages.items()
    }
    return Result(Path(summary["out"]), {k: v for k, v in summary.items() if k != "out"}, by_seed)


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(visible(text))}</{tag}>" for text in texts)
