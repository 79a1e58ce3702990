"""Whole decoder layers in one call: which ones, the same bits as by their parts, nothing where parts are missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import CONFIGS, VOCABULARY, tiny
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from klimb import native
from klimb.models import decoder, linears
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import LoRA
from klimb.native.decoder import DecoderLayer
from klimb.rollout.engine import Request, generate
from klimb.rollout.local import LocalEngine
from klimb.rollout.sampling import SamplingParams
from klimb.types import Prompt, Sample

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
TAKEN = ("llama", "llama-tied", "qwen2", "qwen3", "mistral-window")


def odd() -> LlamaConfig:
    """Widths that no vector and no pair of numbers divides."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=33, head_dim=10, intermediate_size=75, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip


def taken(model: nn.Module) -> int:
    return sum("attending" in vars(module) for module in model.modules())


def samples(policy: Policy) -> list[Sample]:
    """Of prompts that several share, some of them longer than others."""
    engine = LocalEngine(policy, str, max_rows=72)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (5,), generator=draw).tolist()
    tokens = [torch.randint(8, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
    params = SamplingParams(12, frozenset(range(4)))
    asked = [Request(Prompt(f"p{i}", prompt, "?"), 16, params, seed=1) for i, prompt in enumerate(tokens)]
    return [sample for group in generate(engine, asked) for sample in group.samples]


@pytest.mark.parametrize("family", CONFIGS)
def test_which_families_are_taken_over(family: str) -> None:
    assert taken(tiny(family)) == (2 if family in TAKEN else 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*TAKEN, "odd"])
def test_samples_are_those_of_the_parts_to_the_last_bit(
    family: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIGS, "odd", odd)
    policy, calls = Policy(Backbone(tiny(family, dtype=dtype)), None), 0
    own = DecoderLayer.__call__

    def counted(self: DecoderLayer, *args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return own(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = samples(policy)
        assert calls > 20
        monkeypatch.setattr(decoder, "_ready", lambda module: None)
        last, exact = calls, samples(policy)
        assert calls == last
    finally:
        torch.set_num_threads(before)
    assert found == exact


def test_an_adapter_keeps_its_layers_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it adds lies between the products."""
    policy = Policy(Backbone(tiny("llama"), None, LoRA(rank=2)), "policy")
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found = samples(policy)
    monkeypatch.setattr(linears, "ready_of", lambda *_: linears.Ready({}, {}))
    exact = samples(policy)
    assert [s.tokens for s in found] == [s.tokens for s in exact]
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.logps == pytest.approx(theirs.logps, abs=2e-5)


class Ageing(LlamaDecoderLayer):
    """Ministral's way: what it computes depends on positions from some thousands on."""

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **named: Any) -> Tensor:  # type: ignore[override]
        age = 1 + 0.1 * torch.log1p((position_ids / 16384).floor())
        return super().forward(hidden_states * age[..., None], position_ids=position_ids, **named)


class Wide(LlamaDecoderLayer):
    """Repeats its key heads before it asks."""

    def forward(self, hidden_states: Tensor, attention_plan: Any, **named: Any) -> Tensor:  # type: ignore[override]
        q = torch.zeros(1, 4, hidden_states.shape[1], self.self_attn.head_dim)
        attention_plan.attend(self.self_attn.layer_idx, q, q, q, 1.0, None, None)
        return super().forward(hidden_states, attention_plan=attention_plan, **named)


class Scaled(LlamaDecoderLayer):
    """Granite's way: what a branch adds is multiplied."""

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        hidden_states = hidden_states + 0.5 * attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Positional(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, plan: Any) -> Tensor:  # type: ignore[override]
        return hidden_states


@pytest.mark.parametrize("kind", [Ageing, Wide, Scaled, Positional])
def test_a_layer_of_the_same_parts_that_does_something_else_is_left_alone(kind: type[LlamaDecoderLayer]) -> None:
    model = copy.deepcopy(tiny("llama"))
    for layer in model.model.layers:
        vars(layer).pop("forward")
        vars(layer).pop("attending")
        layer.__class__ = kind
    decoder.take_over(model)
    assert taken(model) == 0
