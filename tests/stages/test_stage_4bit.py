"""Adapters on a base in 4 bits through every stage: what is compared, what is saved, and what goes on where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import at_call, differences, fork
from peft import PeftModel
from safetensors import safe_open
from test_stage_lora import logps, move, weights
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from world import SMALL_RL, Played, World, play, tuned_adapter

from klimb.errors import ConfigError
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import LoRA, load_causal
from klimb.models.nf4 import NOTE, keep_layout
from klimb.runtime.manifest import read
from klimb.stages.models import Loaded, load_critic, load_reference

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'klimb[4bit]'")

LORA = {"rank": 4, "alpha": 8.0, "base": "4bit"}
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """SFT of an adapter on a base in 4 bits: where the further stages start from."""
    return tuned_adapter(world, tmp_path_factory.mktemp("tuned") / "sft", LORA)


def loaded(model: str, lora: LoRA | None) -> Loaded:
    network, adapter = load_causal(model, CPU, FLOAT, lora.base if lora else "dense")
    backbone = Backbone(network, adapter, lora)
    return Loaded(Policy(backbone, "policy" if lora else None), None, model, base_in_4bit=True)  # type: ignore[arg-type]


def held(backbone: Backbone) -> set[int]:
    """Where the weights of the base lie."""
    return {p.data_ptr() for n, p in backbone.named_parameters() if "lora_" not in n}


def jobs(world: World, tuned: Played) -> dict[str, tuple[str, dict[str, Any]]]:
    rl = {"model": tuned.model, "data": world.prompts, "reward": world.reward("count"), "steps": 4, **SMALL_RL}
    return {
        "sft": ("sft", {"model": world.model, "data": world.demonstrations, "steps": 4, "batch_size": 5}),
        "dpo": ("preference", {"model": tuned.model, "data": world.preferences, "steps": 4, "batch_size": 5}),
        "grpo": ("rl", rl),
        "ppo": ("rl", {**rl, "algorithm": "ppo"}),
    }


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(
    world: World, tuned: Played, tmp_path: Path, name: str
) -> None:
    stage, values = jobs(world, tuned)[name]
    run = lambda out: play(stage, out, **values, lora=LORA, checkpoint_every=1)  # noqa: E731
    whole = run(tmp_path / "whole")
    with at_call("klimb.runtime.checkpoint.save", 3):
        assert fork(lambda: run(tmp_path / "killed")) != 0
    run(tmp_path / "killed")
    assert differences(tmp_path / "killed", tmp_path / "whole") == []
    [shard] = (whole.path / "checkpoints" / "step-000004").glob("*.safetensors")
    with safe_open(shard, "pt") as file:  # adapters, their moments, a critic's head: nothing of the base
        names = [key for key in file.keys() if key.startswith(("policy/weights", "critic/weights", "sft/weights"))]  # noqa: SIM118
    assert names
    assert all("lora_" in name or "/weights.value." in name for name in names)
    assert all("lora_" in key for key in weights(whole.model))
    assert (read(whole.path) or {})["versions"]["bitsandbytes"]
    assert "base: 4bit" in (whole.path / "config.yaml").read_text()


def test_the_reference_is_the_base_that_is_already_there(world: World) -> None:
    policy = loaded(world.model, LoRA(**LORA))
    before = held(policy.backbone)
    references = [load_reference(None, policy, named) for named in (None, world.model)]  # type: ignore[arg-type]
    start = logps(policy.policy)
    move(policy.policy)
    for reference in references:
        assert reference.backbone is policy.backbone
        assert torch.equal(logps(reference), start)  # the adapter began at zero
    assert held(policy.backbone) == before
    assert not torch.allclose(logps(policy.policy), start, atol=1e-2)


def test_critic_and_reference_of_an_adapter_are_further_ones_on_the_same_base(tuned: Played) -> None:
    policy = loaded(tuned.model, LoRA(**LORA))
    before = held(policy.backbone)
    reference = load_reference(None, policy)  # type: ignore[arg-type]
    critic = load_critic(None, policy, None)  # type: ignore[arg-type]
    assert held(policy.backbone) == before
    start = logps(policy.policy)
    move(policy.policy)
    assert torch.equal(logps(reference), start)
    assert {p.dtype for p in critic.trainable().values()} == {FLOAT}


def test_merged_it_is_the_model_that_was_trained(world: World, tuned: Played) -> None:
    """Without lora (evaluation, sampling, full training) the adapter lies on the rounded base, in fp32: same sums."""
    trained = logps(loaded(tuned.model, LoRA(**LORA)).policy)
    merged = loaded(tuned.model, None)
    assert merged.backbone.peft is None
    assert torch.allclose(logps(merged.policy), trained, atol=1e-4)
    (Path(tuned.model) / NOTE).rename(Path(tuned.model) / "aside")
    unrounded = logps(loaded(tuned.model, None).policy)
    (Path(tuned.model) / "aside").rename(Path(tuned.model) / NOTE)
    assert (unrounded - trained).abs().max() > 1e-3  # the note is what makes it so


def test_transformers_and_peft_load_the_same_from_the_note(world: World, tuned: Played) -> None:
    import json

    config = BitsAndBytesConfig(**json.loads((Path(tuned.model) / NOTE).read_text()))
    base = AutoModelForCausalLM.from_pretrained(world.model, quantization_config=config, device_map={"": "cpu"})
    keep_layout(base)  # bitsandbytes' kernel for processors with bfloat16 takes no layers as narrow as these
    theirs = PeftModel.from_pretrained(base, tuned.model).eval()
    ids = torch.tensor([[14, 1, 0, 9, 10, 1, 11, 15]])
    expected = theirs(ids).logits.float().log_softmax(-1)[0, 2:7].gather(1, ids[0, 3:, None]).squeeze(1)
    mine = logps(loaded(tuned.model, LoRA(**LORA)).policy)[0]
    assert torch.allclose(expected, mine, atol=1e-4)


def test_preferences_and_rl_go_on_from_the_adapter(world: World, tuned: Played, tmp_path: Path) -> None:
    all_jobs = jobs(world, tuned)
    dpo = play("preference", tmp_path / "dpo", **{**all_jobs["dpo"][1], "steps": 20}, lora=LORA)
    assert dpo.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert dpo.rows[-1]["accuracy"] > 0.95
    fast = {"steps": 15, "optimizer": {"lr": 3e-2}}
    grpo = play("rl", tmp_path / "grpo", **{**all_jobs["grpo"][1], **fast}, lora=LORA)
    assert abs(grpo.rows[0]["kl"]) < 1e-4
    assert grpo.rows[-1]["reward/mean"] > grpo.rows[0]["reward/mean"] + 0.3
    assert (Path(grpo.model) / NOTE).is_file()
    scored = play("evaluate", tmp_path / "evaluate", model=grpo.model,
                  measure={"data": world.prompts, "reward": world.reward("count"), "max_tokens": 4})  # fmt: skip
    assert scored.result["evaluation"] is not None


def test_a_reward_model_is_not_trained_in_4_bits(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.base=4bit: a reward model is saved merged.*leave it out"):
        play("reward", tmp_path / "run", model=world.model, data=world.preferences, steps=1, lora=LORA)
