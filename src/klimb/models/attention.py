"""klimb's attention behind the transformers attention interface.

A model is called on one flat run of tokens ``[1, N]`` without padding, and is told nothing about rows: every linear
layer just sees N tokens. What may look at what is decided here, by the *plan* that travels with the call::

    model(input_ids=flat[None], position_ids=positions[None], attention_plan=plan)

`PackedAttention` is the plan of training (rows side by side, a prompt once for all its completions), `Prefill` and
`Decode` in `klimb.models.cache` are those of generation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from klimb import native

NAME = "klimb"
# What klimb implements or may ignore; a model that passes anything else (attention sinks, biases) is refused.
_UNDERSTOOD = {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "attention_plan", "position_ids"}
_SMALL = 4096  # attention scores that cost less than another kernel call
_HARMLESS = {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"}


class AttentionPlan(Protocol):
    """Who sees whom. q [1, H, N, D]; k, v [1, H_kv, N, D]; returns [1, N, H, D_v]."""

    read: Tensor | None
    """Places of the run whose states are read after the last layer; None: all of them."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor: ...


def _planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: AttentionPlan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **further: Any,
) -> tuple[Tensor, None]:
    if attention_plan is None:
        raise ValueError("this model is loaded for klimb's packed attention and needs an attention_plan; "
                         "call it through klimb.models, or reload it with another attn_implementation")  # fmt: skip
    unknown = [name for name, given in further.items() if given is not None and name not in _UNDERSTOOD | _HARMLESS]
    if unknown:
        raise ValueError(f"{type(module).__name__} asks for attention features that klimb lacks: {', '.join(unknown)}")
    if dropout:
        raise ValueError("attention dropout is on: klimb trains without it, since it makes log-probs random")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer = int(getattr(module, "layer_idx", 0) or 0)
    return attention_plan.attend(layer, query, key, value, scale, sliding_window, softcap), None


AttentionInterface.register(NAME, _planned_attention)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Softmax attention with an additive mask. q [R, H, Lq, D], k, v [R, H_kv, Lk, D], mask [R, 1, Lq, Lk]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:  # one query: the heads of a group become its queries, nothing is copied
        folded = q.reshape(q.shape[0], k.shape[1], groups, q.shape[-1])
        return attention(folded, k, v, mask, scale, softcap).reshape(*q.shape[:-1], v.shape[-1])
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) + mask
    return scores.float().softmax(dim=-1).to(q.dtype) @ v


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean mask → 0 where allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)


class _Bucket:
    """Sequences of similar length, padded to each other for the attention alone.

    Index tensors point into the flat run; padding points at the first token and is masked (as a key) or thrown away
    (as a query).
    """

    def __init__(self, queries: Sequence[range], contexts: Sequence[range], device: torch.device) -> None:
        q_length = max(len(q) for q in queries)
        context_length = max(len(c) for c in contexts)
        self.q_index = _padded(queries, q_length, device)
        self.places = torch.cat([torch.arange(len(q), device=device) + i * q_length for i, q in enumerate(queries)])
        self.k_index = torch.cat([_padded(contexts, context_length, device), self.q_index], dim=1)
        contexts_l = torch.tensor([len(c) for c in contexts], device=device)[:, None]
        # Positions within the sequence; context first, own tokens after it.
        own = torch.arange(q_length, device=device)[None, :] + contexts_l
        context = torch.arange(context_length, device=device)[None, :].expand(len(queries), -1)
        self.q_position = own
        self.k_position = torch.cat([torch.where(context < contexts_l, context, torch.iinfo(torch.long).max), own], 1)
        self.masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Causal, within the window: [R, 1, Lq, Lk]. Built once for all layers."""
        if (window, dtype) not in self.masks:
            distance = self.q_position[:, :, None] - self.k_position[:, None, :]
            allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self.masks[window, dtype] = additive(allowed[:, None], dtype)
        return self.masks[window, dtype]


def _padded(ranges: Sequence[range], length: int, device: torch.device) -> Tensor:
    starts = torch.tensor([r.start for r in ranges], device=device)[:, None]
    sizes = torch.tensor([len(r) for r in ranges], device=device)[:, None]
    steps = torch.arange(length, device=device)[None, :]
    return torch.where(steps < sizes, starts + steps, 0)


class PackedAttention:
    """Causal attention within each sequence of a flat run; a sequence may continue a context elsewhere in the run.

    spans: (query range, context range) of every sequence; each flat position is in exactly one query range. A context
    that is not in the run has its keys and values behind those of the run.
    """

    def __init__(self, spans: Sequence[tuple[range, range]], device: torch.device) -> None:
        self.spans, self.device = spans, device
        self.read: Tensor | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if softcap is None and native.attends(q, k, v) and (trees := self.trees) is not None:
            q, k, v = (native.dense_rows(x.squeeze(0)) for x in (q, k, v))  # x[0] would fill zeros for its gradient
            if torch.is_grad_enabled():
                return _NativeAttention.apply(q, k, v, trees, scale, window)[None]
            return native.attention_forward(q, k, v, trees, scale, window)[0][None]
        return self.buckets.attend(q, k, v, scale, window, softcap)

    @cached_property
    def buckets(self) -> _Buckets:
        return _Buckets(self.spans, self.device)

    @cached_property
    def trees(self) -> native.Trees | None:
        """Each sequence without a context, with those behind it that continue some of it; None: other spans."""
        roots: list[int] = []
        end = 0
        for i, (queries, context) in enumerate(self.spans):
            if not context:
                roots.append(i)
            within = roots and self.spans[roots[-1]][0].start <= context.start and context.stop <= queries.start
            if queries.start != end or not (within or not context):
                return None
            end = queries.stop
        lines = [(queries.start, len(queries), context.start, len(context)) for queries, context in self.spans]
        return native.Trees(torch.tensor(lines), torch.tensor([*roots, len(lines)]))


class _NativeAttention(torch.autograd.Function):
    """q [H, N, D], k, v [H_kv, N, D] → [N, H, D]. Keeps those and a number for each query, not the weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, trees: native.Trees, scale: float, window: int | None
    ) -> Tensor:
        out, lse = native.attention_forward(q, k, v, trees, scale, window)
        ctx.save_for_backward(q, k, v, lse)
        ctx.rest = trees, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        return (*native.attention_backward(q, k, v, lse, grad, *ctx.rest), None, None, None)


class _Buckets:
    """Sequences of similar lengths side by side, for torch's attention."""

    def __init__(self, spans: Sequence[tuple[range, range]], device: torch.device) -> None:
        self.buckets = [
            _Bucket([spans[i][0] for i in bucket], [spans[i][1] for i in bucket], device) for bucket in _bucket(spans)
        ]
        # One gather for all buckets: the gradient of each would be a tensor as large as the whole run.
        self.q_index = torch.cat([bucket.q_index.flatten() for bucket in self.buckets])
        self.k_index = torch.cat([bucket.k_index.flatten() for bucket in self.buckets])
        starts = itertools.accumulate((bucket.q_index.numel() for bucket in self.buckets[:-1]), initial=0)
        places = torch.cat([start + bucket.places for start, bucket in zip(starts, self.buckets, strict=True)])
        self.places = torch.empty_like(places)
        self.places[self.q_index[places]] = places

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        queries = self._gather(q, self.q_index, [bucket.q_index for bucket in self.buckets])
        keys, values = (self._gather(x, self.k_index, [bucket.k_index for bucket in self.buckets]) for x in (k, v))
        outputs = [
            attention(*one, bucket.mask(window, q.dtype), scale, softcap).transpose(1, 2).flatten(0, 1)
            for bucket, one in zip(self.buckets, zip(queries, keys, values, strict=True), strict=True)
        ]
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return joined.index_select(0, self.places)[None]

    @staticmethod
    def _gather(x: Tensor, index: Tensor, shapes: Sequence[Tensor]) -> list[Tensor]:
        """[1, H, N, D] → one [R, H, L, D] a bucket."""
        parts = x.squeeze(0).transpose(0, 1).index_select(0, index).split([shape.numel() for shape in shapes])
        return [part.unflatten(0, shape.shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]


def _bucket(spans: Sequence[tuple[range, range]], waste: float = 1.25) -> list[list[int]]:
    """Sequences in order of size; a new bucket starts where padding would grow the work of one by `waste`."""
    order = sorted(range(len(spans)), key=lambda i: (len(spans[i][1]) > 0, len(spans[i][0]), len(spans[i][1]), i))
    buckets: list[list[int]] = []
    exact = longest_q = longest_c = 0
    for i in order:
        queries, context = len(spans[i][0]), len(spans[i][1])
        work = queries * (queries + context)
        grown_q, grown_c = max(longest_q, queries), max(longest_c, context)
        padded = (len(buckets[-1]) + 1) * grown_q * (grown_q + grown_c) if buckets else 0
        if buckets and padded <= waste * (exact + work) + _SMALL:
            buckets[-1].append(i)
            exact, longest_q, longest_c = exact + work, grown_q, grown_c
        else:
            buckets.append([i])
            exact, longest_q, longest_c = work, queries, context
    return buckets
