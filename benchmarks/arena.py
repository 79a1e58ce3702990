"""Every method on equal terms::

    python benchmarks/arena.py [--out DIR] [--seeds 3] [--minutes 60] [--only countdown clerk digits offline]

Online methods start from the same SFT model of a world and a seed, draw the same number of completions, and are
measured on the same held-out prompts: the score of one sample (pass@1), the best of 16 (pass@16), entropy, KL to the
start, length, seconds. Offline methods learn from the same comparisons of the clerk's world and are measured by the
gold program. Everything is a klimb run below --out: what is there already is not run again, so a second call goes on
where the first was stopped, and after --minutes no further run begins. The figures go to
benchmarks/results/arena.json; `--page` alone writes docs/ARENA.md and its picture from that.

Rates are the same for all methods of a world (they were not tuned for any): a method that wants another one says so
in `OWN`. What differs by chance is in the interval over seeds (t, 95 %).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import arena_page

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "arena.json"
Stages = dict[str, dict[str, Any]]

MEASURE_TASK = {
    "data": "${world.test}",
    "reward": "${world.reward}",
    "gold": "${world.reward}",
    "samples_per_prompt": 16,
}
TEN = ("reinforce", "rloo", "reinforce++", "ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "maxrl")
"""Those that run on all three worlds."""
CONTROLS: Mapping[str, dict[str, Any]] = {
    "grpo, clip-higher": {"algorithm": {"name": "grpo", "kl": "none", "surrogate": {"clip": [0.2, 0.28]}}},
    "grpo, shuffled rewards": {"reward": f"{HERE / 'arena_rewards.py'}:shuffled"},
}
OWN: Mapping[str, dict[str, Any]] = {}
"""Settings that a row needs besides the world's."""


class Contest:
    """A world: what all methods start from, and how one of them trains and is measured."""

    def __init__(self, name: str, start: Stages, train: dict[str, Any], measure: dict[str, Any]) -> None:
        self.name, self.start, self.train, self.measure = name, start, train, measure

    def stages(self, method: str, settings: Mapping[str, Any]) -> Stages:
        """The shared ones, the method, its measurement."""
        label = method.replace(", ", "-").replace(" ", "-").replace("+", "p")
        return {
            **self.start,
            label: {**self.train, "method": method, **settings},
            f"{label}-measured": {
                "stage": "evaluate", "method": method, "model": f"${{{label}.model}}", "reference": "${sft.model}",
                "measure": self.measure, "best_of": [1, 16], "report_n": 1,
            },
        }  # fmt: skip


def sft(model: str = "${world.model}", **settings: Any) -> dict[str, Any]:
    return {"stage": "sft", "model": model, "data": "${world.demonstrations}", "batch_size": 256, **settings}


def contests() -> dict[str, Contest]:
    adam = {"betas": [0.9, 0.99]}
    task = {"stage": "rl", "model": "${sft.model}", "data": "${world.prompts}", "reward": "${world.reward}",
            "prompts_per_step": 64, "samples_per_prompt": 8, "steps": 60, "max_samples": 60 * 64 * 8}  # fmt: skip
    measured = {"data": "${world.prompts}", "reward": "${reward_model.model}", "gold": "${world.gold}",
                "samples_per_prompt": 171, "max_tokens": 20}  # fmt: skip
    pairs = {"stage": "sample", "model": "${sft.model}", "data": "${world.prompts}", "samples_per_prompt": 2400,
             "max_tokens": 12, "reward": "${world.gold}", "pairs": True}  # fmt: skip
    clerk = {
        "sft": sft(steps=250, optimizer={**adam, "lr": 3e-3, "warmup_steps": 20, "decay": "linear", "final_lr": 0.1}),
        "comparisons": pairs,
        "held_out": {**pairs, "seed": 1000, "samples_per_prompt": 334},
        "reward_model": {
            "stage": "reward", "model": "${sft.model}", "data": "${comparisons.preferences}",
            "eval_data": "${held_out.preferences}", "epochs": 20, "until_accuracy": 0.8, "batch_size": 32,
            "centering": 1e-3, "min_accuracy": 0.7, "reference": "${comparisons.samples}", "on_bad": "drop",
            "optimizer": {**adam, "lr": 2e-3, "warmup_steps": 30, "decay": "linear", "max_grad_norm": None},
        },
    }  # fmt: skip
    online = {**task, "reward": "${reward_model.model}", "gold": "${world.gold}", "prompts_per_step": 16, "steps": 80,
              "max_samples": 80 * 16 * 8, "max_tokens": 20,
              "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}  # fmt: skip
    offline = {"stage": "preference", "model": "${sft.model}", "data": "${comparisons.preferences}", "epochs": 2,
               "batch_size": 128, "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}  # fmt: skip
    return {
        "countdown": Contest(
            "countdown",
            {"sft": sft(steps=300, optimizer={**adam, "lr": 2e-3, "warmup_steps": 20, "decay": "linear"})},
            {**task, "max_tokens": 6, "optimizer": {**adam, "lr": 1e-4}},
            {**MEASURE_TASK, "max_tokens": 6},
        ),
        "digits": Contest(
            "digits",
            {"sft": sft(steps=250, optimizer={**adam, "lr": 3e-3, "warmup_steps": 50})},
            {**task, "max_tokens": 5, "optimizer": {**adam, "lr": 3e-4}},
            {**MEASURE_TASK, "max_tokens": 5},
        ),
        "clerk": Contest("clerk", clerk, online, measured),
        "offline": Contest("clerk", clerk, offline, measured),
    }


def methods(contest: str) -> dict[str, dict[str, Any]]:
    """Name → settings, of all that take part in a contest."""
    from klimb.objective.algorithms import ALGORITHMS
    from klimb.objective.preference import PREFERENCE_LOSSES

    if contest == "offline":
        return {name: {"loss": name, **OWN.get(name, {})} for name in PREFERENCE_LOSSES}
    names = ALGORITHMS if contest == "countdown" else [name for name in TEN if name in ALGORITHMS]
    # A verifier needs no leash; the clerk's proxy does, and there all have the same one.
    kl = {"where": "reward", "estimator": "k1", "beta": 0.15} if contest == "clerk" else "none"
    found = {name: {"algorithm": {"name": name, "kl": kl}, **OWN.get(name, {})} for name in names}
    if contest == "countdown":
        found |= {name: {"algorithm": {"name": "grpo", "kl": "none"}, **change} for name, change in CONTROLS.items()}
    return found


class Job(NamedTuple):
    """Contests of one world share its start, so that they run one after the other."""

    contests: tuple[str, ...]
    seed: int
    root: Path
    data: str | None


def jobs(chosen: list[str], seeds: int, root: Path, data: str | None) -> Iterator[Job]:
    worlds = dict.fromkeys(contests()[name].name for name in chosen)
    for seed in range(seeds):
        for world in worlds:
            yield Job(tuple(name for name in chosen if contests()[name].name == world), seed, root, data)


def play(job: Job, until: float) -> list[dict[str, Any]]:
    return [row for contest in job.contests for row in rows_of(contest, job.seed, job.root, job.data, until)]


def rows_of(contest: str, seed: int, root: Path, data: str | None, until: float) -> list[dict[str, Any]]:
    """All methods of one contest and seed. A row for each that ran."""
    import klimb

    world = contests()[contest]
    spec: Any = world.name if data is None or world.name != "digits" else {"name": "digits", "data": data}
    rows = []
    for method, settings in [("sft", {}), *methods(contest).items()]:
        if time.time() > until:
            break
        stages = world.stages(method, settings)
        if method == "sft":
            stages = {**world.start, "start-measured": {**stages["sft-measured"], "model": "${sft.model}"}}
        recipe = {"name": "arena", "world": spec, "seed": seed, "threads": 1, "token_budget": 8192, "stages": stages,
                  "out": str(root / world.name / f"seed-{seed}")}  # fmt: skip
        try:
            results = klimb.run(recipe, fresh="changed", say=lambda line: None)["stages"]
        except Exception as error:  # one method's failure is a finding, not the end of the arena
            print(f"{contest}, seed {seed}, {method}: {type(error).__name__}: {error}", flush=True)
            continue
        rows.append(row_of(contest, seed, method, results, root / world.name / f"seed-{seed}"))
        print(f"{contest}, seed {seed}, {method}: {rows[-1]['pass@1']:.3f}", flush=True)
    return rows


def row_of(contest: str, seed: int, method: str, results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    *_, trained, measured = ["sft", *results] if method == "sft" else results
    found, curve = results[measured]["evaluation"], results[measured].get("curve") or [{}, {}]
    steps = [json.loads(line) for line in (folder / trained / "metrics.jsonl").read_text().splitlines()]
    last = steps[-10:]
    mean = lambda key: sum(s[key] for s in last if key in s) / max(sum(key in s for s in last), 1)  # noqa: E731
    return {
        "contest": contest, "seed": seed, "method": method, "pass@1": found["gold"], "pass@16": curve[-1].get("gold"),
        "proxy": found.get("proxy"), "kl": found["kl"], "length": found["length"], "entropy": mean("entropy"),
        "chosen_log_ratio": mean("chosen_log_ratio"), "seconds": results[trained]["seconds"],
        "drawn": steps[-1].get("samples/drawn"), "model": results[trained]["model"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/arena"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", choices=list(contests()), default=list(contests()))
    parser.add_argument("--data", help="GSM8K's rows for digits: a file; default: the hub's")
    parser.add_argument("--page", action="store_true", help="write docs/ARENA.md from the results; run nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        until = time.time() + 60 * arguments.minutes
        with ProcessPoolExecutor(arguments.jobs) as pool:
            running = [
                pool.submit(play, job, until)
                for job in jobs(arguments.only, arguments.seeds, arguments.out.resolve(), arguments.data)
            ]
            rows = [row for future in running for row in future.result()]
        RESULTS.write_text(json.dumps({"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    arena_page.write(json.loads(RESULTS.read_text())["rows"], HERE.parent / "docs")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
