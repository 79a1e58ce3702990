"""What a reward model is held against: judges by length and by words, on pairs whose answer is known by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from world import World, klimb, lines, play, write

from klimb.config import dump_config
from klimb.stages import baselines
from klimb.types import Preference

WORDS = ["", "good", "bad", "the", "a", "of", "x"]


def pair(chosen: str, rejected: str) -> Preference:
    sides = [[WORDS.index(word) for word in text.split()] for text in (chosen, rejected)]
    return Preference("id", [0], *sides, *([True] * len(side) for side in sides))


def decode(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def measured(training: list[Preference], held_out: list[Preference]) -> dict[str, dict[str, float]]:
    return baselines.measure(["length", "bag_of_words"], training, held_out, decode)


def test_length_knows_longer_from_shorter_and_nothing_else() -> None:
    longer = [pair("the a of", "x"), pair("a the", "the"), pair("x x x", "a a"), pair("of", "of of")]
    found = measured(longer, [pair("x of the", "good"), pair("bad", "good"), pair("a of", "x x"), pair("x", "of of")])
    # Three of four training pairs have the longer one chosen; "bad" is shorter than "good", "a of" longer than "x x".
    assert found["length"]["accuracy"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    shorter = [pair(p, q) for p, q in [("x", "the a"), ("of", "of a"), ("a", "the the")]]
    assert measured(shorter, [pair("x", "of of"), pair("the", "the")])["length"]["accuracy"] == 0.75  # a tie is half


def test_words_decide_where_lengths_are_equal() -> None:
    training = [pair(f"good {w}", f"bad {v}") for w in ("the", "a", "of") for v in ("the", "a", "of")]
    asked = [pair("good x", "bad x"), pair("x good", "x bad"), pair("the good", "the bad"), pair("bad x", "good x")]
    found = measured(training, asked)
    assert found["bag_of_words"] == baselines.accuracy_of(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert found["bag_of_words"]["accuracy"] == 0.75
    seldom = measured(training[:2], asked)  # no word in three replies but "good" and "bad" are in two each
    assert seldom["bag_of_words"]["accuracy"] == 0.5


def test_the_fit_is_the_minimum_of_the_penalised_loss() -> None:
    """One feature, three pairs of difference 1, one of −1: w = 3 σ(−w) − σ(w), solved here by bisection."""
    weights = baselines._fit(torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64).to_sparse())
    low, high = 0.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        slope = 3 / (1 + math.exp(middle)) - 1 / (1 + math.exp(-middle)) - middle
        low, high = (middle, high) if slope > 0 else (low, middle)
    assert weights.item() == pytest.approx(low, abs=1e-7)  # L-BFGS stops at a slope of 1e-8


def test_an_interval_is_that_of_a_share() -> None:
    found = baselines.accuracy_of(torch.tensor([1.0] * 75 + [-1.0] * 25))
    assert found["accuracy"] == 0.75
    half = 1.959964 * math.sqrt(0.75 * 0.25 / 99)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.75 - half, 0.75 + half), rel=1e-9)


def test_a_reward_model_stands_beside_its_baselines(world: World, here: Path) -> None:
    """ "yes" against "no" with the same words after it: words tell all, lengths (3 and 2 letters) too, turned around
    on the held-out pairs, where "no" has got longer company."""
    held_out = write(here / "held_out.jsonl", [
        {"prompt": f"{letter} ?", "chosen": "yes it", "rejected": "no so it is"} for letter in "abcdef"
    ])  # fmt: skip
    stage = {"stage": "reward", "method": "judge", "model": world.model, "data": world.preferences, "steps": 20,
             "batch_size": 9, "eval_data": held_out, "baselines": ["length", "bag_of_words"],
             "optimizer": {"lr": 1e-2}}  # fmt: skip
    write_recipe = here / "judge.yaml"
    write_recipe.write_text(dump_config({"out": "out", "threads": 1, "device": "cpu", "stages": {"judge": stage}}))
    said = klimb("run", "judge.yaml", "seed=0..1")
    assert said.code == 0, said.err
    table = [line.split() for line in said.out.splitlines()]
    assert table[0] == ["seed", "method", "accuracy", "accuracy_low", "accuracy_high", "pairs"]
    for seed in "01":
        assert [seed, "judge", "1.000", "1.000", "1.000", "6"] in table
        assert [seed, "length", "0.000", "0.000", "0.000", "6"] in table
        assert [seed, "bag_of_words", "1.000", "1.000", "1.000", "6"] in table
    result = json.loads((here / "out" / "seed-0" / "judge" / "result.json").read_text())
    assert result["baselines"]["length"]["accuracy"] == 0
    page = (here / "out" / "report.html").read_text()
    assert "judge, seed 0: 1.000 [1.000, 1.000] of 6 held-out pairs in the right order." in page
    assert "length alone: 0.000 [0.000, 0.000], worse." in page


def test_baselines_need_held_out_pairs(world: World, tmp_path: Path) -> None:
    done = play("reward", tmp_path / "run", model=world.model, data=world.preferences, steps=2, batch_size=4,
                eval_fraction=0.4, baselines=["length"])  # fmt: skip
    assert done.result["baselines"].keys() == {"length"}
    assert any("length: " in line for line in done.said)
    assert "baselines" not in lines(tmp_path / "run" / "metrics.jsonl")[-1]
