"""The stages by name, and how one of them is run: config → run directory → result."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import StageConfig, load_config
from klimb.errors import ConfigError, Interrupted, did_you_mean
from klimb.plugin import is_reference
from klimb.rewards.spec import reward_files
from klimb.runtime.ranks import rank, share
from klimb.runtime.run import Fresh, Run
from klimb.runtime.signals import interruptible
from klimb.stages.common import inputs_of, say_aside, target_of
from klimb.stages.memory import admitted
from klimb.stages.task import WithTask, with_task

STAGES: Mapping[str, tuple[str, str]] = {
    "sft": ("klimb.stages.sft", "SftConfig"),
    "reward": ("klimb.stages.reward", "RewardConfig"),
    "rl": ("klimb.stages.rl", "RlConfig"),
    "preference": ("klimb.stages.preference", "PreferenceConfig"),
    "online_preference": ("klimb.stages.online_preference", "OnlinePreferenceConfig"),
    "distill": ("klimb.stages.distill", "DistillConfig"),
    "sample": ("klimb.stages.sample", "SampleConfig"),
    "evaluate": ("klimb.stages.evaluate", "EvaluateConfig"),
    "average": ("klimb.stages.average", "AverageConfig"),
    "evaluate_reward": ("klimb.stages.evaluate_reward", "EvaluateRewardConfig"),
    "label": ("klimb.stages.label", "LabelConfig"),
    "revise": ("klimb.stages.revise", "ReviseConfig"),
}


def stage_config(stage: str, values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Any:
    """The typed config of a stage. Raises ConfigError that names every problem."""
    return load_config(_config_class(stage, where), values, overrides, where)


def written_out(stage: str, values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`values` of a stage with what their task says in its place; references stay. Raises ConfigError."""
    cls = _config_class(stage, where)
    return with_task(cls, values) if issubclass(cls, WithTask) and values.get("task") is not None else values


def _config_class(stage: str, where: str) -> type[StageConfig]:
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}", where=where, fix=did_you_mean(stage, STAGES))
    module, name = STAGES[stage]
    found: type[StageConfig] = getattr(importlib.import_module(module), name)
    return found


def preview(stage: str, config: Any) -> list[str]:
    """Lines that say what would run; raises where the settings contradict each other."""
    tell = getattr(importlib.import_module(STAGES[stage][0]), "preview", None)
    lines: list[str] = tell(config) if tell else []
    admitted(config, target_of(config), lines.append)
    return lines


def run_stage(
    stage: str, config: Any, *, name: str, out: str | Path | None = None, fresh: Fresh = False,
    say: Callable[[str], None] = say_aside,
) -> dict[str, Any]:  # fmt: skip
    """Run one stage, or continue it, or return what it found before. The result names its run directory."""
    module = importlib.import_module(STAGES[stage][0])
    with open_run(out or config.out, config, name, fresh, say) as run:
        if (result := share(run.result)) is not None:
            say(f"{run.path}: finished before, nothing has changed")
            return {**result, "run": str(run.path)}
        started = time.monotonic()
        with interruptible() as interrupt:
            result = module.train(config, run, interrupt, say)
        result = {
            "stage": stage, "name": name, "method": config.method or name, "seed": config.seed, **result,
            "seconds": round(time.monotonic() - started, 2),
        }  # fmt: skip
        run.write_result(result)
        result = share(result)  # whoever goes on finds it written
        if interrupt.requested:
            raise Interrupted(f"{run.path} is finished; the same command continues after it")
        return {**result, "run": str(run.path)}


def open_run(out: str | Path | None, config: Any, name: str, fresh: Fresh, say: Callable[[str], None]) -> Run:
    """Rank 0 takes the directory, the others look on."""
    run = None
    if rank() == 0:
        run = Run.open(out, config, inputs_of(config, *code_files(config)), name=name, fresh=fresh, say=say)
    path, facts = share(run and [str(run.path), run.manifest])
    return run or Run.follow(Path(path), facts, say)


def code_files(config: Any) -> list[Path]:
    """Files of the user's that decide the result: reward functions and models, own algorithms and losses."""
    files = [Path(model) for model in getattr(config, "models", []) if Path(model).exists()]
    for key in ("reward", "gold", "other"):
        for holder in (config, getattr(config, "measure", None), getattr(config, "until", None)):
            files += reward_files(getattr(holder, key, None))
    for key in ("algorithm", "loss"):
        files += [Path(text.rpartition(":")[0]) for text in _texts(getattr(config, key, None)) if is_reference(text)]
    return list(dict.fromkeys(files))


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key, inner in value.items() for text in [*_texts(key), *_texts(inner)]]
    return []
