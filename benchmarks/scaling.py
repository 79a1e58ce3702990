"""Cost against work, of klimb alone: steps of GRPO with more sequences, and with longer ones.

Every completion has its full length, so that the work is known: the FLOPs of a forward pass over what is sampled once
for the rollout and three times for training (twice of it backward), attention by what each token sees. A cost that
grows like the work keeps seconds per FLOP; the ratio is that of the smallest step over that of the largest.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import machine
from contest import Environment, alone, interval, report, steps_needed
from floors import Work
from jobs import JOBS, Job
from work import SIZES, prepare
from worker import Options

PROMPT = 64
AXES: dict[str, list[Job]] = {
    axis: [
        JOBS["grpo"]._replace(
            rows=prompts, prompt_tokens=(PROMPT - 1,) * 2, max_tokens=length, stop=0.0,
            token_budget=max(JOBS["grpo"].token_budget, PROMPT + length),
        )
        for prompts, length in steps
    ]
    for axis, steps in {
        "sequences": [(1, 64), (8, 64), (64, 64)],
        "lengths": [(1, 64), (1, 512), (1, 2048)],
    }.items()
}  # fmt: skip
"""Prompts a step, of 8 completions each, and the length of these."""
USUAL = 7
BOX = 60.0
"""Seconds for a point's steps, if nobody says how many; there are three at least."""


def scale(axis: str, options: Options, environment: Environment, steps: int | None) -> dict[str, Any]:
    """Timed steps of each point; None: up to seven."""
    points = [point(job, options, environment, steps) for job in AXES[axis]]
    first, last = points[0], points[-1]
    return {
        "job": axis, "size": options["size"], "dtype": options["dtype"], "architecture": options["architecture"],
        "points": points,
        "ratio": round(first["s_per_tflop"] / last["s_per_tflop"], 3),
        "interval": interval(first["s_per_tflop_steps"], last["s_per_tflop_steps"], paired=False),
        "pairs": min(len(each["s_per_tflop_steps"]) for each in points), "klimb_s": last["klimb_s"],
        "machine": machine.facts(options["threads"], options["malloc"]),
    }  # fmt: skip


def point(job: Job, options: Options, environment: Environment, asked_for: int | None) -> dict[str, Any]:
    steps = asked_for or USUAL
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        prepare(Path(folder), options["size"], job, steps_needed(steps), options["architecture"])
        change = {name: getattr(job, name) for name in ("rows", "prompt_tokens", "max_tokens", "stop")}
        asked = {**options, "folder": folder, "job": "grpo", "change": change, "beta": 0.0,
                 "token_budget": job.token_budget}  # fmt: skip
        taken = alone(asked, environment, steps, math.inf if asked_for else BOX)
    work = Work([PROMPT] * job.rows, [[job.max_tokens] * job.samples] * job.rows)
    if any(step["tokens"] != work.sampled for step in taken):
        raise SystemExit("a completion stopped before its end: the work is not what it was taken for")
    flops = 4 * SIZES[options["size"]].forward_flops(work.flat, work.sampled, work.seen)
    seconds = [step["seconds"] for step in taken]
    found = {
        "sequences": job.rows * job.samples, "length": job.max_tokens,
        "klimb_s": round(statistics.median(seconds), 4), "tflop": flops / 1e12,
        "tokens_per_s": round(work.sampled / statistics.median(seconds), 1),
        "s_per_tflop": statistics.median(seconds) / flops * 1e12,
        "s_per_tflop_steps": [each / flops * 1e12 for each in seconds], "mb": round(taken[-1]["mb"], 1),
    }  # fmt: skip
    report(f"  {found['sequences']} sequences of {PROMPT} + {job.max_tokens} tokens: {found['klimb_s']:.2f} s, "
           f"{found['tokens_per_s']:.0f} tokens/s, {found['s_per_tflop']:.1f} s/TFLOP")  # fmt: skip
    return found
