"""`klimb check RECIPE`: fit where training starts, else the reason; nothing is left behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from world import World, klimb, write

from klimb.config import dump_config

EXACT = "def score(completions, answer):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def grpo(world: World, here: Path, **changes: Any) -> str:
    values = {
        "model": world.model, "data": world.prompts, "reward": "mine.py:score", "max_tokens": 4, "steps": 30,
        "prompts_per_step": 2, "samples_per_prompt": 4, "threads": 1, "device": "cpu",
    }  # fmt: skip
    (here / "mine.py").write_text(EXACT)
    (here / "grpo.yaml").write_text(dump_config({**values, **changes}))
    return "grpo.yaml"


def test_a_recipe_that_would_train(world: World, here: Path, temporary: Path) -> None:
    said = klimb("check", grpo(world, here))
    assert said.code == 0, said.out
    assert said.out.splitlines()[0] == "grpo.yaml: rl: klimb grpo"
    assert said.out.splitlines()[-1] == "training would start"
    found = json.loads(klimb("check", "grpo.yaml", "--json").out)
    assert found["fit"] is True
    assert found["data"]["data"]["rows"] == 6
    assert found["memory"]["peak"] > 0
    assert found["estimate"]["steps"] == 30
    assert found["estimate"]["seconds"] > 30 * found["estimate"]["step"] > 0
    assert found["out"].startswith("runs/grpo-")
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == ["grpo.yaml", "mine.py"]
    assert list(temporary.iterdir()) == []
    assert klimb("grpo", "grpo.yaml", "steps=1", "--json").code == 0  # as it said


def test_the_reward_on_right_wrong_and_empty_answers(world: World, here: Path) -> None:
    rewards = json.loads(klimb("check", grpo(world, here), "--json").out)["rewards"]["reward"]
    assert len(rewards["rows"]) == 6
    assert rewards["reference answers"]["mean"] == 1.0
    assert rewards["shuffled answers"] == {
        "rows": 6, "failed": 0, "abstained": 0, "verdicts": {"scored": 6},
        "mean": 0.0, "std": 0.0, "least": 0.0, "half": 0.0, "most": 0.0,
    }  # fmt: skip
    said = klimb("check", "grpo.yaml", "reward=exact")
    assert "reference answers (6): mean 1 std 0 least 1 half 1 most 1 · 6 ok" in said.out
    assert "empty answers (6): mean 0 std 0 least 0 half 0 most 0 · 6 wrong" in said.out
    assert rewards["empty answers"]["mean"] == 0.0
    said = klimb("check", "grpo.yaml", f"reward={world.reward('count')}")  # counts "yes": no answer has one
    assert said.code == 0
    assert "it does not prefer reference answers to shuffled answers" in said.out
    write(here / "bare.jsonl", [{"prompt": "a ?"}, {"prompt": "b ?"}])
    bare = json.loads(klimb("check", "grpo.yaml", "data=bare.jsonl", f"reward={world.reward('count')}", "--json").out)
    assert list(bare["rewards"]["reward"]) == ["rows"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"reward": "bad.py:score"}, "ZeroDivisionError"),
        ({"data": "bad.jsonl"}, "data: 1 of 2 rows cannot be used"),
        ({"max_tokens": 99}, "max_tokens=99"),
        ({"model": "./gone"}, "./gone"),
        ({"measure": {"data": "gone.jsonl", "max_tokens": 4}}, "gone.jsonl"),
        ({"lora": {"rank": 2, "targets": ["wq"]}}, "wq"),
    ],
)
def test_a_recipe_that_would_not(
    changes: dict[str, Any], names: str, world: World, here: Path, temporary: Path
) -> None:
    (here / "bad.py").write_text("def score(completions, **_):\n    return [1 / 0 for _ in completions]\n")
    (here / "bad.jsonl").write_text('{"prompt": "a ?", "answer": "b"}\n{"prompt": null}\n')
    said = klimb("check", grpo(world, here, **changes))
    assert said.code == 1
    last = said.out.splitlines()[-1]
    assert last.startswith("training would not start: ")
    assert names in last
    if "data" in changes:
        assert "bad.jsonl:2: prompt is null" in said.out
    assert list(temporary.iterdir()) == []


def test_wrong_keys_are_told_as_training_tells_them(world: World, here: Path) -> None:
    grpo(world, here, stpes=3)
    said, refused = klimb("check", "grpo.yaml"), klimb("grpo", "grpo.yaml")
    assert (said.code, said.out) == (1, "")
    assert said.err == refused.err
    assert "did you mean 'steps'?" in said.err
    grpo(world, here, samples_per_prompt=1)
    assert klimb("check", "grpo.yaml").err == klimb("grpo", "grpo.yaml").err


def test_which_stage_a_file_is_for(world: World, here: Path) -> None:
    small = {"model": world.model, "batch_size": 2, "steps": 1, "threads": 1, "device": "cpu"}
    (here / "demonstrations.yaml").write_text(dump_config({**small, "data": world.demonstrations}))
    assert klimb("check", "demonstrations.yaml").out.startswith("demonstrations.yaml: sft: klimb sft")
    (here / "pairs.yaml").write_text(dump_config({**small, "data": world.preferences}))
    said = klimb("check", "pairs.yaml")
    assert (said.code, said.out) == (1, "")
    assert "klimb check reward pairs.yaml" in said.err
    said = klimb("check", "ipo", "pairs.yaml", "loss.beta=0.2")
    assert said.code == 0
    assert "ipo(beta=0.2), 2 pairs in an update" in said.out
    assert "chosen is longer in 0.0% of the pairs" in said.out
    assert klimb("check", "dpo", *(f"{key}={value}" for key, value in small.items()),
                 f"data={world.preferences}").out.startswith("config: preference: klimb dpo")  # fmt: skip


def story(world: World, **changes: Any) -> dict[str, Any]:
    """sft → pairs of its samples → a reward model of these → RL against it. Only equal texts score the same."""
    Path("sums.py").write_text("def score(completions):\n    return [float(sum(map(ord, c))) for c in completions]\n")
    few = {"batch_size": 4, "steps": 7}
    return {"name": "story", "threads": 1, "device": "cpu", "stages": {
        "sft": {"stage": "sft", "model": world.model, "data": world.demonstrations, **few},
        "pairs": {"stage": "sample", "model": "${sft.model}", "data": world.prompts, "samples_per_prompt": 64,
                  "max_tokens": 3, "reward": "sums.py:score", "pairs": True},
        "judge": {"stage": "reward", "model": "${sft.model}", "data": "${pairs.preferences}", "batch_size": 4,
                  "on_bad": "drop", "eval_fraction": 0.2, "min_accuracy": 0.999},
        "rl": {"stage": "rl", "model": "${sft.model}", "data": world.prompts, "reward": "${judge.model}", "steps": 5,
               "prompts_per_step": 2, "samples_per_prompt": 4, "max_tokens": 3,
               "measure": {"data": world.prompts, "gold": world.reward("count"), "max_tokens": 3}, **changes},
    }}  # fmt: skip


def test_the_stages_of_a_recipe_are_tried_on_one_another(world: World, here: Path, temporary: Path) -> None:
    (here / "story.yaml").write_text(dump_config(story(world)))
    said = klimb("check", "story.yaml")
    assert said.code == 0, said.out + said.err
    found = json.loads(klimb("check", "story.yaml", "seed=0..1", "--json").out)
    steps = {each["name"]: each["steps"] for each in found["estimate"]["stages"]}
    assert (steps["sft"], steps["pairs"], steps["rl"]) == (7, 0, 5)
    assert found["estimate"]["seconds"] == pytest.approx(2 * sum(e["seconds"] for e in found["estimate"]["stages"]))
    # Of 6 × 32 pairs 6 × 10 were drawn, and stand for all; a few of them are ties.
    assert 0.7 * 180 / 4 < steps["judge"] <= 180 / 4
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in here.iterdir() if path.suffix) == ["story.yaml", "sums.py"]


def test_a_mistake_in_a_late_stage_is_found(world: World, here: Path) -> None:
    (here / "story.yaml").write_text(dump_config(story(world, reference="./gone", measure_kl=True)))
    said = klimb("check", "story.yaml")
    assert said.code == 1
    assert "./gone" in said.out.splitlines()[-1]
    (here / "story.yaml").write_text(dump_config(story(world, stpes=3)))
    said = klimb("check", "story.yaml")
    assert (said.code, said.out) == (1, "")
    assert "did you mean 'steps'?" in said.err
