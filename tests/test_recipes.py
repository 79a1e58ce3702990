"""Every shipped recipe is read without a complaint, and each of its stages runs two steps at tiny size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import run_ranks
from tiny import chat_model
from world import write

import klimb
from klimb.config import shipped_recipes
from klimb.stages.pipeline import check_recipe
from klimb.stages.results import Result

RECIPES = {name: yaml.safe_load(path.read_text()) for name, path in shipped_recipes().items()}
COUNTDOWN = {"countdown", "expert-iteration", "iterative-dpo", "r1", "r1-zero"}
CLERK = {"quickstart", "ensembles", "refresh"}
MADE_HERE = {
    "gsm8k-digits",
    "hh-reward",
    "hh-ensemble",
    "countdown-steps",
    *CLERK,
    *COUNTDOWN,
}  # their model comes with their world
CALCULATIONS = [(a, b) for a in range(1, 60) for b in range(2, 40)]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_and_says_what_it_takes(name: str) -> None:
    check_recipe(name, RECIPES[name])
    assert RECIPES[name]["name"] == name
    text = shipped_recipes()[name].read_text()
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert f"klimb run {name}" in comments or name == "quickstart"
    # What no machine here can run says so, and whence its figures come.
    assert ("NOT RUN AT THIS SIZE" in comments) is (name not in MADE_HERE)
    assert ("by `klimb doctor`" in comments) is (name not in MADE_HERE)


def data_for(name: str, folder: Path) -> str:
    """Rows with the columns of the data set that the recipe names."""
    if name in ("hh-reward", "hh-ensemble"):
        return write(folder / "data.jsonl", [
            {"chosen": f"\n\nHuman: is {n} odd?\n\nAssistant: {word} I think so", "rejected": f"\n\nHuman: is {n} odd?"
             f"\n\nAssistant: {word} go away"} for n in range(40) for word in ("well", "oh")
        ])  # fmt: skip
    if name in ("dpo-24gb", "ppo-24gb"):
        return write(folder / "data.jsonl", [
            {"chosen": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes, of course"}],
             "rejected": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "no"}]}
            for n in range(150)
        ])  # fmt: skip
    if name == "constitutional-ai":
        return write(folder / "data.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(24)])
    if name == "gsm8k-digits":
        return write(folder / "data.jsonl", [
            {"question": "?", "answer": f"<<{a}+{b}={a + b}>><<{a}*{b}={a * b}>><<{a * b}/{b}={a}>><<{a + b}-{b}={a}>>"}
            for a, b in CALCULATIONS
        ])  # fmt: skip
    return write(folder / "data.jsonl", [{"question": f"{a} and {b}?", "answer": f"{a}+{b} #### {a + b}"}
                                         for a, b in CALCULATIONS[:40]])  # fmt: skip


SMALL: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 8, "checkpoint_every": 0,
    "eval_every": 1,
}  # fmt: skip
"""In place of what a stage says, where it says anything."""
OF_THE_CONSTITUTION: dict[str, dict[str, Any]] = {
    "revise": {"max_tokens": 192}, "sample": {"samples_per_prompt": 8, "max_tokens": 24},
    "label": {"judge": {"canary_limit": 1}},
}  # fmt: skip
"""A model of random numbers ends when it happens to, and prefers what stands first: of 96 pairs a few are decided."""
WHOLE_REPLIES = {"language", "reward_model", "dpo"}
"""Their `max_tokens` bounds rows that are written already."""


def stages_of(stages: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Those within rounds, too."""
    for name, settings in stages.items():
        if "repeat" in settings:
            yield from stages_of(settings["stages"])
        else:
            yield name, settings


def tiny(name: str, folder: Path) -> dict[str, Any]:
    """The recipe with other sizes, a tiny model for that of the hub, and files for its data sets."""
    recipe = json.loads(json.dumps(RECIPES[name]))
    data = data_for(name, folder)
    recipe |= {"out": str(folder / "out"), "threads": 1, "device": "cpu", "token_budget": 1024}
    recipe |= {"data": data} if "data" in recipe else {}
    model = chat_model(folder / "model", context=4096 if name == "constitutional-ai" else 1024)
    for stage, settings in stages_of(recipe["stages"]):
        kept = {key: min(value, settings[key]) for key, value in SMALL.items() if key in settings}
        if stage in WHOLE_REPLIES or settings["stage"] in ("sft", "reward", "preference"):
            kept.pop("max_tokens", None)
        settings |= kept
        if "task" in settings:
            settings["measure"] = {"data": data, "samples_per_prompt": 4, "max_tokens": 4}
            settings |= {"max_tokens": 8} if settings["stage"] == "rl" else {}
        settings |= {"steps": 2} if settings["stage"] in ("sft", "reward", "preference", "rl") else {}
        settings |= {"model": model} if "Qwen" in settings.get("model", "") else {}
        settings |= {"eval_data": data} if ":test" in settings.get("eval_data", "") else {}
        settings |= {"eval_fraction": 0.2} if "eval_fraction" in settings else {}
        for key in ("epochs", "until", "min_accuracy", "until_accuracy", "max_prompt_tokens"):
            settings.pop(key, None)
        if "updates_per_step" in settings:
            settings["updates_per_step"] = 2
        if "critic" in settings:
            settings["critic"].pop("warmup_steps", None)
        if settings["stage"] == "sample":  # enough that some replies are better than others
            thousands = name in COUNTDOWN or name == "countdown-steps"  # of prompts
            settings["samples_per_prompt"] = (2 if "pairs" in settings else 1) if thousands else 40
            if name == "iterative-dpo":
                settings["reward"] = "length"  # after two steps nothing is right, and all pairs are ties
        if name == "constitutional-ai":
            settings |= OF_THE_CONSTITUTION.get(settings["stage"], {})
            for key in ("transcripts", "eval_fraction", "baselines"):
                settings.pop(key, None)
        if "keep" in settings:
            settings["keep"] = {"best": 1}
        if "best_of" in settings:
            settings |= {"best_of": [1, 2], "report_n": 2}
        if "measure" in settings:
            settings["measure"] |= {"samples_per_prompt": 4, "max_tokens": 4}
            if ":test" in settings["measure"]["data"]:
                settings["measure"]["data"] = data
    return dict(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_every_stage(name: str, tmp_path: Path) -> None:
    found = klimb.run(tiny(name, tmp_path), say=lambda line: None)
    assert [*found] == [*check_recipe(name, RECIPES[name])["stages"]]
    for stage in found.stages.values():
        if stage.result["stage"] in ("sft", "reward", "preference", "rl"):
            assert stage.metrics["step"] == [1, 2]
            assert all(loss is not None for loss in stage.metrics["loss"])
            assert Path(str(stage.model)).is_dir()
    expect(name, found)


def expect(name: str, found: Result) -> None:
    """What a recipe is about has happened."""
    if name == "constitutional-ai":
        assert found["revise"].result["kept"] > 0
        assert found["compare"].result["pairs"] > 0
    if name in ("hh-reward", "ppo-24gb"):
        assert found["reward_model"].result["baselines"].keys() == {"length", "bag_of_words"}
    if name == "hh-reward":  # all that differs is "I think so" and "go away": four letters more, and other words
        assert found["reward_model"].result["baselines"]["bag_of_words"]["accuracy"] == 1.0
    if name in ("ensembles", "hh-ensemble"):
        assert len(found["trust"].result["trust"]["members"]["accuracies"]) == 4
    if name == "ensembles":
        assert "reward/disagreement" in found["ppo_min"].metrics
        assert "reward/disagreement" not in found["ppo_single"].metrics
    if name == "refresh":
        drift = found["drift-2"].result
        assert drift["model"] == found["refresh-1"].model
        assert drift["trust"]["drift"]["length"]["n_then"] == 2 * found["drift-1"].result["trust"]["pairs"]
    if name == "ppo-24gb":
        assert "critic/explained_variance" in found["ppo"].metrics
        assert found["ppo"].result["algorithm"].startswith("ppo(")
    if name.startswith("grpo"):
        assert set(found["grpo"].metrics["reward/mean"]) <= {x / 16 for x in range(17)}  # right or wrong
        assert found["sft"].evaluation["gold"] is not None
    if name == "grpo-24gb":  # the adapter that SFT left goes on
        assert json.loads((found["grpo"].path / "model" / "adapter_config.json").read_text())["r"] == 32


@pytest.mark.slow
def test_the_recipe_of_eight_cards_runs_on_two_processes(tmp_path: Path) -> None:
    """As torchrun starts them; that two ranks find what one finds is shown in parity/test_parity_ranks.py."""
    recipe = tiny("grpo-8x80gb", tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    said = run_ranks(["-m", "klimb", "run", tmp_path / "recipe.yaml"], ranks=2)
    assert "summary:" in said[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
