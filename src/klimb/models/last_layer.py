"""The last layer's MLP computes only the places whose states are read: nothing after it looks at the others.

Of a prompt the last token's state is read, of an SFT row those before the completion's tokens, for a score one state
of each row. An MLP is most of a decoder layer, and it takes each token by itself, so what it leaves out changes nothing
else. Keys and values of all tokens come before it, in the attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

_WORTH = 0.9
"""Share of the tokens above which gathering the places would cost more than it saves."""


def worth_skipping(read: Tensor | None, tokens: int) -> Tensor | None:
    """`read`, unless those are nearly all of the run."""
    return None if read is None or len(read) > _WORTH * tokens else read


def skip_unread(model: nn.Module) -> None:
    """From here on the plan's `read` decides what the last MLP of `model` computes."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if layers and isinstance(mlp := getattr(layers[-1], "mlp", None), nn.Module):
        reader = _Reader()
        layers[-1].forward = partial(reader.layer, layers[-1].forward)
        mlp.forward = partial(reader.mlp, mlp.forward)


class _Reader:
    """What the layer was called with, for its MLP. The plan comes with each call, so that a forward pass that is
    computed again for its gradient reads what it read at first."""

    def __init__(self) -> None:
        self.read: Tensor | None = None

    def layer(self, forward: Any, *args: Any, **named: Any) -> Any:
        self.read = getattr(named.get("attention_plan"), "read", None)
        try:
            return forward(*args, **named)
        finally:
            self.read = None

    def mlp(self, forward: Any, x: Tensor, *further: Any, **named: Any) -> Any:
        if self.read is None or further or named or x.dim() != 3 or len(x) != 1:
            return forward(x, *further, **named)
        if not len(self.read):
            return x.new_zeros(x.shape)
        found = forward(x.index_select(1, self.read))
        if not isinstance(found, Tensor):  # experts that return what their router thought of all tokens
            return forward(x)
        return found.new_zeros(x.shape).index_copy(1, self.read, found)
