"""Every method on equal terms::

    python benchmarks/arena.py [--out DIR] [--seeds 3] [--minutes 60] [--only countdown clerk digits offline]

Online methods start from the same SFT model of a world and a seed, draw the same number of completions, and are
measured on the same held-out prompts: the score of one sample (pass@1), the best of 16 (pass@16), KL to the start,
length; and entropy, seconds and what was drawn while training. Offline methods learn from the same comparisons of the
clerk's world and are measured by the gold program. Everything is a klimb run below --out: what is there already is not
run again, so a second call goes on where the first was stopped, and after --minutes no further run begins. The figures
go to benchmarks/results/arena.json as they come; `--page` alone writes docs/ARENA.md and its picture from that.

Rates are the same for all methods of a world (they were not tuned for any): a method that wants another setting says so
in `OWN`. After the start and what all are compared with, every seed has an order of its own, so that it is chance whom
a lack of time hits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import arena_page

from klimb.errors import Interrupted
from klimb.stages.results import Result

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
_TWO_REWARDS = ["${world.reward}", "${world.readable}"]
_STALE = {"prompts_per_step": 720, "steps": 3, "updates_per_step": 15}
"""As many updates of as many samples as the others, from three batches: the last fifteenth of each was drawn by weights
of 14 updates ago."""
_ONE_BATCH = {"prompts_per_step": 2160, "steps": 1, "updates_per_step": 45}
"""The same from a single batch: the last was drawn by weights of 44 updates ago."""
CONTROLS: Mapping[str, dict[str, Any]] = {
    "grpo, clip-higher": {"algorithm": {"name": "grpo", "kl": "none", "surrogate": {"clip": [0.2, 0.28]}}},
    "grpo, shuffled rewards": {"reward": f"{HERE / 'arena_rewards.py'}:shuffled"},
    "grpo, two rewards": {"reward": _TWO_REWARDS},
    "grpo, stale": _STALE,
    "grpo, one batch": _ONE_BATCH,
    # A weight held at 1 is no ratio at all; one of at most 2 is truncated importance sampling.
    "grpo, stale, no ratio": {**_STALE, "algorithm": {"name": "grpo", "kl": "none", "surrogate": {"cispo": [0, 0]}}},
    "grpo, stale, TIS": {**_STALE, "algorithm": {"name": "grpo", "kl": "none", "surrogate": {"cispo": [1, 1]}}},
    "grpo, one batch, no ratio": {
        **_ONE_BATCH,
        "algorithm": {"name": "grpo", "kl": "none", "surrogate": {"cispo": [0, 0]}},
    },
    "grpo, one batch, TIS": {**_ONE_BATCH, "algorithm": {"name": "grpo", "kl": "none", "surrogate": {"cispo": [1, 1]}}},
}
"""Of mini-countdown."""
OWN: Mapping[str, dict[str, Any]] = {"gdpo": {"reward": _TWO_REWARDS}}
"""Settings that a row needs besides the world's."""
ONLINE_PREFERENCE: Mapping[str, dict[str, Any]] = {
    "online_dpo": {},
    "xpo": {"opponent": "reference", "optimism": 1e-5},
}


class Contest:
    """A world: what all methods start from, and how one of them trains and is measured."""

    def __init__(self, name: str, start: Stages, train: dict[str, Any], measure: dict[str, Any]) -> None:
        self.name, self.start, self.train, self.measure = name, start, train, measure

    def stages(self, method: str, settings: Mapping[str, Any]) -> Stages:
        """The shared ones, the method, its measurement. A setting that is None is none of this method's."""
        measured = {"stage": "evaluate", "method": method, "measure": self.measure, "best_of": [1, 16], "report_n": 1}
        if method == "sft":
            return {**self.start, "start-measured": {**measured, "model": "${sft.model}", "reference": "${sft.model}"}}
        label = method.replace(", ", "-").replace(" ", "-").replace("+", "p")
        trained = {"method": method, **{k: v for k, v in {**self.train, **settings}.items() if v is not None}}
        model = f"${{{label}.model}}"
        ending = {**measured, "model": model, "reference": "${sft.model}"}
        return {**self.start, label: trained, f"{label}-measured": ending}


def sft(model: str = "${world.model}", **settings: Any) -> dict[str, Any]:
    return {"stage": "sft", "model": model, "data": "${world.demonstrations}", "batch_size": 256, **settings}


def drawing(steps: int, prompts: int) -> dict[str, int]:
    """Batch numbers of one update a batch, and all that may be drawn."""
    return {"steps": steps, "prompts_per_step": prompts, "samples_per_prompt": 8, "max_samples": steps * prompts * 8}


def contests() -> dict[str, Contest]:
    adam = {"betas": [0.9, 0.99]}
    # Room behind the longest right answer: overlong punishments begin at four fifths of max_tokens.
    begun = {"stage": "rl", "model": "${sft.model}", "data": "${world.prompts}"}
    task = {**begun, "reward": "${world.reward}"}
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
    online = {**begun, "reward": "${reward_model.model}", "gold": "${world.gold}", **drawing(80, 16), "max_tokens": 20,
              "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}  # fmt: skip
    offline = {"stage": "preference", "model": "${sft.model}", "data": "${comparisons.preferences}", "epochs": 2,
               "batch_size": 128, "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}}  # fmt: skip
    return {
        "countdown": Contest(
            "countdown",
            {"sft": sft(steps=300, optimizer={**adam, "lr": 2e-3, "warmup_steps": 20, "decay": "linear"})},
            {**task, **drawing(45, 48), "max_tokens": 8, "optimizer": {**adam, "lr": 1e-4}},
            {**MEASURE_TASK, "max_tokens": 8},
        ),
        "clerk": Contest("clerk", clerk, online, measured),
        "digits": Contest(
            "digits",
            {"sft": sft(steps=250, optimizer={**adam, "lr": 3e-3, "warmup_steps": 50})},
            {**task, **drawing(60, 64), "max_tokens": 7, "optimizer": {**adam, "lr": 3e-4}},
            {**MEASURE_TASK, "max_tokens": 7},
        ),
        "offline": Contest("clerk", clerk, offline, measured),
    }


def methods(contest: str) -> dict[str, dict[str, Any]]:
    """Name → settings, of all that take part in a contest."""
    if contest == "offline":
        return losses()
    from klimb.objective.algorithms import ALGORITHMS

    found: dict[str, dict[str, Any]] = {}
    for name in ALGORITHMS if contest == "countdown" else TEN:
        row = ALGORITHMS[name]
        # A verifier needs no leash; the clerk's proxy does, and there all have the same one. Where β is what the loss
        # regresses on, or regularises a game, it stays.
        kl: Any = {"where": "reward", "estimator": "k1", "beta": 0.15} if contest == "clerk" else "none"
        critic = {"critic": {"optimizer": {"lr": 1e-3}}} if row.critic else {}
        algorithm = name if row.kl.level == "sequence" else {"name": name, "kl": kl}
        found[name] = {"algorithm": algorithm, **critic, **OWN.get(name, {})}
    if contest == "digits":
        return found
    drawn = {"samples_per_prompt": None, "max_samples": None, "stage": "online_preference"}
    train = contests()[contest].train
    pairs = train["prompts_per_step"] * train["samples_per_prompt"] // 2
    found |= {name: {**drawn, "prompts_per_step": pairs, **own} for name, own in ONLINE_PREFERENCE.items()}
    if contest == "countdown":
        found |= {name: {"algorithm": {"name": "grpo", "kl": "none"}, **change} for name, change in CONTROLS.items()}
    return found


def losses() -> dict[str, dict[str, Any]]:
    """All that learn from pairs, or from their two sides with labels: as many completions in each update."""
    from klimb.objective.preference import PREFERENCE_LOSSES, needs_of, parse_preference

    needs = {name: needs_of(parse_preference(name)) for name in PREFERENCE_LOSSES}
    return {
        name: {
            "loss": name,
            **({} if need.reference else {"measure_drift": True}),
            **({"batch_size": 256} if need.data == "labels" else {}),
        }
        for name, need in needs.items()
        if need.data in ("pairs", "labels")
    }


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
    """All methods of one contest and seed. A row for each that ran, and for each that failed one that says so."""
    import klimb

    world = contests()[contest]
    folder = root / world.name / f"seed-{seed}"
    spec: Any = world.name if data is None or world.name != "digits" else {"name": "digits", "data": data}
    rows: list[dict[str, Any]] = []
    for method, settings in in_order(methods(contest), arena_page.BASES[contest], seed):
        if time.time() > until:
            break
        stages = world.stages(method, settings)
        recipe = {"name": "arena", "world": spec, "seed": seed, "threads": 1, "token_budget": 8192, "stages": stages,
                  "out": str(folder)}  # fmt: skip
        row: dict[str, Any] = {"contest": contest, "seed": seed, "method": method}
        try:
            row |= figures("sft" if method == "sft" else [*stages][-2], [*stages][-1], klimb.run(
                recipe, fresh="changed", say=lambda line: None
            ))  # fmt: skip
            told = f"{row['pass@1']:.3f}"
        except Interrupted:
            raise
        except Exception as error:  # one method's failure is a finding, not the end of the arena
            row["error"] = type(error).__name__
            told = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(f"{contest}, seed {seed}, {method}: {told}", flush=True)
        if method == "sft" and "error" in row:
            break  # the others would start from what there is not
    return rows


def in_order(entrants: Mapping[str, dict[str, Any]], base: str, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """The start, what all are compared with, and the others in an order of the seed's own."""
    others = [name for name in entrants if name != base]
    random.Random(seed).shuffle(others)
    return [("sft", {}), *((name, entrants[name]) for name in [base, *others])]


def figures(trained: str, measured: str, found: Result) -> dict[str, Any]:
    """What a stage did while training (the mean of the last ten steps), and what its model does on the test."""
    training, test = found[trained], found[measured]
    steps = [json.loads(line) for line in (training.path / "metrics.jsonl").read_text().splitlines()]

    def late(key: str) -> float | None:
        values = [step[key] for step in steps[-10:] if key in step]
        return sum(values) / len(values) if values else None

    drawn = steps[-1].get("samples/drawn")
    if drawn is None and "groups/drawn" in steps[-1]:
        drawn = 2 * sum(step["groups/drawn"] for step in steps)  # a pair each
    weights = b"".join(path.read_bytes() for path in sorted(Path(str(training.model)).glob("*.safetensors")))
    return {
        "pass@1": test.evaluation["gold"], "pass@16": test.result["curve"][-1]["gold"],
        "proxy": test.evaluation["proxy"], "kl": test.evaluation["kl"], "length": test.evaluation["length"],
        "entropy": late("entropy"), "chosen_log_ratio": late("chosen_log_ratio"), "displaced": late("displaced"),
        "seconds": training.seconds, "drawn": drawn, "weights": hashlib.sha256(weights).hexdigest()[:16],
    }  # fmt: skip


def keep(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds rows to the results that there are, in place of older ones; those of methods that are gone go."""
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    entrants = {contest: {"sft", *methods(contest)} for contest in contests()}
    place = {(row["contest"], row["seed"], row["method"]): row for row in [*known, *rows]}
    kept = [row for (contest, _, method), row in place.items() if method in entrants[contest]]
    RESULTS.write_text(json.dumps({"rows": kept}, indent=1, ensure_ascii=False) + "\n")
    return kept


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
            waiting = jobs(arguments.only, arguments.seeds, arguments.out.resolve(), arguments.data)
            for job in as_completed([pool.submit(play, job, until) for job in waiting]):
                keep(job.result())
    arena_page.write(json.loads(RESULTS.read_text())["rows"], HERE.parent / "docs")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
