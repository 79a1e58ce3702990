"""Reward models of ordered levels, and of ratings in words: learnt, read by others, and paid with."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from world import LETTERS, SMALL_RL, Played, World, klimb, play, write

from klimb.config import dump_config
from klimb.errors import DataError

ASK = [f"{letter} ?" for letter in LETTERS]


def facts(done: Played) -> dict[str, Any]:
    return dict(json.loads((Path(done.model) / "reward.json").read_text()))


def samples(done: Played) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(done.result["samples"]).read_text().splitlines()]


# Levels -----------------------------------------------------------------------------------------------------------


def level_rows() -> list[dict[str, Any]]:
    """A word for each level, but "it" is found a 2 as often as a 3."""
    said = (("no", 1), ("it", 2), ("it", 3), ("so", 3), ("yes", 5))
    return [{"prompt": ask, "completion": word, "rating": rating} for ask in ASK for word, rating in said]


@pytest.fixture(scope="module")
def level_model(world: World, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("levels")
    return play("reward", folder / "run", model=world.model, data=write(folder / "o.jsonl", level_rows()),
                kind="ordinal", steps=150, batch_size=15, eval_fraction=0.3)  # fmt: skip


def raw_scores(model: str, texts: list[str]) -> torch.Tensor:
    """[N]: one text at a time, as somebody without klimb would."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        return torch.cat([classifier(**tokenizer(text, return_tensors="pt")).logits[:, 0] for text in texts]).double()


def test_levels_are_learnt_from_how_frequent_they_are(level_model: Played) -> None:
    assert level_model.rows[0]["score/mean"] == 0.0
    # The shares of the levels are a fifth each and two fifths of 3: their entropy is 1.33.
    assert level_model.rows[0]["loss"] == pytest.approx(1.33, abs=0.2)  # of some of the rows
    # Two rows in five are of a word with two levels: nothing below 2/5 · ln 2 = 0.28 can be reached.
    assert 0.2 < level_model.rows[-1]["loss"] < 0.6
    # Of the nine pairs of a prompt that have an order one is of the same word: 17 / 18 is the most.
    assert level_model.result["accuracy"] == pytest.approx(17 / 18, abs=0.03)
    assert any(line.startswith("  rating exactly right: ") for line in level_model.said)
    assert level_model.result["exact"]["rating"] > level_model.result["exact_if_constant"]["rating"] == 0.4


def test_thresholds_tell_the_probability_of_a_level(level_model: Played) -> None:
    noted = facts(level_model)
    assert (noted["kind"], noted["rating"], noted["levels"]) == ("ordinal", "rating", [1, 2, 3, 5])
    first, second, third = noted["thresholds"]
    assert first < second < third
    no, it, so, yes = raw_scores(level_model.model, [f"a ? {word} <eos>" for word in ("no", "it", "so", "yes")])
    assert no < first < it < so < third < yes
    at_least_three = torch.sigmoid(it - second)
    assert float(at_least_three) == pytest.approx(0.5, abs=0.15)


def test_the_score_is_paid_normalised(world: World, level_model: Played, tmp_path: Path) -> None:
    policy = play("sft", tmp_path / "sft", model=world.model, data=world.demonstrations, steps=40, batch_size=8)
    scored = play("sample", tmp_path / "s", model=policy.model, data=world.prompts, reward=level_model.model,
                  max_tokens=8, temperature=0.5)  # fmt: skip
    finished = [row for row in samples(scored) if row["finish"] == "stop"]
    assert len(finished) > 3
    raw = raw_scores(level_model.model, [f"{row['prompt']} {row['completion']} <eos>" for row in finished])
    expected = (raw - level_model.result["mean"]) / level_model.result["std"]
    assert [row["score"] for row in finished] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_policy_climbs_the_levels(world: World, level_model: Played, tmp_path: Path) -> None:
    done = play("rl", tmp_path / "rl", model=world.model, data=world.prompts, reward=level_model.model, steps=12,
                algorithm="rloo", **SMALL_RL)  # fmt: skip
    assert done.rows[-1]["reward/mean"] > done.rows[0]["reward/mean"] + 0.4


def test_an_adapter_learns_levels_and_is_saved_whole(world: World, tmp_path: Path) -> None:
    done = play("reward", tmp_path / "run", model=world.model, data=write(tmp_path / "o.jsonl", level_rows()),
                kind="ordinal", steps=100, batch_size=15, eval_fraction=0.3, lora={"rank": 4},
                reference=world.demonstrations)  # fmt: skip
    assert done.result["accuracy"] > 0.9
    start = [math.log(share / (1 - share)) for share in (0.2, 0.4, 0.8)]  # what it began with, of equal shares
    assert facts(done)["thresholds"] != pytest.approx(start, abs=0.05)
    said = [json.loads(line) for line in Path(world.demonstrations).read_text().splitlines()]
    raw = raw_scores(done.model, [f"{row['prompt']} {row['completion']} <eos>" for row in said])
    found = (done.result["mean"], done.result["std"])
    assert found == pytest.approx((float(raw.mean()), float(raw.std())), abs=1e-4)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"rating": 3}] * 8, r"rating is 3 in every row to learn from: one level has no order"),
        ([{"rating": 3}, {"rating": 2.5}], r"rating is 2\.5, not a whole number"),
        ([{"rating": 3}, {"stars": 3}], r"has no column of ratings rating \(it has: "),
    ],
)
def test_what_has_no_levels(world: World, tmp_path: Path, rows: list[dict[str, Any]], complaint: str) -> None:
    data = write(tmp_path / "o.jsonl", [{"prompt": "a ?", "completion": "it", **row} for row in rows])
    with pytest.raises(DataError, match=complaint):
        play("reward", tmp_path / "run", model=world.model, data=data, kind="ordinal", steps=1)


# Ratings in words -------------------------------------------------------------------------------------------------

QUALITIES = (("good", 10, 2.5), ("bad", 1, 0), ("meh", 4, 0))


def rated_rows(conversational: bool = False) -> list[dict[str, Any]]:
    def text(role: str, content: str) -> Any:
        return [{"role": role, "content": content}] if conversational else content

    return [
        {"prompt": text("user", f"{a}{b}?"), "completion": text("assistant", reply), "first": first, "second": second}
        for a in "abcd" for b in "abcd" for reply, first, second in QUALITIES
    ]  # fmt: skip


WEIGHTS = {"first": 1.0, "second": -0.5}
IN_WORDS: dict[str, Any] = {"kind": "attributes_text", "attributes": WEIGHTS, "instruction": "\nRate.\n",
                            "optimizer": {"lr": 3e-3}}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_model(tmp_path_factory.mktemp("chat"), "llama", 128)


@pytest.mark.parametrize("conversational", [False, True])
def test_ratings_in_words_are_learnt_written_and_paid(chat: str, tmp_path: Path, conversational: bool) -> None:
    rows = rated_rows(conversational)
    done = play("reward", tmp_path / "run", model=chat, data=write(tmp_path / "r.jsonl", rows), steps=90,
                batch_size=12, eval_fraction=0.3, **IN_WORDS)  # fmt: skip
    assert done.rows[-1]["loss"] < 0.05
    assert done.result["accuracy"] > 0.95
    assert done.result["exact"] == {"first": 1.0, "second": 1.0}
    noted = facts(done)
    assert (noted["kind"], noted["instruction"]) == ("attributes_text", "\nRate.\n")
    assert [(p["attribute"], p["weight"], p["ratings"]) for p in noted["places"]] == [
        ("first", 1.0, [1.0, 4.0, 10.0]), ("second", -0.5, [0.0, 2.5])
    ]  # fmt: skip

    tokenizer, writer = AutoTokenizer.from_pretrained(done.model), AutoModelForCausalLM.from_pretrained(done.model)
    if conversational:
        asked = tokenizer.apply_chat_template([*rows[0]["prompt"], *rows[0]["completion"],
            {"role": "user", "content": "\nRate.\n"}], add_generation_prompt=True, tokenize=False)  # fmt: skip
    else:
        asked = "<bos>aa?good\nRate.\n"
    given = tokenizer(asked, return_tensors="pt", add_special_tokens=False)
    written = writer.generate(**given, max_new_tokens=30, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == "first: 10, second: 2.5"

    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": rows[1]["completion"]} for r in rows[::3]]
    judged = play("evaluate_reward", tmp_path / "judged", reward=done.model, data=write(tmp_path / "p.jsonl", pairs),
                  probes=False)  # fmt: skip
    assert judged.result["accuracy"] == 1.0


def test_references_are_the_rows_themselves(chat: str, tmp_path: Path) -> None:
    """What is expected is Σ weight · rating once it is sure: 8.75, 1 and 4 of equally many rows."""
    done = play("reward", tmp_path / "run", model=chat, data=write(tmp_path / "r.jsonl", rated_rows()), steps=120,
                batch_size=12, lora={"rank": 8}, **{**IN_WORDS, "optimizer": {"lr": 1e-2}})  # fmt: skip
    worth = torch.tensor([8.75, 1.0, 4.0] * 16).double()
    found = (done.result["mean"], done.result["std"])
    assert found == pytest.approx((float(worth.mean()), float(worth.std())), abs=0.2)
    tried = play("rl", tmp_path / "rl", model=chat, reward=done.model, steps=1, algorithm="grpo",
                 data=write(tmp_path / "p.jsonl", [{"prompt": "ab?"}]), prompts_per_step=1, samples_per_prompt=4,
                 max_tokens=4)  # fmt: skip
    assert math.isfinite(tried.rows[0]["reward/mean"])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"second": 1}, r"second is 1 in every row to learn from: .*leave it out of attributes"),
        ({"second": None}, "has no column of ratings second"),
        ({"second": "high"}, "is 'high', not a number"),
    ],
)
def test_what_cannot_be_rated_in_words(chat: str, tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    data = write(tmp_path / "r.jsonl", [{**row, **change} for row in rated_rows()])
    with pytest.raises(DataError, match=complaint):
        play("reward", tmp_path / "run", model=chat, data=data, steps=1, **IN_WORDS)


def test_a_scale_without_steps_is_for_a_head(chat: str, tmp_path: Path) -> None:
    rows = [{**row, "second": number / 7} for number, row in enumerate(rated_rows() * 3)]
    with pytest.raises(DataError, match=r"second has 144 different ratings, more than 101: .*kind=attributes"):
        play("reward", tmp_path / "run", model=chat, data=write(tmp_path / "r.jsonl", rows), steps=1, **IN_WORDS)


# Checked ----------------------------------------------------------------------------------------------------------


def test_check_reads_each_kind_as_its_stage_does(world: World, here: Path) -> None:
    rows = level_rows()
    write(here / "rows.jsonl", [{**row, "label": row["rating"] > 2} for row in rows])
    given = {"model": world.model, "data": "rows.jsonl", "batch_size": 6, "steps": 2, "threads": 1, "device": "cpu"}
    for number, settings in enumerate([{"kind": "ordinal"}, {"kind": "labels"},
                                       {"kind": "attributes", "attributes": {"rating": 1.0}}]):  # fmt: skip
        (here / f"{number}.yaml").write_text(dump_config({**given, **settings}))
        said = klimb("check", "reward", f"{number}.yaml", "--json")
        assert said.code == 0, said.err
        assert json.loads(said.out)["data"]["data"]["rows"] == len(rows)
    write(here / "rows.jsonl", [{**row, "rating": 0.5} for row in rows])
    said = klimb("check", "reward", "0.yaml")
    assert said.code == 1
    assert "not a whole number" in said.out
    assert Counter(row["rating"] for row in rows) == {1: 6, 2: 6, 3: 12, 5: 6}
