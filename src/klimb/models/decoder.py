"""A token's way through a whole decoder layer in one call of the kernels, where a layer proves to be of the usual kind.

That kind: an RMSNorm, attention with rotary positions (and norms of its heads, or none), an RMSNorm, a gated MLP, a sum
after each of both. As everywhere no family has code: a copy with random weights has to answer as the layer's own
`forward` does. What decoding does not meet (training, prompts, adapters, another plan) goes the layer's own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from klimb import native
from klimb.models import fused, linears
from klimb.models.cache import Decode, KVCache, Seats
from klimb.native.decoder import PRODUCTS, Attending, DecoderLayer

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_OF_MLP = ("gate", "up", "down")
_HEAD_NORMS = ("q_norm", "k_norm")
_TOLERANCE = 1e-5
_HIDDEN, _INNER, _HEADS, _GROUPS = 24, 40, 2, 2
"""Of the copy that is tried; its heads are as wide as the layer's own."""


def take_over(model: nn.Module) -> None:
    """Decoder layers, each if it proves equal; after `fused.take_over`, whose parts they are made of."""
    was = native.use(True)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for module in model.modules():
                if _of_known_parts(module) and (attending := _tried(module)) is not None:
                    vars(module)["attending"] = attending
                    module.forward = MethodType(_forward, module)
    finally:
        native.use(was)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
    plan, rotary = named.get("attention_plan"), named.get("position_embeddings")
    if type(plan) is Decode and rotary is not None and not args and (layer := _ready(self)) is not None:
        stores = plan.cache.layers.get(self.self_attn.layer_idx)
        if stores is not None and layer.takes(hidden_states, *rotary, *stores):
            cosine, sine = (x[0].contiguous() for x in rotary)
            x = layer(hidden_states[0], cosine, sine, stores, plan.seats.blocks, plan.prompt_lengths, plan.drawn)
            return x[None]
    return type(self).forward(self, hidden_states, *args, **named)


def _ready(module: Any) -> DecoderLayer | None:
    """With today's weights; None: not all of them are laid out, or an adapter is on one."""
    ready = linears.ready()
    if not ready.panels:
        return None
    if module not in ready.layers:
        panels = {name: ready.panels.get(linear) for name, linear in _linears(module).items()}
        found = {name: weight for name, weight in panels.items() if weight is not None}
        whole = len(found) == len(panels) and all(fused.norm_of(norm) for norm in _norms(module) if norm is not None)
        ready.layers[module] = _layer(module, module.attending, found) if whole else None
    return ready.layers[module]


def _layer(module: Any, attending: Attending, panels: Mapping[str, native.Panels]) -> DecoderLayer | None:
    norms = [None if norm is None else norm.weight for norm in _norms(module)]
    biases = {name: linear.bias for name, linear in _linears(module).items()}
    try:
        return DecoderLayer(attending, norms, panels, biases)
    except ValueError:  # of several types or widths
        return None


def _linears(module: Any) -> dict[str, Any]:
    return {name: getattr(module.mlp if name in _OF_MLP else module.self_attn, f"{name}_proj") for name in PRODUCTS}


def _norms(module: Any) -> list[Any]:
    """Before the attention, between it and the MLP, of queries and of keys; None: there is none."""
    return [module.input_layernorm, module.post_attention_layernorm, *map(module.self_attn._modules.get, _HEAD_NORMS)]


# Which layers ---------------------------------------------------------------------------------------------------------


def _of_known_parts(module: Any) -> bool:
    if set(module._modules) != _PARTS or module._parameters:
        return False
    attention, mlp = module.self_attn, module.mlp
    names = {f"{name}_proj" for name in PRODUCTS if name not in _OF_MLP}
    if not names <= set(attention._modules) <= names | set(_HEAD_NORMS) or attention._parameters:
        return False
    if not all(isinstance(getattr(attention, fact, None), int) for fact in ("head_dim", "layer_idx")):
        return False
    kinds = {fused.norm_of(norm) for norm in _norms(module) if norm is not None}
    return (
        len(kinds) == 1 and None not in kinds and fused.is_gated_mlp(mlp) and fused.is_rotary(attention)
        and all(type(linear) is nn.Linear for linear in _linears(module).values())
    )  # fmt: skip


def _tried(module: Any) -> Attending | None:
    """What the layer's attention is, if the kernels answer as the layer does: three samples of two prompts, each with
    some tokens of its own, ask both ways."""
    shadow, width, place = _copy_of(module), module.self_attn.head_dim, module.self_attn.layer_idx
    k = torch.zeros(1, _HEADS, 3, width)
    caches = [KVCache(), KVCache()]
    for cache in caches:
        cache.grow_prompts(2, 5)
        cache.grow_slots(3, 4)
    theirs, mine = (cache.layer(place, k, k) for cache in caches)
    for store, same in zip(theirs, mine, strict=True):
        same.copy_(store.normal_())
    x, cosine, sine = torch.randn(1, 3, _HIDDEN), torch.randn(1, 3, width), torch.randn(1, 3, width)
    plan = _Noting(caches[0], Seats([0, 1, 0], x.device), torch.tensor([4, 3, 4]), torch.tensor([2, 1, 4]), 4)
    # Attention takes its places from the plan. A layer that reads positions besides must not go unnoticed.
    positions = torch.tensor([[70_003, 1_000_001, 30_000_017]])
    try:
        own = type(module).forward(
            shadow, x, attention_mask=None, position_ids=positions, past_key_values=None, use_cache=False,
            position_embeddings=(cosine, sine), attention_plan=plan,
        )  # fmt: skip
    except Exception:  # a family's own code, called as it may not expect it: of known names, and something else
        return None
    norm = fused.norm_of(module.input_layernorm)
    if plan.noted is None or norm is None or plan.noted[2] is not None:
        return None
    if not isinstance(own, Tensor) or (own.shape, own.dtype) != (x.shape, x.dtype):
        return None
    attending = Attending(width, *plan.noted[:2], *norm)
    layer = _layer(shadow, attending, {name: native.panels(p.weight) for name, p in _linears(shadow).items()})
    if layer is None:
        return None
    found = layer(x[0], cosine[0], sine[0], mine, plan.seats.blocks, plan.prompt_lengths, plan.drawn)
    equal = all(
        torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in ((found[None], own), *zip(mine, theirs, strict=True))
    )
    return attending if equal else None


def _copy_of(module: Any) -> Any:
    """A small one with random weights, which goes the layer's own way throughout."""
    shadow = fused.shadow_of(module)
    attention, mlp = fused.shadow_of(module.self_attn), fused.shadow_of(module.mlp)
    shadow.self_attn, shadow.mlp = attention, mlp
    width = module.self_attn.head_dim
    keys = _HEADS * width
    queries = _GROUPS * keys
    shapes = {"q": (_HIDDEN, queries), "k": (_HIDDEN, keys), "v": (_HIDDEN, keys), "o": (queries, _HIDDEN),
              "gate": (_HIDDEN, _INNER), "up": (_HIDDEN, _INNER), "down": (_INNER, _HIDDEN)}  # fmt: skip
    for name, linear in _linears(module).items():
        new = nn.Linear(*shapes[name], bias=linear.bias is not None)
        setattr(mlp if name in _OF_MLP else attention, f"{name}_proj", new)
    for owner, name, wide in (
        (shadow, "input_layernorm", _HIDDEN), (shadow, "post_attention_layernorm", _HIDDEN),
        *((attention, name, width) for name in _HEAD_NORMS if name in attention._modules),
    ):  # fmt: skip
        norm = fused.shadow_of(owner._modules[name])
        norm.weight = nn.Parameter(torch.randn(wide))
        setattr(owner, name, norm)
    return shadow


class _Noting(Decode):
    """Notes how a layer asks for attention."""

    noted: tuple[float, int | None, float | None] | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        store = self.cache.layers[layer]
        heads, width = len(store.keys) // self.cache.slots, store.keys.shape[-1]
        if q.shape != (1, heads * _GROUPS, len(self.rows), width) or not k.shape == v.shape == (1, heads, *q.shape[2:]):
            raise ValueError("the layer asks with other heads than its projections give")
        self.noted = scale, window, softcap
        return super().attend(layer, q, k, v, scale, window, softcap)
