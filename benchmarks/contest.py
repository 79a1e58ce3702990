"""One comparison: both sides have to agree on a fixed batch, TRL gets its fastest settings, then they step in turn."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from jobs import JOBS, job_of
from work import prepare
from worker import EndedEarly, Options, Side

TOLERANCE = 1e-4  # of loss, gradient norm (relative), log-probs and scores (absolute) on the fixed batch in fp32
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip
"""glibc keeps what was freed instead of giving it back to the system and asking again."""
PRECISIONS = ("autocast", "pure")
"""TRL's ways to bf16: fp32 weights under autocast (its default), or weights in bf16."""
WARM_UP = 1
"""Steps of each side that are not counted: allocation, warm caches."""
DRAWS = 10_000

Environment = dict[str, str]
Steps = list[dict[str, Any]]


class Disagreement(Exception):
    """The two sides do not compute the same."""


def environment_of(threads: int, malloc: str) -> Environment:
    """The same for both sides."""
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path), "TRL_EXPERIMENTAL_SILENCE": "1",
        **(TUNED_MALLOC if malloc == "tuned" else {}),
    }  # fmt: skip


@contextlib.contextmanager
def work_of(job: str, size: str, pairs: int, common: Options) -> Iterator[Options]:
    """Model and rows in a folder, and what the sides are told about them; `common` names dtype, threads, malloc,
    device, architecture, and beta or token_budget where they are not the job's own."""
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as folder:
        parameters = prepare(Path(folder), size, JOBS[job], steps_needed(pairs), common["architecture"])
        own = {"beta": JOBS[job].beta, "token_budget": JOBS[job].budget(common["dtype"], size)}
        yield {**own, **common, "folder": folder, "job": job, "size": size, "parameters": parameters}


def steps_needed(pairs: int) -> int:
    """Rows are written for so many steps: TRL draws those of a step before it is told to take it."""
    return max(pairs + WARM_UP, 4) + 1


def settings(
    jobs: Sequence[str], dtype: str, precisions: Sequence[str] = PRECISIONS, sizes: Sequence[int] = ()
) -> list[Options]:
    """What is tried for TRL: the job's way of laying out rows, then its precision, then the micro-batch."""
    ways = precisions if dtype == "bf16" else ("fp32",)
    return [
        {"job": job, "precision": precision, "micro_batch": size}
        for job in jobs for precision in ways for size in sizes or JOBS[job].micro_batches
    ]  # fmt: skip


def check(options: Options, environment: Environment) -> dict[str, float]:
    """Both sides on the fixed batch, always in fp32 and where there can be a KL with one: the same numbers, or
    nothing is timed."""
    beta = 0.04 if options["beta"] == 0 else options["beta"]
    options = {**options, "dtype": "fp32", "beta": beta, "task": "gate"}
    trl_options = {**options, "tried": {"micro_batch": 1, "precision": "fp32"}}
    with Side("trl", trl_options, environment) as theirs, Side("klimb", options, environment) as ours:
        trl, klimb = theirs.read(), ours.read()
    rows = [sorted(answer["rows"]) for answer in (trl, klimb)]
    if [tokens for tokens, _ in rows[0]] != [tokens for tokens, _ in rows[1]]:
        raise Disagreement("the two sides do not learn from the same tokens")
    pairs = [pair for (_, a), (_, b) in zip(*rows, strict=True) for pair in zip(a, b, strict=True)]
    differences = {
        "loss": abs(klimb["loss"] - trl["loss"]) / abs(trl["loss"]),
        "grad_norm": abs(klimb["grad_norm"] - trl["grad_norm"]) / trl["grad_norm"],
        "scores" if job_of(options).scores else "logps": max(abs(a - b) for a, b in pairs),
    }
    line = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if max(differences.values()) > TOLERANCE:
        raise Disagreement(f"the two sides do not compute the same: differences of {line} (allowed {TOLERANCE:g})")
    report(f"{options['job']}: same numbers on a fixed batch of {len(rows[0])} rows: loss {klimb['loss']:.6g}, "
           f"gradient norm {klimb['grad_norm']:.6g} (differences: {line})")  # fmt: skip
    return differences


def try_settings(options: Options, environment: Environment, candidates: list[Options], box: float) -> list[Options]:
    """What each candidate costs TRL, the fastest first; those that did not fit in `box` seconds come without costs.

    The candidates of one job and precision share a process; each of these gets an equal part of what time is left.
    """
    if len(candidates) == 1:
        return [{"settings": candidates[0]}]
    until = time.monotonic() + box
    groups = [list(group) for _, group in itertools.groupby(candidates, lambda each: (each["job"], each["precision"]))]
    found: list[Options] = []
    for i, group in enumerate(groups):
        seconds = max(until - time.monotonic(), 0) / (len(groups) - i)
        best = min((trial["per_token"] for trial in found), default=math.inf)
        asked = {**options, "task": "trials", "job": group[0]["job"], "candidates": group, "seconds": seconds,
                 "best": best}  # fmt: skip
        with Side("trl", asked, environment) as side, contextlib.suppress(EndedEarly):  # out of memory, at times
            while trial := side.read():
                report(f"  TRL, {spelled(trial['settings'])}: {trial['seconds']:.2f} s a step")
                found.append(trial)
    if not found:
        raise EndedEarly("TRL could not take a step with any of its settings")
    tried = [trial["settings"] for trial in found]
    left_out = [{"settings": each} for each in candidates if each not in tried]
    if left_out:
        report(f"  not tried, the time was up: {', '.join(spelled(each['settings']) for each in left_out)}")
    return sorted(found, key=lambda trial: trial["per_token"]) + left_out


def spelled(tried: Options) -> str:
    return f"{tried['job']} {tried['precision']} {tried['micro_batch']} a micro-batch"


def in_turn(
    options: Options, tried: Options, environment: Environment, pairs: int, until: float
) -> tuple[Steps, Steps]:
    """One step of each, again and again, the first `WARM_UP` for nothing.

    until: by `time.monotonic`, when no further pair begins.
    """
    klimb = {**options, "task": "steps"}
    trl = {**klimb, "job": tried["job"], "tried": tried}
    theirs, ours = [], []
    with Side("trl", trl, environment) as a, Side("klimb", klimb, environment) as b:
        a.read(), b.read()
        for _ in range(pairs + WARM_UP):
            if len(theirs) > WARM_UP and time.monotonic() > until:
                break
            theirs.append(a.step())
            ours.append(b.step())
    if trl["job"] in ("sft", "reward", "dpo") and any(
        x[key] != y[key] for x, y in zip(theirs, ours, strict=True) for key in ("tokens", "flat")
    ):
        raise Disagreement("the two sides did not learn from the same rows")
    return theirs[WARM_UP:], ours[WARM_UP:]


def alone(options: Options, environment: Environment, steps: int, box: float = math.inf) -> Steps:
    """klimb's steps with nobody beside it: `steps` of them, but after three none begins when `box` seconds are over."""
    until = time.monotonic() + box
    taken: Steps = []
    with Side("klimb", {**options, "task": "steps"}, environment) as side:
        side.read()
        while len(taken) < steps + WARM_UP and (len(taken) < 3 + WARM_UP or time.monotonic() < until):
            taken.append(side.step())
    return taken[WARM_UP:]


def interval(a: Sequence[float], b: Sequence[float], *, paired: bool = True) -> list[float]:
    """95 % of the ratio of medians a / b: a percentile bootstrap of 10,000 draws with a fixed seed.

    Pairs are drawn together: what slowed the machine slowed both.
    """
    draw = np.random.default_rng(0)
    first = draw.integers(len(a), size=(DRAWS, len(a)))
    second = first if paired else draw.integers(len(b), size=(DRAWS, len(b)))
    ratios = np.median(np.asarray(a)[first], axis=1) / np.median(np.asarray(b)[second], axis=1)
    return [round(float(bound), 3) for bound in np.percentile(ratios, [2.5, 97.5])]


def summary(options: Options, tried: list[Options], trl: Steps, klimb: Steps) -> dict[str, Any]:
    """The figures of a comparison; TRL's seconds with packed rows are those for as many tokens as klimb had."""

    def median(steps: Steps, key: str) -> float:
        return round(statistics.median(step[key] for step in steps), 4)

    def least(steps: Steps) -> float:
        return round(min(step["seconds"] for step in steps), 4)

    def rate(steps: Steps, key: str) -> float:
        return round(statistics.median(step[key] / step["seconds"] for step in steps), 1)

    if tried[0]["settings"]["job"] == "sft-packed":
        trl = [{**x, "seconds": x["seconds"] * y["flat"] / x["flat"]} for x, y in zip(trl, klimb, strict=True)]
    seconds = [[step["seconds"] for step in steps] for steps in (trl, klimb)]
    return {
        "job": options["job"], "size": options["size"], "dtype": options["dtype"],
        "architecture": options["architecture"], "pairs": len(trl),
        "trl_s": median(trl, "seconds"), "klimb_s": median(klimb, "seconds"),
        "ratio": round(median(trl, "seconds") / median(klimb, "seconds"), 3), "interval": interval(*seconds),
        "ratio_of_minima": round(least(trl) / least(klimb), 3),
        "ratio_per_token": round(rate(klimb, "tokens") / rate(trl, "tokens"), 3),
        "ratio_per_flat_token": round(rate(klimb, "flat") / rate(trl, "flat"), 3),
        "trl_min_s": least(trl), "klimb_min_s": least(klimb),
        "trl_cpu_s": median(trl, "cpu"), "klimb_cpu_s": median(klimb, "cpu"),
        "cpu_ratio": round(median(trl, "cpu") / median(klimb, "cpu"), 3),
        "trl_mb": round(trl[-1]["mb"], 1), "klimb_mb": round(klimb[-1]["mb"], 1),
        "memory_ratio": round(klimb[-1]["mb"] / trl[-1]["mb"], 3),
        "trl_rollout_s": median(trl, "rollout"), "klimb_rollout_s": median(klimb, "rollout"),
        "trl_tokens": median(trl, "tokens"), "klimb_tokens": median(klimb, "tokens"),
        "trl_flat_tokens": median(trl, "flat"), "klimb_flat_tokens": median(klimb, "flat"),
        "trl_tokens_per_s": rate(trl, "tokens"), "klimb_tokens_per_s": rate(klimb, "tokens"),
        "trl_flat_tokens_per_s": rate(trl, "flat"), "klimb_flat_tokens_per_s": rate(klimb, "flat"),
        "trl_steps_s": [round(s, 4) for s in seconds[0]], "klimb_steps_s": [round(s, 4) for s in seconds[1]],
        "trl_settings": tried[0]["settings"], "trl_tried": tried,
        "klimb_settings": {"token_budget": options["token_budget"]}, "beta": options["beta"],
        "parameters": options["parameters"], "machine": machine.facts(options["threads"], options["malloc"]),
    }  # fmt: skip


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
