"""At load: do klimb's packed, prefix-shared, chunked numbers equal the model's own padded forward?

A family can do things to its logits or its attention that a formula outside the model does not know of. So the same
rows go through both paths once; a head that differs is replaced by the model's own, anything else is refused.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from klimb.batch import Row, TokenBatch
from klimb.errors import KlimbError
from klimb.models.attention import NAME
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}
"""Largest difference of a log-prob. bfloat16 keeps 8 bits, float16 11: two orders of the same sums differ that much in
a tail."""


def probed_policy(backbone: Backbone, adapter: str | None) -> tuple[Policy, str]:
    """A policy whose log-probs were held against the model's own, and a line that says which path it takes.

    Raises KlimbError when klimb cannot compute this model's numbers.
    """
    batch = _probe_batch(backbone)
    own = _own_logps(backbone, adapter, batch)
    worst = float("nan")
    for own_head in (False, True):
        policy = Policy(backbone, adapter, own_head=own_head)
        try:
            with torch.no_grad():
                logps = policy(batch).logps
        except (TypeError, ValueError) as error:
            name = type(backbone.model).__name__
            raise KlimbError(f"{name} cannot run on klimb's packed attention", why=error) from None
        worst = float((logps - own).abs().max())
        if worst <= TOLERANCE[backbone.dtype]:
            path = "the model's own head" if policy.own_head else "chunked head"
            return policy, f"packed attention, {path}: log-probs within {worst:.1e} of the model's own forward"
    raise KlimbError(
        f"{type(backbone.model).__name__}: packed log-probs differ from the model's own by {worst:.1e} "
        f"(allowed {TOLERANCE[backbone.dtype]:.0e})",
        why="its attention does something that klimb does not know of",
        fix="use one of the tested families: Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3, GPT-2",
    )


def _probe_batch(backbone: Backbone) -> TokenBatch:
    """Four rows: two share a prompt; some are longer than a (short) sliding window."""
    config = backbone.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    length = min(max(12, window + 4 if window <= 64 else 12), backbone.context // 2)
    draw = random.Random(0)
    tokens = lambda n: [draw.randrange(config.vocab_size) for _ in range(n)]  # noqa: E731
    shared, other = tokens(5), tokens(3)
    rows = [[Row(prompt, completion := tokens(n), [True] * len(completion))]
            for prompt, n in ((shared, length), (shared, 4), (other, 7), (other[:1], 1))]  # fmt: skip
    return TokenBatch.from_rows(rows, [0, 0, 1, 2], ["probe"] * len(rows))


@torch.no_grad()
def _own_logps(backbone: Backbone, adapter: str | None, batch: TokenBatch) -> Tensor:
    """Right-padded, through the model's own eager attention and head: [B, T]."""
    backbone.use(adapter)
    texts = [[*rows[0].prompt, *rows[0].completion] for rows in batch.rows]
    width = max(len(text) for text in texts)
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=backbone.device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=backbone.device)
    backbone.model.set_attn_implementation("eager")
    try:
        logits = backbone.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    finally:
        backbone.model.set_attn_implementation(NAME)
    precise = logits.double() if logits.dtype == torch.float64 else logits.float()
    logps = precise[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    own = torch.zeros(batch.mask.shape, dtype=logps.dtype, device=logps.device)
    for i, rows in enumerate(batch.rows):
        start = len(rows[0].prompt) - 1
        own[i, : len(rows[0].completion)] = logps[i, start : start + len(rows[0].completion)]
    return own
