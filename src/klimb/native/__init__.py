"""klimb's own CPU kernels: C, compiled once on this machine, called through ctypes, never required.

Each has a path in torch beside it that gives the same numbers up to rounding; `takes` says which of the two a call
goes. Whether they are used is decided when a run begins, and recorded, like the number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_float, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from klimb.native.build import Unavailable, identity, library

_BLOCK = 16  # samples of a prompt that are computed together
_LANES = 16  # float32 in the widest vector
_GRAIN = 16_384  # numbers that a thread should have, or it is not worth waking
_MOST = 2**32  # bytes of weights that are held a second time while they are decoded with
_SUFFIX = {torch.float32: "", torch.bfloat16: "_bf16"}
"""Of the functions for tensors of a type. All compute in float32."""
_on = True
_counted = False


def use(on: bool) -> bool:
    """For the whole process, as torch.set_num_threads. Returns how it was."""
    global _on
    was, _on = _on, on
    return was


def made_of() -> str | None:
    """Sources, compiler and processor in a word: kernels of others may round differently. None: there are none."""
    return identity() if why_not() is None else None


def why_not() -> str | None:
    """What is in the way of the kernels here; None: nothing."""
    try:
        _all_kernels()
    except Unavailable as reason:
        return str(reason)
    return None


@contextmanager
def counting() -> Iterator[None]:
    """Within, tensors of torch's meta device go the way of the kernels, too: nothing is computed, and what the kernels
    would be given to write on can be counted."""
    global _counted
    was, _counted = _counted, True
    try:
        yield
    finally:
        _counted = was


def takes(*tensors: Tensor) -> bool:
    """Do the kernels compute with these tensors? They have to hold numbers of one type, float32 or bfloat16."""
    dtype = tensors[0].dtype
    if not _on or dtype not in _SUFFIX:
        return False
    for x in tensors:  # asked for every layer of every token: a generator would take three times as long
        if x.dtype != dtype or not (x.is_cpu or (_counted and x.is_meta)):
            return False
    return why_not() is None


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Do they compute attention of this kind? Values have to be as wide as keys."""
    return q.shape[-1] == v.shape[-1] and takes(q, k, v)


class _Shape(ctypes.Structure):
    """The `Shape` of attention.c."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "groups", "D", "window")),
        ("scale", c_float),
        *((name, c_int64) for name in ("qh", "qn", "kh", "kn", "vh", "vn")),
    )


_SIGNATURES = {
    "attention_forward": [c_void_p] * 7 + [c_int64] * 2 + [c_void_p, c_int64],
    "attention_backward": [c_void_p] * 10 + [c_int64] * 2 + [c_void_p, c_int64],
    "attention_decode": [c_void_p] * 12 + [c_int64] * 2 + [c_void_p, c_int64, c_void_p, c_int64],
    "rms_norm_forward": [c_void_p] * 2 + [c_float] * 2 + [c_void_p] * 2 + [c_int64] * 3,
    "rms_norm_backward": [c_void_p] * 2 + [c_float] + [c_void_p] * 4 + [c_int64] * 3,
    "rope": [c_void_p] + [c_int64] * 2 + [c_void_p] * 3 + [c_int64] * 5,
    "swiglu_forward": [c_void_p] * 3 + [c_int64] * 2,
    "swiglu_backward": [c_void_p] * 5 + [c_int64] * 3,
    "decoder_layer": [c_void_p] * 5 + [c_int64],
    "panels": [c_void_p] + [c_int64] * 2 + [c_void_p] + [c_int64] * 3,
    "panels_product": [c_void_p] * 5 + [c_int64] * 4,
    "token_logps_forward": [c_void_p] * 2 + [c_float] + [c_void_p] * 3 + [c_int64] * 3,
    "token_logps_backward": [c_void_p] * 2 + [c_float] + [c_void_p] * 4 + [c_int64] * 3,
}


_HEADS = ("token_logps_forward", "token_logps_backward")
"""For float32 alone."""


class _Nothing:
    """Each of the functions, for tensors without numbers."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


class _Kernels:
    """The functions of the library for tensors of one type, with their signatures."""

    def __init__(self, loaded: ctypes.CDLL, suffix: str) -> None:
        for name, signature in _SIGNATURES.items():
            if suffix and name in _HEADS:
                continue
            function = getattr(loaded, name + suffix)
            function.argtypes, function.restype = signature, None
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


_NOTHING = _Nothing()
_loaded: dict[torch.dtype, _Kernels] | Unavailable | None = None


def kernels(x: Tensor) -> _Kernels | _Nothing:
    """Those for numbers of x's type. Raises Unavailable."""
    return _NOTHING if x.is_meta else _all_kernels()[x.dtype]


def _all_kernels() -> dict[torch.dtype, _Kernels]:
    """Built and loaded on the first call. Raises Unavailable, then and ever after."""
    global _loaded
    if _loaded is None:
        try:
            found = library()
            _loaded = {dtype: _Kernels(found, suffix) for dtype, suffix in _SUFFIX.items()}
        except Unavailable as reason:
            _loaded = reason
    if isinstance(_loaded, Unavailable):
        raise _loaded
    return _loaded


def _threads(numbers: int) -> int:
    return max(1, min(torch.get_num_threads(), numbers // _GRAIN))


def _shape(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> _Shape:
    """q [H, N, D], k and v [H_kv, N, D] in any order of heads and tokens."""
    heads = k.shape[0]
    return _Shape(
        heads, q.shape[0] // heads, q.shape[2], window or 0, scale, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    )


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last dimension lies dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Trees:
    """Which tokens see which, as the kernels read it: spans with their contexts, in trees that share nothing."""

    def __init__(self, spans: Tensor, trees: Tensor) -> None:
        """spans [S, 4] (first query, queries, first token of the context, its length), trees [T + 1], both int64."""
        self.spans, self.trees = spans.contiguous(), trees.contiguous()


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, trees: Trees, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q [H, N, D], k, v [H_kv, N, D] → [N, H, D], and the log of each query's sum of exponentials [H, N], float32."""
    heads, tokens, width = q.shape
    out, lse = q.new_empty(tokens, heads, width), q.new_empty(heads, tokens, dtype=torch.float32)
    shape = _shape(q, k, v, scale, window)
    kernels(q).attention_forward(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), trees.spans.data_ptr(),
        trees.trees.data_ptr(), len(trees.trees) - 1, tokens, ctypes.byref(shape), torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad: Tensor, trees: Trees, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [N, H, D] → the gradients of q, k and v in their shapes."""
    heads, tokens, width = q.shape
    grad = grad.contiguous()
    dq, dk, dv = q.new_empty(tokens, heads, width), *(q.new_empty(tokens, x.shape[0], width) for x in (k, v))
    shape = _shape(q, k, v, scale, window)
    kernels(q).attention_backward(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), lse.data_ptr(), grad.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), trees.spans.data_ptr(), trees.trees.data_ptr(), len(trees.trees) - 1, tokens,
        ctypes.byref(shape), torch.get_num_threads(),
    )  # fmt: skip
    return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


class Blocks:
    """The slots by the prompt that they share, at most 16 in a block."""

    def __init__(self, prompt_of: Sequence[int]) -> None:
        """prompt_of [n]: place of each slot's prompt."""
        slots = sorted(range(len(prompt_of)), key=lambda slot: (prompt_of[slot], slot))
        starts: list[int] = []
        for i, slot in enumerate(slots):
            if not starts or prompt_of[slot] != prompt_of[slots[starts[-1]]] or i - starts[-1] == _BLOCK:
                starts.append(i)
        self.slots, self.prompt_of = torch.tensor(slots), torch.tensor(prompt_of)
        self.starts = torch.tensor([*starts, len(slots)])


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, prompt_keys: Tensor, prompt_values: Tensor, keys: Tensor, values: Tensor,
    blocks: Blocks, prompt_lengths: Tensor, drawn: Tensor, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """One token for each of n slots: q [H, n, D], k, v [H_kv, n, D] → [n, H, D]; k and v are stored.

    prompt_keys [P · H_kv, D, length], a multiple of 32; prompt_values [P · H_kv, length, D]; keys, values
    [slots · H_kv, length, D]; prompt_lengths, drawn [n] int64: of each slot's prompt, and tokens that it drew so far,
    this one included.
    """
    heads, rows, width = q.shape
    out = q.new_empty(rows, heads, width)
    shape = _shape(q, k, v, scale, window)
    kernels(q).attention_decode(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), prompt_keys.data_ptr(), prompt_values.data_ptr(), keys.data_ptr(),
        values.data_ptr(), blocks.starts.data_ptr(), blocks.slots.data_ptr(), blocks.prompt_of.data_ptr(),
        prompt_lengths.data_ptr(), drawn.data_ptr(), prompt_keys.shape[2], keys.shape[1], out.data_ptr(),
        len(blocks.starts) - 1, ctypes.byref(shape), _threads(q.numel() * 64),
    )  # fmt: skip
    return out


def rms_norm_forward(x: Tensor, weight: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
    """x [n, d] / rms · (offset + weight), and 1 / rms [n], float32."""
    y, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    kernels(x).rms_norm_forward(
        x.data_ptr(), weight.data_ptr(), offset, eps, y.data_ptr(), scale.data_ptr(), *x.shape, _threads(x.numel())
    )
    return y, scale


def rms_norm_backward(x: Tensor, weight: Tensor, offset: float, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    threads = _threads(x.numel())
    dx, partial = torch.empty_like(x), x.new_empty(threads, x.shape[1], dtype=torch.float32)
    kernels(x).rms_norm_backward(
        x.data_ptr(), weight.data_ptr(), offset, scale.data_ptr(), grad.data_ptr(), dx.data_ptr(), partial.data_ptr(),
        *x.shape, threads,
    )  # fmt: skip
    return dx, (partial.sum(0) if threads > 1 else partial[0]).to(x.dtype)


def rope(x: Tensor, cosine: Tensor, sine: Tensor, inverse: bool = False) -> Tensor:
    """Rotary positions of x [H, N, D] by cos and sin [N, D] (each half against the other), or the transposed map."""
    heads, tokens, width = x.shape
    y = x.new_empty(tokens, heads, width)
    kernels(x).rope(
        x.data_ptr(), *x.stride()[:2], cosine.data_ptr(), sine.data_ptr(), y.data_ptr(), tokens, heads, width, inverse,
        _threads(x.numel()),
    )  # fmt: skip
    return y.transpose(0, 1)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    y = torch.empty_like(gate)
    kernels(gate).swiglu_forward(gate.data_ptr(), up.data_ptr(), y.data_ptr(), y.numel(), _threads(y.numel()))
    return y


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor, *, output_over_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Their gradients. output_over_grad: what `swiglu_forward` answered is written where grad was."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    kernels(gate).swiglu_backward(
        gate.data_ptr(), up.data_ptr(), grad.data_ptr(), dgate.data_ptr(), dup.data_ptr(), gate.numel(),
        output_over_grad, _threads(gate.numel()),
    )  # fmt: skip
    return dgate, dup


class Panels(NamedTuple):
    """A weight [outputs, inputs] as `product` reads it."""

    numbers: Tensor
    outputs: int
    inputs: int


def too_large(weights: Iterable[Tensor]) -> bool:
    """Would their panels take more room than they save time for?"""
    return sum(weight.nbytes for weight in weights) > _MOST


def panels(weight: Tensor) -> Panels:
    """weight [N, K] in any order of memory."""
    outputs, inputs = weight.shape
    columns = 2 * _LANES
    numbers = weight.new_empty(-(-outputs // columns) * columns * (inputs + inputs % 2))
    kernels(weight).panels(
        weight.data_ptr(), *weight.stride(), numbers.data_ptr(), outputs, inputs, _threads(weight.numel())
    )
    return Panels(numbers, outputs, inputs)


def product(x: Tensor, weight: Panels, bias: Tensor | None) -> Tensor:
    """x [..., K] times a weight of [N, K]: [..., N]. A row's numbers do not depend on the other rows.

    Raises ValueError where x is not as wide as the weight.
    """
    if x.shape[-1] != weight.inputs:
        raise ValueError(f"a weight of {weight.inputs} inputs does not take {x.shape[-1]}")
    rows = x.numel() // weight.inputs
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], weight.outputs)
    terms = x.new_empty(x.numel() + rows, dtype=torch.float32)
    kernels(x).panels_product(
        x.data_ptr(), weight.numbers.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        terms.data_ptr(), rows, weight.outputs, weight.inputs, _threads(rows * weight.numbers.numel() // 4),
    )  # fmt: skip
    return y


def token_logps_forward(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of softmax(logits / temperature), logits [m, V] float32 and dense, targets [m] int64: log-probs of the targets,
    logs of the normalising sums, entropies; [m] each. Raises IndexError for a target that no logit belongs to."""
    if len(targets) and not targets.is_meta and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise IndexError(f"targets from {targets.min()} to {targets.max()} of {logits.shape[1]} tokens")
    targets = targets.contiguous()
    logps, normalisers, entropies = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))
    kernels(logits).token_logps_forward(
        logits.data_ptr(), targets.data_ptr(), 1 / temperature, logps.data_ptr(), normalisers.data_ptr(),
        entropies.data_ptr() if with_entropy else None, *logits.shape, _threads(logits.numel()),
    )  # fmt: skip
    return logps, normalisers, entropies if with_entropy else None


def token_logps_backward_(
    logits: Tensor, targets: Tensor, temperature: float, normalisers: Tensor, entropies: Tensor, grad_logps: Tensor,
    grad_entropies: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, written over them. The targets are those of the forward pass."""
    targets, grads = targets.contiguous(), grad_logps.contiguous()
    of_entropies = None if grad_entropies is None else grad_entropies.contiguous()
    kernels(logits).token_logps_backward(
        logits.data_ptr(), targets.data_ptr(), 1 / temperature, normalisers.data_ptr(), entropies.data_ptr(),
        grads.data_ptr(), None if of_entropies is None else of_entropies.data_ptr(), *logits.shape,
        _threads(logits.numel()),
    )  # fmt: skip
    return logits
