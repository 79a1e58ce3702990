"""Rounds written out, against the same stages written by hand; and run."""

import json
from pathlib import Path
from typing import Any

import pytest
from world import World, klimb, lines

from klimb import run
from klimb.config import dump_config
from klimb.errors import ConfigError
from klimb.stages.rounds import unroll

BLOCK: dict[str, Any] = {
    "sft": {"stage": "sft", "model": "m"},
    "rounds": {
        "repeat": 2,
        "first": {"model": "${sft.model}", "data": "seed.jsonl"},
        "then": {"model": "${learn.model}", "data": "${draw.demonstrations}"},
        "stages": {
            "draw": {"stage": "sample", "model": "${rounds.model}"},
            "learn": {"stage": "sft", "model": "${sft.model}", "data": ["${draw.demonstrations}", "${rounds.data}"]},
        },
    },
    "end": {"stage": "evaluate", "model": "${rounds.model}"},
}


def test_each_round_starts_from_what_the_one_before_made() -> None:
    assert unroll(BLOCK, "recipe") == {
        "sft": {"stage": "sft", "model": "m"},
        "draw-1": {"stage": "sample", "model": "${sft.model}", "round": 1},
        "learn-1": {
            "stage": "sft", "model": "${sft.model}", "data": ["${draw-1.demonstrations}", "seed.jsonl"], "round": 1,
        },
        "draw-2": {"stage": "sample", "model": "${learn-1.model}", "round": 2},
        "learn-2": {
            "stage": "sft", "model": "${sft.model}", "round": 2,
            "data": ["${draw-2.demonstrations}", "${draw-1.demonstrations}"],
        },
        "end": {"stage": "evaluate", "model": "${learn-2.model}"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repeat": 0}, r"recipe: stages.rounds: repeat=0: it is no number of rounds; write repeat: 3"),
        ({"repeat": True}, r"repeat=True: it is no number"),
        ({"repeats": 3}, r"unknown key 'repeats'.*did you mean 'repeat'"),
        ({"stages": {}}, r"no stages to repeat"),
        ({"then": {}}, r"first and then have to name the same things"),
        ({"stages": {"draw": "sample"}}, r"no stages to repeat"),
    ],
)
def test_a_block_that_cannot_be_written_out(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        unroll({**BLOCK, "rounds": {**BLOCK["rounds"], **change}}, "recipe")


def test_rounds_are_tried_before_they_run(world: World, here: Path) -> None:
    stage = {"stage": "sft", "data": world.demonstrations, "steps": 1, "batch_size": 4}
    rounds = {"repeat": 2, "first": {"model": world.model}, "then": {"model": "${learn.model}"}}
    recipe = {"threads": 1, "device": "cpu", "stages": {
        "rounds": {**rounds, "stages": {"learn": {**stage, "model": "${rounds.model}"}}},
    }}  # fmt: skip
    (here / "two.yaml").write_text(dump_config(recipe))
    said = klimb("run", "two.yaml", "--dry-run", "--json")
    assert said.code == 0, said.err
    assert [tried["name"] for tried in json.loads(said.out)["stages"]] == ["learn-1", "learn-2"]
    assert klimb("check", "two.yaml", "--json").code == 0


def test_rejection_sampling_in_rounds(world: World, tmp_path: Path) -> None:
    """What a round learns is what it drew and kept; no two rounds draw with the same random numbers."""
    draw = {
        "stage": "sample", "model": "${rounds.model}", "data": world.prompts, "samples_per_prompt": 8, "max_tokens": 8,
        "reward": world.reward("count"), "keep": {"best": 2, "at_least": 0.2},
    }  # fmt: skip
    learn = {"stage": "sft", "model": "${rounds.model}", "data": "${draw.demonstrations}", "steps": 1, "batch_size": 4}
    start = {"stage": "sft", "model": world.model, "data": world.demonstrations, "steps": 20, "batch_size": 8,
             "optimizer": {"lr": 3e-3}}  # fmt: skip
    rounds = {"repeat": 2, "first": {"model": "${sft.model}"}, "then": {"model": "${learn.model}"}}
    summary = run({"name": "rounds", "out": str(tmp_path), "seed": 5, "stages": {
        "sft": start, "rounds": {**rounds, "stages": {"draw": draw, "learn": learn}},
    }})  # fmt: skip
    results = {name: stage.result for name, stage in summary.stages.items()}
    assert list(results) == ["sft", "draw-1", "learn-1", "draw-2", "learn-2"]
    assert [results[name]["seed"] for name in results] == [5, 5, 5, 10_005, 10_005]
    for count in (1, 2):
        result = results[f"draw-{count}"]
        samples, kept = lines(Path(result["samples"])), lines(Path(result["demonstrations"]))
        assert len(kept) == result["kept"] > 0
        for row in kept:
            rivals = [s for s in samples if s["prompt"] == row["prompt"] and s["finish"] == "stop"]
            better = {s["completion"] for s in rivals if s["score"] > row["score"]}
            assert row["score"] >= 0.2
            assert len(better) < 2
            assert row["completion"] in {s["completion"] for s in rivals}
        assert len({(row["prompt"], row["completion"]) for row in kept}) == len(kept)
    assert results["draw-2"]["model"] == results["learn-1"]["model"]
