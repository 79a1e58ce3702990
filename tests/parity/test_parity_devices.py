"""Every loss away from the CPU: on meta, where no tensor has values. What would end a run on a GPU shows (tensors of
two devices in one operation), and what would hold it up (a value that is looked at)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CONFIGS, ragged
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from klimb.batch import TokenBatch
from klimb.models import attention
from klimb.models.backbone import Backbone
from klimb.models.faces import Critic, Policy, RewardModel, policy_logps
from klimb.models.load import look_for_no_padding
from klimb.objective.algorithms import ALGORITHMS
from klimb.stages import rl, sft
from klimb.stages.reward_kinds import comparisons

META = torch.device("meta")
FAMILIES = ["llama", "gemma2", "gpt2"]
Loss = Callable[[TokenBatch, Any], tuple[Tensor, Any]]


def backbone(family: str, kind: Any = AutoModelForCausalLM, **changes: Any) -> Backbone:
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    with META:
        model = kind.from_config(config, attn_implementation=attention.NAME).eval()
    look_for_no_padding(model)
    return Backbone(model)


def back_and_forth(loss: Loss, batch: TokenBatch, parameters: dict[str, nn.Parameter]) -> None:
    """As `Learner` does it with two micro-batches, a part of which is padding."""
    for part in ([0, 1, 2, 3], [4, 5]):
        value, measured = loss(batch.select(part).to(META), batch.totals)
        value.backward()
        assert all(metric.value.device in (META, torch.device("cpu")) for metric in measured.values())
    assert sum(p.grad is not None for p in parameters.values()) > len(parameters) / 2
    assert all(p.grad.device == META for p in parameters.values() if p.grad is not None)


def pairs() -> TokenBatch:
    batch = ragged(groups=4, samples=2)
    batch = TokenBatch.from_rows(batch.rows, batch.group.tolist(), batch.ids, whole_groups=True)
    return batch.with_columns(margin=torch.zeros(8), ref_logps=torch.zeros(batch.mask.shape))


def test_tensors_of_two_devices_do_not_meet() -> None:
    """What the tests below rely on."""
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device=META)
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros(1, device=META))


@pytest.mark.parametrize("family", FAMILIES)
def test_supervised_and_reward_losses(family: str) -> None:
    """Preference losses tell their sides apart by an index, which costs a wait in each micro-batch: not here."""
    policy = Policy(backbone(family), None)
    back_and_forth(lambda micro, totals: sft.sft_loss(policy, micro, totals), ragged(3, 2), policy.trainable())
    model = RewardModel(backbone(family, AutoModelForSequenceClassification, num_labels=1))
    back_and_forth(lambda micro, totals: comparisons.pair_loss(model, micro, totals, 0.01), pairs(), model.trainable())
    assert policy_logps(policy, pairs(), budget=50).logps.device == META


@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_of_reinforcement_learning(name: str) -> None:
    algorithm = ALGORITHMS[name].resolve(max_length=20)
    face = backbone("llama")
    policy, critic = Policy(face, None), Critic(face, None)
    actors: Any = SimpleNamespace(
        policy=policy, critic=critic, algorithm=algorithm, config=SimpleNamespace(temperature=0.8)
    )
    batch = ragged(3, 2)
    numbers = torch.where(batch.mask, torch.randn(batch.mask.shape), 0.0)
    batch = batch.with_columns(
        advantages=numbers.double(), returns=numbers.double(), behavior_logps=numbers, ref_logps=numbers,
        values=numbers, kept=batch.mask, imitation=numbers,
    )  # fmt: skip
    for given in (batch, batch.with_columns(old_logps=numbers)):
        back_and_forth(lambda micro, totals: rl.rl_loss(actors, micro, totals, {}, None), given, policy.trainable())
    if algorithm.critic is not None:
        back_and_forth(lambda micro, totals: rl.value_loss(actors, micro, totals), batch, critic.trainable())
