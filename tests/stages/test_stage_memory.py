"""Options that save memory, in whole stages: what they may not change, and what a run says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from kills import remains
from world import CONTEXT, SMALL_RL, WORDS, Played, World, play

from klimb.errors import KlimbError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models.outline import Outline
from klimb.runtime import plan
from klimb.stages import common
from klimb.stages.memory import fit, for_groups, proposals
from klimb.stages.registry import stage_config


def job(world: World, name: str) -> tuple[str, dict[str, Any]]:
    rl = {"data": world.prompts, "reward": world.reward("count"), "steps": 2, **SMALL_RL}
    return {
        "grpo": ("rl", rl),
        "ppo": ("rl", {**rl, "algorithm": "ppo", "lora": {"rank": 2}}),  # both faces on one backbone
        "ppo-full": ("rl", {**rl, "algorithm": "ppo"}),
        "dpo": ("preference", {"data": world.preferences, "steps": 2, "batch_size": 5}),
        "reward": ("reward", {"data": world.preferences, "steps": 2, "batch_size": 5, "lora": {"rank": 2}}),
    }[name]


@pytest.mark.parametrize("name", ["grpo", "ppo", "ppo-full", "dpo", "reward"])
def test_checkpointing_changes_no_bit_of_a_run(world: World, tmp_path: Path, name: str) -> None:
    stage, values = job(world, name)
    calls = []
    for setting in ("off", "on"):
        play(stage, tmp_path / setting, model=world.model, checkpointing=setting, token_budget=40, **values)
        calls.append(remains(tmp_path / setting))
    off, on = calls
    assert [key for key in off if off[key] != on[key] and key.startswith("model/") and "config" not in key] == []
    assert off["metrics.jsonl"] == on["metrics.jsonl"]


# The memory plan ------------------------------------------------------------------------------------------------------


def short_of(bytes_free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with so much memory."""
    monkeypatch.setattr(common, "available", lambda device: bytes_free)


def decisions(run: Played) -> dict[str, Any]:
    return dict(json.loads((run.path / "manifest.json").read_text())["decisions"])


@pytest.mark.parametrize("name", ["grpo", "ppo", "ppo-full", "dpo", "reward"])
def test_with_room_activations_are_kept_and_the_plan_is_told(world: World, tmp_path: Path, name: str) -> None:
    stage, values = job(world, name)
    run = play(stage, tmp_path / "run", model=world.model, **values)
    assert decisions(run)["checkpointing"] is False
    lines = decisions(run)["memory"]["lines"]
    assert decisions(run)["memory"]["peak"] == sum(lines.values())
    assert ("critic" in lines) == name.startswith("ppo")
    assert ("reference" in lines) == (name != "reward" and "lora" not in values)
    assert [line for line in run.said if line.startswith("memory: about ")] != []


def test_without_room_they_are_computed_again_now_and_when_it_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, values = job(world, "dpo")
    roomy = play(stage, tmp_path / "roomy", model=world.model, **values)
    lines = decisions(roomy)["memory"]["lines"]
    short_of(decisions(roomy)["memory"]["peak"] - lines["activations"] // 2, monkeypatch)
    run = play(stage, tmp_path / "run", model=world.model, **values)
    assert decisions(run)["checkpointing"] is True
    assert decisions(run)["memory"]["peak"] < decisions(roomy)["memory"]["peak"]
    assert remains(run.path)["metrics.jsonl"] == remains(roomy.path)["metrics.jsonl"]
    (run.path / "result.json").unlink()  # as if it had been cut off
    monkeypatch.undo()
    again = play(stage, tmp_path / "run", model=world.model, **values)
    assert decisions(again)["checkpointing"] is True


def test_off_is_off(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, values = job(world, "dpo")
    found = decisions(play(stage, tmp_path / "roomy", model=world.model, **values))["memory"]
    short_of(found["peak"] - 1000, monkeypatch)
    run = play(stage, tmp_path / "run", model=world.model, checkpointing="off", **values)
    assert decisions(run)["checkpointing"] is False
    assert any("may not fit" in line for line in run.said)


def test_what_cannot_fit_is_refused_and_what_is_proposed_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight is loaded: there are none."""
    stage, values = job(world, "ppo-full")
    model = make_model(
        tmp_path / "wide", tokenizer=word_tokenizer(WORDS), architecture="llama", hidden=256, layers=2, heads=4,
        mlp=512, context=CONTEXT, seed=0,
    )  # fmt: skip
    values |= {"token_budget": 40, "model": str(model)}
    needed = decisions(play(stage, tmp_path / "lora", **values, lora={"rank": 16}))["memory"]["peak"]
    short_of(needed, monkeypatch)
    (model / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(KlimbError, match=r"does not fit into the memory.* free on cpu.*moments.*lora\.rank=16") as told:
        play(stage, tmp_path / "full", **values)
    assert "\n" not in str(told.value)
    (tmp_path / "aside").rename(model / "model.safetensors")
    play(stage, tmp_path / "run", **values, lora={"rank": 16})


def test_nothing_that_could_fit_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least is what is held between micro-batches; with that a run starts, and is told what to change."""
    stage, values = job(world, "dpo")
    config = stage_config(stage, {"model": world.model, "device": "cpu", **values})
    target = common.target_of(config)
    least = fit(config, target).plan.least
    short_of(least, monkeypatch)
    run = play(stage, tmp_path / "run", model=world.model, checkpointing="off", **values)
    assert any("may not fit" in line for line in run.said)
    short_of(least - 1000, monkeypatch)
    with pytest.raises(KlimbError, match="does not fit"):
        play(stage, tmp_path / "less", model=world.model, **values)


def test_proposals_are_the_nearest_first_and_each_fits(world: World) -> None:
    values = {"model": world.model, "data": world.prompts, "reward": "exact", "device": "cpu", "token_budget": 4096}
    config = stage_config("rl", {**values, "max_tokens": 8, "checkpointing": "off"})
    target = common.target_of(config)
    needed = fit(config, target).plan
    free = needed.peak - 10_000
    first, *_ = found = proposals(config, target._replace(free=free))
    assert first.startswith("checkpointing=on (")
    assert found[1].startswith("token_budget=1024 (")
    (nothing,) = proposals(config, target._replace(free=1000))
    assert nothing.startswith("use a smaller model or more memory: even lora.rank=16")


def test_micro_batches_for_long_prompts_grow_as_far_as_there_is_memory(world: World) -> None:
    given = {"model": world.model, "data": world.prompts, "reward": "exact", "device": "cpu"}
    given |= {"algorithm": "reinforce", "prompts_per_step": 2, "max_tokens": 4}  # training is the peak

    def config(samples: int = 16) -> Any:
        return stage_config("rl", {**given, "samples_per_prompt": samples})

    target = common.target_of(config())._replace(budget=12)
    found = for_groups(config(), target, False, 10, 10)
    assert found["tokens"] == 40  # four prompts: one part in four is prompt
    enough = -(-found["peak"] * 10 // 8)
    assert for_groups(config(), target._replace(free=enough), False, 10, 10) == found
    less = for_groups(config(), target._replace(free=enough - 10), False, 10, 10)
    assert (less["tokens"], less["peak"] < found["peak"]) == (30, True)
    assert for_groups(config(), target._replace(free=0), False, 10, 10) == {"tokens": 12}
    assert for_groups(config(), target._replace(budget=40), False, 10, 10) == {"tokens": 40}
    assert for_groups(config(3), target, False, 10, 10)["tokens"] == 22  # the whole group
    assert for_groups(config(1), target, False, 10, 10) == {"tokens": 12}  # nobody to share with
    even, outlier = (for_groups(config(), target, False, 5, longest) for longest in (5, 20))
    assert even["tokens"] == outlier["tokens"] == 20
    assert outlier["peak"] > even["peak"]  # planned for, and no measure


def test_samples_share_a_long_prompt_unless_a_budget_is_typed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "token_budget", lambda config, _: 4)
    stage, values = job(world, "ppo")
    grown, typed = (play(stage, tmp_path / name, model=world.model, **values, **more)
                    for name, more in (("grown", {}), ("typed", {"token_budget": 4})))  # fmt: skip
    tokens = decisions(grown)["groups"]["tokens"]
    assert tokens > 4
    assert [line for line in grown.said if line.startswith(f"token_budget={tokens}, not 4, so that samples")] != []
    assert "groups" not in decisions(typed)
    assert [line for line in typed.said if line.startswith("token_budget=4: ")] != []
    one, other = (json.loads((run.path / "metrics.jsonl").read_text().splitlines()[0]) for run in (grown, typed))
    for norm in ("grad_norm", "critic/grad_norm"):
        assert one[norm] == pytest.approx(other[norm], rel=1e-4)  # other parts, the same sum
        assert one[norm] > 0
    whole = remains(grown.path)
    (grown.path / "result.json").unlink()
    shutil.rmtree(grown.path / "checkpoints")
    short_of(decisions(grown)["memory"]["peak"], monkeypatch)  # today there would be no room to grow
    again = play(stage, tmp_path / "grown", model=world.model, **values)
    assert decisions(again)["groups"]["tokens"] == tokens
    assert remains(again.path)["metrics.jsonl"] == whole["metrics.jsonl"]


def test_a_plan_that_cannot_be_made_stops_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NotImplementedError("an operation without a meta kernel")

    monkeypatch.setattr(Outline, "training", fails)
    plan._training.cache_clear()  # an equal plan of another test would be taken
    stage, values = job(world, "dpo")
    run = play(stage, tmp_path / "run", model=world.model, token_budget=37, **values)
    assert any(line.startswith("memory: no plan") and "meta kernel" in line for line in run.said)
    assert decisions(run)["checkpointing"] is False
