"""One set of weights and the faces it shows: policy, reference, critic.

With LoRA they are adapters on one base, which is held once; the reference is the base itself (adapter off), or a
frozen copy of the adapter that training started from. With full weights each face has a backbone of its own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from klimb.batch import TokenBatch
from klimb.errors import KlimbError
from klimb.models import linears
from klimb.models.attention import AttentionPlan
from klimb.models.last_layer import skip_unread, worth_skipping
from klimb.models.load import HALF, LoRA
from klimb.models.logprobs import Head
from klimb.models.packing import Packed, pack
from klimb.models.place import context_length

_WHOLE = 32
"""A run of 16-bit numbers on a CPU is filled up to a multiple of this. oneDNN multiplies these, and compiles a product
anew for each number of tokens that it has not met: one to three milliseconds, for every shape of weight."""
_UNKNOWN = ""
"""No adapter has this name."""


class Backbone(nn.Module):
    """A transformers model called on flat runs, with any number of named adapters on it."""

    def __init__(self, model: PreTrainedModel, adapter: Path | None = None, lora: LoRA | None = None) -> None:
        """adapter: the LoRA to continue from (merged into the weights when `lora` is None: full training)."""
        super().__init__()
        self.peft: Any = None
        if adapter is not None:
            from peft import PeftModel

            if lora is not None:
                _check_same(adapter, lora)
            self.peft = PeftModel.from_pretrained(model, str(adapter), adapter_name="policy", is_trainable=True)
            if lora is None:
                model, self.peft = self.peft.merge_and_unload(), None
                model.requires_grad_(True)  # peft had frozen what was below the adapter
        elif lora is not None:
            self.peft = _new_adapter(model, lora)
        self._used: str | None = _UNKNOWN
        self.model = model
        self._adapters_in_its_precision()
        self.started_from_adapter = adapter is not None and self.peft is not None
        self.context = context_length(model.config)
        skip_unread(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def pack(self, batch: TokenBatch) -> Packed:
        """A batch as this model is called with it."""
        return pack(batch, self.device, _WHOLE if self.device.type == "cpu" and self.dtype in HALF else 1)

    def checkpoint_activations(self) -> None:
        """From here on a decoder layer keeps its input alone for the backward pass, and computes the rest again there.

        What transformers offers for it works in training mode only; klimb's models stay in evaluation mode.
        """
        layers = [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            raise KlimbError(f"checkpointing: {type(self.model).__name__} has no layers that transformers knows how to "
                             "compute again", fix="set checkpointing=off")  # fmt: skip
        for layer in layers:
            layer.forward = partial(_computed_again, layer.forward)

    def use(self, adapter: str | None) -> None:
        """Make one adapter active (None: the base alone). Frozen ones are recognised by their name."""
        if self.peft is None or adapter == self._used:  # to switch visits every layer, and a token asks for it
            return
        self._used = adapter
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(adapter, inference_mode=adapter == "reference")

    def states(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, keep: Tensor, read: Tensor | None = None,
        *, logits: bool = False,
    ) -> Tensor:  # fmt: skip
        """Hidden states [K, d] after the final norm at the flat places `keep` [K], or the model's own logits [K, V].

        read: the places of `keep`, once each; None where those are all.
        """
        plan.read = worth_skipping(read, len(tokens))
        inputs = {
            "input_ids": tokens[None],
            "position_ids": positions[None],
            "attention_plan": plan,
            "use_cache": False,
        }
        if logits:
            return self.model(**inputs, logits_to_keep=keep).logits.squeeze(0)
        return self.model.base_model(**inputs).last_hidden_state.squeeze(0).index_select(0, keep)

    def for_decoding(self) -> linears.Ready:
        """Its weights as a rollout multiplies by them, until they change."""
        return linears.ready_of(self.model, self.model.get_output_embeddings())

    def packed_states(self, packed: Packed, keep: Tensor, read: Tensor, *, logits: bool = False) -> Tensor:
        """`states` of a packed batch. Raises KlimbError where a row has more tokens than the model has positions."""
        if packed.longest > self.context:
            raise KlimbError(f"a row has {packed.longest} tokens", where=str(self.model.config.name_or_path),
                             why=f"this model takes {self.context}",
                             fix="lower max_prompt_tokens or max_tokens, or take a model with more")  # fmt: skip
        return self.states(packed.tokens, packed.positions, packed.plan, keep, read, logits=logits)

    def head(self) -> Head | None:
        """The output layer as a formula, or None when klimb has none for it (then the model's own logits are used)."""
        layer = self.model.get_output_embeddings()
        if type(layer) is not nn.Linear:  # an adapter on the head, a quantised layer
            return None
        config = self.model.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))

    def add_adapter(self, name: str, source: str) -> None:
        """A further adapter, of the same shape as `source` and with the same numbers."""
        self.peft.add_adapter(name, self.peft.peft_config[source])
        self._adapters_in_its_precision()
        self._used = _UNKNOWN
        numbers = dict(self.model.named_parameters())
        with torch.no_grad():
            for path, parameter in numbers.items():
                if f".{source}." in path and "lora_" in path:
                    numbers[path.replace(f".{source}.", f".{name}.")].copy_(parameter)

    def _adapters_in_its_precision(self) -> None:
        """peft makes them in float32, and each would keep its layer's input in float32 a second time. What training
        needs in float32 are the masters, and those the learner has."""
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.model.dtype)

    def named_weights(self, adapter: str | None) -> dict[str, Tensor]:
        """All weights, or an adapter's, whether they are trained or not."""
        named = {name: p.detach() for name, p in self.model.named_parameters()}
        return named if adapter is None else {n: p for n, p in named.items() if "lora_" in n and f".{adapter}." in n}

    def trainable(self, adapter: str | None = "policy") -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name: the adapter's, or all of a model without adapters."""
        if self.peft is None:
            return dict(self.model.named_parameters())
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n and f".{adapter}." in n}


def _computed_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # there is no dropout


def _new_adapter(model: PreTrainedModel, lora: LoRA) -> Any:
    from peft import LoraConfig, get_peft_model

    is_classifier = hasattr(model, "score")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, lora_dropout=0.0,
        task_type=None if is_classifier else "CAUSAL_LM", exclude_modules=["score"] if is_classifier else None,
    )  # fmt: skip
    try:
        with warnings.catch_warnings(action="ignore", category=Warning):  # of what is mended or refused below
            adapted = get_peft_model(model, config, adapter_name="policy")
    except ValueError as error:
        raise KlimbError(f"lora.targets={lora.targets}: {str(error).splitlines()[0]}") from None
    ends = (model.get_input_embeddings(), None if is_classifier else model.get_output_embeddings())
    if model.config.get_text_config().tie_word_embeddings and any(hasattr(layer, "lora_A") for layer in ends):
        raise KlimbError(f"lora.targets={lora.targets}: adapts the embedding or the head",
                         why="in this model both are one matrix, and merged the adapter would change both",
                         fix="leave them out, as all-linear does")  # fmt: skip
    return adapted


def _check_same(adapter: Path, lora: LoRA) -> None:
    """An adapter has its shape already; settings that ask for another one would be ignored."""
    given = json.loads((adapter / "adapter_config.json").read_text())
    for key, has, wanted in (("rank", given["r"], lora.rank), ("alpha", given["lora_alpha"], lora.alpha)):
        if has != wanted:
            raise KlimbError(f"lora.{key}={wanted:g}: the adapter in {adapter} has {key} {has:g}",
                             fix=f"set lora.{key}={has:g} to train it further, or start from a model that it was "
                             "merged into (klimb export)")  # fmt: skip
    has_targets = given["target_modules"]
    if lora.targets != "all-linear" and _names(lora.targets) != _names(has_targets):
        raise KlimbError(f"lora.targets={lora.targets}: the adapter in {adapter} is on {has_targets}",
                         fix="leave lora.targets out to train it further, or start from a model that it was merged "
                         "into (klimb export)")  # fmt: skip


def _names(targets: str | list[str]) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets)
