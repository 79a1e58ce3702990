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
from klimb.models.encoder import EncoderReward
from klimb.models.faces import RewardModel, Verdicts, reward_scores
from klimb.models.packing import Budget
from klimb.objective.judging import right

Judge = RewardModel | EncoderReward | Verdicts
Right = list[list[float]]
"""Of each item and each thing that it asks: 1 right, ½ undecided, 0 wrong."""


@dataclass(frozen=True)
class Kind:
    """A kind of reward model, as the training loop sees it.

    load: as those of `klimb.data.load`. batch_of: items → samples to learn from. loss: of the model, a part of an
    update, and the update's totals. rightness: of held-out items. facts: how the model is read, as it is kept beside
    the weights, by its renderer and whether it was trained on messages.
    """

    load: Callable[..., Loaded[Any]]
    batch_of: Callable[[Sequence[Any]], TokenBatch]
    loss: Callable[[Any, TokenBatch, BatchTotals], tuple[Tensor, Metrics]]
    rightness: Callable[[Any, Sequence[Any], Budget], Right]
    facts: Callable[[Renderer, bool], dict[str, Any]] = lambda renderer, conversational: {}


def batch(rows: Sequence[Row], ids: Sequence[str]) -> TokenBatch:
    """A sample for each row."""
    return TokenBatch.from_rows([[row] for row in rows], range(len(rows)), ids)


def labelled_right(model: Judge, batch: TokenBatch, labels: Sequence[bool], budget: Budget) -> Right:
    """Does the score have the sign of the label?"""
    found = right(reward_scores(model, batch, budget=budget), torch.tensor(labels, dtype=torch.float64))
    return [[value] for value in found.tolist()]
