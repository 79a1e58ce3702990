"""From a directory (or a hub name) to a model on a device, and back to a directory that transformers and peft load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from klimb import native
from klimb.errors import KlimbError, out_of_memory
from klimb.models import attention, code, decoder, fused, nf4
from klimb.models.place import base_of, check_place, first_line, is_classifier

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip
HALF = (torch.bfloat16, torch.float16)
"""Computed in as they are, with fp32 masters of what is trained; heads, losses and statistics are in fp32."""
_PRODUCTS = "4096"
"""How many compiled products oneDNN keeps. Its own 1,024 are what a rollout and an update together fill. It reads this
when it first computes, so it is set before a model of 16 bits is loaded."""
_BFLOAT16_FROM = (8, 0)
"""CUDA compute capability. Older cards take bfloat16 and emulate it, slower than they compute in fp32."""


class LoRA(BaseModel):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the named linear layers."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, description="the adapter's product is multiplied by alpha / rank")
    targets: str | list[str] = Field("all-linear", description="names of linear layers")
    base: Literal["dense", "4bit"] = Field(
        "dense", description="4bit: the frozen weights below as NF4, about half a byte each (QLoRA, arXiv 2305.14314)"
    )


def resolve_device(name: str, *, samples: bool = False) -> torch.device:
    """`auto` takes cuda, then mps where nothing is sampled, then cpu. samples: will tokens be drawn?"""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and not samples else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KlimbError(f"device={name}: no such device; use auto, cpu, cuda or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise KlimbError(f"device={name}: torch sees no CUDA device here; use device=cpu or install a CUDA build")
    if device.type == "mps" and not mps:
        raise KlimbError(f"device={name}: torch sees no Apple GPU here; use device=cpu")
    if device.type == "mps" and samples:
        raise KlimbError(f"device={name}: tokens cannot be drawn there", why="klimb draws in float64, which mps lacks",
                         fix="use device=cpu; sft, reward and dpo without `measure` run on mps")  # fmt: skip
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU that computes in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and without_bfloat16(device) is None else torch.float32
    if name not in DTYPES:
        raise KlimbError(f"dtype={name}: unknown; use auto, {', '.join(DTYPES)}")
    if device.type == "mps" and name == "float64":
        raise KlimbError("dtype=float64: mps lacks it; use device=cpu")
    return DTYPES[name]


def without_bfloat16(device: torch.device) -> str | None:
    """What a CUDA card that does not compute in bfloat16 is called, with its compute capability; None of others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _BFLOAT16_FROM:
        return None
    return f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"


def load_causal(
    model: str, device: torch.device, dtype: torch.dtype, base: Literal["dense", "4bit"] = "dense"
) -> tuple[PreTrainedModel, Path | None]:
    """A causal language model; when `model` is a LoRA adapter: its base, and the adapter's directory.

    A dense base of an adapter that was trained on one in 4 bits has the same numbers as that had.
    """
    adapter = Path(model) if (Path(model) / "adapter_config.json").is_file() else None
    options = nf4.loading(device, dtype) if base == "4bit" else {}
    network = _from_pretrained(AutoModelForCausalLM, base_of(model), device, dtype, **options)
    if base == "4bit":
        nf4.keep_layout(network)
    elif nf4.noted(model):
        nf4.round_weights(network)
    return network, adapter


def load_classifier(
    model: str, device: torch.device, dtype: torch.dtype, seed: int = 0, outputs: int = 1
) -> PreTrainedModel:
    """A sequence classifier with one output (or several). A causal model gets a new head that starts at zero, so that
    the first Bradley–Terry loss is ln 2 exactly."""
    if (Path(model) / "adapter_config.json").is_file():
        raise KlimbError(f"model={model} is a LoRA adapter; a reward model starts from merged weights: "
                         "export it merged first, or train the stage before without lora")  # fmt: skip
    fresh = not is_classifier(model)
    torch.manual_seed(seed)
    classifier = _from_pretrained(AutoModelForSequenceClassification, model, device, dtype, num_labels=outputs)
    if fresh:
        nn.init.zeros_(score_head(classifier, outputs).weight)
    return classifier


def score_head(classifier: PreTrainedModel, outputs: int = 1) -> nn.Linear:
    """The linear layer [outputs, d] that reads the score off a hidden state."""
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != outputs:
        raise KlimbError(
            f"{type(classifier).__name__}: klimb reads scores off a single linear layer `score` with {outputs} "
            f"output{'s' if outputs > 1 else ''}"
        )
    return head


def _from_pretrained(
    kind: Any, model: str, device: torch.device, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    check_place(model)
    if device.type == "cpu" and dtype in HALF:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRODUCTS)
    try:
        loaded = kind.from_pretrained(
            model, dtype=dtype, attn_implementation=attention.NAME, **code.loading(model), **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if out_of_memory(error):
            raise
        raise KlimbError(f"model={model}: cannot be loaded ({first_line(error)})") from None
    if getattr(loaded, "hf_quantizer", None) is not None and "quantization_config" not in options:
        raise KlimbError(f"model={model}: its weights are stored quantised, klimb quantises dense ones itself",
                         fix="give the dense model, and lora.base=4bit to hold it in 4 bits")  # fmt: skip
    for module in loaded.modules():  # dropout makes log-probs random: the ratio of the first update would not be 1
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    look_for_no_padding(loaded)
    loaded = loaded.to(device).eval()
    if device.type == "cpu" and dtype not in HALF:
        _store_by_column(loaded)
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and native.why_not() is None:
        fused.take_over(loaded)
        decoder.take_over(loaded)
    return loaded


def look_for_no_padding(model: PreTrainedModel) -> None:
    """Some families read the tokens of every call back from the device, to warn of padding. A flat run has none."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _no_warning


def _no_warning(*_: Any) -> None:
    pass


def _store_by_column(model: PreTrainedModel) -> None:
    """Same weights [out, in], other strides: MKL multiplies a few rows (a decode step) by them in a third to a fifth of
    the time on two threads, and many rows (training) in the same. Not so the large matrix of a head."""
    for module in model.modules():
        dense = isinstance(module, nn.Linear) and module.weight.is_floating_point()
        if dense and module is not model.get_output_embeddings():
            module.weight.data = module.weight.data.t().contiguous().t()


def save_causal(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, stop_tokens: list[int]
) -> None:
    """Hugging Face layout; the generation config stops on `stop_tokens`, with which training taught it to stop, too."""
    _end_generation(model, tokenizer, stop_tokens)
    _save(model, tokenizer, directory)


def save_adapter(
    model: PreTrainedModel, peft: Any, tokenizer: PreTrainedTokenizerBase, directory: Path, stop_tokens: list[int]
) -> None:
    """The adapter "policy" alone, as peft loads it; the generation config stands beside it as for whole weights."""
    peft.save_pretrained(directory, selected_adapters=["policy"])
    for file in (directory / "policy").iterdir():  # peft puts a named adapter in a folder of its name
        file.replace(directory / file.name)
    (directory / "policy").rmdir()
    _end_generation(model, tokenizer, stop_tokens)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _end_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_tokens: list[int]) -> None:
    """Generation ends where training taught it to, and where it ended before."""
    config = model.generation_config
    if config is None:
        return
    config.eos_token_id = sorted({*stop_tokens, *token_list(config.eos_token_id)})
    config.pad_token_id = tokenizer.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:  # published models hold a temperature beside do_sample=false, which transformers will not save
        config.do_sample = True


def token_list(value: int | list[int] | None) -> list[int]:
    """One id, several or none, as configs hold them."""
    return [] if value is None else value if isinstance(value, list) else [value]


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Raises KlimbError where the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise KlimbError(
            f"the tokenizer's token {token!r} has the id {largest}", where=f"model={place}",
            why=f"the model has embeddings for {rows} tokens",
            fix="save it after model.resize_token_embeddings(len(tokenizer)), or with its own tokenizer",
        )  # fmt: skip


def save_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, facts: dict[str, Any]
) -> None:
    """A reward model that transformers scores padded batches with: its pad token is one that never occurs in text.

    transformers finds the end of a row by looking for pad tokens, so a text that ends in PAD = EOS would be read one
    token early. facts: "mean" and "std" of raw scores on reference samples, and how it is read, for a file beside them.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": "<|klimb_pad|>"})
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    _save(model, tokenizer, directory)
    save_facts(directory, facts)


def save_facts(directory: Path, facts: dict[str, Any]) -> None:
    (directory / "reward.json").write_text(json.dumps(facts, indent=2) + "\n")


def reward_facts(directory: str | Path) -> dict[str, Any]:
    """How a reward model is read, of its directory: "mean", "std", and where it is not a scalar one its "kind" with
    what belongs to that. Empty where nothing is noted."""
    noted = Path(directory) / "reward.json"
    return dict(json.loads(noted.read_text())) if noted.is_file() else {}


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
