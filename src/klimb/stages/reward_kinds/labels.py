"""Labels: a single completion that is good or bad, without another to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.feedback import load_feedback
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel
from klimb.models.packing import Budget
from klimb.objective.judging import label_loss
from klimb.stages.reward_kinds import Kind, Right, batch, labelled_right
from klimb.types import Labelled


def kind() -> Kind:
    """Logistic regression on the score. Of pairs, the chosen one is good and the rejected one bad."""
    return Kind(partial(load_feedback, "labels"), batch_of, loss, rightness)


def batch_of(items: Sequence[Labelled]) -> TokenBatch:
    made = batch([Row(i.prompt, i.completion, i.mask) for i in items], [i.id for i in items])
    return made.with_columns(label=torch.tensor([item.label for item in items], dtype=torch.float32))


def loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    return label_loss(model(batch), batch["label"], samples=totals.samples)


def rightness(model: RewardModel, items: Sequence[Labelled], budget: Budget) -> Right:
    return labelled_right(model, batch_of(items), [item.label for item in items], budget)
