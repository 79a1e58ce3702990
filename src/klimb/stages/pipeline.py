"""A recipe: named stages that use each other's results, for one seed or for several, and one table at the end."""

from __future__ import annotations

import importlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import (
    apply_override,
    config_changes,
    config_hash,
    dump_config,
    find_references,
    load_recipe,
    load_yaml,
    parse_seeds,
    resolve_references,
)
from klimb.errors import ConfigError, did_you_mean
from klimb.plugin import is_reference, load_attribute
from klimb.report.page import write_report
from klimb.runtime.durable import explained, replace_file
from klimb.runtime.manifest import most_recent
from klimb.runtime.ranks import rank, share
from klimb.stages.common import described, say_aside
from klimb.stages.registry import run_stage, stage_config
from klimb.watch.statistics import seeds_interval

WORLDS: Mapping[str, str] = {"clerk": "klimb.lab.clerk", "digits": "klimb.lab.digits"}
_KEYS = ("name", "world", "data", "seed", "device", "out", "stages", "threads", "simulated_labels")


def run(
    recipe: str | Mapping[str, Any], *, fresh: bool = False, say: Callable[[str], None] = say_aside, **overrides: Any
) -> dict[str, Any]:
    """Run a recipe (a path, the name of a shipped one, or a dict) and return its summary.

    ``klimb.run("quickstart", seed=1)``; a key of a stage is given as ``**{"stages.sft.steps": 10}``.
    """
    if isinstance(recipe, str):
        name, _, values = load_recipe(recipe)
    else:
        name, values = str(recipe.get("name", "recipe")), dict(recipe)
    for key, value in overrides.items():
        _set(values, key, value)
    return run_pipeline(name, values, fresh=fresh, say=say)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values[part] = dict(values.get(part) or {})
        values = values[part]
    values[last] = value


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Command-line changes; a stage may be named without `stages.` before it."""
    changed = json.loads(json.dumps(values))
    for override in overrides:
        head = override.partition("=")[0].split(".")[0]
        apply_override(changed, f"stages.{override}" if head in changed.get("stages", {}) else override)
    return dict(changed)


def run_pipeline(
    name: str, values: Mapping[str, Any], *, fresh: bool = False, say: Callable[[str], None] = say_aside
) -> dict[str, Any]:
    """All seeds of a recipe, one after the other; returns what summary.json holds."""
    check_recipe(name, values)
    seeds = parse_seeds(values.get("seed", 0))
    root = Path(share(str(_open_root(name, described(values), say)) if rank() == 0 else None))
    summaries = {}
    for seed in seeds:
        folder = root if len(seeds) == 1 else root / f"seed-{seed}"
        say(f"── {name}, seed {seed} → {folder}")
        summaries[seed] = run_seed(name, values, seed, folder, fresh=fresh, say=say)
    summary = summaries[seeds[0]] if len(seeds) == 1 else over_seeds(name, summaries)
    if len(seeds) > 1:
        _write_json(root / "summary.json", summary)
        _report(root)
    return {**summary, "out": str(root)}


def _open_root(name: str, values: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """The directory of all stages: `out`, else one for this recipe, whatever its seeds."""
    identity = config_hash({key: value for key, value in values.items() if key != "seed"})
    root = Path(values.get("out") or f"runs/{name}-{identity[:8]}")
    previous = None if values.get("out") or root.exists() else most_recent(root.parent, name, holding="config.yaml")
    if previous is not None:
        changes = "; ".join(config_changes(load_yaml(previous / "config.yaml"), values))
        say(f"{root}: a new run, it differs from {previous.name}: {changes}")
    with explained("cannot write the run directory", root, fix="choose another out"):
        root.mkdir(parents=True, exist_ok=True)
        replace_file(root / "config.yaml", dump_config(values).encode())
    return root


def check_recipe(name: str, values: Mapping[str, Any]) -> None:
    """What can be said before anything runs: keys of the recipe, stages and their configs."""
    for key in values:
        if key not in _KEYS:
            known = [*_KEYS, *(values.get("stages") or {})]
            raise ConfigError(f"unknown key {key!r}", where=name, fix=did_you_mean(str(key), known))
    stages = values.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        raise ConfigError("no stages", where=name, fix="give stages: {sft: {stage: sft, model: …, data: …}}")
    for stage, settings in stages.items():
        if not isinstance(settings, Mapping) or "stage" not in settings:
            raise ConfigError("which kind of stage is it?", where=f"{name}: stages.{stage}",
                              fix="add stage: sft, reward, rl, preference, sample or evaluate")  # fmt: skip
        _stage_config(name, stage, settings, values, seed=0)
        _check_references(f"{name}: stages.{stage}", settings, [*stages][: [*stages].index(stage)], "world" in values)


def _check_references(where: str, settings: Mapping[str, Any], before: Sequence[str], has_world: bool) -> None:
    """`${stage.key}` may name the recipe, its world, and the stages before this one."""
    known = ["recipe", *(["world"] if has_world else []), *before]
    for reference in find_references(settings):
        source = reference.strip().partition(".")[0]
        if source not in known:
            fix = f"{did_you_mean(source, known)} (a stage can use the results of earlier stages only)"
            raise ConfigError(f"no result of a stage {source!r} for ${{{reference}}}", where=where, fix=fix)


def _stage_config(name: str, stage: str, settings: Mapping[str, Any], recipe: Mapping[str, Any], seed: int) -> Any:
    shared = {key: recipe[key] for key in ("device", "threads") if key in recipe}
    own = {key: value for key, value in settings.items() if key != "stage"}
    return stage_config(settings["stage"], {**shared, "seed": seed, **own}, where=f"{name}: stages.{stage}")


def run_seed(
    name: str, values: Mapping[str, Any], seed: int, folder: Path, *, fresh: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {"recipe": {"data": values.get("data"), "seed": seed}}
    if "world" in values:
        spec = resolve_references(values["world"], results, name)
        results["world"] = share(prepare_world(spec, folder / "world", seed, say) if rank() == 0 else None)
    finished: dict[str, dict[str, Any]] = {}
    for stage, settings in values["stages"].items():
        say(f"─ {stage}")
        resolved = resolve_references(settings, results, f"{name}: stages.{stage}")
        config = _stage_config(name, stage, resolved, values, seed)
        finished[stage] = run_stage(settings["stage"], config, name=stage, out=folder / stage, fresh=fresh, say=say)
        results[stage] = finished[stage]
    summary = {
        "name": name, "seed": seed, "rows": [row for r in finished.values() if (row := _row(r))], "stages": finished,
        "simulated_labels": bool(values.get("simulated_labels", False)), "kl_estimator": "full",
    }  # fmt: skip
    _write_json(folder / "summary.json", summary)
    _write_json(folder / "replies.json", replies(finished, results.get("world", {})))
    _report(folder)
    return summary


def prepare_world(spec: Any, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Data, models and judges that a recipe starts from: a world of `klimb.lab`, or `my_world.py:prepare`.

    Such a function takes (out, seed=…, and the spec's further keys) and returns names for `${world.NAME}`.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = str(options.pop("name", ""))
    if is_reference(name):
        prepare = load_attribute(name)
    elif name in WORLDS:
        prepare = importlib.import_module(WORLDS[name]).prepare
    else:
        raise ConfigError(f"unknown world {name!r}", fix=did_you_mean(name, WORLDS))
    done = folder / "world.json"
    asked = {"name": name, "seed": seed, **options}
    if done.is_file():
        made = json.loads(done.read_text())
        if made["asked"] == asked:
            return dict(made["world"])
    try:
        world = dict(prepare(folder, seed=seed, **options))
    except TypeError as error:
        raise ConfigError(f"world {name}: {error}", where="world") from None
    if "summary" in world:
        say(str(world["summary"]))
    _write_json(done, {"asked": asked, "world": world})
    return world


def _row(result: Mapping[str, Any]) -> dict[str, Any] | None:
    evaluation = result.get("evaluation")
    if not evaluation:
        return None
    keys = ("proxy", "gold", "gold_low", "gold_high", "kl", "by")
    row = {"method": result["method"], **{key: evaluation.get(key) for key in keys}, "seconds": result["seconds"]}
    return {**row, "algorithm": result.get("algorithm")}


def replies(results: Mapping[str, Mapping[str, Any]], world: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first answers of every measured method, side by side; with the gold program's bill where it writes one."""
    explain = _explain(world)
    by_prompt: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for reply in (result.get("evaluation") or {}).get("replies", []):
            entry = by_prompt.setdefault(json.dumps(reply["prompt"]), {"prompt": reply["prompt"], "replies": []})
            shown = {"method": result["method"], **{k: reply[k] for k in ("completion", "proxy", "gold")}}
            if explain is not None:
                shown["bill"] = [list(line) for line in explain(reply["prompt"], reply["completion"])]
            entry["replies"].append(shown)
    return list(by_prompt.values())


def _explain(world: Mapping[str, Any]) -> Any:
    reference = world.get("explain")
    return load_attribute(str(reference)) if reference else None


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
            "kl_estimator": "full", "by_seed": {str(seed): summary["rows"] for seed, summary in summaries.items()},
            "simulated_labels": any(summary["simulated_labels"] for summary in summaries.values())}  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _report(folder: Path) -> None:
    if rank() == 0:
        write_report(folder)


def _write_json(path: Path, value: Any) -> None:
    if rank() == 0:
        replace_file(path, (json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
