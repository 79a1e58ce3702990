"""TRL and klimb side by side on the same work::

    python benchmarks/vs_trl.py --job grpo --size S --dtype fp32 [--json benchmarks/results/grpo-S-fp32.json]

Each side is a process of its own with the same weights, prompts, reward, threads, precision and allocator settings.
First both compute loss, gradient norm and log-probs of one fixed batch, which have to agree; then TRL's settings
are tried for the fastest; then the two take their steps in turn. What counts is a whole step, from drawing prompts to
the updated weights, in seconds; memory is the peak of the resident set less what was resident after loading.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from work import SIZES, prepare

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # of loss, gradient norm (relative) and log-probs (absolute) on the fixed batch in fp32
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip
"""glibc keeps what was freed instead of giving it back to the system and asking again."""


class Side:
    """A worker process that takes a step when it is asked."""

    def __init__(self, name: str, options: dict[str, Any], environment: dict[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the side)
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / f"side_{name}.py"), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, env=environment,
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended early:\n{self.log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def main() -> None:
    arguments = parse()
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TRL_EXPERIMENTAL_SILENCE": "1",
        **(TUNED_MALLOC if arguments.malloc == "tuned" else {}),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as folder:
        parameters = prepare(Path(folder), arguments.size)
        options = {
            "folder": folder, "size": arguments.size, "dtype": arguments.dtype, "beta": arguments.beta,
            "threads": arguments.threads, "token_budget": arguments.token_budget,
        }  # fmt: skip
        report(f"GRPO, {parameters:,} parameters, {arguments.dtype}, β = {arguments.beta:g}, "
               f"{arguments.threads} threads")  # fmt: skip
        agreement = check(options, environment)
        tried = fastest(options, environment, arguments.micro_batches)
        trl, klimb = in_turn({**options, "tried": tried}, options, environment, arguments.steps)
    print_result(result := summary(arguments, parameters, agreement, tried, trl, klimb))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=["grpo"], default="grpo")
    parser.add_argument("--size", choices=list(SIZES), default="S")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--beta", type=float, default=0.0, help="0 (TRL's default): no reference on either side")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each side, after two that are not")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--malloc", choices=["default", "tuned"], default="default", help="glibc's, for both sides")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16, 32, 64], help="tried for TRL")
    parser.add_argument("--token-budget", type=int, default=640, help="klimb's micro-batch, in flat tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def check(options: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """Both sides on the fixed batch, always in fp32 and with a KL: the same numbers, or nothing is timed."""
    options = {**options, "dtype": "fp32", "beta": 0.04, "gate": True}
    with Side("trl", {**options, "tried": {"micro_batch": 8}}, environment) as side:
        trl = side.read()
    with Side("klimb", options, environment) as side:
        klimb = side.read()
    differences = {
        "loss": abs(klimb["loss"] - trl["loss"]) / abs(trl["loss"]),
        "grad_norm": abs(klimb["grad_norm"] - trl["grad_norm"]) / trl["grad_norm"],
        "logps": max(abs(a - b) for a, b in zip(klimb["logps"], trl["logps"], strict=True)),
    }
    line = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same: differences of {line} (allowed {TOLERANCE:g})")
    report(f"same numbers on a fixed batch (relative differences: {line})")
    return differences


def fastest(options: dict[str, Any], environment: dict[str, str], micro_batches: list[int]) -> dict[str, Any]:
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


Steps = list[dict[str, Any]]


def in_turn(trl: dict[str, Any], klimb: dict[str, Any], environment: dict[str, str], steps: int) -> tuple[Steps, Steps]:
    """One step of each, again and again; the first two of each (allocation, warm caches) are not counted."""
    with Side("trl", trl, environment) as a, Side("klimb", klimb, environment) as b:
        a.read(), b.read()
        pairs = [(a.step(), b.step()) for _ in range(steps + 2)][2:]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def summary(
    arguments: argparse.Namespace, parameters: int, agreement: dict[str, float], tried: dict[str, Any], trl: Steps,
    klimb: Steps,
) -> dict[str, Any]:  # fmt: skip
    def median(steps: Steps, key: str) -> float:
        return round(statistics.median(step[key] for step in steps), 4)

    def seconds_per_token(steps: Steps) -> float:
        return statistics.median(step["seconds"] / step["tokens"] for step in steps)

    return {
        "job": arguments.job, "size": arguments.size, "dtype": arguments.dtype,
        "trl_s": median(trl, "seconds"), "klimb_s": median(klimb, "seconds"),
        "ratio": round(median(trl, "seconds") / median(klimb, "seconds"), 3),
        "ratio_of_minima": round(min(s["seconds"] for s in trl) / min(s["seconds"] for s in klimb), 3),
        "ratio_per_token": round(seconds_per_token(trl) / seconds_per_token(klimb), 3),
        "trl_cpu_s": median(trl, "cpu"), "klimb_cpu_s": median(klimb, "cpu"),
        "cpu_ratio": round(median(trl, "cpu") / median(klimb, "cpu"), 3),
        "trl_mb": round(trl[-1]["mb"], 1), "klimb_mb": round(klimb[-1]["mb"], 1),
        "memory_ratio": round(klimb[-1]["mb"] / trl[-1]["mb"], 3),
        "trl_rollout_s": median(trl, "rollout"), "klimb_rollout_s": median(klimb, "rollout"),
        "trl_tokens": median(trl, "tokens"), "klimb_tokens": median(klimb, "tokens"),
        "trl_steps_s": [round(s["seconds"], 4) for s in trl], "klimb_steps_s": [round(s["seconds"], 4) for s in klimb],
        "trl_settings": tried, "klimb_settings": {"token_budget": arguments.token_budget},
        "beta": arguments.beta, "parameters": parameters, "agreement": agreement,
        "machine": {
            "processor": processor(), "threads": arguments.threads, "malloc": arguments.malloc,
            "load_before_and_now": [LOAD_AT_START, os.getloadavg()[0]], "system": platform.platform(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers"),
            "trl": version("trl"), "klimb": version("klimb"),
            "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        },
    }  # fmt: skip


LOAD_AT_START = os.getloadavg()[0]


def processor() -> str:
    """Name, and what it can multiply."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([name, f"{os.cpu_count()} cores", *wide])


def print_result(result: dict[str, Any]) -> None:
    print(f"TRL    {result['trl_s']:8.3f} s a step (generation {result['trl_rollout_s']:.3f}), "
          f"{result['trl_tokens']:.0f} tokens, {result['trl_mb']:.0f} MB, {result['trl_settings']}")  # fmt: skip
    print(f"klimb  {result['klimb_s']:8.3f} s a step (generation {result['klimb_rollout_s']:.3f}), "
          f"{result['klimb_tokens']:.0f} tokens, {result['klimb_mb']:.0f} MB")  # fmt: skip
    print(f"ratio of medians {result['ratio']:.2f}, of minima {result['ratio_of_minima']:.2f}, "
          f"per token {result['ratio_per_token']:.2f}, of CPU time {result['cpu_ratio']:.2f}; "
          f"memory {result['memory_ratio']:.2f}")  # fmt: skip


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
