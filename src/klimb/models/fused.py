"""The small layers of a transformers model, computed by klimb's kernels where those can.

A layer is known by what it is made of and proven by its numbers: a copy with random weights has to answer as the
layer's own `forward` does, or nothing is taken over. No family has code here, the weights stay where they are, and
what the kernels do not take (another device or type, or `native.use(False)`) goes the layer's own way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from klimb import native
from klimb.models.linears import Forward, embedding_of, is_linear, linear_of, weight_gradient

_TOLERANCE = 1e-5
_NORM = "taken_over_with"
_ROTARY = "apply_rotary_pos_emb"
_GATED = ("gate_proj", "up_proj", "down_proj")


def take_over(model: nn.Module) -> None:
    """RMSNorms, gated MLPs, GELUs and rotary positions, each if it proves equal; linear layers and embeddings by type.

    Needs the kernels.
    """
    was = native.use(True)  # a layer's own way would prove nothing
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for module in model.modules():
                forward = (
                    _rms_norm_of(module) or _gated_mlp_of(module) or _gelu_of(module) or _with_rotary(module)
                    or linear_of(module) or embedding_of(module)
                )  # fmt: skip
                if forward is not None:
                    module.forward = MethodType(forward, module)
    finally:
        native.use(was)


def shadow_of(module: nn.Module) -> Any:
    """A copy that shares nothing that is set on it, and whose `forward` is its class's."""
    shadow = copy.copy(module)
    shadow._parameters, shadow._modules = dict(module._parameters), dict(module._modules)
    vars(shadow).pop("forward", None)
    return shadow


def _proven(module: nn.Module, forward: Forward, x: Tensor, parts: Mapping[str, nn.Parameter | nn.Module]) -> bool:
    """Does `forward` answer x as the layer's own does, with these parts in the place of its own?"""
    shadow = shadow_of(module)
    for name, part in parts.items():
        setattr(shadow, name, part)
    try:
        own = type(module).forward(shadow, x)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # called otherwise: another layer under a known name
        return False
    return torch.allclose(forward(shadow, x), own, rtol=_TOLERANCE, atol=_TOLERANCE)


def norm_of(module: nn.Module) -> tuple[float, float] | None:
    """Offset of its weights and epsilon of an RMSNorm that was taken over."""
    found: tuple[float, float] | None = vars(module).get(_NORM)
    return found


def is_gated_mlp(module: nn.Module) -> bool:
    """Was it taken over as one?"""
    return getattr(module.forward, "__func__", None) is _gated_mlp


def is_rotary(module: nn.Module) -> bool:
    """An attention whose rotary positions were taken over?"""
    return "forward" in vars(module)


# RMSNorm (Zhang & Sennrich 2019, eq. 4) -------------------------------------------------------------------------------


def _rms_norm_of(module: nn.Module) -> Forward | None:
    if "RMSNorm" not in type(module).__name__ or set(module._parameters) != {"weight"}:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        return None
    x, weight = torch.randn(2, 3, 24), nn.Parameter(torch.randn(24))
    for offset in (0.0, 1.0):  # Gemma keeps its weights around 0

        def forward(self: Any, x: Tensor, offset: float = offset) -> Tensor:
            if not (native.takes(x, self.weight) and x.is_contiguous()):
                return type(self).forward(self, x)
            if not torch.is_grad_enabled():
                return native.rms_norm_forward(x.view(-1, x.shape[-1]), self.weight, offset, eps)[0].view_as(x)
            return _RMSNorm.apply(x, self.weight, offset, eps)

        if _proven(module, forward, x, {"weight": weight}):
            vars(module)[_NORM] = (offset, float(eps))
            return forward
    return None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        y, scale = native.rms_norm_forward(rows, weight, offset, eps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.offset, ctx.shape = offset, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        grad = grad.contiguous().view(rows.shape)
        dx, dw = native.rms_norm_backward(rows, weight, ctx.offset, scale, grad)
        return dx.view(ctx.shape), dw, None, None


# Gated MLP (Shazeer 2020, eq. 6) --------------------------------------------------------------------------------------


def _gated_mlp_of(module: nn.Module) -> Forward | None:
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
        return None
    act = getattr(module, "act_fn", None)
    probe = torch.linspace(-6, 6, 49)
    if not callable(act) or not torch.allclose(act(probe), nn.functional.silu(probe), rtol=_TOLERANCE, atol=_TOLERANCE):
        return None
    linears = dict(zip(_GATED, (nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)), strict=True))
    return _gated_mlp if _proven(module, _gated_mlp, torch.randn(1, 3, 8), linears) else None


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    if not native.takes(x):
        return type(self).forward(self, x)
    weights = _trained_alone([getattr(self, name) for name in _GATED]) if torch.is_grad_enabled() else None
    if weights and native.takes(x, *weights):
        return _GatedMLP.apply(x, *weights)
    gate, up = self.gate_proj(x).contiguous(), self.up_proj(x).contiguous()
    if not native.takes(gate, up):
        return self.down_proj(self.act_fn(gate) * up)
    hidden = _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else native.swiglu_forward(gate, up)
    return self.down_proj(hidden)


def _trained_alone(linears: list[Any]) -> list[Tensor] | None:
    """The weights, if these layers are nothing else, without hooks of their own, and all of them are trained."""
    for m in linears:
        hooks = (m._forward_pre_hooks, m._forward_hooks, m._backward_pre_hooks, m._backward_hooks)
        if not is_linear(m) or m.bias is not None or any(hooks):
            return None
    return [m.weight for m in linears] if all(m.weight.requires_grad for m in linears) else None


class _GatedMLP(torch.autograd.Function):
    """Keeps what it was given and what it was gated by; what its last product takes is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor) -> Tensor:
        gate, up = (nn.functional.linear(x, weight).contiguous() for weight in (gate_weight, up_weight))
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        ctx.weights = gate_weight, up_weight, down_weight
        return nn.functional.linear(native.swiglu_forward(gate, up), down_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        hidden = (grad @ down_weight).contiguous()  # its gradient, which the kernel replaces by itself
        dgate, dup = native.swiglu_backward(gate, up, hidden, output_over_grad=True)
        of_gate, of_up, of_down = ctx.weights
        ddown = weight_gradient(of_down, hidden, grad)
        del hidden
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dgate @ gate_weight).flatten(0, -2).addmm_(dup.flatten(0, -2), up_weight).view(x.shape)
        return dx, weight_gradient(of_gate, x, dgate), weight_gradient(of_up, x, dup), ddown


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs; the sigmoid and the product are computed again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return native.swiglu_backward(gate, up, grad.contiguous())


# GELU by tanh (Hendrycks & Gimpel 2016, section 2) --------------------------------------------------------------------


def _gelu_of(module: nn.Module) -> Forward | None:
    """One operator of torch where a family writes the formula out."""
    if "GELU" not in type(module).__name__ or module._parameters or module._modules:
        return None
    return _gelu if _proven(module, _gelu, torch.linspace(-6, 6, 49), {}) else None


def _gelu(self: nn.Module, x: Tensor) -> Tensor:
    if not native.takes(x):
        return type(self).forward(self, x)
    return nn.functional.gelu(x, approximate="tanh")


# Rotary positions (Su et al. 2021, eq. 34) ----------------------------------------------------------------------------


def _with_rotary(module: nn.Module) -> Forward | None:
    """The attention's own forward, with another function under the name by which it rotates queries and keys.

    That function is a global of the family's module; a copy of `forward` with globals of its own leaves it alone.
    """
    own = type(module).forward
    if not isinstance(own, FunctionType) or _ROTARY not in own.__code__.co_names:
        return None
    theirs = own.__globals__[_ROTARY]
    q, k, cosine, sine = (torch.randn(1, *shape) for shape in ((4, 3, 8), (2, 3, 8), (3, 8), (3, 8)))
    try:
        answers = zip(theirs(q, k, cosine, sine), _rotated(q, k, cosine, sine), strict=True)
        proven = all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in answers)
    except (TypeError, RuntimeError):  # another signature
        proven = False
    if not proven:
        return None

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *further: Any, **named: Any) -> tuple[Tensor, Tensor]:
        plain = not further and not named and len(q) == 1 and cos.shape == (1, q.shape[2], q.shape[3])
        if not (plain and native.takes(q, k, cos, sin)):
            return theirs(q, k, cos, sin, *further, **named)
        return _rotated(q, k, cos, sin)

    forward = FunctionType(own.__code__, {**own.__globals__, _ROTARY: rotary}, own.__name__, own.__defaults__,
                           own.__closure__)  # fmt: skip
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _rotated(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """q [1, H, N, D], k [1, H_kv, N, D]; cosine, sine [1, N, D]."""
    if torch.is_grad_enabled():
        return _Rotary.apply(q, k, cosine, sine)
    cosine, sine = cosine[0].contiguous(), sine[0].contiguous()
    q, k = (native.rope(native.dense_rows(x[0]), cosine, sine)[None] for x in (q, k))
    return q, k


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = cosine[0].contiguous(), sine[0].contiguous()
        ctx.save_for_backward(cosine, sine)
        q, k = (native.rope(native.dense_rows(x[0]), cosine, sine)[None] for x in (q, k))
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        dq, dk = (native.rope(native.dense_rows(g[0]), cosine, sine, inverse=True)[None] for g in grads)
        return dq, dk, None, None
