"""The last layer's MLP leaves out what nobody reads, and nothing that is read changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import CONFIGS, ragged, tiny
from torch import Tensor, nn

from klimb.models import last_layer
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.packing import pack


def last_mlp(policy: Policy) -> nn.Module:
    return [module for name, module in policy.backbone.model.named_modules() if name.endswith(".mlp")][-1]


@contextmanager
def places_computed(policy: Policy) -> Iterator[list[int]]:
    """How many tokens the last MLP's first layer sees in each call."""
    seen: list[int] = []
    first = next(m for m in last_mlp(policy).children() if any(True for _ in m.parameters()))
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    yield seen
    handle.remove()


def passed(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients of one batch."""
    batch = ragged(longest=6)
    policy.zero_grad()
    logps = policy(batch).logps
    (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_read_stays_what_it_was(monkeypatch: pytest.MonkeyPatch, family: str, checkpointing: bool) -> None:
    policy = Policy(Backbone(tiny(family, dtype=torch.float64)), None)
    if checkpointing:
        policy.backbone.checkpoint_activations()
    packed = pack(ragged(longest=6), torch.device("cpu"))
    assert packed.read.tolist() == sorted(set(packed.predictors.tolist()))
    assert len(packed.read) < 0.8 * len(packed.tokens)
    with places_computed(policy) as seen:
        logps, gradients = passed(policy)
    assert seen == [len(packed.read)] * (2 if checkpointing else 1)
    monkeypatch.setattr(last_layer, "_WORTH", 0.0)
    with places_computed(policy) as seen:
        whole, whole_gradients = passed(policy)
    assert seen == [len(packed.tokens)] * (2 if checkpointing else 1)
    assert torch.allclose(logps, whole, rtol=0, atol=1e-12)
    assert gradients.keys() == whole_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, whole_gradients[name], rtol=1e-10, atol=1e-12), name


def test_a_place_that_is_read_and_left_out_shows() -> None:
    """The control: with one place too few the numbers are others."""
    policy = Policy(Backbone(tiny(dtype=torch.float64)), None)
    packed = pack(ragged(longest=6), torch.device("cpu"))
    _, states = policy.predictions(packed)
    _, fewer = policy.predictions(replace(packed, read=packed.read[1:]))
    changed = (states - fewer).abs().amax(dim=1) > 1e-6
    assert changed.tolist() == (packed.predictors == packed.read[0]).tolist()


def test_a_run_that_is_read_as_a_whole_is_computed_as_one() -> None:
    policy = Policy(Backbone(tiny()), None)
    batch = ragged(longest=6)
    packed = pack(batch, torch.device("cpu"))
    everything = torch.arange(len(packed.tokens))
    with places_computed(policy) as seen:
        policy.backbone.states(packed.tokens, packed.positions, packed.plan, everything, everything)
        policy.backbone.states(packed.tokens, packed.positions, packed.plan, everything[:0], everything[:0])
    assert seen == [len(packed.tokens)]  # and of nothing, nothing


@pytest.mark.parametrize("family", CONFIGS)
def test_a_run_that_is_filled_up_says_and_learns_the_same(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    policy = Policy(Backbone(tiny(family, dtype=torch.float64)), None)
    logps, gradients = passed(policy)
    monkeypatch.setattr(Backbone, "pack", lambda self, batch: pack(batch, self.device, whole=64))
    packed = policy.backbone.pack(ragged(longest=6))
    assert [len(packed.tokens) % 64, len(packed.read) % 64, len(packed.ends) % 64] == [0, 0, 0]
    assert set(packed.predictors.tolist()) <= set(packed.read.tolist())
    assert set(packed.last.tolist()) <= set(packed.ends.tolist())
    filled, filled_gradients = passed(policy)
    close = 1e-6 if family.startswith("gemma") else 1e-12  # Gemma's norms compute in float32 whatever comes in
    assert torch.allclose(logps, filled, rtol=0, atol=close)
    assert gradients.keys() == filled_gradients.keys()
    assert all(torch.allclose(gradients[name], filled_gradients[name], rtol=0, atol=10 * close) for name in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_of_16_bits_are_filled_up_on_a_cpu(dtype: torch.dtype) -> None:
    plain, filled = (Backbone(tiny("llama", dtype=d)).pack(ragged(longest=6)) for d in (torch.float32, dtype))
    assert len(plain.tokens) % 32
    assert len(filled.tokens) % 32 == 0
    assert filled.tokens[: len(plain.tokens)].equal(plain.tokens)
