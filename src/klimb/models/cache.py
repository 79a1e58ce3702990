"""Keys and values of running generations: those of a prompt once for all its samples, and each sample's own.

Prompts [0, P) and slots [0, n) are the running ones, so that a decode step reads one slice and copies nothing. A step
multiplies all queries of a prompt's samples with that prompt's keys at once, and every query with its sample's own
keys; one softmax runs over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from klimb.models.attention import PackedAttention, additive
from klimb.models.logprobs import precision


class _Layer(NamedTuple):
    """Keys and values [places, H_kv, length, D] of the prompts and of the slots."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class KVCache:
    """`prompts` places of `prompt_length` tokens and `slots` of `length`, made when a model's shapes are first seen."""

    def __init__(self, prompts: int, prompt_length: int, slots: int, length: int) -> None:
        self.prompts, self.prompt_length, self.slots, self.length = prompts, prompt_length, slots, length
        self.layers: dict[int, _Layer] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> _Layer:
        """k, v [1, H_kv, N, D] of the first call tell heads, width, dtype and device."""
        if index not in self.layers:
            prompt = (self.prompts, k.shape[1], self.prompt_length)
            own = (self.slots, k.shape[1], self.length)
            self.layers[index] = _Layer(
                k.new_zeros(*prompt, k.shape[-1]), v.new_zeros(*prompt, v.shape[-1]),
                k.new_zeros(*own, k.shape[-1]), v.new_zeros(*own, v.shape[-1]),
            )  # fmt: skip
        return self.layers[index]

    def grow(self, prompts: int, prompt_length: int) -> None:
        """Make room for more or longer prompts; what is stored stays where it is."""
        if prompts <= self.prompts and prompt_length <= self.prompt_length:
            return
        more, longer = max(prompts - self.prompts, 0), max(prompt_length - self.prompt_length, 0)
        self.prompts, self.prompt_length = self.prompts + more, self.prompt_length + longer
        for index, layer in self.layers.items():
            keys, values = (pad(store, (0, 0, 0, longer, 0, 0, 0, more)) for store in layer[:2])
            self.layers[index] = layer._replace(prompt_keys=keys, prompt_values=values)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole slots: the last running ones into those that became free."""
        for layer in self.layers.values():
            for store in (layer.keys, layer.values):
                store[list(targets)] = store[list(sources)]

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for layer in self.layers.values():
            for store in (layer.prompt_keys, layer.prompt_values):
                store[list(targets)] = store[list(sources)]


@dataclass
class Prefill:
    """Plan of computing prompts, packed side by side, and storing each in its place."""

    cache: KVCache
    packed: PackedAttention
    places: Tensor
    positions: Tensor

    @staticmethod
    def of(cache: KVCache, prompts: Sequence[range], first: int, device: torch.device) -> Prefill:
        """prompts: flat range of each; they take the places `first`, `first` + 1, …"""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(first, first + len(prompts), device=device).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        return Prefill(cache, PackedAttention([(prompt, range(0)) for prompt in prompts], device), places, positions)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        stored = self.cache.layer(layer, k, v)
        stored.prompt_keys[self.places, :, self.positions] = k[0].transpose(0, 1)
        stored.prompt_values[self.places, :, self.positions] = v[0].transpose(0, 1)
        return self.packed.attend(layer, q, k, v, scale, window, softcap)


class Decode:
    """Plan of one further token for each of the first n slots."""

    def __init__(self, cache: KVCache, prompt_of: Sequence[int], prompt_lengths: Tensor, drawn: Tensor) -> None:
        """prompt_of [n]: place of each slot's prompt; prompt_lengths [n]; drawn [n]: tokens sampled so far, of which
        the last one is what comes in now."""
        device = drawn.device
        self.cache = cache
        self.rows = torch.arange(len(prompt_of), device=device)
        self.own_position = drawn - 1
        self.position = prompt_lengths + drawn - 1
        self.prompt_lengths = prompt_lengths
        self.longest = int(drawn.max())
        members: list[list[int]] = [[] for _ in range(max(prompt_of) + 1)]
        seats = []
        for slot, prompt in enumerate(prompt_of):
            seats.append((prompt, len(members[prompt])))
            members[prompt].append(slot)
        self.seats = max(len(slots) for slots in members)
        # Seats [P, m]: which slot asks there (an empty seat repeats slot 0, nobody reads what comes out).
        self.slot_of_seat = torch.tensor([m + [0] * (self.seats - len(m)) for m in members], device=device)
        self.seat_of_slot = torch.tensor([prompt * self.seats + seat for prompt, seat in seats], device=device)
        self.masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        stored = self.cache.layer(layer, k, v)
        stored.keys[self.rows, :, self.own_position] = k[0].transpose(0, 1)
        stored.values[self.rows, :, self.own_position] = v[0].transpose(0, 1)
        prompts = len(self.slot_of_seat)
        n, heads, length = len(self.rows), k.shape[1], stored.prompt_keys.shape[2]
        dtype = precision(q)  # in bfloat16 the scores would lose what the trainer's attention keeps
        keys, values = (store[:n, :, : self.longest].to(dtype) for store in (stored.keys, stored.values))
        prompt_keys, prompt_values = (s[:prompts].to(dtype) for s in (stored.prompt_keys, stored.prompt_values))

        asked = q[0].transpose(0, 1).to(dtype).mul(scale).view(n, heads, -1, q.shape[-1])  # [n, H_kv, H / H_kv, D]
        to_prompts = self._seated(asked) @ prompt_keys.transpose(-1, -2)
        scores = torch.cat([self._unseated(to_prompts, asked.shape[2]), asked @ keys.transpose(-1, -2)], dim=-1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.add_(self.mask(window, dtype)).softmax(dim=-1)
        from_prompts = self._seated(weights[..., :length]) @ prompt_values
        out = self._unseated(from_prompts, asked.shape[2]) + weights[..., length:] @ values
        return out.to(q.dtype).reshape(1, n, -1, v.shape[-1])

    def _seated(self, x: Tensor) -> Tensor:
        """[n, H_kv, g, …] by slot → [P, H_kv, m · g, …] by prompt."""
        prompts, seats = self.slot_of_seat.shape
        by_seat = x.index_select(0, self.slot_of_seat.view(-1)).view(prompts, seats, *x.shape[1:])
        return by_seat.transpose(1, 2).reshape(prompts, x.shape[1], seats * x.shape[2], x.shape[3])

    def _unseated(self, x: Tensor, group: int) -> Tensor:
        """The inverse: [P, H_kv, m · g, …] → [n, H_kv, g, …]."""
        prompts, heads, _, width = x.shape
        by_seat = x.view(prompts, heads, self.seats, group, width).transpose(1, 2)
        return by_seat.reshape(prompts * self.seats, heads, group, width).index_select(0, self.seat_of_slot)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, 1, prompt length + own length], additive; built once for all layers."""
        if window not in self.masks:
            device = self.position.device
            prompt = torch.arange(self.cache.prompt_length, device=device)[None, :]
            own = torch.arange(self.longest, device=device)[None, :]
            allowed = torch.cat([prompt < self.prompt_lengths[:, None], own <= self.own_position[:, None]], dim=1)
            if window is not None:
                place = torch.cat([prompt.expand(len(self.rows), -1), own + self.prompt_lengths[:, None]], dim=1)
                allowed &= self.position[:, None] - place < window
            self.masks[window] = additive(allowed[:, None, None], dtype)
        return self.masks[window]
