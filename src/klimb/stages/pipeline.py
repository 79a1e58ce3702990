"""A recipe: named stages that use each other's results, for one seed or for several, and one table at the end."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import apply_override, find_references, load_recipe, parse_seeds, resolve_references
from klimb.errors import ConfigError, did_you_mean
from klimb.plugin import is_reference, load_attribute
from klimb.report.page import write_report
from klimb.runtime.durable import content_hash, replace_file
from klimb.runtime.ranks import rank, share
from klimb.runtime.run import Fresh, OtherRun
from klimb.stages.common import say_aside
from klimb.stages.given import described, with_known_rows
from klimb.stages.progress import notebook
from klimb.stages.registry import code_files, run_stage, stage_config, written_out
from klimb.stages.results import Result, result_of
from klimb.stages.rounds import unroll
from klimb.stages.seeds import accuracies_of, keep_config, open_root, over_seeds, rows_of

WORLDS: Mapping[str, str] = {
    "clerk": "klimb.lab.clerk",
    "countdown": "klimb.lab.countdown",
    "countdown_steps": "klimb.lab.countdown_steps",
    "digits": "klimb.lab.digits",
    "gym": "klimb.lab.gym",
    "transcripts": "klimb.lab.transcripts",
}
_ROUNDS_APART = 10_000
"""Seeds between two rounds, so that no two rounds of a recipe's few seeds meet."""
_KEYS = ("name", "world", "data", "seed", "device", "out", "stages", "threads", "token_budget", "simulated_labels")


def run(
    recipe: str | Path | Mapping[str, Any], *, fresh: Fresh = False, say: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Result:  # fmt: skip
    """Run a recipe (a path, the name of a shipped one, or a dict) and return what it found.

    ``klimb.run("quickstart", seed=1)``; a key of a stage is given as ``**{"sft.steps": 10}``. A dict with the key
    `stage` is that one stage: ``klimb.run({"stage": "rl", "model": …, "data": rows, "reward": function})["rl"]``.
    `fresh`: True starts every stage anew, "changed" those that differ from what `out` holds, and those that use what
    they make. `say` is given lines about the progress: by default they go to standard error, in a notebook each takes
    the place of the one before it. Raises KlimbError where something is wrong, Interrupted after Ctrl-C.
    """
    if isinstance(recipe, Mapping):
        values = dict(with_known_rows(recipe))
        if "stage" in values:
            values = {"name": values["stage"], "stages": {values["stage"]: values}}
        name = str(values.get("name", "recipe"))
    else:
        name, _, values = load_recipe(str(recipe))
    for key, value in overrides.items():
        path = f"stages.{key}" if key.split(".")[0] in values.get("stages", {}) else key
        _set(values, path, with_known_rows(value, key.split(".")[-1]))
    say = say or notebook() or say_aside
    summary, stages = _run(name, values, fresh=fresh, say=say)
    found = result_of(summary, stages)
    say(f"report: {found.report}")
    return found


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
    name: str, values: Mapping[str, Any], *, fresh: Fresh = False, say: Callable[[str], None] = say_aside
) -> dict[str, Any]:
    """All seeds of a recipe, one after the other; returns what summary.json holds."""
    return _run(name, values, fresh=fresh, say=say)[0]


def _run(
    name: str, values: Mapping[str, Any], *, fresh: Fresh, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The summary, and the results of the stages by seed."""
    values = check_recipe(name, values)
    seeds = parse_seeds(values.get("seed", 0))
    root = Path(share(str(open_root(name, described(values), say)) if rank() == 0 else None))
    summaries = {}
    for seed in seeds:
        folder = root if len(seeds) == 1 else root / f"seed-{seed}"
        say(f"── {name}, seed {seed} → {folder}")
        summaries[seed] = run_seed(name, values, seed, folder, fresh=fresh, say=say)
    summary = summaries[seeds[0]] if len(seeds) == 1 else over_seeds(name, summaries)
    if len(seeds) > 1:
        _write_json(root / "summary.json", summary)
        _report(root, values)
    return {**summary, "out": str(root)}, {seed: found["stages"] for seed, found in summaries.items()}


def check_recipe(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, its rounds and tasks written out, after what can be said before it runs: keys, stages, configs."""
    for key in values:
        if key not in _KEYS:
            known = [*_KEYS, *(values.get("stages") or {})]
            raise ConfigError(f"unknown key {key!r}", where=name, fix=did_you_mean(str(key), known))
    stages = values.get("stages")
    if not isinstance(stages, Mapping) or not stages:
        raise ConfigError("no stages", where=name, fix="give stages: {sft: {stage: sft, model: …, data: …}}")
    stages = unroll(stages, name)
    for stage, settings in stages.items():
        if not isinstance(settings, Mapping) or "stage" not in settings:
            raise ConfigError("which kind of stage is it?", where=f"{name}: stages.{stage}",
                              fix="add stage: sft, reward, rl, preference, sample or evaluate")  # fmt: skip
        stages[stage] = settings = written_out(settings["stage"], settings, f"{name}: stages.{stage}")
        code_files(
            _stage_config(name, stage, settings, values, seed=0)
        )  # refuses a key in a judge before it is written
        _check_references(f"{name}: stages.{stage}", settings, [*stages][: [*stages].index(stage)], "world" in values)
    return {**values, "stages": stages}


def _check_references(where: str, settings: Mapping[str, Any], before: Sequence[str], has_world: bool) -> None:
    """`${stage.key}` may name the recipe, its world, and the stages before this one."""
    known = ["recipe", *(["world"] if has_world else []), *before]
    for reference in find_references(settings):
        source = reference.strip().partition(".")[0]
        if source not in known:
            fix = f"{did_you_mean(source, known)} (a stage can use the results of earlier stages only)"
            raise ConfigError(f"no result of a stage {source!r} for ${{{reference}}}", where=where, fix=fix)


def _stage_config(name: str, stage: str, settings: Mapping[str, Any], recipe: Mapping[str, Any], seed: int) -> Any:
    shared = {key: recipe[key] for key in ("device", "threads", "token_budget") if key in recipe}
    own = {key: value for key, value in settings.items() if key not in ("stage", "round")}
    seed += _ROUNDS_APART * (settings.get("round", 1) - 1)
    return stage_config(settings["stage"], {**shared, "seed": seed, **own}, where=f"{name}: stages.{stage}")


def run_seed(
    name: str, values: Mapping[str, Any], seed: int, folder: Path, *, fresh: Fresh, say: Callable[[str], None]
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    finished: dict[str, dict[str, Any]] = {}
    for stage, kind, config in stages_of(name, values, seed, folder, results, say):
        try:
            finished[stage] = run_stage(kind, config, name=stage, out=folder / stage, fresh=fresh, say=say)
        except OtherRun as error:
            fix = f"{_what_changed_does(stage, values['stages'])}; --fresh restarts all; or choose another out"
            raise OtherRun(error.path, error.changes, fix) from None
        results[stage] = finished[stage]
    summary = {
        "name": name, "seed": seed, "rows": rows_of([*finished.values()]),
        "accuracies": accuracies_of([*finished.values()]), "stages": finished,
        "simulated_labels": bool(values.get("simulated_labels", False)), "kl_estimator": "full",
    }  # fmt: skip
    _write_json(folder / "summary.json", summary)
    _write_json(folder / "replies.json", replies(finished, results.get("world", {})))
    _report(folder, values)
    return summary


def stages_of(
    name: str, values: Mapping[str, Any], seed: int, folder: Path, results: dict[str, dict[str, Any]],
    say: Callable[[str], None],
) -> Iterator[tuple[str, str, Any]]:  # fmt: skip
    """(name, kind, config) of one stage after the other; what a stage found has to be in `results` before the next."""
    results["recipe"] = {"data": values.get("data"), "seed": seed}
    if "world" in values:
        spec = resolve_references(values["world"], results, name)
        results["world"] = share(prepare_world(spec, folder / "world", seed, say) if rank() == 0 else None)
    for stage, settings in values["stages"].items():
        say(f"─ {stage}")
        resolved = resolve_references(settings, results, f"{name}: stages.{stage}")
        yield stage, settings["stage"], _stage_config(name, stage, resolved, values, seed)


def _what_changed_does(stage: str, stages: Mapping[str, Any]) -> str:
    """What --changed would do here: with this stage, with those that use its results, and with all others."""
    users = [stage]
    for other, settings in stages.items():
        sources = {reference.strip().partition(".")[0] for reference in find_references(settings)}
        if sources & {*users}:
            users.append(other)
    told = f" (and {', '.join(users[1:])}, where the inputs then differ)" if users[1:] else ""
    return f"--changed deletes and restarts {stage}{told} and keeps the others"


def prepare_world(spec: Any, folder: Path, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Data, models and judges that a recipe starts from: a world of `klimb.lab`, or `my_world.py:prepare`.

    Such a function takes (out, seed=…, and the spec's further keys) and returns names for `${world.NAME}`. What it
    made is used again as long as it is asked for the same: by name, seed and keys, and by the content of its code
    and of every file or folder that a key names.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = str(options.pop("name", ""))
    if is_reference(name):
        prepare, code = load_attribute(name), name.rpartition(":")[0]
    elif name in WORLDS:
        module = importlib.import_module(WORLDS[name])
        prepare, code = module.prepare, str(module.__file__)
    else:
        raise ConfigError(f"unknown world {name!r}", where="world", fix=did_you_mean(name, WORLDS))
    done = folder / "world.json"
    asked = {"name": name, "seed": seed, **options, "content": _content([code, options])}
    if done.is_file():
        made = json.loads(done.read_text())
        if made["asked"] == asked:
            return dict(made["world"])
        done.unlink()  # its files are about to be replaced
    try:
        world = dict(prepare(folder, seed=seed, **options))
    except TypeError as error:
        raise ConfigError(f"world {name}: {error}", where="world") from None
    if "summary" in world:
        say(str(world["summary"]))
    _write_json(done, {"asked": asked, "world": world})
    return world


def _content(value: Any) -> list[str]:
    """The hashes of what lies where a text names a file or folder, in their order."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return [content for inner in value for content in _content(inner)]
    return [content_hash(Path(value))] if isinstance(value, str | Path) and os.path.exists(value) else []


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


def _report(folder: Path, values: Mapping[str, Any]) -> None:
    if rank() == 0:
        keep_config(folder, described(values))
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
