"""Measuring a reward: figures against those worked out from its scores, and what it says of pairs it cannot judge."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from world import LETTERS, Played, World, klimb, play, write

from klimb.errors import KlimbError
from klimb.report.page import write_report
from klimb.watch import trust


class Members(NamedTuple):
    """Three reward models that differ by seed, the pairs they saw and others."""

    models: list[str]
    seen: str
    held_out: str


def pairs(seed: int, n: int) -> list[dict[str, Any]]:
    """Replies of two lengths; the one with more "yes" is chosen, by one labeller in ten the other."""
    stream = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < n:
        a, b = (" ".join(stream.choices(["yes", "no", "it"], k=stream.choice([2, 4]))) for _ in "ab")
        margin = a.split().count("yes") - b.split().count("yes")
        if margin:
            chosen, rejected = (a, b) if (margin > 0) != (stream.random() < 0.1) else (b, a)
            found.append({"prompt": f"{stream.choice(LETTERS)} ?", "chosen": chosen, "rejected": rejected,
                          "margin": abs(margin), "subset": "long" if len(a) > len(b) else "other"})  # fmt: skip
    return found


@pytest.fixture(scope="module")
def members(world: World, tmp_path_factory: pytest.TempPathFactory) -> Members:
    folder = tmp_path_factory.mktemp("members")
    seen, held_out = (write(folder / f"{n}.jsonl", pairs(n, 120)) for n in (1, 2))
    each = [
        play("reward", folder / f"rm-{seed}", model=world.model, data=seen, steps=12, batch_size=16, seed=seed).model
        for seed in range(3)
    ]
    assert len({load_file(f"{model}/model.safetensors")["score.weight"].sum().item() for model in each}) == 3
    return Members(each, seen, held_out)


def by_transformers(model: str, rows: list[dict[str, Any]]) -> list[float]:
    """Normalised differences, one text at a time and without a line of klimb's."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    std = json.loads((Path(model) / "reward.json").read_text())["std"]

    @torch.no_grad()
    def raw(text: str) -> float:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return float(classifier(torch.tensor([ids])).logits)

    return [(raw(f"{r['prompt']} {r['chosen']}") - raw(f"{r['prompt']} {r['rejected']}")) / std for r in rows]


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(world: World, members: Members, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return play(
        "evaluate_reward", tmp_path_factory.mktemp("measured"), data=members.held_out,
        reward={"ensemble": {"models": members.models, "combine": "min"}}, other=members.models[0],
        gold=world.reward("count"), reference=members.seen,
    )  # fmt: skip


def test_an_ensemble_on_held_out_pairs(members: Members, measured: Played) -> None:
    found, told = measured.result["trust"], measured.result
    rows = rows_of(members.held_out)
    assert told["held_out_pairs"] == found["pairs"] == len(rows) == 120
    assert told["model"] == members.models[0]
    assert told["accuracy"] > 0.75  # of at most about 0.9: one label in ten is turned round
    assert sum(part["n"] for part in found["by_length"]) == sum(part["n"] for part in found["by_margin"]) == 120
    assert found["by"].keys() == {"long", "other"}
    assert found["column"] == "subset"
    mean = sum(part["accuracy"] for part in found["by"].values()) / 2
    assert found["mean_of_parts"] == pytest.approx(mean)
    assert len(found["members"]["accuracies"]) == 3
    assert 0.5 < found["members"]["agreement"] <= 1
    assert found["agreement"]["agreement"] > 0.5
    assert found["length"]["given"] == "gold"
    assert found["drift"]["length"]["n_then"] == 240
    assert not found["drift"]["length"]["flagged"]  # both from one source


def test_a_model_alone_is_as_transformers_has_it(members: Members, tmp_path: Path) -> None:
    model = members.models[1]
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows_of(members.held_out)]
    done = play("evaluate_reward", tmp_path / "run", data=write(tmp_path / "rows.jsonl", rows), reward=model, probes=0)
    found = done.result["trust"]
    differences = by_transformers(model, rows)
    assert done.result["accuracy"] == trust.accuracy(differences)["accuracy"]
    std = json.loads((Path(model) / "reward.json").read_text())["std"]
    expected = trust.calibration([std * difference for difference in differences])
    # float32 scores of two ways to compute attention: equal to about 1e-6, and no pair lies so near to a bin's edge.
    assert found["calibration"]["ece"] == pytest.approx(expected["ece"], abs=1e-5)
    assert not found.keys() & {"probes", "members", "agreement", "drift", "by", "by_margin"}


def test_probes_need_fifty_replies_that_the_model_can_read(measured: Played) -> None:
    """Thirteen words and no others: flattery cannot be written in them, an empty reply and half of one can."""
    probes = measured.result["trust"]["probes"]
    assert probes.keys() == {"empty", "repeated", "truncated"}
    assert any("probe flattering: 0 replies" in line for line in measured.said)
    assert probes["repeated"]["n"] == 120
    assert probes["repeated"]["prompts"] == 6
    # Twice the words are twice the "yes": who learnt to count them pays for it.
    assert probes["repeated"]["gain"] > 0 > probes["empty"]["gain"]
    for probe in probes.values():
        assert probe["flagged"] is (probe["gain_low"] > 0)


def test_what_does_not_fit_is_left_out_or_refused(members: Members, tmp_path: Path) -> None:
    rows = [*rows_of(members.held_out)[:60], {"prompt": "a ?", "chosen": "yes " * 30, "rejected": "no"}]
    data = write(tmp_path / "long.jsonl", rows)
    with pytest.raises(KlimbError, match=r"1 of 61 rows cannot be used, the first: .*has 34 tokens, rm-0 takes 24"):
        play("evaluate_reward", tmp_path / "a", data=data, reward=members.models[0])
    within = [{"reward": members.models[0], "weight": 2.0, "clip": 9.0}]
    with pytest.raises(KlimbError, match=r"has 34 tokens, rm-0 takes 24"):
        play("evaluate_reward", tmp_path / "sum", data=data, reward=within)
    done = play("evaluate_reward", tmp_path / "b", data=data, reward=members.models[0], on_bad="drop")
    assert done.result["held_out_pairs"] == 60
    assert any("1 rows left out" in line for line in done.said)


def test_the_command_and_the_report(members: Members, tmp_path: Path, here: Path) -> None:
    said = klimb("evaluate", f"reward={members.models[0]}", f"data={members.held_out}", "device=cpu", "threads=1",
                 "out=run")  # fmt: skip
    assert said.code == 0, said.err
    assert "accuracy" in said.out
    for title in ("by length", "calibration", "probe"):
        assert title in said.out, said.out
    page = write_report(here / "run").read_text()
    assert "How far can the reward be trusted?" in page
    assert "Reliability" in page


def test_members_of_a_recipe(world: World, members: Members, tmp_path: Path) -> None:
    """`repeat` trains one reward model after the other, each with its own seed; the ensemble of them is a reward."""
    import klimb as library

    train = {"stage": "reward", "model": world.model, "data": members.seen, "steps": 2, "batch_size": 8}
    both = ["${rm-1.model}", "${rm-2.model}"]
    found = library.run({"name": "ensemble", "out": str(tmp_path), "device": "cpu", "threads": 1, "stages": {
        "members": {"repeat": 2, "stages": {"rm": train}},
        "trust": {"stage": "evaluate_reward", "reward": {"ensemble": {"models": both}}, "data": members.held_out},
        "average": {"stage": "average", "models": both, "data": members.held_out},
        "rl": {
            "stage": "rl", "algorithm": "rloo", "model": world.model, "data": world.prompts, "steps": 1,
            "prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 4,
            "reward": {"ensemble": {"models": both, "combine": "uncertainty", "lambda": 0.5}},
        },
    }}, say=lambda line: None)  # fmt: skip
    assert found["rm-1"].seed != found["rm-2"].seed
    assert found["rl"].metrics["reward/disagreement"][0] is not None
    row = found["rl"].samples()[0]
    assert row["reward.disagreement"] >= 0
    assert row["score"] == pytest.approx(row["reward.ensemble"])
    assert found["trust"].result["trust"]["members"]["accuracies"]
    assert found["average"].result["averaged"] == 2
