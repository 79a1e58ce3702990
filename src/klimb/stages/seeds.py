"""The same for several seeds: one directory above theirs, and what they found on average."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import config_changes, config_hash, dump_config, load_yaml, parse_seeds, parse_value, plain
from klimb.errors import RunError
from klimb.report.page import write_report
from klimb.runtime import manifest
from klimb.runtime.durable import explained, replace_file
from klimb.runtime.ranks import rank, share
from klimb.stages.common import inputs_of, say_aside
from klimb.stages.registry import code_files, run_stage, stage_config
from klimb.watch.statistics import Interval, seeds_interval

_BOUNDS = ("_low", "_high")
_NO_FIGURES = ("seed", "step", "steps", "n", "prompts")


def configs_by_seed(
    stage: str, values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config"
) -> dict[int, Any]:
    """The config of a stage for each seed of `seed: 0..4`. Raises ConfigError that names every problem."""
    seed, others = values.get("seed", 0), []
    for override in overrides:
        key, equals, text = override.partition("=")
        if key.strip() == "seed" and equals:
            seed = parse_value(text, where="command line: seed")
        else:
            others.append(override)
    return {each: stage_config(stage, {**values, "seed": each}, others, where) for each in parse_seeds(seed)}


def run_seeds(
    stage: str, configs: Mapping[int, Any], *, name: str, fresh: bool = False, say: Callable[[str], None] = say_aside
) -> dict[str, Any]:
    """One stage for all seeds of `configs`, one after the other, in seed-N below one directory.

    Returns what its summary.json holds: as that of a recipe, and under "figures" the mean, its 95 % t interval and
    the values of what was measured, or of the last step's metrics where nothing is measured.
    """
    root = Path(share(str(_root_of_stage(name, configs, say)) if rank() == 0 else None))
    results = {}
    for seed, config in configs.items():
        folder = root / f"seed-{seed}"
        say(f"── {name}, seed {seed} → {folder}")
        results[seed] = run_stage(stage, config, name=name, out=folder, fresh=fresh, say=say)
    if rank() == 0:
        first = results[next(iter(configs))]
        summary = {
            "stage": stage, "method": first["method"], "algorithm": first.get("algorithm"),
            **over_seeds(name, {seed: {"rows": rows_of([result]), "accuracies": accuracies_of([result])}
                                for seed, result in results.items()}),
            "figures": _over_results(results),
        }  # fmt: skip
        replace_file(root / "summary.json", manifest.to_json(summary))
        keep_config(root, _shared(configs))
        write_report(root)
    summary = share(json.loads((root / "summary.json").read_bytes()) if rank() == 0 else None)
    return {**summary, "out": str(root)}


def _root_of_stage(name: str, configs: Mapping[int, Any], say: Callable[[str], None]) -> Path:
    return open_root(name, _shared(configs), say, _hashes(configs))


def place_of_seeds(name: str, configs: Mapping[int, Any]) -> Path:
    """Where `run_seeds` would put them. Raises RunError where a run of one seed lies."""
    return place_of(name, _shared(configs), _hashes(configs))


def _hashes(configs: Mapping[int, Any]) -> dict[str, str]:
    config = next(iter(configs.values()))
    if config.out and (Path(config.out) / "manifest.json").exists():
        raise RunError("holds a run of one seed", where=config.out, fix="choose another out for several")
    inputs = inputs_of(config, *code_files(config))
    return {key: manifest.fingerprint(key, source) for key, source in inputs.items()}


def _shared(configs: Mapping[int, Any]) -> dict[str, Any]:
    return {**plain(next(iter(configs.values()))), "seed": [*configs]}


def open_root(
    name: str, values: Mapping[str, Any], say: Callable[[str], None], hashes: Mapping[str, str] | None = None
) -> Path:
    """The directory of all seeds, made where there is none."""
    root = place_of(name, values, hashes)
    previous = None
    if not (values.get("out") or root.exists()):
        previous = manifest.most_recent(root.parent, name, holding="config.yaml")
    if previous is not None:
        changes = "; ".join(config_changes(load_yaml(previous / "config.yaml"), values)) or "the content of its inputs"
        say(f"{root}: a new run, it differs from {previous.name}: {changes}")
    with explained("cannot write the run directory", root, fix="choose another out"):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "config.yaml").exists():
            keep_config(root, values)
    return root


def place_of(name: str, values: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> Path:
    """`out`, else a directory for these values and inputs, whatever their seeds."""
    identity = config_hash({key: value for key, value in values.items() if key != "seed"}, hashes)
    return Path(values.get("out") or f"runs/{name}-{identity[:8]}")


def keep_config(root: Path, values: Mapping[str, Any]) -> None:
    """The config of what `root` holds: written when all of it is there, so that a refused one replaces nothing."""
    replace_file(root / "config.yaml", dump_config(values).encode())


# What they found ----------------------------------------------------------------------------------------------------


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The line of the table of every result that was measured."""
    keys = ("proxy", "gold", "gold_low", "gold_high", "kl", "by")
    return [
        {
            "method": result["method"], **{key: result["evaluation"].get(key) for key in keys},
            "seconds": result["seconds"], "algorithm": result.get("algorithm"),
        }
        for result in results if result.get("evaluation")
    ]  # fmt: skip


def accuracies_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The share of held-out pairs that every reward model puts in order, and below it that of its baselines."""
    table = []
    for result in results:
        if result.get("accuracy") is not None:
            for method, found in {result["method"]: result, **result.get("baselines", {})}.items():
                shown = {key: found[key] for key in ("accuracy", "accuracy_low", "accuracy_high")}
                held_out = result.get("held_out_pairs", result.get("held_out_rows"))
                table.append({"seed": result["seed"], "method": method, **shown, "pairs": held_out})
    return table


def over_seeds(name: str, summaries: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and t interval over seeds for each method, and paired differences to the first one."""
    tables = {seed: {row["method"]: row for row in summary["rows"]} for seed, summary in summaries.items()}
    methods = [row["method"] for row in next(iter(summaries.values()))["rows"]]
    rows, paired = [], []
    for method in methods:
        of_seed = [table[method] for table in tables.values() if method in table]
        gold = seeds_interval([row["gold"] for row in of_seed if row["gold"] is not None])
        rows.append({
            "method": method, "proxy": _mean([row["proxy"] for row in of_seed]), "gold": gold.mean,
            "gold_low": gold.low, "gold_high": gold.high, "kl": _mean([row["kl"] for row in of_seed]),
            "seconds": _mean([row["seconds"] for row in of_seed]), "algorithm": of_seed[0].get("algorithm"),
        })  # fmt: skip
        if method != methods[0]:
            both = [(t[method]["gold"], t[methods[0]]["gold"]) for t in tables.values() if method in t]
            difference = seeds_interval([a - b for a, b in both if a is not None and b is not None])
            paired.append({"method": method, "against": methods[0], "difference": difference.mean,
                           "low": difference.low, "high": difference.high})  # fmt: skip
    return {"name": name, "seeds": list(summaries), "rows": rows, "paired": paired,
            "accuracies": [row for summary in summaries.values() for row in summary["accuracies"]],
            "kl_estimator": "full", "by_seed": {str(seed): summary["rows"] for seed, summary in summaries.items()},
            "simulated_labels": any(summary.get("simulated_labels") for summary in summaries.values())}  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _over_results(results: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every figure that all seeds have: its mean, the bounds of its interval, and the values."""
    found = {seed: figures(result) for seed, result in results.items()}
    first, *others = found.values()
    shared = [key for key in first if all(key in other for other in others)]
    table: dict[str, dict[str, Any]] = {}
    for key in shared:
        interval: Interval = seeds_interval([of_seed[key] for of_seed in found.values()])
        table[key] = {**interval._asdict(), "values": {str(seed): of_seed[key] for seed, of_seed in found.items()}}
    return table


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """What one run found: what was measured, else the metrics of its last step and the numbers of its result."""
    if evaluation := result.get("evaluation"):
        measured = {k: v for k, v in evaluation.items() if not k.endswith(_BOUNDS)}
    else:
        lines = Path(result["run"], "metrics.jsonl")
        last = json.loads(lines.read_text(encoding="utf-8").splitlines()[-1]) if lines.exists() else {}
        measured = {**{k: v for k, v in last.items() if not k.startswith("time/")}, **result}
        measured = {k: v for k, v in measured.items() if not k.endswith(_BOUNDS)}
    numbers = {**measured, "seconds": result["seconds"]}
    return {key: value for key, value in numbers.items() if key not in _NO_FIGURES and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
