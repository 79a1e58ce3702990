"""What is counted on tensors without numbers is what real ones hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM

from klimb import native
from klimb.models import attention, fused
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy
from klimb.models.load import LoRA
from klimb.models.logprobs import kept_logits
from klimb.models.outline import Outline, Shape, size
from klimb.models.packing import flat_length

SHAPE, BUDGET, LAYERS = Shape(24, 40, 3), 1100, 6
"""More samples and layers than are computed."""


def made(
    family: str, folder: Path, layers: int = LAYERS, dtype: torch.dtype = torch.float32, kernels: bool = False,
    lora: LoRA | None = None,
) -> tuple[str, Policy]:  # fmt: skip
    """A config alone in a folder, and a model of it."""
    config = CONFIGS[family]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    config.save_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=dtype).eval()
    if kernels:
        fused.take_over(model)
    return str(folder), Policy(Backbone(model, None, lora), "policy" if lora else None)


def kept(policy: Policy) -> int:
    """Bytes that autograd keeps of a micro-batch, by its own hooks, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    found: dict[int, tuple[Tensor, int]] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (x, storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy(SHAPE.batch(SHAPE.fitting(BUDGET)))
    return sum(count for _, count in found.values())


@pytest.mark.parametrize("family", CONFIGS)
def test_activations_are_those_of_the_real_model(family: str, tmp_path: Path, kernels: str) -> None:
    """Within 8 %: tables of positions and places live as well, and are not autograd's."""
    path, policy = made(family, tmp_path, kernels=kernels == "native")
    outline = Outline(path, torch.float32, kernels=kernels == "native")
    assert outline.training(SHAPE, BUDGET, checkpointing=False).kept == pytest.approx(kept(policy), rel=0.08)
    assert outline.weights == size(policy.parameters())
    assert outline.trained == sum(p.numel() for p in policy.parameters())


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_kernels_keep_is_counted(dtype: torch.dtype, lora: LoRA | None, tmp_path: Path) -> None:
    """In 16 bits and with adapters, too. Logits that wait are not autograd's, and come on top."""
    path, policy = made("qwen2", tmp_path, dtype=dtype, kernels=True, lora=lora)
    outline = Outline(path, dtype, lora, kernels=True)
    counted, waiting = (outline.training(SHAPE, BUDGET, checkpointing=False, waiting=w).kept for w in (False, True))
    assert counted == pytest.approx(kept(policy), rel=0.05)
    logits = kept_logits(SHAPE.fitting(BUDGET) * SHAPE.completion, outline.config.vocab_size)
    assert waiting - counted == logits > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_activations_that_are_computed_again_a_layer_keeps_its_input(family: str, tmp_path: Path) -> None:
    batch = SHAPE.batch(SHAPE.fitting(BUDGET))
    tokens = flat_length([row for rows in batch.rows for row in rows])
    found = []
    for layers in (LAYERS, LAYERS + 4):
        path, _ = made(family, tmp_path / str(layers), layers)
        outline = Outline(path, torch.float32)
        off, on = (outline.training(SHAPE, BUDGET, checkpointing=again).kept for again in (False, True))
        assert on < 0.3 * off
        assert outline.training(SHAPE, BUDGET, checkpointing=False).kept == off  # the outline is as it was
        found.append(on)
    of_inputs = 4 * tokens * 32 * 4  # layers × tokens × width × bytes
    assert found[1] - found[0] == pytest.approx(of_inputs, rel=0.03)  # of the last group's prompt a part is counted


def test_adapters_are_counted_and_the_frozen_base_has_no_gradients(tmp_path: Path) -> None:
    path, _ = made("llama", tmp_path)
    lora = LoRA(rank=4)
    real = Backbone(AutoModelForCausalLM.from_config(CONFIGS["llama"]()), None, lora)
    of_two_layers = size(real.trainable().values())
    outline = Outline(path, torch.bfloat16, lora)
    assert outline.adapters == of_two_layers * LAYERS // 2 // 2  # in bfloat16, as the base
    assert (outline.masters, outline.gradients) == (4 * outline.trained, 6 * outline.trained)
    full = Outline(path, torch.bfloat16)
    assert (full.masters, full.gradients) == (4 * full.trained, 6 * full.trained)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
@pytest.mark.parametrize(("family", "a_layer"), [("qwen2", 7), ("gpt2", 4)])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_what_a_rollout_holds_a_second_time_is_counted(
    lora: LoRA | None, family: str, a_layer: int, tmp_path: Path
) -> None:
    model, policy = made(family, tmp_path)
    fused.take_over(policy.backbone.model)
    backbone = Backbone(policy.backbone.model, None, lora)
    layers = [layer for layer in backbone.for_decoding().panels if isinstance(layer.weight, Tensor)]
    assert len(layers) == a_layer * LAYERS
    assert Outline(model, torch.float32, lora).panels == size(layer.weight for layer in layers)


def test_a_plan_draws_no_random_numbers(tmp_path: Path) -> None:
    path, _ = made("llama", tmp_path)
    before = torch.random.get_rng_state()
    Outline(path, torch.float32, LoRA()).scoring(SHAPE, BUDGET)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_micro_batch_is_filled_up_to_its_budget() -> None:
    for budget in (30, 64, 150, 500, 600):
        batch = SHAPE.batch(SHAPE.fitting(budget))
        length = flat_length([row for rows in batch.rows for row in rows])
        assert len(batch) == 1 or length <= budget
        assert budget < length + 64
        assert batch.group.tolist() == [i // 3 for i in range(len(batch))]
