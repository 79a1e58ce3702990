"""`klimb schema`: recipes and configs as JSON schema, for editors that complete and check YAML while it is written."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from klimb.errors import ConfigError, did_you_mean
from klimb.objective.algorithms import ALGORITHMS
from klimb.objective.preference import PREFERENCE_LOSSES
from klimb.stages.registry import STAGES
from klimb.stages.task import Task

_REFERENCE = {"type": "string", "pattern": r"\$\{[^{}]+\}", "description": "the result of an earlier stage"}
_SEEDS = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^[0-9., ]+$"},
              {"type": "array", "items": {"type": "integer", "minimum": 0}}],
    "default": 0, "description": "3, 0..4 or 0,2,5",
}  # fmt: skip
_METHODS: Mapping[str, Mapping[str, Any]] = {"algorithm": ALGORITHMS, "loss": PREFERENCE_LOSSES}


def schema(kind: str = "recipe") -> dict[str, Any]:
    """The schema of a recipe (what `klimb run` reads), of a task, or of the config of a stage, an algorithm or a loss.

    Raises ConfigError for any other name.
    """
    if kind == "recipe":
        return _recipe()
    found = Task.model_json_schema() if kind == "task" else _stage(stage_of(kind))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **found,
        "title": f"klimb {kind}",
    }


def keys(command: str) -> list[tuple[str, str]]:
    """Every key of a command's config with its default, `optimizer.lr=none`, and what it is."""
    found = _stage(stage_of(command))
    return _keys(found, found.get("$defs", {}), "")


def _keys(section: Mapping[str, Any], sections: Mapping[str, Any], above: str) -> list[tuple[str, str]]:
    lines = []
    for name, told in section["properties"].items():
        refs = [each["$ref"] for each in (told, *told.get("anyOf", ()), *told.get("allOf", ())) if "$ref" in each]
        kind = sections[refs[0].rpartition("/")[2]] if refs else {}
        given = "" if name in section.get("required", ()) else _spelled(told.get("default"))
        what = told.get("description", "")
        if "properties" not in kind:
            choices = told.get("enum") or kind.get("enum")
            what = f"{what} ({', '.join(map(str, choices))})".strip() if choices else what
            lines.append((f"{above}{name}={given}", what))
            continue
        if not isinstance(told.get("default", {}), Mapping):
            lines.append((f"{above}{name}={given}", what or kind.get("description", "")))
        lines += _keys(kind, sections, f"{above}{name}.")
    return lines


def _spelled(default: Any) -> str:
    """As it is written on the command line."""
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "none"}[default]
    if isinstance(default, list | tuple):
        return f"[{', '.join(_spelled(each) for each in default)}]"
    return f"{default:g}" if isinstance(default, float) else "{}" if default == {} else str(default)


def stage_of(command: str) -> str:
    """The stage that a command runs: its own name, or that of an algorithm or a loss."""
    if command in STAGES:
        return command
    if command in ALGORITHMS or command in PREFERENCE_LOSSES:
        return "rl" if command in ALGORITHMS else "preference"
    known = ["recipe", "task", *STAGES, *ALGORITHMS, *PREFERENCE_LOSSES]
    raise ConfigError(f"no schema of {command!r}", where="command line", fix=did_you_mean(command, known))


def config_class(stage: str) -> Any:
    module, name = STAGES[stage]
    return getattr(importlib.import_module(module), name)


def _stage(stage: str) -> dict[str, Any]:
    """Of a file that holds one stage's keys."""
    found: dict[str, Any] = config_class(stage).model_json_schema()
    properties = found["properties"]
    for key, known in _METHODS.items():
        if key in properties and "enum" not in properties[key]:  # a name, a name with changes, my_file.py:NAME
            properties[key]["anyOf"] = [{"enum": [*known]}, {"type": ["string", "object"]}]
    properties["seed"] = _SEEDS
    if "task" in properties:  # it may bring what has to be there
        found.get("$defs", {}).get("Measurement", {}).pop("required", None)
        if brought := sorted({*config_class(stage).from_task} & {*found["required"]}):
            found["required"] = [key for key in found["required"] if key not in brought]
            found["anyOf"] = [{"required": ["task"]}, {"required": brought}]
    return found


def _recipe() -> dict[str, Any]:
    """Of a file of named stages, in which any value may be a reference to an earlier stage's result."""
    stages: list[dict[str, Any]] = []
    sections: dict[str, Any] = {}
    for stage in STAGES:
        found = _stage(stage)
        sections |= found.pop("$defs", {})
        found["properties"] = {"stage": {"const": stage}, **found["properties"]}
        found["required"] = ["stage", *found.get("required", [])]
        stages.append(_with_references(found))
    stages.append(_rounds([*stages]))
    top = {
        "name": {"type": "string"},
        "world": {"description": "what the stages start from: a world of klimb's, or my_world.py:prepare"},
        "data": {"description": "${recipe.data} in the stages"},
        "seed": _SEEDS,
        "simulated_labels": {"type": "boolean", "default": False},
        **{key: _stage("sft")["properties"][key] for key in ("device", "threads", "token_budget", "out")},
        "stages": {"type": "object", "additionalProperties": {"oneOf": stages}, "minProperties": 1},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "klimb recipe", "type": "object", "properties": top, "required": ["stages"],
        "additionalProperties": False,
        "$defs": {name: _with_references(section) for name, section in sections.items()},
    }  # fmt: skip


def _rounds(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """A block of stages that is repeated."""
    carried = {"type": "object", "additionalProperties": {"type": "string"}}
    return {
        "title": "rounds", "type": "object", "required": ["repeat", "stages"], "additionalProperties": False,
        "properties": {
            "repeat": {"type": "integer", "minimum": 1, "description": "how many rounds"},
            "first": {**carried, "description": "what ${this block.KEY} is in the first round"},
            "then": {**carried, "description": "and in the others, from the round before"},
            "stages": {"type": "object", "additionalProperties": {"oneOf": stages}, "minProperties": 1},
        },
    }  # fmt: skip


def _with_references(section: Mapping[str, Any]) -> dict[str, Any]:
    properties = {
        key: value if "const" in value else {**_told(value), "anyOf": [value, _REFERENCE]}
        for key, value in section.get("properties", {}).items()
    }
    return {**section, "properties": properties}


def _told(value: Mapping[str, Any]) -> dict[str, Any]:
    """What an editor shows of a key stays on top."""
    return {key: value[key] for key in ("title", "description", "default") if key in value}
