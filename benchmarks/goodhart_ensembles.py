"""Gold at the peak and at the end when one reward model is climbed, and when an ensemble of four is.

    python benchmarks/goodhart_ensembles.py seed=0..2 out=runs/ensembles

runs the recipe `ensembles` (or takes what it left in `out`) and prints a row for each way to climb: means over the
seeds with 95 % Student t intervals. The peak of PPO is that of a centred mean of nine steps of training batches, picked
after the fact and so biased upwards a little; its end is an evaluation of the last policy. That of best-of-n is over n.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import yaml

import klimb
from klimb.report.text import columns
from klimb.report.tracks import moving_mean
from klimb.stages.results import StageResult
from klimb.watch.statistics import seeds_interval


class Found(NamedTuple):
    """One method on one seed. at: the step or the n of the peak. apart: disagreement at the start and the end."""

    peak: float
    at: float
    end: float
    kl: float
    apart: tuple[float, float] | None


def found_of(stage: StageResult) -> Found | None:
    """None of a stage that climbs nothing."""
    if curve := stage.result.get("curve"):
        best = max(curve, key=lambda row: row["gold"])
        return Found(best["gold"], best["n"], curve[-1]["gold"], curve[-1]["kl"], None)
    if stage.result["stage"] != "rl":
        return None
    metrics = stage.metrics
    gold = [value for value in moving_mean(metrics["gold/mean"]) if value is not None]
    apart = [value for value in metrics.get("reward/disagreement", []) if value is not None]
    ends = (apart[0], sum(apart[-9:]) / len(apart[-9:])) if apart else None
    peak = max(range(len(gold)), key=gold.__getitem__)
    return Found(gold[peak], peak + 1, stage.evaluation["gold"], stage.evaluation["kl"], ends)


def interval(values: list[float]) -> str:
    mean, low, high = seeds_interval(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def table(result: klimb.Result) -> list[dict[str, Any]]:
    by_method: dict[str, list[Found]] = {}
    for stages in result.by_seed.values():
        for stage in stages.values():
            if (found := found_of(stage)) is not None:
                by_method.setdefault(stage.method, []).append(found)
    return [
        {
            "method": method,
            "gold at peak": interval([each.peak for each in found]),
            "at (n or step)": ", ".join(f"{each.at:g}" for each in found),
            "gold at end": interval([each.end for each in found]),
            "KL at end": interval([each.kl for each in found]),
            "disagreement": "; ".join("{:.2f} → {:.2f}".format(*each.apart) for each in found if each.apart),
        }
        for method, found in by_method.items()
    ]  # fmt: skip


def main() -> None:
    overrides = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in sys.argv[1:])}
    result = klimb.run("ensembles", **overrides)
    print(columns(table(result)))
    for seed, stages in result.by_seed.items():
        own = [f"{stage.result['accuracy']:.3f}" for stage in stages.values() if stage.result["stage"] == "reward"]
        start, mean = stages["baseline"].evaluation, stages["trust"].result["accuracy"]
        print(f"seed {seed}: gold of SFT {start['gold']:.2f} [{start['gold_low']:.2f}, {start['gold_high']:.2f}]; "
              f"accuracy on held-out pairs: members {', '.join(own)}, their mean {mean:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
