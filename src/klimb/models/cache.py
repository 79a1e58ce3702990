"""Keys and values of running generations: those of a prompt once for all its samples, and each sample's own.

Prompts [0, P) and slots [0, n) are the running ones, so that a decode step reads one slice and copies nothing. A step
multiplies all queries of a prompt's samples with that prompt's keys at once, and every query with its sample's own
keys; one softmax runs over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from klimb import native
from klimb.models.attention import PackedAttention, additive
from klimb.models.logprobs import precision

_WHOLE = 32
"""Room for prompts comes in this many tokens: the kernels read whole vectors."""


class _Layer(NamedTuple):
    """Keys and values of the prompts and of the slots, a line for every head of each: [places · H_kv, length, D].

    The keys of a prompt lie by column, [places · H_kv, D, length]: they are written once and asked by many.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


class KVCache:
    """`prompts` places of `prompt_length` tokens and `slots` of `length`: as much as was needed until now.

    The stores are made when a model's shapes are first seen; what they hold stays where it is when they grow.
    """

    def __init__(self) -> None:
        self.prompts = self.prompt_length = self.slots = self.length = 0
        self.layers: dict[int, _Layer] = {}

    def layer(self, index: int, k: Tensor, v: Tensor) -> _Layer:
        """k, v [1, H_kv, N, D] of the first call tell heads, width, dtype and device."""
        if index not in self.layers:
            heads = k.shape[1]
            prompts, slots = self.prompts * heads, self.slots * heads
            self.layers[index] = _Layer(
                k.new_zeros(prompts, k.shape[-1], self.prompt_length),
                v.new_zeros(prompts, self.prompt_length, v.shape[-1]),
                k.new_zeros(slots, self.length, k.shape[-1]),
                v.new_zeros(slots, self.length, v.shape[-1]),
            )
        return self.layers[index]

    def grow_prompts(self, places: int, length: int) -> None:
        """Make room for more or longer prompts."""
        length = -(-length // _WHOLE) * _WHOLE
        more, longer = max(places - self.prompts, 0), max(length - self.prompt_length, 0)
        for index, layer in self.layers.items():
            keys = self._grown(layer.prompt_keys, self.prompts, more, (0, longer, 0, 0))
            values = self._grown(layer.prompt_values, self.prompts, more, (0, 0, 0, longer))
            self.layers[index] = layer._replace(prompt_keys=keys, prompt_values=values)
        self.prompts, self.prompt_length = self.prompts + more, self.prompt_length + longer

    def grow_slots(self, places: int, length: int) -> None:
        """Make room for more samples or longer ones."""
        more, longer = max(places - self.slots, 0), max(length - self.length, 0)
        for index, layer in self.layers.items():
            keys, values = (self._grown(store, self.slots, more, (0, 0, 0, longer)) for store in layer[2:])
            self.layers[index] = layer._replace(keys=keys, values=values)
        self.slots, self.length = self.slots + more, self.length + longer

    @staticmethod
    def _grown(store: Tensor, places: int, more: int, sides: tuple[int, int, int, int]) -> Tensor:
        """sides: what comes before and behind in the last dimension, and in the one before it."""
        return pad(store, (*sides, 0, more * (len(store) // places))) if more or any(sides) else store

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole slots: the last running ones into those that became free."""
        self._move([store for layer in self.layers.values() for store in layer[2:]], self.slots, sources, targets)

    def move_prompts(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._move([store for layer in self.layers.values() for store in layer[:2]], self.prompts, sources, targets)

    @staticmethod
    def _move(stores: Sequence[Tensor], places: int, sources: Sequence[int], targets: Sequence[int]) -> None:
        if stores:
            lines = torch.tensor([sources, targets], device=stores[0].device)
        for store in stores:
            by_place = store.view(places, -1)
            by_place.index_copy_(0, lines[1], by_place.index_select(0, lines[0]))


@dataclass
class Prefill:
    """Plan of computing pieces of prompts, packed side by side, and storing each in the place of its prompt."""

    cache: KVCache
    packed: PackedAttention
    places: Tensor
    positions: Tensor
    stored: list[tuple[int, int]]
    """Place of each prompt that is continued, and how much of it is there: what the pieces see besides themselves."""
    read: Tensor | None = None

    @staticmethod
    def of(cache: KVCache, pieces: Sequence[tuple[int, range]], device: torch.device) -> Prefill:
        """pieces: place and positions of each, in their order in the flat run."""
        run = sum(len(piece) for _, piece in pieces)
        spans, start, context = [], 0, run  # what is stored comes behind the run
        for _, piece in pieces:
            spans.append((range(start, start + len(piece)), range(context, context + piece.start)))
            start, context = start + len(piece), context + piece.start
        lengths = torch.tensor([len(piece) for _, piece in pieces], device=device)
        places = torch.tensor([place for place, _ in pieces], device=device)
        places = places.repeat_interleave(lengths, output_size=run)
        positions = torch.cat([torch.arange(piece.start, piece.stop, device=device) for _, piece in pieces])
        stored = [(place, piece.start) for place, piece in pieces if piece.start]
        return Prefill(cache, PackedAttention(spans, device), places, positions, stored)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        stored = self.cache.layer(layer, k, v)
        keys, values = self._put(stored.prompt_keys.transpose(1, 2), k), self._put(stored.prompt_values, v)
        return self.packed.attend(layer, q, keys, values, scale, window, softcap)

    def _put(self, store: Tensor, new: Tensor) -> Tensor:
        """Store the run [1, H_kv, N, D]; returns it with what was there before behind it."""
        by_place = store.unflatten(0, (self.cache.prompts, -1))
        by_place[self.places, :, self.positions] = new[0].transpose(0, 1)
        before = [by_place[place, :, :length][None] for place, length in self.stored]
        return torch.cat([new, *before], dim=2) if before else new


class Seats:
    """Who asks which prompt: P prompts with m seats each, of which some stay empty. It changes when a sample comes or
    goes, not with every token."""

    def __init__(self, prompt_of: Sequence[int], device: torch.device) -> None:
        """prompt_of [n]: place of each slot's prompt."""
        members: list[list[int]] = [[] for _ in range(max(prompt_of) + 1)]
        seat_of = []
        for slot, prompt in enumerate(prompt_of):
            seat_of.append(len(members[prompt]))
            members[prompt].append(slot)
        self.prompts, self.seats = len(members), max(len(slots) for slots in members)
        # An empty seat repeats slot 0; nobody reads what comes out of it.
        self._slot = torch.tensor([m + [0] * (self.seats - len(m)) for m in members], device=device)
        self._prompt = torch.tensor(prompt_of, device=device)
        self._seat = torch.tensor(seat_of, device=device)
        self._orders: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._places = prompt_of

    @cached_property
    def blocks(self) -> native.Blocks:
        return native.Blocks(self._places)

    def orders(self, heads: int, group: int) -> tuple[Tensor, Tensor]:
        """Lines [n, H_kv, g] of the slots in the order of the seats [P, H_kv, m, g], and the inverse."""
        if (heads, group) not in self._orders:
            device = self._slot.device
            h = torch.arange(heads, device=device)[None, :, None, None]
            g = torch.arange(group, device=device)
            to_seats = (self._slot[:, None, :, None] * heads + h) * group + g
            prompt_line = self._prompt[:, None, None] * heads + h[:, :, 0]
            to_slots = (prompt_line * self.seats + self._seat[:, None, None]) * group + g
            self._orders[heads, group] = to_seats.flatten(), to_slots.flatten()
        return self._orders[heads, group]


class Decode:
    """Plan of one further token for each of the first n slots."""

    def __init__(self, cache: KVCache, seats: Seats, prompt_lengths: Tensor, drawn: Tensor, longest: int) -> None:
        """prompt_lengths [n]; drawn [n]: tokens sampled so far, of which the last one is what comes in now; longest:
        the most of them, known without waiting for the device."""
        self.cache = cache
        self.seats = seats
        self.rows = torch.arange(len(drawn), device=drawn.device)
        self.drawn = drawn
        self.own_position = drawn - 1
        self.position = prompt_lengths + self.own_position
        self.prompt_lengths = prompt_lengths
        self.longest = longest
        self.masks: dict[int | None, Tensor] = {}
        self.lines: dict[int, Tensor] = {}
        self.read: Tensor | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        stored = self.cache.layer(layer, k, v)
        if softcap is None and native.attends(q, k, v):
            q, k, v = (native.dense_rows(x[0]) for x in (q, k, v))
            return native.attention_decode(
                q, k, v, *stored, self.seats.blocks, self.prompt_lengths, self.drawn, scale, window
            )[None]
        n, heads, group = len(self.rows), k.shape[1], q.shape[1] // k.shape[1]
        to_seats, to_slots = self.seats.orders(heads, group)
        for store, new in ((stored.keys, k), (stored.values, v)):
            store.view(-1, store.shape[-1]).index_copy_(0, self._lines(heads), _by_slot(new))
        dtype = precision(q)  # in bfloat16 the scores would lose what the trainer's attention keeps
        keys, values = (store[: n * heads, : self.longest].to(dtype) for store in (stored.keys, stored.values))
        prompts = self.seats.prompts * heads
        prompt_keys, prompt_values = (s[:prompts].to(dtype) for s in (stored.prompt_keys, stored.prompt_values))
        length = prompt_keys.shape[2]

        asked = _by_slot(q).to(dtype) * scale  # a line for every slot and head
        seated = asked.index_select(0, to_seats).view(prompts, -1, asked.shape[-1])
        to_prompts = torch.bmm(seated, prompt_keys).view(-1, length).index_select(0, to_slots)
        to_own = torch.bmm(asked.view(n * heads, group, -1), keys.transpose(1, 2))
        scores = torch.cat([to_prompts, to_own.view(-1, self.longest)], dim=1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.view(n, heads * group, -1).add_(self.mask(window, dtype)).softmax(dim=-1)
        weights = weights.view(n * heads, group, -1)

        seated = weights.view(n * heads * group, -1)[:, :length].index_select(0, to_seats)
        from_prompts = torch.bmm(seated.view(prompts, -1, length), prompt_values)
        from_prompts = from_prompts.view(-1, v.shape[-1]).index_select(0, to_slots).view(n * heads, group, -1)
        out = torch.baddbmm(from_prompts, weights[..., length:], values)
        return out.to(q.dtype).view(1, n, heads * group, -1)

    def _lines(self, heads: int) -> Tensor:
        """Where the new key of each slot and head goes: [n · H_kv] of the lines of a store."""
        if heads not in self.lines:
            place = self.rows[:, None] * heads + torch.arange(heads, device=self.rows.device)
            self.lines[heads] = (place * self.cache.length + self.own_position[:, None]).flatten()
        return self.lines[heads]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[n, 1, prompt length + own length], additive; built once for all layers."""
        if window not in self.masks:
            device = self.position.device
            prompt = torch.arange(self.cache.prompt_length, device=device)[None, :]
            own = torch.arange(self.longest, device=device)[None, :]
            allowed = torch.cat([prompt < self.prompt_lengths[:, None], own <= self.own_position[:, None]], dim=1)
            if window is not None:
                place = torch.cat([prompt.expand(len(self.rows), -1), own + self.prompt_lengths[:, None]], dim=1)
                allowed &= self.position[:, None] - place < window
            self.masks[window] = additive(allowed[:, None], dtype)
        return self.masks[window]


def _by_slot(x: Tensor) -> Tensor:
    """[1, H, n, D] → a line for every slot and head: [n · H, D]."""
    return x[0].transpose(0, 1).reshape(-1, x.shape[-1])
