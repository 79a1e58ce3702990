"""Linear layers and embeddings, known by their types.

Rollouts multiply by weights that were laid out for them, training adds gradients where their sums are; what the kernels
do not take goes torch's way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from klimb import native
from klimb.models.gradients import sum_so_far
from klimb.native.decoder import DecoderLayer

Forward = Callable[..., Any]


def linear_of(module: nn.Module) -> Forward | None:
    """How a linear layer is computed; None: it is none."""
    return {nn.Linear: _linear, Conv1D: _turned_linear}.get(type(module))


def weight_of(module: Any) -> Tensor | None:
    """A linear layer's, [outputs, inputs] whichever way it lies in memory (GPT-2's the other way round); None: it is
    none."""
    if type(module) is nn.Linear:
        return module.weight
    return module.weight.t() if type(module) is Conv1D else None


def is_linear(module: nn.Module) -> bool:
    """Was it taken over as one whose weight is [outputs, inputs]?"""
    return getattr(module.forward, "__func__", None) is _linear


def _taken_over(module: nn.Module) -> bool:
    return is_linear(module) or getattr(module.forward, "__func__", None) is _turned_linear


class Ready(NamedTuple):
    """Weights of linear layers as a rollout multiplies by them, and decoder layers that are computed in one call."""

    panels: Mapping[nn.Module, native.Panels]
    layers: dict[nn.Module, DecoderLayer | None]
    """Filled by the first token."""


_ready = Ready({}, {})


def ready_of(model: nn.Module, head: nn.Module | None) -> Ready:
    """The weights of the layers that were taken over, but for the head's, as a rollout multiplies by them: once they
    are laid out in the order in which they are read, a few rows take half of the time or less."""
    weights: dict[nn.Module, Tensor] = {
        module: weight for module in model.modules()
        if module is not head and (weight := weight_of(module)) is not None and _taken_over(module)
        and (module.bias is None or module.bias.dtype == weight.dtype)
    }  # fmt: skip
    if not weights or not native.takes(*weights.values()) or native.too_large(weights.values()):
        return Ready({}, {})
    return Ready({module: native.panels(weight) for module, weight in weights.items()}, {})


@contextmanager
def decoding(weights: Ready) -> Iterator[None]:
    """Within, these layers are computed with what is ready of them."""
    global _ready
    before, _ready = _ready, weights
    try:
        yield
    finally:
        _ready = before


def ready() -> Ready:
    """What `decoding` is given."""
    return _ready


def _linear(self: Any, x: Tensor, turned: bool = False) -> Tensor:
    panels = _ready.panels.get(self)
    if panels is not None and not torch.is_grad_enabled() and native.takes(x, panels.numbers):
        return native.product(x, panels, self.bias)
    if torch.is_grad_enabled() and self.weight.requires_grad and native.takes(x, self.weight):
        return _Linear.apply(x, self.weight, self.bias, turned)
    return nn.functional.linear(x, self.weight.t() if turned else self.weight, self.bias)


def _turned_linear(self: Any, x: Tensor) -> Tensor:
    return _linear(self, x, turned=True)


class _Linear(torch.autograd.Function):
    """turned: the weight is [inputs, outputs], so in its gradient the two factors change places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.turned = weight, turned
        return nn.functional.linear(x, weight.t() if turned else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        dx = grad @ (weight.t() if ctx.turned else weight) if needs_x else None
        dbias = grad.flatten(0, -2).sum(0) if needs_bias else None
        factors = (grad, x) if ctx.turned else (x, grad)
        return dx, weight_gradient(ctx.weight, *factors), dbias, None


def weight_gradient(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor | None:
    """From the second micro-batch on it is added where it is, within the product that computes it, and nothing is
    returned: a matrix less to write, and two less to read.

    weight: itself. What autograd keeps of it may be a copy without a gradient, where activations are computed again.
    """
    rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
    by_row = weight.is_contiguous()  # a gradient that lies the other way round would be copied by autograd
    total = sum_so_far(weight)
    if total is None or total.dtype != rows.dtype or total.stride() != weight.stride():
        product = grads.t() @ rows if by_row else (rows.t() @ grads).t()
        if total is None:
            return product
        total.add_(product)
    elif by_row:
        total.addmm_(grads.t(), rows)
    else:
        total.t().addmm_(rows.t(), grads)
    return None


# Embeddings -----------------------------------------------------------------------------------------------------------


def embedding_of(module: nn.Module) -> Forward | None:
    """How an embedding is computed; None: it is none, or one of another kind."""
    plain = type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    return _embedding if plain and not module.sparse else None


def _embedding(self: Any, tokens: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and self.weight.requires_grad and native.takes(self.weight)):
        return nn.functional.embedding(tokens, self.weight, self.padding_idx)
    return _Embedding.apply(tokens, self.weight, -1 if self.padding_idx is None else self.padding_idx)


class _Embedding(torch.autograd.Function):
    """From the second micro-batch on the rows that were looked up are added where the sum is: torch makes a matrix of
    zeros for them, as large as the vocabulary, and adds that."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.padding = padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        total = sum_so_far(weight)
        if total is None or total.dtype != torch.float32:
            return None, torch.ops.aten.embedding_dense_backward(grad, tokens, len(weight), ctx.padding, False), None
        rows = grad.masked_fill((tokens == ctx.padding)[..., None], 0).flatten(0, -2)
        total.index_add_(0, tokens.flatten(), rows.float())
        return None, None, None
