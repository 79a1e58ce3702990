"""A frozen base in 4 bits below an adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

The linear layers inside the model are stored as NF4 in blocks of 64, their scales in 8 bits (double quantisation): 0.52
byte a weight. Embeddings, norms, biases and the head keep their type, and so does the arithmetic: a layer's weight is
put together again each time something is multiplied by it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from klimb.errors import KlimbError
from klimb.models.linears import weight_of

NOTE = "base_quantization.json"
"""Beside an adapter: what transformers.BitsAndBytesConfig takes to load the base that it was trained on."""
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


_BYTES = 0.516
"""A weight, its share of the scales included."""


def saving(model: PreTrainedModel) -> int:
    """Bytes less than this dense model would take."""
    return int(sum(weight.numel() * (weight.element_size() - _BYTES) for weight in _quantised(model)))


def _quantised(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that are stored in 4 bits, each [outputs, inputs]."""
    head = model.get_output_embeddings()
    return [weight for m in model.modules() if m is not head and (weight := weight_of(m)) is not None]


def loading(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained`: each weight is quantised as it is read. Raises KlimbError where that cannot be."""
    if dtype == torch.float64:
        raise KlimbError(f"lora.base=4bit: dtype={str(dtype).removeprefix('torch.')}",
                         why="4-bit layers compute in float32, bfloat16 or float16", fix="set one of them")  # fmt: skip
    _bitsandbytes()
    config = BitsAndBytesConfig(**_NF4, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}


def keep_layout(model: PreTrainedModel) -> None:
    """One layout and one arithmetic for rollouts and training.

    On a CPU with AVX512-BF16 a layer that is called without gradient would otherwise repack its weight for a kernel
    that computes in bfloat16 whatever was asked for, and samples would come from other numbers than training's.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Gives a dense model the numbers that the same model in 4 bits computes with: what an adapter is merged into.

    Merging into the 4-bit layers would round the sum again and lose most of a small adapter.
    """
    functional = _bitsandbytes().functional
    for weight in _quantised(model):
        codes, state = functional.quantize_4bit(weight.contiguous(), compress_statistics=True, quant_type="nf4")
        weight.copy_(functional.dequantize_4bit(codes, state))


def note(adapter: Path) -> None:
    """Writes beside an adapter that its base was in 4 bits."""
    (adapter / NOTE).write_text(json.dumps(_NF4, indent=2) + "\n")


def noted(model: str) -> bool:
    """Is `model` an adapter that was trained on a base in 4 bits?"""
    return (Path(model) / NOTE).is_file()


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise KlimbError("a base in 4 bits needs bitsandbytes", why=error, fix="pip install 'klimb[4bit]'") from None
    return bitsandbytes
