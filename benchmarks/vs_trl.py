"""TRL and klimb side by side on the same work::

    python benchmarks/vs_trl.py --all
    python benchmarks/vs_trl.py --job grpo --size S --dtype fp32 [--json FILE]

The first runs every comparison that has a bar (see bars.py) within 40 minutes, keeps each in benchmarks/results and
prints one table; the second runs one of any job, size and precision.

Each side is a process of its own with the same weights, rows, reward, threads, precision and allocator settings.
First both compute loss, gradient norm and log-probs (of a reward model: scores) of one fixed batch, which have to
agree; then TRL's settings are tried for the fastest (or known from an earlier call on the same machine, whose trials
lie in --results); then the two take their steps in turn. What counts is a whole step, from drawing rows to the updated
weights, in seconds; memory is the peak of the resident set less what was resident after loading.

grpo        8 prompts × 8 completions, sampled, scored and learned from; β = 0, TRL's default (no reference)
grpo-long   2 prompts of 1,024 tokens × 16 completions of 64
rloo        as grpo with β = 0.05 in the reward, TRL's default. TRL clips the ratio of whole completions; so does
            klimb here, whose own row of that name does not
sft         64 examples, loss on the completions; TRL pads
sft-packed  the same examples; TRL with packing=True in rows of 1,024 tokens. They go through dense attention on a CPU
            (each token is multiplied with all of the row), so this comparison alone would flatter klimb. Ten such rows
            make a step and hold 64 examples on average: TRL's seconds are scaled to as many tokens as klimb had
reward      32 pairs, Bradley–Terry with centering 0.01 (klimb's default, set in TRL too)
dpo         32 pairs, β = 0.1; the frozen reference is computed in every step, the default of both

Rows are others in every step and the same on both sides (completions that are sampled differ by their draw).
Tokens are those that carry loss, all of a row where rows are scored; flat tokens are prompts and completions of all
rows, without padding and before any sharing of prompts.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import bars
import machine
from contest import (
    Disagreement,
    check,
    environment_of,
    in_turn,
    report,
    settings,
    spelled,
    summary,
    try_settings,
    work_of,
)
from jobs import JOBS
from work import SIZES
from worker import EndedEarly, Options

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = parse()
    common = {
        "threads": arguments.threads, "malloc": arguments.malloc, "device": "cpu", "dtype": arguments.dtype,
        "architecture": arguments.architecture,
    }  # fmt: skip
    if arguments.table:
        print(*bars.table(bars.stored(arguments.results, common)), sep="\n")
    elif arguments.all:
        all_of_them(arguments, common)
    else:
        try:
            one(arguments, common)
        except (Disagreement, EndedEarly) as error:
            raise SystemExit(str(error)) from None


def all_of_them(arguments: argparse.Namespace, common: Options) -> None:
    results = bars.run_all(
        arguments.rows, common, environment_of(arguments.threads, arguments.malloc), folder=arguments.results,
        minutes=arguments.minutes, pairs=arguments.pairs, force_bf16=arguments.force_bf16,
        try_again=arguments.try_again,
    )  # fmt: skip
    print(*bars.table(results), sep="\n")
    if any(isinstance(result, str) and result.startswith("failed") for result in results.values()):
        raise SystemExit(1)


def one(arguments: argparse.Namespace, common: Options) -> None:
    environment, pairs = environment_of(arguments.threads, arguments.malloc), arguments.pairs or 7
    own = {"beta": arguments.beta, "token_budget": arguments.token_budget}
    common |= {name: value for name, value in own.items() if value is not None}
    with work_of(arguments.job, arguments.size, pairs, common) as options:
        report(f"{arguments.job}, {arguments.architecture} of {options['parameters']:,} parameters, {arguments.dtype}, "
               f"β = {options['beta']}, {arguments.threads} threads")  # fmt: skip
        agreement = check(options, environment)
        if arguments.gate_only:
            return
        candidates = settings((arguments.job,), arguments.dtype, sizes=arguments.micro_batches or ())
        tried = try_settings(options, environment, candidates, box=60 * arguments.minutes)
        steps = in_turn(options, tried[0]["settings"], environment, pairs, math.inf)
        result = summary(options, tried, *steps) | {"agreement": agreement}
    print_result(result)
    machine.keep(result, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every comparison that has a bar")
    parser.add_argument("--table", action="store_true", help="the table of what lies in --results; nothing is run")
    parser.add_argument("--architecture", choices=["llama", "qwen3", "gpt2"], default="llama")
    parser.add_argument("--pairs", type=int, help="timed steps of each side, after one that is not; default: 7 or more")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--malloc", choices=["default", "tuned"], default="default", help="glibc's, for both sides")
    parser.add_argument("--minutes", type=float, default=36, help="--all: no row begins later; else: for TRL's trials")
    every = parser.add_argument_group("with --all")
    every.add_argument(
        "--rows", nargs="+", choices=bars.names(), default=bars.names(), help="only these", metavar="ROW"
    )
    every.add_argument("--force-bf16", action="store_true", help="also on a processor without bf16 units")
    every.add_argument(
        "--try-again", action="store_true", help="TRL's settings, also where --results knows the fastest"
    )
    every.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    single = parser.add_argument_group("without --all")
    single.add_argument("--job", choices=list(JOBS), default="grpo")
    single.add_argument("--size", choices=list(SIZES), default="S")
    single.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    single.add_argument("--beta", type=float, help="weight of the KL; default: TRL's; 0: no reference on either side")
    single.add_argument("--micro-batches", type=int, nargs="+", help="tried for TRL; default: those that divide a step")
    single.add_argument("--token-budget", type=int, help="klimb's micro-batch, in flat tokens; default: the job's")
    single.add_argument("--gate-only", action="store_true", help="compare the fixed batch's numbers, time nothing")
    single.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    job = JOBS[arguments.job]
    if arguments.beta is not None and job.beta is None:
        parser.error(f"--beta: {arguments.job} has no reference")
    if arguments.beta is not None and arguments.job == "dpo" and not arguments.beta > 0:
        parser.error("--beta: dpo needs one above 0")
    if uneven := [size for size in arguments.micro_batches or () if job.whole % size]:
        parser.error(f"--micro-batches: {uneven} do not divide the {job.whole} of a step")
    return arguments


def print_result(result: dict[str, Any]) -> None:
    budget = result["klimb_settings"]["token_budget"]
    for side, used in {"trl": spelled(result["trl_settings"]), "klimb": f"{budget} tokens a micro-batch"}.items():
        values = {key.removeprefix(f"{side}_"): value for key, value in result.items() if key.startswith(f"{side}_")}
        rollout = f" (generation {values['rollout_s']:.3f})" if values["rollout_s"] else ""
        print(f"{side:5}  {values['s']:8.3f} s a step{rollout}, {values['tokens']:.0f} tokens "
              f"({values['tokens_per_s']:.0f}/s), {values['flat_tokens']:.0f} flat "
              f"({values['flat_tokens_per_s']:.0f}/s), {values['mb']:.0f} MB, {used}")  # fmt: skip
    low, high = result["interval"]
    print(f"ratio of medians {result['ratio']:.2f} (95 %: {low:.2f}–{high:.2f}), of minima "
          f"{result['ratio_of_minima']:.2f}, per token {result['ratio_per_token']:.2f}, per flat token "
          f"{result['ratio_per_flat_token']:.2f}, of CPU time {result['cpu_ratio']:.2f}; "
          f"memory {result['memory_ratio']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
