"""Reads a run or pipeline directory. Whatever is missing or damaged becomes a note, never an exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from klimb.report.text import clipped, finite

KINDS = ("sft", "reward", "sample", "rl", "preference", "online_preference", "distill", "average", "evaluate_reward",
         "evaluate")  # fmt: skip
RUN_FILES = ("metrics.jsonl", "result.json")


@dataclass
class Run:
    """One stage. `result` is empty until it has finished; `metrics` hold numbers only, one dict a step."""

    name: str
    stage: str
    method: str
    seed: int | None
    result: dict[str, Any]
    metrics: list[dict[str, float]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return int(finite(self.result.get("steps")) or (self.metrics[-1]["step"] if self.metrics else 0))


@dataclass(frozen=True)
class Row:
    """One line of the results table, joined with what the stage says of itself."""

    method: str
    stage: str = ""
    algorithm: str = ""
    seed: int | None = None
    proxy: float | None = None
    gold: float | None = None
    gold_low: float | None = None
    gold_high: float | None = None
    kl: float | None = None
    length: float | None = None
    n: int | None = None
    seconds: float | None = None


@dataclass
class Records:
    """All that a directory holds. `rows` are over seeds when there are several, `seed_rows` are per seed."""

    name: str
    runs: list[Run]
    rows: list[Row]
    seed_rows: list[Row]
    seeds: list[int]
    summary: dict[str, Any]
    config: str
    manifest: dict[str, Any]
    replies: list[Any]
    notes: list[str]


def load(directory: Path) -> Records:
    """Raises NotADirectoryError for no directory; everything else is taken as it is."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory}: no directory to report on; give a run or a pipeline directory")
    notes: list[str] = []
    summary = _object(directory / "summary.json", notes)
    folders = sorted(_numbered_seeds(directory))
    runs: list[Run] = []
    seed_rows: list[Row] = []
    replies = _list(directory / "replies.json", notes)
    for seed, folder in folders:
        own = _object(folder / "summary.json", notes)
        found = _stages(folder, own, seed, notes)
        seed_rows += _rows(own, found, seed)
        if not found:  # one stage for several seeds: their folders are the runs
            found = [_run(folder, seed, {}, notes)]
            seed_rows += [row for run in found if (row := _evaluated(run)) is not None]
        runs += found
        replies = replies or _list(folder / "replies.json", notes)
    if not folders:
        runs = _stages(directory, summary, None, notes) or [_run(directory, None, {}, notes)]
    rows = _rows(summary, runs, None)
    if not rows and len(folders) <= 1:
        rows, seed_rows = seed_rows, []
    if not folders and not rows:
        rows = [row for run in runs if (row := _evaluated(run)) is not None]
    return Records(
        name=str(summary.get("name") or directory.resolve().name),
        runs=runs,
        rows=rows,
        seed_rows=seed_rows,
        seeds=[seed for seed, _ in folders] or _own_seed(summary, runs),
        summary=summary,
        config=_read(directory / "config.yaml", notes),
        manifest=_object(directory / "manifest.json", notes),
        replies=replies,
        notes=notes,
    )


def _numbered_seeds(directory: Path) -> Iterator[tuple[int, Path]]:
    for folder in directory.glob("seed-*"):
        if folder.is_dir() and folder.name.removeprefix("seed-").isdecimal():
            yield int(folder.name.removeprefix("seed-")), folder


def _own_seed(summary: dict[str, Any], runs: list[Run]) -> list[int]:
    seeds = {finite(summary.get("seed")), *(finite(run.result.get("seed")) for run in runs)} - {None}
    return sorted(int(seed) for seed in seeds if seed is not None)


def _stages(folder: Path, summary: dict[str, Any], seed: int | None, notes: list[str]) -> list[Run]:
    """The runs below `folder`, in the order of the summary, else in the order in which stages usually run."""
    told = {name: result for name, result in _dict(summary.get("stages")).items() if isinstance(result, dict)}
    present = sorted(
        child.name
        for child in folder.iterdir()
        if child.is_dir() and any((child / file).is_file() for file in RUN_FILES)
    )
    names = [*told, *(name for name in present if name not in told)]
    runs = [_run(folder / name, seed, told.get(name, {}), notes) for name in names]
    if told:
        return runs
    return sorted(runs, key=lambda run: KINDS.index(run.stage) if run.stage in KINDS else len(KINDS))


def _run(folder: Path, seed: int | None, told: dict[str, Any], notes: list[str]) -> Run:
    result = _object(folder / "result.json", notes) or told
    manifest = _object(folder / "manifest.json", notes)
    config = _read(folder / "config.yaml", notes)
    metrics = _metrics(folder / "metrics.jsonl", notes)
    stage = str(result.get("stage") or manifest.get("stage") or _configured(config, "stage") or _guess(metrics))
    return Run(
        name=str(result.get("name") or folder.name),
        stage=stage,
        method=str(result.get("method") or manifest.get("method") or result.get("name") or folder.name),
        seed=seed,
        result=result,
        metrics=metrics,
        events=[event for event in _json_lines(folder / "events.jsonl", notes)],
        config=config,
        manifest=manifest,
        samples=sorted(folder.glob("samples/*.parquet")),
    )


def _metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    """One dict a step. A step written twice (a run that was resumed) counts once, as written last."""
    steps: dict[float, dict[str, float]] = {}
    for entry in _json_lines(path, notes):
        numbers = {str(key): value for key, raw in entry.items() if (value := finite(raw)) is not None}
        if "step" in numbers:
            steps[numbers["step"]] = numbers
    return [steps[step] for step in sorted(steps)]


def _guess(metrics: list[dict[str, float]]) -> str:
    """What kind of stage writes these names; a run that is still going has no result.json to say so."""
    names = {name for step in metrics for name in step}
    if "reward/mean" in names:
        return "rl"
    if names & {"chosen_log_ratio", "chosen_logps"}:
        return "preference"
    if "margin" in names:
        return "reward"
    return "sft" if "loss" in names else ""


def _rows(summary: dict[str, Any], runs: list[Run], seed: int | None) -> list[Row]:
    by_method = {run.method: run for run in reversed(runs)}
    rows = []
    for entry in _objects(summary.get("rows")):
        method = str(entry.get("method", "?"))
        run = by_method.get(method)
        rows.append(_row(method, entry, run, seed))
    return rows


def _evaluated(run: Run) -> Row | None:
    evaluation = _dict(run.result.get("evaluation"))
    return _row(run.method, {"seconds": run.result.get("seconds")} | evaluation, run, run.seed) if evaluation else None


def _row(method: str, entry: dict[str, Any], run: Run | None, seed: int | None) -> Row:
    evaluation = _dict(run.result.get("evaluation")) if run else {}
    n = finite(entry.get("n", evaluation.get("n")))
    return Row(
        method=method,
        stage=str(entry.get("stage") or (run.stage if run else "")),
        algorithm=str(entry.get("algorithm") or (run.result.get("algorithm") if run else "") or ""),
        seed=seed,
        proxy=finite(entry.get("proxy")),
        gold=finite(entry.get("gold")),
        gold_low=finite(entry.get("gold_low")),
        gold_high=finite(entry.get("gold_high")),
        kl=finite(entry.get("kl")),
        length=finite(entry.get("length", evaluation.get("length"))),
        n=None if n is None else int(n),
        seconds=finite(entry.get("seconds")),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _configured(config: str, key: str) -> Any:
    try:
        return _dict(yaml.safe_load(config)).get(key)
    except yaml.YAMLError:
        return None


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    return _dict(_parsed(path, notes))


def _list(path: Path, notes: list[str]) -> list[Any]:
    value = _parsed(path, notes)
    return value if isinstance(value, list) else []


def _parsed(path: Path, notes: list[str]) -> Any:
    text = _read(path, notes)
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        notes.append(f"{_place(path)} is no JSON and was left out: {clipped(str(error), 200)}")
        return None


def _json_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    for line, text in enumerate(_read(path, notes).splitlines(), start=1):
        try:
            entry = json.loads(text) if text.strip() else None
        except ValueError:
            notes.append(f"{_place(path)}, line {line}: no JSON (a run killed while writing?); the line was left out")
            continue
        if isinstance(entry, dict):
            yield entry


def _read(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        notes.append(f"{_place(path)} cannot be read ({error.strerror}) and was left out")
        return ""


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
