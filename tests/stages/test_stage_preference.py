"""The preference stage with every kind of loss: the data each takes, what it logs, and what the cache may change."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from world import FAST, Played, World, lines, play, write

from klimb.data import cache
from klimb.objective.preference import PREFERENCE_LOSSES, needs_of, parse_preference
from klimb.stages import preference
from klimb.stages.preference import PreferenceConfig


def weights(done: Played) -> bytes:
    return (Path(done.model) / "model.safetensors").read_bytes()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing lies yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def data_for(kind: str, world: World, folder: Path) -> str:
    pairs = lines(Path(world.preferences))
    if kind == "triples":
        return write(folder / "triples.jsonl", [{**row, "gold": f"{row['chosen']} it"} for row in pairs])
    if kind == "steps":
        solutions = [
            {"prompt": f"{row['prompt']} ", "completions": ["it is", word, "so"], "labels": [True, word == "yes", True]}
            for row in pairs for word in ("yes", "no")
        ]  # fmt: skip
        return write(folder / "steps.jsonl", solutions)
    return world.preferences


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PREFERENCE_LOSSES if n not in ("discopop", "chosen_nll")])
def test_every_loss_learns_what_was_preferred(name: str, world: World, tmp_path: Path) -> None:
    """discopop does not from here, by its formula: see its page; chosen_nll knows no rejected."""
    loss = parse_preference(name)
    needs = needs_of(loss)
    data = data_for(needs.data, world, tmp_path)
    done = play("preference", tmp_path / "run", model=world.model, data=data, loss=name, steps=12, batch_size=9)
    assert done.rows[-1]["accuracy"] > 0.9
    assert done.rows[-1]["loss"] < done.rows[0]["loss"]
    logged = {"chosen_logps", "rejected_logps"}
    assert logged | ({"chosen_log_ratio", "rejected_log_ratio", "displaced"} if needs.reference else set()) <= set(
        done.rows[0]
    )
    assert ("chosen_log_ratio" in done.rows[0]) == needs.reference


def test_unpaired_labels_and_pairs_teach_kto(world: World, tmp_path: Path) -> None:
    """Of twice as many desirable completions as undesirable ones, too."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for place, row in enumerate(lines(Path(world.preferences)))
        for side in (("chosen",) if place % 2 else ("chosen", "rejected"))
    ]
    given = {"model": world.model, "steps": 20, "batch_size": 9, "eval_fraction": 0.3, "eval_every": 10}
    for name, data in (("labels", write(tmp_path / "labelled.jsonl", rows)), ("pairs", world.preferences)):
        done = play("preference", tmp_path / name, data=data, loss="kto", **given)
        assert done.rows[0]["loss"] == pytest.approx(0.5, rel=1e-6)
        assert done.rows[-1]["accuracy"] > 0.9
        assert done.rows[-1]["eval/accuracy"] > 0.9


def test_losses_without_a_reference_load_none(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a reference was loaded")

    given = {"model": world.model, "data": world.preferences, "steps": 2, "batch_size": 9}
    config = PreferenceConfig(**given, loss="dpo")
    assert config.work(24).frozen != PreferenceConfig(**given, loss="simpo").work(24).frozen == ()
    drift = play("preference", tmp_path / "drift", **given, loss="simpo", measure_drift=True)
    monkeypatch.setattr(preference, "load_reference", refuse)
    for name in ("orpo", "cpo", "simpo", "alphapo"):
        done = play("preference", tmp_path / name, **given, loss=name)
        assert "displaced" not in done.rows[0]
    assert drift.rows[0]["chosen_log_ratio"] == 0.0 != drift.rows[1]["chosen_log_ratio"]
    bare = play("preference", tmp_path / "bare", **given, loss="simpo")
    assert weights(bare) == weights(drift)  # to look changes nothing


# The reference's log-probs ------------------------------------------------------------------------------------------


def said_of_reference(done: Played) -> str:
    [line] = [line for line in done.said if line.startswith("reference log-probs")]
    return line.removeprefix("reference log-probs: ")


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_is_the_same_with_and_without_what_was_kept(own_folder: Path, world: World, lora: Any) -> None:
    given = {"model": world.model, "data": world.preferences, "steps": 6, "batch_size": 7, "lora": lora,
             "optimizer": FAST}  # fmt: skip

    def bits(done: Played) -> bytes:
        return next(Path(done.model).glob("*.safetensors")).read_bytes()

    first = play("preference", own_folder / "first", **given)
    assert said_of_reference(first).startswith("miss, kept: ")
    second = play("preference", own_folder / "second", **given)
    assert said_of_reference(second).startswith("hit: ")
    assert bits(first) == bits(second)
    other = play("preference", own_folder / "other", **{**given, "loss": "ipo", "seed": 3})
    assert said_of_reference(other).startswith("hit: ")  # of another loss and order
    for path in cache.folder().iterdir():
        path.write_bytes(b"not what was written")
    third = play("preference", own_folder / "third", **given)
    assert said_of_reference(third).startswith("miss, kept: ")
    assert bits(first) == bits(third)
    shutil.rmtree(own_folder / "cache")
    (own_folder / "cache").write_text("no folder")
    fourth = play("preference", own_folder / "fourth", **given)
    assert said_of_reference(fourth).startswith("miss, ")
    assert bits(first) == bits(fourth)


def test_what_was_kept_is_that_of_the_same_data_and_weights(own_folder: Path, world: World) -> None:
    given = {"model": world.model, "data": world.preferences, "steps": 6, "batch_size": 7}
    play("preference", own_folder / "first", **given)
    rows = lines(Path(world.preferences))
    turned = write(own_folder / "turned.jsonl", [*rows[1:], rows[0]])
    again = write(own_folder / "copy.jsonl", rows)
    assert said_of_reference(play("preference", own_folder / "a", **{**given, "data": turned})).startswith("miss")
    assert said_of_reference(play("preference", own_folder / "b", **{**given, "data": again})).startswith("hit")
    tuned = play("sft", own_folder / "sft", model=world.model, data=world.demonstrations, steps=2, batch_size=4)
    changed = {**given, "model": tuned.model}
    assert said_of_reference(play("preference", own_folder / "c", **changed)).startswith("miss")
    assert said_of_reference(play("preference", own_folder / "d", **changed, reference=world.model)).startswith("hit")
    assert said_of_reference(play("preference", own_folder / "e", **given, dtype="float64")).startswith("miss")


def test_what_was_kept_are_the_log_probs_of_the_reference(own_folder: Path, world: World) -> None:
    """A run from another model: at step 1 its log-ratios are not 0, and equal those of a run that looks nothing up."""
    tuned = play("sft", own_folder / "sft", model=world.model, data=world.demonstrations, steps=20, batch_size=4)
    given = {"model": tuned.model, "reference": world.model, "data": world.preferences, "batch_size": 9}
    play("preference", own_folder / "miss", **given, steps=2, optimizer={"lr": 1e-9})
    hit = play("preference", own_folder / "hit", **given, steps=2)
    live = play("preference", own_folder / "live", **given, steps=1)  # less than an epoch: update by update
    assert said_of_reference(hit).startswith("hit")
    assert not any(line.startswith("reference log-probs") for line in live.said)
    names = ("loss", "chosen_log_ratio", "rejected_log_ratio")
    assert abs(live.rows[0]["chosen_log_ratio"]) > 0.1
    assert {n: live.rows[0][n] for n in names} == pytest.approx({n: hit.rows[0][n] for n in names}, rel=1e-6)


def test_a_loss_with_a_memory_goes_on_where_it_was_cut_off(own_folder: Path, world: World) -> None:
    """The shift of bco, the running mean and the lots of beta_dpo, the fall that was told."""
    for loss in ("bco", "beta_dpo", "kto"):
        given = {"model": world.model, "data": world.preferences, "loss": loss, "batch_size": 7, "steps": 9,
                 "checkpoint_every": 3}  # fmt: skip
        whole = play("preference", own_folder / f"{loss}-whole", **given)
        run = own_folder / f"{loss}-cut"
        cut = play("preference", run, **given)
        (run / "result.json").unlink()  # as if it had been killed on the way
        shutil.rmtree(run / "checkpoints" / "step-000009")
        again = play("preference", run, **given)
        assert weights(again) == weights(whole) == weights(cut)
        logged = [
            [{k: v for k, v in row.items() if not k.startswith("time/")} for row in d.rows] for d in (whole, again)
        ]
        assert logged[0] == logged[1]


def test_the_split_changes_no_statistic(own_folder: Path, world: World) -> None:
    """The same run with every pair a micro-batch of its own, in float64."""
    for loss in ("bco", "beta_dpo", "kto", "aot", "aot_unpaired", "wpo"):
        given = {"model": world.model, "data": world.preferences, "loss": loss, "batch_size": 7, "steps": 4,
                 "dtype": "float64"}  # fmt: skip
        one, many = (play("preference", own_folder / f"{loss}-{b}", **given, token_budget=b) for b in (1000, 1))
        for a, b in zip(one.rows, many.rows):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-9)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-7)


# Likelihood displacement --------------------------------------------------------------------------------------------


def test_an_alarm_says_that_the_chosen_falls(own_folder: Path, world: World) -> None:
    """apo_down lowers both sides by design; the alarm stands in the events and on the screen."""
    done = play(
        "preference", own_folder / "run", model=world.model, data=world.preferences, loss="apo_down", steps=15,
        batch_size=9,
    )  # fmt: skip
    [event, *_] = [event for event in done.events if event["kind"] == "displacement"]
    assert event["step"] >= 10
    assert "the chosen completions become less likely" in event["message"]
    assert event["message"] in done.said
    assert done.rows[-1]["displaced"] > 0.9
    assert done.rows[-1]["margin"] > 0 > done.rows[-1]["chosen_log_ratio"]
    rising = play(
        "preference", own_folder / "rpo", model=world.model, data=world.preferences, loss="rpo", steps=15, batch_size=9
    )
    assert not [event for event in rising.events if event["kind"] == "displacement"] if rising.events else True
    assert rising.rows[-1]["displaced"] == 0.0


def test_a_mixture_by_weights(own_folder: Path, world: World) -> None:
    spec = {"mix": {"dpo": {"weight": 1.0, "beta": 0.2}, "chosen_nll": 0.0}}
    given = {"model": world.model, "data": world.preferences, "steps": 4, "batch_size": 9}
    mixed = play("preference", own_folder / "mixed", **given, loss=spec)
    plain = play("preference", own_folder / "plain", **given, loss={"dpo": 0.2})
    assert [r["loss"] for r in mixed.rows] == pytest.approx([r["loss"] for r in plain.rows], rel=1e-6)
    assert json.loads((own_folder / "mixed" / "result.json").read_text())["algorithm"].startswith("Mixed(")
    assert mixed.rows[0]["loss"] == pytest.approx(math.log(2))


def test_dft_learns_and_says_the_likelihood_too(own_folder: Path, world: World) -> None:
    done = play(
        "sft", own_folder / "run", model=world.model, data=world.demonstrations, loss="dft", steps=60, batch_size=8
    )
    assert done.rows[-1]["nll"] < done.rows[0]["nll"] / 2
    p = torch.exp(torch.tensor(-done.rows[0]["nll"]))
    assert done.rows[0]["loss"] < done.rows[0]["nll"] * 3 * p  # every token weighs its probability
