"""What `--dry-run` prints: the resolved config as YAML, and below it, as comments, what two steps of it tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klimb.config import dump_config, parse_seeds, plain
from klimb.report.text import duration
from klimb.runtime.ranks import rank
from klimb.stages.dry_run import Estimate, rehearse, rehearse_recipe
from klimb.stages.pipeline import check_recipe
from klimb.stages.registry import preview

Say = Callable[[str], None]


def dry_stage(
    stage: str, configs: Mapping[int, Any], name: str, fresh: bool, say: Say, as_json: bool
) -> None:  # fmt: skip
    """configs: by seed. Raises what the run would raise."""
    seeds, config = [*configs], next(iter(configs.values()))
    lines = preview(stage, config)
    estimate, place = rehearse(stage, configs, name=name, fresh=fresh, say=say)
    if rank() != 0:
        return
    if as_json:
        shown = {"config": plain(config), "preview": lines, "seeds": seeds, "out": place, **told(estimate)}
        print(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    print(dump_config(config), end="")
    several = f"seeds {', '.join(map(str, seeds))}"
    for line in [*lines, *estimate.lines(), f"out: {place}", *([several] if len(seeds) > 1 else [])]:
        print(f"# {line}")


def dry_recipe(name: str, values: Mapping[str, Any], say: Say, as_json: bool) -> None:
    """Raises what the recipe would raise, as far as two steps of each stage tell."""
    values = check_recipe(name, values)
    estimates, place = rehearse_recipe(name, values, say=say)
    if rank() != 0:
        return
    if as_json:
        print(json.dumps({"recipe": values, **told_of_all(values, estimates, place)}, indent=1, ensure_ascii=False))
        return
    print(dump_config(values), end="")
    for line in lines_of_all(values, estimates, place):
        print(f"# {line}")


def told(estimate: Estimate) -> dict[str, Any]:
    """For programs."""
    return {**estimate._asdict(), "seconds": estimate.seconds}


def told_of_all(values: Mapping[str, Any], estimates: Sequence[Estimate], place: str) -> dict[str, Any]:
    seeds = parse_seeds(values.get("seed", 0))
    seconds = len(seeds) * sum(estimate.seconds for estimate in estimates)
    return {"stages": [told(estimate) for estimate in estimates], "seeds": seeds, "seconds": seconds, "out": place}


def lines_of_all(values: Mapping[str, Any], estimates: Sequence[Estimate], place: str) -> list[str]:
    found = told_of_all(values, estimates, place)
    times = f" × {len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else ""
    each = [f"{estimate.name}: {'; '.join(estimate.lines_of_whole())}" for estimate in estimates]
    return [*each, f"the whole recipe takes about {duration(found['seconds'])}{times and f' ({times[1:]})'}",
            f"out: {place}"]  # fmt: skip
