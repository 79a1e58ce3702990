"""TRL and klimb side by side on the same work::

    python benchmarks/vs_trl.py --job grpo --size S --dtype fp32 [--json benchmarks/results/grpo-S-fp32.json]

Each side is a process of its own with the same weights, rows, reward, threads, precision and allocator settings.
First both compute loss, gradient norm and log-probs (of a reward model: scores) of one fixed batch, which have to
agree; then TRL's settings are tried for the fastest; then the two take their steps in turn. What counts is a whole
step, from drawing rows to the updated weights, in seconds; memory is the peak of the resident set less what was
resident after loading.

grpo        8 prompts × 8 completions, sampled, scored and learned from; β = 0, TRL's default (no reference)
rloo        the same with β = 0.05 in the reward, TRL's default. TRL clips the ratio of whole completions; so does
            klimb here, whose own row of that name does not
sft         64 examples, loss on the completions; TRL pads
sft-packed  the same examples; TRL with packing=True in rows of 1,024 tokens. They go through dense attention on a CPU
            (each token is multiplied with all of the row), so this comparison flatters klimb: `sft` is the one to
            quote. Ten such rows make a step and hold 64 examples on average: see the ratio per flat token
reward      32 pairs, Bradley–Terry with centering 0.01 (klimb's default, set in TRL too)
dpo         32 pairs, β = 0.1; the frozen reference is computed in every step, the default of both

Rows are others in every step and the same on both sides (completions that are sampled differ by their draw).
Tokens are those that carry loss, all of a row where rows are scored; flat tokens are prompts and completions of all
rows, without padding and before any sharing of prompts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from jobs import JOBS
from work import SIZES, prepare
from worker import Options, Side

TOLERANCE = 1e-4  # of loss, gradient norm (relative), log-probs and scores (absolute) on the fixed batch in fp32
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip
"""glibc keeps what was freed instead of giving it back to the system and asking again."""
WARM_UP = 2

Environment = dict[str, str]
Steps = list[dict[str, Any]]


def main() -> None:
    arguments = parse()
    job = JOBS[arguments.job]
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TRL_EXPERIMENTAL_SILENCE": "1",
        **(TUNED_MALLOC if arguments.malloc == "tuned" else {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as folder:
        # TRL draws the rows of a step before it is told to take it.
        parameters = prepare(Path(folder), arguments.size, job, steps=max(arguments.steps + WARM_UP, 4) + 1)
        options = {
            "folder": folder, "job": arguments.job, "size": arguments.size, "dtype": arguments.dtype,
            "beta": arguments.beta, "threads": arguments.threads, "token_budget": arguments.token_budget,
        }  # fmt: skip
        report(f"{arguments.job}, {parameters:,} parameters, {arguments.dtype}, β = {arguments.beta}, "
               f"{arguments.threads} threads")  # fmt: skip
        agreement = check(options, environment)
        if arguments.gate_only:
            return
        tried = fastest(options, environment, arguments.micro_batches)
        trl, klimb = in_turn({**options, "tried": tried}, options, environment, arguments.steps)
    print_result(result := summary(arguments, parameters, agreement, tried, trl, klimb))
    machine.keep(result, arguments.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(JOBS), default="grpo")
    parser.add_argument("--size", choices=list(SIZES), default="S")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--beta", type=float, help="weight of the KL; default: TRL's; 0: no reference on either side")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side, after two that are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--malloc", choices=["default", "tuned"], default="default", help="glibc's, for both sides")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", help="tried for TRL; default: four that divide the step"
    )
    parser.add_argument("--token-budget", type=int, default=640, help="klimb's micro-batch, in flat tokens")
    parser.add_argument("--gate-only", action="store_true", help="compare the numbers of the fixed batch, time nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    job = JOBS[arguments.job]
    if arguments.beta is None:
        arguments.beta = job.beta
    elif job.beta is None:
        parser.error(f"--beta: {arguments.job} has no reference")
    elif arguments.job == "dpo" and not arguments.beta > 0:
        parser.error("--beta: dpo needs one above 0")
    arguments.micro_batches = arguments.micro_batches or list(job.micro_batches)
    if uneven := [size for size in arguments.micro_batches if job.whole % size]:
        parser.error(f"--micro-batches: {uneven} do not divide the {job.whole} of a step")
    return arguments


def check(options: Options, environment: Environment) -> dict[str, float]:
    """Both sides on the fixed batch, always in fp32 and where there can be a KL with one: the same numbers, or
    nothing is timed."""
    beta = 0.04 if options["beta"] == 0 else options["beta"]
    options = {**options, "dtype": "fp32", "beta": beta, "gate": True}
    with Side("trl", {**options, "tried": {"micro_batch": 1}}, environment) as side:
        trl = side.read()
    with Side("klimb", options, environment) as side:
        klimb = side.read()
    rows = [sorted(answer["rows"]) for answer in (trl, klimb)]
    if [tokens for tokens, _ in rows[0]] != [tokens for tokens, _ in rows[1]]:
        raise SystemExit("the two sides do not learn from the same tokens")
    pairs = [pair for (_, a), (_, b) in zip(*rows, strict=True) for pair in zip(a, b, strict=True)]
    differences = {
        "loss": abs(klimb["loss"] - trl["loss"]) / abs(trl["loss"]),
        "grad_norm": abs(klimb["grad_norm"] - trl["grad_norm"]) / trl["grad_norm"],
        "scores" if JOBS[options["job"]].scores else "logps": max(abs(a - b) for a, b in pairs),
    }
    line = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: differences of {line} (allowed {TOLERANCE:g})")
    report(f"same numbers on a fixed batch of {len(rows[0])} rows: loss {klimb['loss']:.6g}, "
           f"gradient norm {klimb['grad_norm']:.6g} (differences: {line})")  # fmt: skip
    return differences


def fastest(options: Options, environment: Environment, micro_batches: list[int]) -> dict[str, Any]:
    """TRL's settings with the smallest median of three steps."""
    precisions: list[dict[str, Any]] = [{}]
    if options["dtype"] == "bf16":
        precisions = [{"autocast": True}, {"weights": "bf16"}]
    candidates = [{"micro_batch": size, **precision} for precision in precisions for size in micro_batches]
    if len(candidates) == 1:
        return candidates[0]
    best, found = float("inf"), candidates[0]
    for tried in candidates:
        with Side("trl", {**options, "tried": tried}, environment) as side:
            side.read()
            seconds = statistics.median([side.step()["seconds"] for _ in range(4)][1:])
        report(f"TRL with {tried}: {seconds:.2f} s")
        if seconds < best:
            best, found = seconds, tried
    return found


def in_turn(trl: Options, klimb: Options, environment: Environment, steps: int) -> tuple[Steps, Steps]:
    """One step of each, again and again; the first two of each (allocation, warm caches) are not counted."""
    with Side("trl", trl, environment) as a, Side("klimb", klimb, environment) as b:
        a.read(), b.read()
        pairs = [(a.step(), b.step()) for _ in range(steps + WARM_UP)][WARM_UP:]
    if klimb["job"] in ("sft", "reward", "dpo") and any(
        x[key] != y[key] for x, y in pairs for key in ("tokens", "flat")
    ):
        raise SystemExit("the two sides did not learn from the same rows")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def summary(
    arguments: argparse.Namespace, parameters: int, agreement: dict[str, float], tried: dict[str, Any], trl: Steps,
    klimb: Steps,
) -> dict[str, Any]:  # fmt: skip
    def median(steps: Steps, key: str) -> float:
        return round(statistics.median(step[key] for step in steps), 4)

    def least(steps: Steps) -> float:
        return round(min(step["seconds"] for step in steps), 4)

    def rate(steps: Steps, key: str) -> float:
        return round(statistics.median(step[key] / step["seconds"] for step in steps), 1)

    return {
        "job": arguments.job, "size": arguments.size, "dtype": arguments.dtype,
        "trl_s": median(trl, "seconds"), "klimb_s": median(klimb, "seconds"),
        "ratio": round(median(trl, "seconds") / median(klimb, "seconds"), 3),
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
        "trl_steps_s": [round(s["seconds"], 4) for s in trl], "klimb_steps_s": [round(s["seconds"], 4) for s in klimb],
        "trl_settings": tried, "klimb_settings": {"token_budget": arguments.token_budget},
        "beta": arguments.beta, "parameters": parameters, "agreement": agreement,
        "machine": machine.facts(arguments.threads, arguments.malloc),
    }  # fmt: skip


def print_result(result: dict[str, Any]) -> None:
    for side in ("trl", "klimb"):
        values = {key.removeprefix(f"{side}_"): value for key, value in result.items() if key.startswith(f"{side}_")}
        rollout = f" (generation {values['rollout_s']:.3f})" if values["rollout_s"] else ""
        print(f"{side:5}  {values['s']:8.3f} s a step{rollout}, {values['tokens']:.0f} tokens "
              f"({values['tokens_per_s']:.0f}/s), {values['flat_tokens']:.0f} flat "
              f"({values['flat_tokens_per_s']:.0f}/s), {values['mb']:.0f} MB, {values['settings']}")  # fmt: skip
    print(f"ratio of medians {result['ratio']:.2f}, of minima {result['ratio_of_minima']:.2f}, "
          f"per token {result['ratio_per_token']:.2f}, per flat token {result['ratio_per_flat_token']:.2f}, "
          f"of CPU time {result['cpu_ratio']:.2f}; memory {result['memory_ratio']:.2f}")  # fmt: skip


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
