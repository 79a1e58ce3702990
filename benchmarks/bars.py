"""The bars: every comparison that klimb wants to win by a stated factor, run one after another, in one table."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import machine
from contest import (
    PRECISIONS,
    Disagreement,
    Environment,
    check,
    in_turn,
    report,
    settings,
    spelled,
    summary,
    try_settings,
    work_of,
)
from jobs import JOBS
from scaling import scale
from worker import EndedEarly, Options

ENOUGH = 7  # pairs, for a bar to count as met


class Row(NamedTuple):
    """least, aim: how many times as fast as TRL. box: seconds for trials of TRL's settings, where none are known."""

    name: str
    job: str
    size: str
    dtype: str
    least: float
    aim: float
    trl_jobs: tuple[str, ...] = ()
    precisions: tuple[str, ...] = PRECISIONS
    pairs: int = ENOUGH
    box: float = 90


ROWS = (
    Row("grpo-S-fp32", "grpo", "S", "fp32", 2.8, 5, pairs=9),
    Row("grpo-M-fp32", "grpo", "M", "fp32", 2.6, 4.5),
    Row("grpo-M-bf16-autocast", "grpo", "M", "bf16", 3.8, 7, precisions=("autocast",)),
    Row("grpo-M-bf16-pure", "grpo", "M", "bf16", 3.0, 5, precisions=("pure",)),
    Row("grpo-L-bf16", "grpo", "L", "bf16", 2.5, 5, box=150),
    Row("sft-M-fp32", "sft", "M", "fp32", 2.1, 3, trl_jobs=("sft", "sft-packed")),
    Row("sft-M-bf16", "sft", "M", "bf16", 3.0, 6, trl_jobs=("sft", "sft-packed")),
    Row("reward-M-bf16", "reward", "M", "bf16", 2.4, 5),
    Row("dpo-M-bf16", "dpo", "M", "bf16", 2.4, 5),
    Row("grpo-long-M-fp32", "grpo-long", "M", "fp32", 6, 10),
)
"""Neighbours of one job and size share model, rows and the check of the numbers."""
SCALING = {"sequences-M-fp32": "sequences", "lengths-M-fp32": "lengths"}
"""Cost against work, small over large: at least 1."""
MEMORY = {"grpo-M-fp32": (0.35, 0.25), "sft-M-fp32": (0.35, 0.25)}
"""klimb's peak over TRL's: at most, aim."""

Results = dict[str, dict[str, Any] | str]
"""Of each row its figures, or why there are none."""


def names() -> list[str]:
    return [*(row.name for row in ROWS), *SCALING]


def run_all(
    chosen: Sequence[str], common: Options, environment: Environment, *, folder: Path, minutes: float,
    pairs: int | None, force_bf16: bool, try_again: bool,
) -> Results:  # fmt: skip
    """The chosen rows, each kept in `folder` as soon as it is there. After `minutes` no further one begins."""
    until = time.monotonic() + 60 * minutes
    results: Results = {}

    def keep(name: str, take: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > until:
            results[name] = f"not run: {minutes:g} minutes were over"
            return
        report(f"{name}:")
        try:
            result = take()
        except (Disagreement, EndedEarly) as error:
            results[name] = f"failed: {error}"
        else:
            results[name] = result
            machine.keep(result, folder / f"{file_name(name, common)}.json")

    rows = [row for row in ROWS if row.name in chosen]
    if not (force_bf16 or machine.multiplies_bf16()):
        slow = "not run: this processor has no bf16 units (--force-bf16 runs it all the same)"
        results |= {row.name: slow for row in rows if row.dtype == "bf16"}
        rows = [row for row in rows if row.dtype != "bf16"]
    for (job, size), together in itertools.groupby(rows, key=lambda row: (row.job, row.size)):
        group = [row._replace(pairs=pairs or row.pairs) for row in together]
        agreed: dict[str, dict[str, float]] = {}
        with work_of(job, size, max(row.pairs for row in group), common) as options:
            for row in group:
                known = None if try_again else earlier_trials(folder / f"{file_name(row.name, common)}.json", common)
                keep(row.name, partial(contest_of, row, options, environment, until, agreed, known))
    for name in (name for name in SCALING if name in chosen):
        asked = {**common, "size": "M", "dtype": "fp32"}
        keep(name, partial(scale, SCALING[name], asked, environment, pairs))
    return results


def contest_of(
    row: Row, options: Options, environment: Environment, until: float, agreed: dict[str, dict[str, float]],
    known: list[Options] | None,
) -> dict[str, Any]:  # fmt: skip
    """agreed: the jobs that were found to give the same numbers on this model, and how far apart they were.
    known: what each of TRL's settings cost in an earlier call."""
    jobs = row.trl_jobs or (row.job,)
    for job in jobs:
        if job not in agreed:
            agreed[job] = check({**options, "job": job}, environment)
    options = {**options, "dtype": row.dtype, "token_budget": JOBS[row.job].budget(row.dtype, options["size"])}
    candidates = settings(jobs, row.dtype, row.precisions)
    tried = known or try_settings(options, environment, candidates, min(row.box, until - time.monotonic()))
    steps = in_turn(options, tried[0]["settings"], environment, row.pairs, until)
    return summary(options, tried, *steps) | {"agreement": {job: agreed[job] for job in jobs}}


def earlier_trials(file: Path, common: Options) -> list[Options] | None:
    """TRL's settings, the fastest first, as tried on such a machine with such software: klimb plays no part in them."""
    if not file.exists():
        return None
    result, now = json.loads(file.read_text()), machine.facts(common["threads"], common["malloc"])
    same = ("processor", "threads", "malloc", "python", "torch", "transformers", "trl")
    if any(result["machine"][fact] != now[fact] for fact in same):
        return None
    tried: list[Options] = result["trl_tried"]
    report(f"  TRL, {spelled(tried[0]['settings'])}: the fastest of an earlier call's trials (--try-again)")
    return tried


def file_name(name: str, common: Options) -> str:
    return name if common["architecture"] == "llama" else f"{name}-{common['architecture']}"


def stored(folder: Path, common: Options) -> Results:
    """What earlier runs left."""
    found: Results = {}
    for name in names():
        found[name] = "not measured"
        with contextlib.suppress(FileNotFoundError):
            found[name] = json.loads((folder / f"{file_name(name, common)}.json").read_text())
    return found


# The table ----------------------------------------------------------------------------------------------------------

HEAD = (
    "job",
    "size",
    "dtype",
    "TRL s",
    "klimb s",
    "ratio",
    "95 %",
    "at least",
    "aim",
    "met",
    "memory",
    "TRL's best",
)


def table(results: Results) -> list[str]:
    """In Markdown: a line a row that was asked for, then the bars of memory."""
    lines = [HEAD, ("---",) * len(HEAD)]
    by_name = {row.name: row for row in ROWS}
    for name, result in results.items():
        row = by_name.get(name)
        if isinstance(result, str):
            lines.append((name, result, *[""] * (len(HEAD) - 2)))
        elif row is None:
            lines.append(_scaling_line(result))
        else:
            lines.append(_line(row, result))
    for name, (most, aim) in MEMORY.items():
        result = results.get(name)
        if isinstance(result, dict):
            lines.append(_memory_line(result, most, aim))
    return ["| " + " | ".join(line) + " |" for line in lines]


def _line(row: Row, result: dict[str, Any]) -> tuple[str, ...]:
    low, high = result["interval"]
    return (
        result["job"], result["size"], result["dtype"], f"{result['trl_s']:.2f}", f"{result['klimb_s']:.2f}",
        f"**{result['ratio']:.2f}**", f"{low:.2f}–{high:.2f}", f"{row.least:g}", f"{row.aim:g}",
        _met(result, row.least, row.aim), f"{result['memory_ratio']:.2f}", spelled(result["trl_settings"]),
    )  # fmt: skip


def _memory_line(result: dict[str, Any], most: float, aim: float) -> tuple[str, ...]:
    ratio = result["memory_ratio"]
    met = "aim" if ratio <= aim else "yes" if ratio <= most else "no"
    return (f"peak memory {result['job']}", result["size"], result["dtype"], f"{result['trl_mb']:.0f} MB",
            f"{result['klimb_mb']:.0f} MB", f"**{ratio:.2f}**", "", f"≤ {most}", f"≤ {aim}", met, "", "")  # fmt: skip


def _scaling_line(result: dict[str, Any]) -> tuple[str, ...]:
    low, high = result["interval"]
    rates = ", ".join(f"{p['sequences']} × {p['length']}: {p['tokens_per_s']:.0f}" for p in result["points"])
    return (f"cost against work, {result['job']}", result["size"], result["dtype"], "", f"{result['klimb_s']:.2f}",
            f"**{result['ratio']:.2f}**", f"{low:.2f}–{high:.2f}", "1", "", _met(result, 1, None), "",
            f"tokens/s of {rates}")  # fmt: skip


def _met(result: dict[str, Any], least: float, aim: float | None) -> str:
    """By the lower end of the interval, over enough pairs."""
    low = result["interval"][0]
    if low < least:
        return "no"
    if result["pairs"] < ENOUGH:
        return f"no: {result['pairs']} pairs"
    return "aim" if aim is not None and low >= aim else "yes"
