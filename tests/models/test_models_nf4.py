"""A base in 4 bits: the numbers of a dense model that was rounded, in a seventh of its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import ragged, tiny
from torch import Tensor, nn

from klimb.errors import KlimbError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models import nf4
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import LoRA, load_causal
from klimb.models.probe import probed_policy

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama-tied", "qwen3", "gemma3", "gpt2"]


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'klimb[4bit]'")


def saved(folder: Path, family: str = "llama") -> str:
    tiny(family).save_pretrained(folder)
    return str(folder)


def policy_of(model: str, base: Any, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy with an adapter that does something, the same one on every base."""
    network, _ = load_causal(model, CPU, dtype, base)
    if base == "dense":
        nf4.round_weights(network)
    torch.manual_seed(0)
    backbone = Backbone(network, None, LoRA(rank=2, base=base))
    for name, parameter in backbone.trainable().items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return probed_policy(backbone, "policy")[0]


def numbers(policy: Policy) -> tuple[Tensor, dict[str, Tensor]]:
    logps = policy(ragged()).logps
    logps.sum().backward()
    gradients = {name: parameter.grad for name, parameter in policy.trainable().items()}
    assert all(p.grad is None for n, p in policy.named_parameters() if "lora_" not in n)
    return logps.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_learns_as_on_the_dense_model_of_the_same_numbers(bnb: Any, family: str, tmp_path: Path) -> None:
    """fp32 on both sides: the same products, in another order of sums where a matrix lies by column."""
    model = saved(tmp_path, family)
    four_bit, dense = (numbers(policy_of(model, base)) for base in ("4bit", "dense"))
    assert torch.allclose(four_bit[0], dense[0], atol=1e-4)
    assert four_bit[1].keys() == dense[1].keys()
    for name, gradient in dense[1].items():
        assert gradient.dtype == torch.float32
        assert (four_bit[1][name] - gradient).norm() < 1e-4 * gradient.norm(), name
    unrounded = Policy(Backbone(load_causal(model, CPU, torch.float32)[0]), None)(ragged()).logps
    base_alone = policy_of(model, "4bit")
    base_alone.adapter = None
    assert (base_alone(ragged()).logps - unrounded).abs().max() > 1e-2  # rounding is seen at all


def test_in_bfloat16_the_adapter_is_in_bfloat16_too(bnb: Any, tmp_path: Path) -> None:
    model = saved(tmp_path)
    four_bit, dense = (policy_of(model, base, torch.bfloat16) for base in ("4bit", "dense"))
    assert {p.dtype for p in four_bit.trainable().values()} == {torch.bfloat16}  # the learner has masters
    mine, its = numbers(four_bit), numbers(dense)
    assert (mine[0] - its[0]).abs().max() < 0.25  # as in the probe: 8 bits and two orders of the same sums
    for name, gradient in its[1].items():
        assert torch.cosine_similarity(mine[1][name].flatten(), gradient.flatten(), dim=0) > 0.98, name


def test_with_and_without_gradient_the_same_bits(bnb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout computes without, training with it; the same after the other, also where the CPU knows bfloat16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    policy = policy_of(saved(tmp_path), "4bit")
    layers = [module for module in policy.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    with_gradient = policy(ragged()).logps.detach()
    with torch.inference_mode():
        without = policy(ragged()).logps
    assert torch.equal(with_gradient, without)
    assert torch.equal(policy(ragged()).logps.detach(), with_gradient)


def test_about_half_a_byte_a_weight(bnb: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path, tokenizer=word_tokenizer(("a", "b")), architecture="llama", hidden=256, layers=2,
                       heads=4, mlp=512, context=32, seed=0)  # fmt: skip
    network, _ = load_causal(str(model), CPU, torch.float32, "4bit")
    layers = [module for module in network.modules() if isinstance(module, bnb.nn.Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = 0
    for layer in layers:
        state = layer.weight.quant_state
        held += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert weights > 2 * 500_000
    assert held / weights == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=0.01)
    dense, _ = load_causal(str(tmp_path), CPU, torch.float32)
    assert nf4.saving(dense) == pytest.approx(4 * weights - held, rel=1e-3)  # what the memory plan says
    others = [p for p in network.parameters() if p.is_floating_point()]
    assert {p.dtype for p in others} == {torch.float32}
    assert type(network.get_output_embeddings()) is nn.Linear


def test_what_cannot_be_in_4_bits_says_so(bnb: Any, tmp_path: Path) -> None:
    with pytest.raises(KlimbError, match=r"lora.base=4bit: dtype=float64.*set one of them"):
        load_causal(saved(tmp_path / "dense"), CPU, torch.float64, "4bit")
    network, _ = load_causal(str(tmp_path / "dense"), CPU, torch.float32, "4bit")
    network.save_pretrained(tmp_path / "quantised")
    with pytest.raises(KlimbError, match=r"stored quantised.*lora\.base=4bit"):
        load_causal(str(tmp_path / "quantised"), CPU, torch.float32)


def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(KlimbError, match=r"needs bitsandbytes.*pip install 'klimb\[4bit\]'"):
        load_causal(saved(tmp_path), CPU, torch.float32, "4bit")
