"""Pairs, triples and labelled completions as one batch, each sample with the side that it is on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klimb.batch import Row, TokenBatch
from klimb.types import Labelled, Preference

CHOSEN, REJECTED, GOLD = range(3)


def batch_of(items: Sequence[Preference | Labelled]) -> TokenBatch:
    """The completions of a pair or triple are a group and stay together; a labelled completion is alone.

    Column `side` [B]: chosen (desirable), rejected (undesirable) or gold.
    """
    rows: list[list[Row]] = []
    groups, ids, sides = [], [], []
    for place, item in enumerate(items):
        for name, side, completion, mask in _sides(item):
            rows.append([Row(item.prompt, completion, mask)])
            groups.append(place)
            ids.append(f"{item.id}/{name}")
            sides.append(side)
    batch = TokenBatch.from_rows(rows, groups, ids, whole_groups=True)
    return batch.with_columns(side=torch.tensor(sides))


def _sides(item: Preference | Labelled) -> list[tuple[str, int, list[int], list[bool]]]:
    if isinstance(item, Labelled):
        name, side = ("desirable", CHOSEN) if item.label else ("undesirable", REJECTED)
        return [(name, side, item.completion, item.mask)]
    found = [
        ("chosen", CHOSEN, item.chosen, item.chosen_mask),
        ("rejected", REJECTED, item.rejected, item.rejected_mask),
    ]
    return [*found, ("gold", GOLD, item.gold, item.gold_mask)] if item.gold else found


def mismatched(batch: TokenBatch, context: int) -> TokenBatch:
    """Each prompt of the update with the completion of the next one that has another prompt and fits; those without
    such a completion are left out."""
    rows: list[list[Row]] = []
    for place in range(len(batch)):
        prompt = batch.rows[place][0].prompt
        for step in range(1, len(batch)):
            [other] = batch.rows[(place + step) % len(batch)]
            if other.prompt != prompt and len(prompt) + len(other.completion) <= context:
                rows.append([Row(prompt, other.completion, other.mask)])
                break
    return TokenBatch.from_rows(rows, range(len(rows)), [f"mismatched {i}" for i in range(len(rows))])
