"""A task: prompts, answers and the verifier in one file, so that what is trained for is what is measured.

::

    # tasks/sums.yaml
    data: train.jsonl                         the prompts to train on
    eval_data: test.jsonl                     those held out, to measure on
    columns: {prompt: question}               of both files; the others reach the reward by their names
    reward: {numeric: {column: answer}}
    max_tokens: 64

`task: tasks/sums.yaml` in a stage stands for these keys: one that draws prompts gets `data`, `columns`, `reward` and
`max_tokens`, one that measures gets `measure`, and a key that the stage has itself wins. They are written out before
anything is checked: config.yaml holds what the task said, and no word of the task. So a run knows by its config that a
task has changed, as it knows of any other key, and goes on where the file is gone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from klimb.config import StageConfig, find_references, load_config, load_recipe
from klimb.data.source import FILE_SUFFIXES
from klimb.errors import ConfigError
from klimb.plugin import is_reference
from klimb.stages.common import RunConfig, TrainConfig
from klimb.stages.given import Data, Given, described


class Task(StageConfig):
    """What a task file holds. Paths are relative to the file; one of a folder in a reward has a slash: `./rm`."""

    data: Data = Field(None, description="prompts to train on")
    eval_data: Data = Field(None, description="held-out prompts, to measure on")
    columns: dict[str, str] = Field({}, description="names of the columns of both: {prompt: question}")
    reward: Given = Field(description="the verifier, as in a stage: a name, one with options, or a mixture")
    gold: Given = Field(
        None, description="who judges the held-out prompts, beside `reward`; default: `reward`, as verifiers are right"
    )
    max_tokens: int | None = Field(None, ge=1, description="longest completion")
    eval_samples_per_prompt: int | None = Field(None, ge=1, description="completions of a held-out prompt")
    eval_temperature: float | None = Field(None, ge=0, description="at which these are drawn; 0: greedy")

    @model_validator(mode="after")
    def _without_contradiction(self) -> Self:
        if found := "; ".join(self._contradictions()):
            raise ValueError(found)
        return self

    def _contradictions(self) -> Iterator[str]:
        if self.data is None and self.eval_data is None:
            yield "no prompts: give data to train on, eval_data to measure on, or both"
        elif described(self.data, "data") == described(self.eval_data, "data"):
            yield "data and eval_data are the same: nothing would be held out"

    def measured(self) -> dict[str, Any]:
        """The keys of `measure`. A second judge makes the reward a proxy."""
        judges = {"gold": self.reward} if self.gold is None else {"reward": self.reward, "gold": self.gold}
        return _said({
            "data": self.eval_data, "columns": self.columns, **judges, "max_tokens": self.max_tokens,
            "samples_per_prompt": self.eval_samples_per_prompt, "temperature": self.eval_temperature,
        })  # fmt: skip


class WithTask(RunConfig):
    """Settings of a stage that a task can fill: those named in `from_task`."""

    from_task: ClassVar[tuple[str, ...]] = ("measure",)
    task: str | dict[str, Any] | None = Field(
        None, exclude=True, description="YAML file of prompts, columns and verifier: keys that are left out are its"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("task") is None:
            return values
        found = with_task(cls, values)
        if references := find_references(found):
            why = "it names what an earlier stage of a recipe found, and this stage runs alone"
            raise ConfigError(f"${{{references[0]}}}", where=_name(values["task"]), why=why, fix="write the value")
        return found


def with_task(cls: type[WithTask], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a `cls` without `task`, and with what the task says where they say nothing.

    References in the task stay what they are. Raises ConfigError where it cannot be read, or does not fit.
    """
    task, where = _read(values["task"]), _name(values["task"])
    filled = {key: value for key, value in values.items() if key != "task"}
    held_out, typed = (described(data, "data") for data in (task.eval_data, filled.get("data")))
    if TrainConfig in cls.__mro__ and held_out is not None and typed == held_out:
        why, fix = "it would be trained on what it is measured on", "leave data out, or give other prompts"
        raise ConfigError(f"data={held_out}: these are its held-out prompts", where=where, why=why, fix=fix)
    if "data" in cls.from_task and task.data is None and "data" not in filled:
        why, fix = "the prompts to draw for are those to train on", "give it some, or give data"
        raise ConfigError("no data", where=where, why=why, fix=fix)
    if "measure" in cls.from_task and isinstance(asked := filled.get("measure", {}), Mapping):
        if "data" in (measure := task.measured() | dict(asked)):
            filled["measure"] = measure
        elif "measure" in filled or cls.model_fields["measure"].is_required():
            why, fix = "the prompts to measure on are its held-out ones", "give it some, or give measure.data"
            raise ConfigError("no eval_data", where=where, why=why, fix=fix)
    return _said({key: getattr(task, key) for key in cls.from_task if key != "measure"}) | filled


def _said(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if value is not None}


# The file -------------------------------------------------------------------------------------------------------------


def _name(task: Any) -> str:
    """What errors call it."""
    name = task.get("name", "task") if isinstance(task, Mapping) else task
    return str(name)


def _read(task: Any) -> Task:
    """Of a path, of the name of a shipped one, of a mapping as in a file, or of {name: …} with keys that win."""
    values = dict(task) if isinstance(task, Mapping) else {"name": task}
    if "name" not in values:
        return load_config(Task, values, where="task")
    name = values.pop("name")
    if not isinstance(name, str) or find_references(name):
        raise ConfigError(f"task={name}", why="it is read before any stage runs", fix="write the path of its file")
    file = load_recipe(name, "task")
    return load_config(Task, _as_seen_from_here(file.values, file.path.parent) | values, where=name)


def _as_seen_from_here(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of a file in `folder`, for somebody who is not there. Names and hub names are no paths."""

    def is_data(text: str) -> bool:
        return text.lower().endswith(FILE_SUFFIXES) or (folder / text).exists()

    def is_code_or_model(text: str) -> bool:
        return is_reference(text) or ("/" in text and (folder / text).exists())

    kinds = {"data": is_data, "eval_data": is_data, "reward": is_code_or_model, "gold": is_code_or_model}
    return {key: _moved(value, folder, kinds[key]) if key in kinds else value for key, value in values.items()}


def _moved(value: Any, folder: Path, is_path: Callable[[str], bool]) -> Any:
    if isinstance(value, Mapping):
        return {_moved(key, folder, is_path): _moved(inner, folder, is_path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, folder, is_path) for inner in value]
    if not isinstance(value, str) or value.startswith(("~", "${")) or not is_path(value):
        return value
    return os.path.normpath(folder / value)
