"""The memory plan against what a run takes, on a CPU::

    python benchmarks/memory.py [--sizes S M] [--stages sft reward dpo grpo ppo] [--runs 5] [--json FILE]

Each stage runs in a process of its own, with all weights and with LoRA, on rows that are as long as the plan takes them
to be: 128 tokens of prompt, 128 of completion. Measured is the peak of the resident set during the run less what was
resident before it, in a process that has run the stage once on a model of a few thousand parameters, so that all that
is imported and kept is there; planned is what the run itself says before it loads weights, from the model's config
alone. The error is planned over measured, less 1.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPT = COMPLETION = 128
STAGES = ("sft", "reward", "dpo", "grpo", "ppo")
COMMON: dict[str, Any] = {"steps": 3, "threads": 1, "device": "cpu", "token_budget": 2048, "seed": 0}
RL = {"prompts_per_step": 8, "samples_per_prompt": 8, "max_tokens": COMPLETION, "max_prompt_tokens": PROMPT}


def settings(stage: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """The stage's name in klimb, and its settings without the model."""
    if stage in ("sft", "reward", "dpo"):
        kind = {"sft": "sft", "reward": "reward", "dpo": "preference"}[stage]
        rows = "demonstrations" if stage == "sft" else "pairs"
        return kind, {"data": str(folder / f"{rows}.jsonl"), "batch_size": 32,
                      "max_tokens": PROMPT + COMPLETION}  # fmt: skip
    reward = {"reward": f"{HERE / 'rewards.py'}:long_words"}
    kl = {"name": stage, "kl": {"where": "reward", "estimator": "k1", "beta": 0.05}}
    return "rl", {"data": str(folder / "prompts.jsonl"), **reward, "algorithm": kl, **RL}


def write_data(folder: Path, words: list[str]) -> None:
    """Texts of so many words; BOS and EOS are of the lengths, too."""
    draw = random.Random(0)
    text = lambda count: " ".join(draw.choices(words, k=count))  # noqa: E731
    prompts = [text(PROMPT - 1) for _ in range(64)]
    files = {
        "demonstrations": [{"prompt": p, "completion": text(COMPLETION - 1)} for p in prompts],
        "pairs": [{"prompt": p, "chosen": text(COMPLETION - 1), "rejected": text(COMPLETION - 1)} for p in prompts],
        "prompts": [{"prompt": p} for p in prompts],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, size: str) -> None:
    from work import SIZES

    from klimb.lab.scratch import make_model, word_tokenizer

    shape = SIZES[size]
    words = [f"w{i}" for i in range(shape.vocabulary - 3)]
    write_data(folder, words)
    common: Any = {
        "tokenizer": word_tokenizer(words),
        "architecture": "llama",
        "context": PROMPT + COMPLETION,
        "seed": 0,
    }
    make_model(folder / "warm-up", hidden=8, layers=1, heads=1, mlp=8, **common)
    make_model(folder / "model", hidden=shape.hidden, layers=shape.layers, heads=shape.heads, mlp=shape.mlp, **common)


def measure(stage: str, folder: Path, lora: bool) -> dict[str, Any]:
    """In this process, which runs nothing else."""
    from klimb.runtime.memory import give_back
    from klimb.stages.registry import run_stage, stage_config

    def run(model: str) -> Path:
        kind, values = settings(stage, folder)
        values |= {"model": str(folder / model)} | ({"lora": {"rank": 16}} if lora else {})
        out = folder / f"{model}-{stage}-{lora}"
        shutil.rmtree(out, ignore_errors=True)  # of the run before
        run_stage(kind, stage_config(kind, {**COMMON, **values}), name=kind, out=out, say=lambda line: None)
        return out

    run("warm-up")
    give_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    found = run("model")
    planned = json.loads((found / "manifest.json").read_text())["decisions"]["memory"]
    lines = {name: round(count / 2**20, 1) for name, count in planned["lines"].items()}
    return {"measured_mb": (resident("VmHWM") - before) / 1024, "planned_mb": planned["peak"] / 2**20,
            "lines_mb": lines}  # fmt: skip


def resident(key: str) -> int:
    """kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def measured(stage: str, folder: Path, trained: str, runs: int) -> dict[str, Any]:
    """Each run in a process of its own; what was planned is the same in all."""
    peaks: list[float] = []
    found: dict[str, Any] = {}
    for _ in range(runs):
        told = subprocess.run([sys.executable, __file__, "--one", stage, folder, trained],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if told.returncode:
            raise SystemExit(told.stderr)
        found = json.loads(told.stdout.splitlines()[-1])
        peaks.append(found["measured_mb"])
    middle = statistics.median(peaks)
    return {**found, "measured_mb": middle, "peaks_mb": sorted(peaks), "error": found["planned_mb"] / middle - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--runs", type=int, default=5, help="of each row")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "FOLDER", "LORA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        stage, folder, lora = arguments.one
        print(json.dumps(measure(stage, Path(folder), lora == "lora")))
        return
    rows = []
    print("| stage | size | trained | planned MB | measured MB | from, to | error |\n|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(prefix="memory-") as folder:
            prepare(Path(folder), size)
            for stage in arguments.stages:
                for trained in ("all weights", "lora"):
                    row = measured(stage, Path(folder), trained, arguments.runs)
                    rows.append({"stage": stage, "size": size, "trained": trained, **row})
                    peaks = row["peaks_mb"]
                    print(f"| {stage} | {size} | {trained} | {row['planned_mb']:.0f} | {row['measured_mb']:.0f} | "
                          f"{peaks[0]:.0f}, {peaks[-1]:.0f} | {row['error']:+.0%} |", flush=True)  # fmt: skip
    if arguments.json:
        from machine import facts, keep

        keep({"rows": rows, "machine": facts(COMMON["threads"], "default")}, arguments.json)


if __name__ == "__main__":
    main()
