"""Where a GRPO step of klimb goes, beside what this machine could do it in::

    python benchmarks/breakdown.py --size M --dtype fp32 --threads 2 [--json FILE]

The step is that of `vs_trl.py`. Its functions are wrapped by timers that stop while an inner one runs, so the lines
add up to the step. A floor is the multiplications of a line over the measured speed of the model's own matrices at the
line's number of rows, or its bytes over the measured speed of a copy; see floors.py. What is computed twice (logits
in the backward pass), prompts that several micro-batches need, and the layout of ragged rows are not in the floors.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import torch
from floors import Floors, Work
from jobs import JOBS
from side_klimb import take_steps
from work import SIZES, prepare
from worker import Finished

import klimb.rollout.local
import klimb.stages.experience
import klimb.stages.rl
from klimb.models.backbone import Backbone
from klimb.models.cache import Decode
from klimb.rewards.scorer import Scorer
from klimb.rollout.local import LocalEngine
from klimb.runtime.learner import Learner
from klimb.runtime.run import Run

WARM_UP = 2
LINES = (
    "rollout: prefill", "rollout: decode", "rollout: sampling", "rollout: bookkeeping", "reward", "layout of rows",
    "forward", "backward", "optimiser", "run directory", "everything else",
)  # fmt: skip


class Clock:
    """Seconds by line. What runs inside of another line is taken off it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running: list[str] = []
        self.since = time.perf_counter()

    def _pass_on(self) -> None:
        """The time until now belongs to the line that was on top."""
        now = time.perf_counter()
        self.seconds[self.running[-1] if self.running else "everything else"] += now - self.since
        self.since = now

    @contextmanager
    def line(self, name: str) -> Iterator[None]:
        self._pass_on()
        self.running.append(name)
        try:
            yield
        finally:
            self._pass_on()
            self.running.pop()

    def read(self) -> dict[str, float]:
        """All since the last reading."""
        self._pass_on()
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def wrap(self, owner: Any, name: str, line: str | Callable[..., str]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*given: Any, **named: Any) -> Any:
            with self.line(line if isinstance(line, str) else line(*given)):
                return function(*given, **named)

        setattr(owner, name, timed)


def wrap_all(clock: Clock, drawn: list[Work]) -> None:
    rl, local, experience = klimb.stages.rl, klimb.rollout.local, klimb.stages.experience
    clock.wrap(experience, "generate", "rollout: bookkeeping")
    clock.wrap(
        LocalEngine, "_states",
        lambda engine, tokens, positions, plan, keep: (
            "rollout: decode" if isinstance(plan, Decode) else "rollout: prefill"
        ),
    )  # fmt: skip
    clock.wrap(LocalEngine, "_logits", "rollout: decode")
    clock.wrap(Backbone, "for_decoding", "rollout: decode")
    clock.wrap(local, "draw", "rollout: sampling")
    clock.wrap(local, "uniforms", "rollout: sampling")
    clock.wrap(Scorer, "score", "reward")
    clock.wrap(Backbone, "pack", "layout of rows")
    clock.wrap(Learner, "_accumulate", "layout of rows")
    clock.wrap(rl, "rl_loss", "forward")
    clock.wrap(torch.Tensor, "backward", "backward")
    clock.wrap(Learner, "step", "optimiser")  # what is left of it: clipping, AdamW, working copies
    clock.wrap(rl, "sample_records", "run directory")
    for name in ("log", "write_samples", "sync"):
        clock.wrap(Run, name, "run directory")
    rollout = rl.rollout

    def noted(*given: Any) -> Any:
        result = rollout(*given)
        drawn.append(Work.of(result[0]))
        return result

    rl.rollout = noted


class CountedRun(Run):
    """Reads the clock after every step and ends the run after the last."""

    clock: Clock
    readings: list[dict[str, float]]
    steps: int

    def truncate(self, step: int) -> None:
        super().truncate(step)
        self.clock.read()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().log(step, metrics)
        self.readings.append(self.clock.read())
        if step == self.steps + WARM_UP:
            raise Finished


def main() -> None:
    arguments = parse()
    clock = Clock()
    readings: list[dict[str, float]] = []
    drawn: list[Work] = []
    wrap_all(clock, drawn)
    with tempfile.TemporaryDirectory(prefix="breakdown-") as folder:
        parameters = prepare(Path(folder), arguments.size, JOBS["grpo"], steps=arguments.steps + WARM_UP)
        options = {
            "folder": folder, "task": "steps", "job": "grpo", "beta": 0.0, "dtype": arguments.dtype, "device": "cpu",
            "threads": arguments.threads, "token_budget": arguments.token_budget,
        }  # fmt: skip
        with contextlib.suppress(Finished):
            take_steps(CountedRun, options, clock=clock, readings=readings, steps=arguments.steps)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    floors = Floors(SIZES[arguments.size], parameters, dtype, arguments.token_budget)
    result = table(readings[WARM_UP:], [floors.of(work) for work in drawn[WARM_UP:]])
    result |= {
        "size": arguments.size, "dtype": arguments.dtype, "parameters": parameters,
        "token_budget": arguments.token_budget, "tokens": [work.sampled for work in drawn[WARM_UP:]],
        "gflops_by_rows": {rows: round(rate / 1e9, 1) for rows, rate in floors.rates.items()},
        "gb_per_s_by_mb": {round(8 * n / 1e6, 3): round(rate / 1e9, 1) for n, rate in floors.bandwidths.items()},
        "machine": machine.facts(arguments.threads, os.environ.get("MALLOC_MMAP_MAX_", "default")),
    }  # fmt: skip
    show(result)
    machine.keep(result, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="S")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that are not")
    parser.add_argument("--token-budget", type=int, help="the micro-batch, in flat tokens; default: that of vs_trl.py")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.token_budget = arguments.token_budget or JOBS["grpo"].budget(arguments.dtype, arguments.size)
    return arguments


def table(readings: list[dict[str, float]], floors: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the steps, which add up; of the whole step the median and the minimum too. Milliseconds."""
    steps = [sum(reading.values()) for reading in readings]
    lines = []
    for name in LINES:
        seconds = statistics.mean(reading.get(name, 0.0) for reading in readings)
        floor = statistics.mean(each[name] for each in floors) if name in floors[0] else None
        lines.append({
            "line": name, "ms": round(1e3 * seconds, 2), "share": round(seconds / statistics.mean(steps), 4),
            "floor_ms": None if floor is None else round(1e3 * floor, 2),
            "times_floor": None if floor is None else round(seconds / floor, 2),
        })  # fmt: skip
    return {
        "step_ms": round(1e3 * statistics.mean(steps), 2), "median_ms": round(1e3 * statistics.median(steps), 2),
        "min_ms": round(1e3 * min(steps), 2),
        "floor_ms": round(1e3 * statistics.mean(sum(each.values()) for each in floors), 2), "lines": lines,
    }  # fmt: skip


def show(result: dict[str, Any]) -> None:
    print(f"{'':28} {'ms':>9} {'share':>7} {'floor ms':>9} {'× floor':>8}")
    for line in result["lines"]:
        floor = "" if line["floor_ms"] is None else f"{line['floor_ms']:9.2f} {line['times_floor']:8.1f}"
        print(f"{line['line']:28} {line['ms']:9.2f} {line['share']:7.1%} {floor}")
    print(f"{'step':28} {result['step_ms']:9.2f} {'':7} {result['floor_ms']:9.2f} "
          f"{result['step_ms'] / result['floor_ms']:8.1f}")  # fmt: skip
    print(f"GFLOP/s by rows {result['gflops_by_rows']}, GB/s by MB {result['gb_per_s_by_mb']}", file=sys.stderr)


if __name__ == "__main__":
    main()
