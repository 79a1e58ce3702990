"""Adapters handed from stage to stage: what is trained, what stays, and what each is compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from world import CONTEXT, SMALL_RL, WORDS, Played, World, play, tuned_adapter

from klimb.batch import Row, TokenBatch
from klimb.errors import ConfigError, KlimbError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models.backbone import Backbone
from klimb.models.faces import Critic, Policy, policy_logps
from klimb.models.load import LoRA, load_causal, reward_facts
from klimb.stages.models import Loaded, load_critic, load_reference, load_reward_model

LORA = {"rank": 4, "alpha": 8.0}
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """SFT of an adapter: where the further stages start from."""
    return tuned_adapter(world, tmp_path_factory.mktemp("tuned") / "sft", LORA)


def weights(model: str) -> dict[str, Tensor]:
    [file] = Path(model).glob("*.safetensors")
    return load_file(file)


def loaded(model: str, lora: LoRA | None = None) -> Loaded:
    network, adapter = load_causal(model, CPU, FLOAT)
    backbone = Backbone(network, adapter, lora)
    return Loaded(Policy(backbone, "policy" if backbone.peft is not None else None), None, model)  # type: ignore[arg-type]


def logps(policy: Policy) -> Tensor:
    rows = [[Row([14, 1, 0], [9, 10, 1, 11, 15], [True] * 5)], [Row([14, 2, 0], [7, 15], [True] * 2)]]
    return policy_logps(policy, TokenBatch.from_rows(rows, [0, 1], ["a", "b"]), budget=100).logps


def move(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))


def test_a_new_adapter_is_compared_with_the_base(world: World) -> None:
    policy = loaded(world.model, LoRA(**LORA))
    reference = load_reference(None, policy)  # type: ignore[arg-type]
    base = logps(loaded(world.model).policy)
    assert torch.equal(logps(reference), base)
    assert torch.equal(logps(policy.policy), base)  # its second matrix is zero
    move(policy.policy)
    assert not torch.allclose(logps(policy.policy), base, atol=1e-2)
    assert torch.equal(logps(reference), base)


def test_a_given_adapter_is_compared_with_a_frozen_copy_of_itself(world: World, tuned: Played) -> None:
    policy = loaded(tuned.model, LoRA(**LORA))
    reference = load_reference(None, policy)  # type: ignore[arg-type]
    start = logps(policy.policy)
    assert torch.equal(logps(reference), start)
    assert not torch.allclose(start, logps(loaded(world.model).policy), atol=1e-2)  # not the base
    move(policy.policy)
    assert not torch.allclose(logps(policy.policy), start, atol=1e-2)
    assert torch.equal(logps(reference), start)
    assert not [name for name in policy.policy.trainable() if ".reference." in name]


def test_the_critic_of_an_adapter_is_a_third_one_on_the_same_base(tuned: Played) -> None:
    policy = loaded(tuned.model, LoRA(**LORA))
    reference = load_reference(None, policy)  # type: ignore[arg-type]
    critic: Critic = load_critic(None, policy, None)  # type: ignore[arg-type]
    assert critic.backbone is policy.backbone is reference.backbone
    mine, its = policy.policy.trainable(), critic.trainable()
    assert not set(map(id, mine.values())) & set(map(id, its.values()))
    start = logps(policy.policy)
    with torch.no_grad():
        for parameter in its.values():
            parameter.add_(0.1)
    assert torch.equal(logps(policy.policy), start)
    assert torch.equal(logps(reference), start)


def test_only_the_adapter_is_saved_and_the_base_is_untouched(world: World, tuned: Played) -> None:
    names = weights(tuned.model)
    assert names
    assert all("lora_" in name for name in names)
    from peft import AutoPeftModelForCausalLM

    ids = torch.tensor([[14, 1, 0, 9, 10, 1, 11, 15]])
    theirs = AutoPeftModelForCausalLM.from_pretrained(tuned.model)(ids).logits.log_softmax(-1)
    mine = logps(loaded(tuned.model, LoRA(**LORA)).policy)[0]
    assert torch.allclose(theirs[0, 2:7].gather(1, ids[0, 3:, None]).squeeze(1), mine, atol=1e-5)


@pytest.mark.parametrize(("loss", "start"), [("dpo", math.log(2)), ({"ipo": 0.5}, 1.0)])
def test_preferences_go_on_from_the_adapter(
    world: World, tuned: Played, tmp_path: Path, loss: Any, start: float
) -> None:
    """The first loss is that of π = π_ref only if the reference is the adapter and not the base."""
    done = play(
        "preference",
        tmp_path / "run",
        model=tuned.model,
        data=world.preferences,
        loss=loss,
        steps=20,
        batch_size=18,
        lora=LORA,
    )
    assert done.rows[0]["loss"] == pytest.approx(start, rel=1e-6)
    assert done.rows[-1]["accuracy"] > 0.95
    before, after = weights(tuned.model), weights(done.model)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_rl_goes_on_from_the_adapter(world: World, tuned: Played, tmp_path: Path, algorithm: str) -> None:
    done = play(
        "rl",
        tmp_path / "run",
        model=tuned.model,
        data=world.prompts,
        reward=world.reward("count"),
        algorithm=algorithm,
        steps=15,
        lora=LORA,
        **{**SMALL_RL, "optimizer": {"lr": 3e-2}},
    )
    assert abs(done.rows[0]["kl"]) < 1e-4  # to the adapter it started from, not to the base
    assert done.rows[-1]["kl"] > 0.1
    assert done.rows[-1]["reward/mean"] > done.rows[0]["reward/mean"] + 0.3
    assert weights(done.model).keys() == weights(tuned.model).keys()


def test_without_lora_an_adapter_is_merged_and_trained_whole(world: World, tuned: Played, tmp_path: Path) -> None:
    done = play("preference", tmp_path / "run", model=tuned.model, data=world.preferences, steps=2, batch_size=18)
    assert done.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (Path(done.model) / "config.json").is_file()
    assert not any("lora_" in name for name in weights(done.model))


def test_a_reward_model_trained_with_an_adapter_is_saved_merged(world: World, tmp_path: Path) -> None:
    done = play(
        "reward",
        tmp_path / "run",
        model=world.model,
        data=world.preferences,
        steps=30,
        batch_size=18,
        lora=LORA,
        optimizer={"lr": 3e-2},
    )
    assert done.rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert done.rows[-1]["accuracy"] > 0.95
    assert not any("lora_" in name for name in weights(done.model))
    scored = play(
        "sample",
        tmp_path / "sample",
        model=world.model,
        data=world.preferences,
        reward=done.model,
        samples_per_prompt=4,
        max_tokens=4,
        pairs=True,
    )
    assert scored.result["pairs"] > 0


def test_a_critic_of_its_own_beside_an_adapter_is_trained_whole_at_the_rate_for_that(
    world: World, tmp_path: Path
) -> None:
    settings = {
        **SMALL_RL,
        "optimizer": {},
        "lora": LORA,
        "critic": {"model": world.model},
        "algorithm": "ppo",
    }
    said = play("rl", tmp_path, model=world.model, data=world.prompts, reward="exact", steps=1, **settings).said
    [policy] = [line for line in said if line.startswith("policy:")]
    [critic] = [line for line in said if line.startswith("critic:")]
    assert policy.endswith("(table: rl, LoRA)")
    assert critic.endswith("lr 1e-05 (table: critic, full)")


def test_a_critic_from_a_reward_model_begins_with_what_the_reward_pays(world: World, tmp_path: Path) -> None:
    """(raw − mean) / std at the end of a text, which is the state before whatever would come next."""
    done = play("reward", tmp_path, model=world.model, data=world.preferences, steps=2, batch_size=4)
    facts = reward_facts(done.model)
    assert facts["std"] != 1
    session: Any = SimpleNamespace(device=CPU, dtype=FLOAT, checkpointing=False)
    critic = load_critic(session, loaded(world.model), done.model)
    judge = load_reward_model(session, done.model)
    said, further = [Row([14, 1, 0], [9, 10, 1], [False] * 3)], [Row([14, 1, 0], [9, 10, 1, 11], [False] * 3 + [True])]
    with torch.no_grad():
        raw = judge(TokenBatch.from_rows([said], [0], ["a"])).item()
        value = critic(TokenBatch.from_rows([further], [0], ["a"]))[0, -1].item()
    assert value == pytest.approx((raw - facts["mean"]) / facts["std"], abs=1e-5)


@pytest.mark.parametrize("stage", ["preference", "rl"])
def test_a_reference_of_another_vocabulary(world: World, tmp_path: Path, stage: str) -> None:
    other = make_model(
        tmp_path / "other", tokenizer=word_tokenizer((*WORDS[1:], WORDS[0])), architecture="gpt2", hidden=16, layers=1,
        heads=2, mlp=32, context=CONTEXT, seed=0,
    )  # fmt: skip
    own = {"preference": {"data": world.preferences}, "rl": {"data": world.prompts, "reward": "exact", **SMALL_RL}}
    with pytest.raises(ConfigError, match=r"reference=.*other: its vocabulary is another than the trained model's"):
        play(stage, tmp_path / "run", model=world.model, reference=str(other), steps=1, **own[stage])


def test_an_adapter_on_other_layers_than_those_asked_for_is_refused(tuned: Played) -> None:
    [*on] = json.loads((Path(tuned.model) / "adapter_config.json").read_text())["target_modules"]
    loaded(tuned.model, LoRA(**{**LORA, "targets": on[::-1]}))
    with pytest.raises(KlimbError, match=r"lora.targets=.*is on"):
        loaded(tuned.model, LoRA(**{**LORA, "targets": ["elsewhere"]}))
