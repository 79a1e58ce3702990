"""A token of every running sample through a whole decoder layer, in one call; see decoder.c."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb import native

PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    """The `Layer` of decoder.c."""

    _fields_ = (
        *((name, c_int64) for name in ("hidden", "inner", "heads", "groups", "D", "window")),
        *((name, c_float) for name in ("scale", "offset", "eps")),
        *((name, c_void_p) for name in ("before", "between", "q_norm", "k_norm")),
        *((name, c_void_p) for name in PRODUCTS),
        *((f"{name}_bias", c_void_p) for name in PRODUCTS),
    )


class _Running(ctypes.Structure):
    """The `Running` of decoder.c."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "B", "longest_prompt", "length")),
        *((name, c_void_p) for name in (
            "cosine", "sine", "prompt_keys", "prompt_values", "keys", "values", "blocks", "slots", "prompt_of",
            "prompt_length", "drawn",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class Attending:
    """What a layer's attention is besides its weights. width: of a head; offset, eps: of all norms."""

    width: int
    scale: float
    window: int | None
    offset: float
    eps: float


class DecoderLayer:
    """The weights of a layer as they are now."""

    def __init__(
        self, attending: Attending, norms: Sequence[Tensor | None], products: Mapping[str, native.Panels],
        biases: Mapping[str, Tensor | None],
    ) -> None:  # fmt: skip
        """norms: before the attention, between it and the MLP, of queries and of keys, these or None; products by name.

        Raises ValueError where types or widths do not fit together.
        """
        q, k, v, o, gate, up, down = (products[name] for name in PRODUCTS)
        weights = [*(None if x is None else x.detach() for x in norms), *(products[name].numbers for name in PRODUCTS),
                   *(None if (x := biases[name]) is None else x.detach() for name in PRODUCTS)]  # fmt: skip
        self._held = [x for x in weights if x is not None]
        self.attending, self.dtype = attending, q.numbers.dtype
        self.hidden, self.inner, self.queries, self.keys = q.inputs, gate.outputs, q.outputs, k.outputs
        widths = (self.hidden, self.hidden, attending.width, attending.width)
        if (
            {x.dtype for x in self._held} != {self.dtype}
            or any(x is not None and x.numel() != wide for x, wide in zip(norms, widths, strict=True))
            or {p.inputs for p in (q, k, v, gate, up)} | {o.outputs, down.outputs} != {self.hidden}
            or (v.outputs, o.inputs, up.outputs, down.inputs) != (self.keys, self.queries, self.inner, self.inner)
            or self.queries % self.keys or self.keys % attending.width
        ):  # fmt: skip
            raise ValueError("the layer's weights do not fit together")
        self._layer = _Layer(
            self.hidden, self.inner, self.keys // attending.width, self.queries // self.keys, attending.width,
            attending.window or 0, attending.scale, attending.offset, attending.eps,
            *(None if x is None else x.data_ptr() for x in weights),
        )  # fmt: skip

    def takes(self, x: Tensor, cosine: Tensor, sine: Tensor, *stores: Tensor) -> bool:
        """x [1, n, hidden]; cosine, sine [1, n, D]; stores as in `native.attention_decode`."""
        return (
            x.dtype == self.dtype and native.takes(x, cosine, sine, *stores) and not torch.is_grad_enabled()
            and len(x) == 1 and cosine.shape == sine.shape == (1, x.shape[1], self.attending.width)
        )  # fmt: skip

    def __call__(
        self, x: Tensor, cosine: Tensor, sine: Tensor, stores: tuple[Tensor, Tensor, Tensor, Tensor],
        blocks: native.Blocks, prompt_lengths: Tensor, drawn: Tensor,
    ) -> Tensor:  # fmt: skip
        """x [n, hidden] → the same. cosine, sine [n, D] dense; the rest as in `native.attention_decode`."""
        n, y = len(x), x.clone(memory_format=torch.contiguous_format)
        room = x.new_empty(n * (self.hidden + max(2 * self.inner, 3 * (self.queries + self.keys))))
        terms = x.new_empty(n * (1 + max(self.hidden, self.inner, self.queries)), dtype=torch.float32)
        prompt_keys, keys = stores[0], stores[2]
        running = _Running(
            n, len(blocks.starts) - 1, prompt_keys.shape[2], keys.shape[1], cosine.data_ptr(), sine.data_ptr(),
            *(store.data_ptr() for store in stores), blocks.starts.data_ptr(), blocks.slots.data_ptr(),
            blocks.prompt_of.data_ptr(), prompt_lengths.data_ptr(), drawn.data_ptr(),
        )  # fmt: skip
        native.kernels(x).decoder_layer(
            y.data_ptr(), ctypes.byref(self._layer), ctypes.byref(running), room.data_ptr(), terms.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return y
