"""A task stands for the keys that it holds: in every stage, and nothing else about a run is changed by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from world import SMALL_RL, World, klimb, lines, play, write

import klimb as library
from klimb.commands.schema import schema
from klimb.config import dump_config, load_config, load_yaml, plain, shipped_recipes
from klimb.errors import ConfigError
from klimb.runtime.run import OtherRun
from klimb.stages.pipeline import check_recipe
from klimb.stages.registry import stage_config
from klimb.stages.task import Task

WORDS = {
    "data": "train.jsonl", "eval_data": "../test.jsonl", "columns": {"prompt": "question"},
    "reward": "rewards.py:count", "max_tokens": 4, "eval_samples_per_prompt": 3, "eval_temperature": 0.5,
}  # fmt: skip
MEASURE = {
    "data": "test.jsonl", "columns": {"prompt": "question"}, "gold": "tasks/rewards.py:count", "max_tokens": 4,
    "samples_per_prompt": 3, "temperature": 0.5,
}  # fmt: skip
DRAWN = {"data": "tasks/train.jsonl", "columns": {"prompt": "question"}, "max_tokens": 4}
REWARDED = {**DRAWN, "reward": "tasks/rewards.py:count"}
ROWS = {"data": "rows.jsonl"}
WRITTEN_OUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rl": ({}, {**REWARDED, "measure": MEASURE}),
    "online_preference": ({}, {**REWARDED, "measure": MEASURE}),
    "sample": ({}, REWARDED),
    "evaluate": ({}, {"measure": MEASURE}),
    "distill": ({"teacher": "m"}, {**DRAWN, "measure": MEASURE}),
    "sft": (ROWS, {"measure": MEASURE}),
    "preference": (ROWS, {"measure": MEASURE}),
}
"""What a stage has to be given itself, and what the task is to it."""


@pytest.fixture
def task(world: World, here: Path) -> str:
    """The file of a task, with what belongs to it in folders around it."""
    (here / "tasks").mkdir()
    questions = [{"question": f"{letter} ?", "answer": letter} for letter in "abcdef"]
    write(here / "tasks" / "train.jsonl", questions[:4])
    write(here / "test.jsonl", questions[4:])
    (here / "tasks" / "rewards.py").write_text(Path(world.rewards).read_text())
    return task_file(here)


def task_file(here: Path, **changes: Any) -> str:
    (here / "tasks" / "words.yaml").write_text(dump_config({**WORDS, **changes}))
    return "tasks/words.yaml"


@pytest.mark.parametrize("stage", WRITTEN_OUT)
def test_it_is_the_same_as_its_keys(stage: str, task: str) -> None:
    own, keys = WRITTEN_OUT[stage]
    with_task = stage_config(stage, {"model": "m", **own, "task": task})
    assert with_task == stage_config(stage, {"model": "m", **own, **keys})
    assert with_task == stage_config(stage, {"model": "m", **own}, [f"task={task}"])
    assert "task" not in plain(with_task)


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in kept]


def test_one_definition_trains_and_measures_to_the_same_bits(task: str, world: World, here: Path) -> None:
    few = {"model": world.model, "steps": 2, **SMALL_RL, "prompts_per_step": 4}
    del few["max_tokens"]
    bits = []
    for name, keys in (("task", {"task": task}), ("keys", {**REWARDED, "measure": MEASURE})):
        trained = play("rl", here / f"grpo-{name}", **few, **keys)
        own = {"task": task} if name == "task" else {"measure": keys["measure"]}
        measured = play("evaluate", here / f"evaluate-{name}", model=trained.model, reference=world.model, **own)
        evaluation = measured.result["evaluation"]
        assert evaluation["n"] == 6  # 3 of each of the two prompts that are held out
        assert evaluation["gold"] > 0
        bits.append([
            without_time(trained.rows), trained.result["evaluation"], evaluation,
            (trained.path / "model" / "model.safetensors").read_bytes(), (trained.path / "config.yaml").read_text(),
        ])  # fmt: skip
    assert bits[0] == bits[1]


# What is typed wins ---------------------------------------------------------------------------------------------------


def test_what_is_typed_wins(task: str) -> None:
    typed = {"reward": "length", "columns": {}, "measure": {"samples_per_prompt": 9}}
    config = stage_config("rl", {"model": "m", "task": task, **typed}, ["max_tokens=7", "measure.gold=exact"])
    assert (config.reward, config.columns, config.max_tokens) == ("length", {}, 7)
    assert plain(config.measure) == {
        **plain(stage_config("evaluate", {"model": "m", "measure": MEASURE}).measure), "samples_per_prompt": 9,
        "gold": "exact",
    }  # fmt: skip


def test_nothing_is_a_value_that_wins_too(task: str) -> None:
    assert stage_config("rl", {"model": "m", "task": task}, ["measure=null"]).measure is None
    assert stage_config("sample", {"model": "m", "task": task}, ["reward=null"]).reward is None


def test_keys_of_the_task_itself_can_be_changed(task: str) -> None:
    config = stage_config("rl", {"model": "m", "task": task}, ["task.max_tokens=9"])
    assert (config.max_tokens, config.measure.max_tokens) == (9, 9)


def test_a_judge_that_training_never_sees_makes_the_reward_a_proxy(task: str, here: Path) -> None:
    measure = stage_config("evaluate", {"model": "m", "task": task_file(here, gold="exact")}).measure
    assert (measure.reward, measure.gold) == ("tasks/rewards.py:count", "exact")


def test_without_held_out_prompts_nothing_is_measured_after_training(task: str, here: Path) -> None:
    task_file(here, eval_data=None)
    assert stage_config("rl", {"model": "m", "task": task}).measure is None
    other = stage_config("evaluate", {"model": "m", "task": task}, ["measure.data=mine.jsonl"]).measure
    assert (other.data, other.gold) == ("mine.jsonl", "tasks/rewards.py:count")


# Paths ----------------------------------------------------------------------------------------------------------------


def test_paths_are_those_beside_the_file(task: str, here: Path) -> None:
    (here / "tasks" / "rm").mkdir()
    (here / "tasks" / "source").mkdir()  # no column is a folder
    mixture = [
        {"reward": "./rm", "weight": 0.5},
        {"route": {"column": "source", "to": {"a": {"rewards.py:count": {"timeout": 3}}, "b": "numeric"}}},
    ]
    task_file(here, data={"train.jsonl": 1, "owner/set": 2, "/a/b.csv": 1}, eval_data=["../test.jsonl"], reward=mixture)
    config = stage_config("rl", {"model": "m", "task": task})
    assert config.data == {"tasks/train.jsonl": 1, "owner/set": 2, "/a/b.csv": 1}
    assert config.measure.data == ["test.jsonl"]
    assert config.reward == [
        {"reward": "tasks/rm", "weight": 0.5},
        {"route": {"column": "source", "to": {"a": {"tasks/rewards.py:count": {"timeout": 3}}, "b": "numeric"}}},
    ]


def test_a_missing_file_is_missed_where_it_should_be(task: str, here: Path, world: World) -> None:
    write(here / "gone.jsonl", [{"question": "a ?"}])  # another one, where the command is given
    task_file(here, data="gone.jsonl")
    said = klimb("grpo", f"model={world.model}", f"task={task}", "--json")
    assert said.err.startswith("klimb: tasks/gone.jsonl: no such file")


# Runs and recipes -----------------------------------------------------------------------------------------------------


def recipe(world: World, task: Any) -> dict[str, Any]:
    return {
        "name": "words", "threads": 1, "device": "cpu", "out": "out",
        "stages": {
            "before": {"stage": "evaluate", "model": world.model, "task": task},
            "sft": {"stage": "sft", "model": world.model, "data": world.demonstrations, "steps": 1, "batch_size": 4,
                    "task": task},
            "grpo": {"stage": "rl", "model": "${sft.model}", "steps": 1, "prompts_per_step": 2,
                     "samples_per_prompt": 4, "task": task},
        },
    }  # fmt: skip


def test_the_stages_of_a_recipe_name_one_task(task: str, world: World, here: Path) -> None:
    (here / "words.yaml").write_text(dump_config(recipe(world, task)))
    said = klimb("run", "words.yaml", "grpo.measure.samples_per_prompt=5", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["stages"]
    assert [stage["evaluation"]["n"] for stage in found.values()] == [6, 6, 10]
    config = load_yaml(here / "out" / "grpo" / "config.yaml")
    assert (config["data"], config["measure"]["data"]) == ("tasks/train.jsonl", "test.jsonl")
    assert "task" not in config


def test_rows_and_functions_of_python_make_a_task(world: World, here: Path) -> None:
    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(completion)) for completion in completions]

    task = {"data": [{"prompt": f"{a} ?"} for a in "abc"], "eval_data": [{"prompt": "d ?"}], "reward": short,
            "max_tokens": 3}  # fmt: skip
    found = library.run(recipe(world, task), say=lambda line: None)
    assert found["grpo"].evaluation["gold"] < 0
    assert found["before"].evaluation["prompts"] == 1


def test_references_in_a_task_are_those_of_its_recipe(task: str, world: World, here: Path) -> None:
    task_file(here, data="${recipe.data}", eval_data="${nowhere.samples}")
    values = {**recipe(world, task), "data": "tasks/train.jsonl"}
    with pytest.raises(ConfigError, match=r"stages.before: no result of a stage 'nowhere' for \$\{nowhere.samples\}"):
        check_recipe("words", values)
    task_file(here, data="${recipe.data}")
    written = check_recipe("words", values)["stages"]["grpo"]
    assert (written["data"], written["measure"]["data"]) == ("${recipe.data}", "test.jsonl")
    assert library.run(values, say=lambda line: None)["grpo"].evaluation["n"] == 6


def test_a_run_knows_that_its_task_has_changed(task: str, world: World, here: Path) -> None:
    few = {"model": world.model, "task": task}
    first = play("evaluate", here / "run", **few)
    (here / task).write_text(dump_config(WORDS) + "# a remark\n")
    assert any("finished before" in line for line in play("evaluate", here / "run", **few).said)
    task_file(here, eval_temperature=0.25)
    with pytest.raises(OtherRun, match=r"measure.temperature: 0.5 → 0.25"):
        play("evaluate", here / "run", **few)
    (here / task).unlink()
    kept = load_yaml(first.path / "config.yaml")
    del kept["out"]
    again = play("evaluate", here / "run", **kept)
    assert any("finished before" in line for line in again.said)
    assert lines(again.path / "events.jsonl") == first.events


# Commands -------------------------------------------------------------------------------------------------------------


def test_check_looks_at_what_a_task_brings(task: str, world: World, here: Path) -> None:
    few = ["steps=1", "prompts_per_step=2", "samples_per_prompt=4", "threads=1", "device=cpu", f"model={world.model}"]
    said = klimb("check", "grpo", f"task={task}", *few, "--json")
    found = json.loads(said.out)
    assert (said.code, found["fit"]) == (0, True), said.out
    assert {key: rows["rows"] for key, rows in found["data"].items()} == {"data": 4, "measure.data": 2}
    assert found["rewards"].keys() == {"reward"}
    (here / "mine.yaml").write_text(f"model: {world.model}\ntask: {task}\nprompts_per_step: 2\nalgorithm: grpo\n")
    assert json.loads(klimb("check", "mine.yaml", *few[2:], "steps=1", "--json").out)["stage"] == "rl"


def test_editors_know_tasks() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema("task"))
    for path in shipped_recipes("task").values():
        values = load_yaml(path)
        assert [error.message for error in check.iter_errors(values)] == []
        assert load_config(Task, values).eval_data is not None
    assert not check.is_valid({"data": "a.jsonl", "rewrad": "exact"})
    stage = jsonschema.Draft202012Validator(schema("grpo"))
    assert stage.is_valid({"model": "m", "task": "gsm8k", "measure": {"samples_per_prompt": 1}})
    assert not stage.is_valid({"model": "m", "data": "a.jsonl"})
    assert stage.is_valid({"model": "m", "data": "a.jsonl", "reward": "exact"})


def test_a_shipped_task_has_a_name(here: Path) -> None:
    config = stage_config("rl", {"model": "m", "task": "gsm8k"})
    assert (config.data, config.reward, config.measure.gold) == ("openai/gsm8k/main", "numeric", "numeric")
    assert config.measure.data == "openai/gsm8k/main:test"
    (here / "gsm8k").write_text("data: mine.jsonl\nreward: exact\n")
    assert stage_config("rl", {"model": "m", "task": "gsm8k"}).data == "mine.jsonl"  # a path that exists wins
