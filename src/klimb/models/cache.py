"""Keys and values of running generations, allocated once: every running sequence owns a slot.

Slots [0, n) are the running ones, so that a decode step reads one slice and copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.models.attention import PackedAttention, additive, attention


class KVCache:
    """Per layer K and V [slots, H_kv, length, D], made at the first use when the model's shapes are seen."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [1, H_kv, N, D] of the first call tell heads, width, dtype and device."""
        if index not in self.layers:
            shape = (self.slots, k.shape[1], self.length)
            self.layers[index] = (k.new_zeros(*shape, k.shape[-1]), v.new_zeros(*shape, v.shape[-1]))
        return self.layers[index]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole slots: the last running ones into those that became free."""
        for keys, values in self.layers.values():
            for store in (keys, values):
                store[list(targets)] = store[list(sources)]


@dataclass
class Prefill:
    """Plan of computing prompts, packed side by side, and storing each in the slots of all its samples."""

    cache: KVCache
    packed: PackedAttention
    places: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(cache: KVCache, prompts: Sequence[range], slots: Sequence[Sequence[int]], device: torch.device) -> Prefill:
        """prompts: flat range of each; slots: which slots continue it."""
        flat, slot, position = [], [], []
        for prompt, owners in zip(prompts, slots, strict=True):
            steps = torch.arange(len(prompt), device=device)
            for owner in owners:
                flat.append(prompt.start + steps)
                slot.append(torch.full_like(steps, owner))
                position.append(steps)
        places = (torch.cat(flat), torch.cat(slot), torch.cat(position))
        return Prefill(cache, PackedAttention([(prompt, range(0)) for prompt in prompts], device), places)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        flat, slot, position = self.places
        keys, values = self.cache.layer(layer, k, v)
        keys[slot, :, position] = k[0].transpose(0, 1)[flat]
        values[slot, :, position] = v[0].transpose(0, 1)[flat]
        return self.packed.attend(layer, q, k, v, scale, window, softcap)


class Decode:
    """Plan of one further token for each of the first n slots, at its own position. positions [n]."""

    def __init__(self, cache: KVCache, positions: Tensor, longest: int) -> None:
        """longest: the largest position + 1, known to the caller so that nothing has to be read back."""
        self.cache = cache
        self.positions = positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.longest = longest
        self.masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        keys, values = self.cache.layer(layer, k, v)
        keys[self.rows, :, self.positions] = k[0].transpose(0, 1)
        values[self.rows, :, self.positions] = v[0].transpose(0, 1)
        n = len(self.rows)
        seen_keys, seen_values = keys[:n, :, : self.longest], values[:n, :, : self.longest]
        out = attention(
            q[0].transpose(0, 1)[:, :, None], seen_keys, seen_values, self.mask(window, q.dtype), scale, softcap
        )
        return out[:, :, 0][None]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if (window, dtype) not in self.masks:
            distance = self.positions[:, None] - torch.arange(self.longest, device=self.positions.device)[None, :]
            allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self.masks[window, dtype] = additive(allowed[:, None, None], dtype)
        return self.masks[window, dtype]
