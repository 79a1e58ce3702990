"""Rankings: several completions of a prompt in an order, all their pairs together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.judged import load_judged, rankings
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.packing import Budget
from klimb.objective.judging import ordered_pairs, ranking_loss
from klimb.stages.reward_kinds import Kind, Right
from klimb.types import Judged
from klimb.watch.statistics import Tally


def kind(centering: float) -> Kind:
    def loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return ranking_loss(model(batch), batch["worth"], batch.group, centering=centering, groups=totals.groups)

    return Kind(partial(load_judged, rankings), batch_of, loss, rightness)


def batch_of(items: Sequence[Judged]) -> TokenBatch:
    """The completions of one prompt are a group and stay together."""
    pieces = [(place, item, piece) for place, item in enumerate(items) for piece in item.pieces]
    rows = [[Row(item.prompt, piece, [True] * len(piece))] for _, item, piece in pieces]
    ids = [f"{item.id}/{number}" for item in items for number in range(len(item.lengths))]
    batch = TokenBatch.from_rows(rows, [place for place, _, _ in pieces], ids, whole_groups=True)
    return batch.with_columns(worth=torch.tensor([value for item in items for value in item.values]).double())


def rightness(model: RewardModel, items: Sequence[Judged], budget: Budget) -> Right:
    """Of every pair of a prompt."""
    scores = reward_scores(model, batch_of(items), budget=budget).split([len(item.values) for item in items])
    found = []
    for own, item in zip(scores, items, strict=True):
        better, worse = ordered_pairs(torch.tensor(item.values), torch.zeros(len(item.values)))
        found.append(Tally.of((((own[better] - own[worse]).sign() + 1) / 2).tolist()))
    return found
