"""A model by its config alone, on torch's meta device: what it weighs, and what a pass over it holds, in bytes.

No formula stands for the activations: the very code of a micro-batch runs on tensors without numbers, and the storages
that live at a time are counted. Of many layers the first three are computed, each further one adds what the third
added; of many samples a few.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from klimb import native
from klimb.batch import Row, TokenBatch
from klimb.models import attention, code, fused, nf4
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, RewardModel
from klimb.models.linears import weight_of
from klimb.models.load import HALF, LoRA
from klimb.models.logprobs import kept_logits
from klimb.models.place import base_of, check_place

META = torch.device("meta")
_FEW_SAMPLES = 8  # computed; so many and twice so many tell what each further one adds
_COMPUTED_LAYERS = (2, 3)  # two, for what the kinds of a family with alternating layers share among their own

_Measure = Callable[[TokenBatch], tuple[int, int]]


class Shape(NamedTuple):
    """Samples of `prompt` + `completion` tokens, of which `samples` share a prompt."""

    prompt: int
    completion: int
    samples: int = 1

    def fitting(self, budget: int) -> int:
        """Samples of at most `budget` flat tokens together, at least one."""
        groups, rest = divmod(budget, self.prompt + self.samples * self.completion)
        return max(groups * self.samples + max((rest - self.prompt) // self.completion, 0), 1)

    def batch(self, count: int) -> TokenBatch:
        """So many samples."""
        owners = [sample // self.samples for sample in range(count)]
        completion, mask = [0] * self.completion, [True] * self.completion
        # Another prompt for every group: equal ones would be shared.
        rows = [[Row([group] * self.prompt, completion, mask)] for group in owners]
        return TokenBatch.from_rows(rows, owners, ["row"] * count)


class Held(NamedTuple):
    """Bytes of a training pass: what the forward pass keeps for the backward pass, and what both hold at most besides.
    Gradients of parameters are not in it."""

    kept: int
    besides: int


class Outline:
    """A policy (or reward model) without weights, with new adapters where `lora` is given."""

    def __init__(
        self, model: str, dtype: torch.dtype, lora: LoRA | None = None, *, classifier: bool = False,
        kernels: bool = False,
    ) -> None:  # fmt: skip
        """kernels: is it computed by klimb's own, which have to be there?

        Raises KlimbError, OSError, ValueError or KeyError where the config cannot be read.
        """
        check_place(model)
        adapter = Path(model) / "adapter_config.json"
        if lora is not None and adapter.is_file():  # training goes on with that adapter, whatever is asked for
            own = json.loads(adapter.read_text())
            lora = LoRA(rank=own["r"], targets=own["target_modules"], base=lora.base)
        base = base_of(model)
        config = AutoConfig.from_pretrained(base, **code.loading(base), **({"num_labels": 1} if classifier else {}))
        kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        with META, warnings.catch_warnings(action="ignore"):
            building = {"dtype": dtype, "attn_implementation": attention.NAME, **code.building(base)}
            network = kind.from_config(config, **building).eval()
            network.config.pad_token_id = None  # transformers would look for it among tokens without numbers
            if kernels:
                with torch.device("cpu"):
                    fused.take_over(network)
            self.weights = size(network.parameters())
            if lora is not None and lora.base == "4bit":
                self.weights -= nf4.saving(network)
            self.backbone = Backbone(network, None, lora)
            self.face = RewardModel(self.backbone) if classifier else Policy(self.backbone, "policy" if lora else None)
        self.panels = self._panels(network, lora)
        trained = [*self.face.trainable().values()]
        self.trained = sum(p.numel() for p in trained)
        self.adapters = size(trained) if lora else 0
        self.masters = sum(4 * p.numel() for p in trained if p.dtype in HALF)
        self.gradients = size(trained) + self.masters
        self.config = config.get_text_config()
        self.dtype, self.kernels = dtype, kernels
        self.can_compute_again = any(isinstance(m, GradientCheckpointingLayer) for m in network.modules())

    def _panels(self, network: nn.Module, lora: LoRA | None) -> int:
        """What a rollout on a CPU holds of its layers a second time, see `linears.ready_of`."""
        head = self.backbone.model.get_output_embeddings()
        weights = [
            weight for name, module in network.named_modules()
            if module is not head and "lora_" not in name and (weight := weight_of(module)) is not None
        ]  # fmt: skip
        return 0 if native.too_large(weights) or (lora is not None and lora.base == "4bit") else size(weights)

    def training(self, shape: Shape, budget: int, *, checkpointing: bool, waiting: bool = False) -> Held:
        """A micro-batch of `budget` tokens. waiting: do few logits wait for the backward pass, see `token_logps`?"""

        def once(batch: TokenBatch) -> tuple[int, int]:
            with self._as_computed(), _Count() as count:
                outputs = self.face(batch)
                kept = count.live
                (outputs if isinstance(outputs, Tensor) else outputs.logps).sum().backward()
            return kept, count.peak

        with self._without_gradients():
            kept, peak = self._by_samples(shape, budget, once, checkpointing)
        logits = 0
        if waiting and isinstance(self.face, Policy) and not self.face.own_head:
            logits = kept_logits(shape.fitting(budget) * shape.completion, self.config.vocab_size)
        return Held(kept + logits, peak - kept)

    def scoring(self, shape: Shape, budget: int) -> int:
        """The most that a pass without gradient holds."""

        def once(batch: TokenBatch) -> tuple[int, int]:
            with torch.no_grad(), self._as_computed(), _Count() as count:
                self.face(batch)
            return 0, count.peak

        return self._by_samples(shape, budget, once, False)[1]

    def _by_samples(self, shape: Shape, budget: int, measure: _Measure, checkpointing: bool) -> tuple[int, int]:
        count = shape.fitting(budget)
        few = -(-_FEW_SAMPLES // shape.samples) * shape.samples  # whole groups
        if count <= 2 * few:
            return self._by_layers(partial(measure, shape.batch(count)), checkpointing)
        one, two = (self._by_layers(partial(measure, shape.batch(n)), checkpointing) for n in (few, 2 * few))
        kept, peak = (b + (count - 2 * few) * (b - a) // few for a, b in zip(one, two, strict=True))
        return kept, peak

    def _by_layers(self, measure: Callable[[], tuple[int, int]], checkpointing: bool) -> tuple[int, int]:
        found = [(name, m) for name, m in self.backbone.named_modules() if _are_layers(m)]
        layers = [*found[0][1].children()] if found else []
        if len(found) != 1 or len(layers) <= _COMPUTED_LAYERS[-1]:
            return self._measured(measure, checkpointing)
        holder, _, name = found[0][0].rpartition(".")
        place = self.backbone.get_submodule(holder)
        results = []
        for few in _COMPUTED_LAYERS:
            setattr(place, name, nn.ModuleList([*layers[: few - 1], layers[-1]]))
            results.append(self._measured(measure, checkpointing))
        setattr(place, name, nn.ModuleList(layers))
        further = len(layers) - _COMPUTED_LAYERS[-1]
        kept, peak = (more + further * (more - few) for few, more in zip(*results, strict=True))
        return kept, peak

    def _measured(self, measure: Callable[[], tuple[int, int]], checkpointing: bool) -> tuple[int, int]:
        if not checkpointing:
            return measure()
        layers = [m for m in self.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        forwards = [layer.forward for layer in layers]
        self.backbone.checkpoint_activations()
        found = measure()
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        return found

    @contextmanager
    def _as_computed(self) -> Iterator[None]:
        """By the kernels, or by torch with an attention that does not hold its scores."""
        with _flash(), native.counting() if self.kernels else nullcontext():
            yield

    @contextmanager
    def _without_gradients(self) -> Iterator[None]:
        """Those of parameters are dropped as they come."""
        trained = [p for p in self.face.parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(_forget) for p in trained]
        yield
        for handle in handles:
            handle.remove()


def size(tensors: Any) -> int:
    """Bytes of tensors; one that comes twice (tied weights) counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _are_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(isinstance(m, GradientCheckpointingLayer) for m in module)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Count(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self.seen | given:
                storage = tensor.untyped_storage()
                self.seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, count: int) -> None:
        self.seen.discard(key)
        self.live -= count


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _flash() -> Iterator[None]:
    """On the meta device torch's attention would hold all its scores; real devices have kernels that do not."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **_: _FlashAttention.apply(q, k, v, attn_mask)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None
