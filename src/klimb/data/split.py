"""A part of the items for evaluation, by their prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from klimb.data.store import Chosen, Held, Item, prompt_tokens
from klimb.errors import DataError


def split_by_prompt(items: Sequence[Item], eval_fraction: float, seed: int = 0) -> tuple[Chosen[Item], Chosen[Item]]:
    """(train, eval), by a hash of each item's prompt: no prompt is on both sides, nor in any later file.

    Raises DataError where a side would be empty.
    """
    whole = items if isinstance(items, Chosen) else Chosen(Held(list(items)), np.arange(len(items)))
    if eval_fraction == 0:
        return whole, whole.part(np.zeros(0, np.int64))
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction is {eval_fraction}", fix="choose one between 0 and 1")
    out = np.array([_draw(prompt_tokens(item), seed) < eval_fraction for item in items], bool)
    if out.all() or not out.any():
        raise DataError(
            f"no prompt of {len(items)} items falls into the {'training' if out.any() else 'evaluation'} part",
            why=f"eval_fraction is {eval_fraction}",
            fix="choose another, or give eval_data",
        )
    return whole.part(np.flatnonzero(~out)), whole.part(np.flatnonzero(out))


def _draw(key: list[int], seed: int) -> float:
    """Uniform in [0, 1), from the content alone."""
    digest = hashlib.sha256(json.dumps([seed, key]).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
