"""Attributes: a rating for each of several, and their weighted sum as the reward (SteerLM, HelpSteer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.judged import load_judged, ratings
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.packing import Budget
from klimb.objective.judging import rating_loss
from klimb.stages.reward_kinds import Kind, Right, batch, in_order
from klimb.types import Judged


def kind(weights: Mapping[str, float]) -> Kind:
    """Regression heads (arXiv 2310.05344; HelpSteer2, arXiv 2406.08673). weights: of each attribute in the reward."""
    facts = {"kind": "attributes", "attributes": dict(weights)}

    def rightness(model: RewardModel, items: Sequence[Judged], budget: Budget) -> Right:
        worth = torch.tensor([item.values for item in items]).double() @ torch.tensor([*weights.values()]).double()
        return in_order(reward_scores(model, batch_of(items), budget=budget), worth)

    return Kind(partial(load_judged, ratings([*weights])), batch_of, loss, rightness, lambda *_: facts)


def batch_of(items: Sequence[Judged]) -> TokenBatch:
    rows = [Row(item.prompt, item.tokens, [True] * len(item.tokens)) for item in items]
    made = batch(rows, [item.id for item in items])
    return made.with_columns(**{
        f"rating{number}": torch.tensor(each, dtype=torch.float32)
        for number, each in enumerate(zip(*(item.values for item in items)))
    })  # fmt: skip


def loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    wanted = torch.stack([batch[f"rating{number}"] for number in range(len(batch.columns))], dim=1)
    return rating_loss(model.outputs(batch), wanted, samples=totals.samples)
