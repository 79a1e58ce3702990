"""Kinds of reward models: what each learns from, how it is trained, and when it is right. One file for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.render import Renderer
from klimb.data.report import Loaded
from klimb.metrics import Metrics
from klimb.models.faces import reward_scores
from klimb.models.packing import Budget
from klimb.models.rated import Judge
from klimb.objective.judging import right
from klimb.watch.statistics import Tally

Right = list[Tally]
"""Of each item, over all that it asks: 1 right, ½ undecided, 0 wrong."""
_TOGETHER = 256
"""Completions that are compared with all others at once: in memory that grows with their number, not its square."""


@dataclass(frozen=True)
class Kind:
    """A kind of reward model, as the training loop sees it.

    load: as those of `klimb.data.load`. batch_of: items → samples to learn from. loss: of the model, a part of an
    update, and the update's totals. rightness: of held-out items. facts: how the model is read, as it is kept beside
    the weights, by its renderer, whether it was trained on messages, and the items to learn from. learned: the facts
    that training has changed. figures: what else is told of held-out items.
    """

    load: Callable[..., Loaded[Any]]
    batch_of: Callable[[Sequence[Any]], TokenBatch]
    loss: Callable[[Any, TokenBatch, BatchTotals], tuple[Tensor, Metrics]]
    rightness: Callable[[Any, Sequence[Any], Budget], Right]
    facts: Callable[[Renderer, bool, Sequence[Any]], dict[str, Any]] = lambda *_: {}
    learned: Callable[[Any], dict[str, Any]] = lambda model: {}
    figures: Callable[[Any, Sequence[Any], Budget], dict[str, Any]] = lambda *_: {}


def batch(rows: Sequence[Row], ids: Sequence[str]) -> TokenBatch:
    """A sample for each row."""
    return TokenBatch.from_rows([[row] for row in rows], range(len(rows)), ids)


def labelled_right(model: Judge, batch: TokenBatch, labels: Sequence[bool], budget: Budget) -> Right:
    """Does the score have the sign of the label?"""
    found = right(reward_scores(model, batch, budget=budget), torch.tensor(labels, dtype=torch.float64))
    return [Tally.of([value]) for value in found.tolist()]


def in_order(scores: Tensor, worth: Tensor) -> Right:
    """Of each completion: is it in the right order with every other one, of any prompt? scores, worth [N]."""
    found: Right = []
    for own, value in zip(scores.split(_TOGETHER), worth.split(_TOGETHER)):
        better = (value[:, None] - worth).sign()
        agreement = (own[:, None] - scores).sign() * better  # 1 right, -1 wrong; 0 undecided, or nothing asked
        counts = zip(*(which.sum(1).tolist() for which in (better != 0, agreement > 0, agreement < 0)), strict=True)
        found += [_tally(*each) for each in counts]
    return found


def _tally(asked: int, right: int, wrong: int) -> Tally:
    total = right + (asked - right - wrong) / 2
    squares = right + (asked - right - wrong) / 4
    return Tally(asked, total, (squares - total**2 / asked) / (asked - 1) if asked > 1 else 0.0)


def exactly(names: Sequence[str], found: Tensor, given: Tensor) -> dict[str, dict[str, float]]:
    """Shares of exactly right ratings, and those of the most frequent one said of all. found, given [N, K]."""
    constant = given.mode(dim=0).values
    return {
        "exact": dict(zip(names, (found == given).double().mean(dim=0).tolist(), strict=True)),
        "exact_if_constant": dict(zip(names, (given == constant).double().mean(dim=0).tolist(), strict=True)),
    }
