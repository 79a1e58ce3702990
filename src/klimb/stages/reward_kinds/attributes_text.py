"""Attributes in words: a language model writes "helpfulness: 4, correctness: 3", and what it expects is the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.judged import load_judged
from klimb.data.rated_text import Spelling, rated_text
from klimb.data.render import Renderer
from klimb.errors import DataError
from klimb.metrics import Metrics
from klimb.models.faces import reward_scores
from klimb.models.packing import Budget, in_parts
from klimb.models.rated import Place, WrittenRatings
from klimb.objective import supervised
from klimb.stages.reward_kinds import Kind, Right, batch, exactly, in_order
from klimb.types import Judged

MOST = 101
"""Ratings of an attribute, as of a scale from 0 to 100: each of them is read for every completion."""


def kind(weights: Mapping[str, float], instruction: str | None) -> Kind:
    """The attribute prediction model of SteerLM (arXiv 2310.05344, section 3.1): supervised fine-tuning on the ratings
    in words, behind prompt, completion and instruction. How it is read: `WrittenRatings`.

    weights: of each attribute in the reward. instruction: None asks for their names.
    """
    asked = instruction or f"\nRate this: {', '.join(weights)}.\n"

    def facts(renderer: Renderer, conversational: bool, items: Sequence[Judged]) -> dict[str, Any]:
        spelling = Spelling(renderer, [*weights], asked)
        places = [
            _place(spelling, number, weights, sorted({item.values[number] for item in items}))
            for number in range(len(weights))
        ]
        return {"kind": "attributes_text", "instruction": asked} | WrittenRatings.facts(
            places, spelling.end(conversational)
        )

    def rightness(model: WrittenRatings, items: Sequence[Judged], budget: Budget) -> Right:
        worth = _ratings(items) @ torch.tensor([*weights.values()], dtype=torch.float64)
        return in_order(reward_scores(model, batch_of(items), budget=budget), worth)

    @torch.no_grad()
    def figures(model: WrittenRatings, items: Sequence[Judged], budget: Budget) -> dict[str, Any]:
        written = torch.zeros(len(items), len(weights), dtype=torch.float64)
        for part, (_, likeliest) in in_parts(batch_of(items), budget, model.read):
            written[part] = likeliest.double().cpu()
        return exactly([*weights], written, _ratings(items))

    load = partial(load_judged, rated_text([*weights], asked))
    return Kind(load, batch_of, loss, rightness, facts, figures=figures)


def _place(spelling: Spelling, number: int, weights: Mapping[str, float], seen: list[float]) -> Place:
    """Raises DataError where there is nothing to tell apart, or it could not be told apart."""
    name = spelling.names[number]
    if len(seen) < 2:
        raise DataError(f"{name} is {seen[0]:g} in every row to learn from", where="data",
                        why="it would be the same of every completion", fix="leave it out of attributes")  # fmt: skip
    if len(seen) > MOST:
        raise DataError(f"{name} has {len(seen)} different ratings, more than {MOST}", where="data",
                        why="each would be read for every completion",
                        fix="round them, or use kind=attributes")  # fmt: skip
    tokens = [spelling.rating(value) for value in seen]
    for value, spelt in zip(seen, tokens, strict=True):
        if tokens.index(spelt) != seen.index(value):
            raise DataError(
                f"the tokenizer writes the ratings {seen[tokens.index(spelt)]:g} and {value:g} of {name} alike",
                where="data", fix="use another model, or kind=attributes",
            )  # fmt: skip
    return Place(name, float(weights[name]), spelling.name(number), seen, tokens)


def _ratings(items: Sequence[Judged]) -> Tensor:
    """[N, K]"""
    return torch.tensor([item.values for item in items], dtype=torch.float64)


def batch_of(items: Sequence[Judged]) -> TokenBatch:
    """Trained is all that is to be written: names, ratings and the end."""
    masks = [[False] * asked + [True] * answer for asked, answer in (item.lengths for item in items)]
    rows = [Row(item.prompt, item.tokens, mask) for item, mask in zip(items, masks, strict=True)]
    return batch(rows, [item.id for item in items])


def loss(model: WrittenRatings, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    return supervised.sft_loss(model.policy(batch).logps, batch.mask, totals)
