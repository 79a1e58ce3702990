"""Pairs: which of two completions is better, by what margin, or by which share of the judges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.load import load_preferences
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.packing import Budget
from klimb.objective.critic import reward_loss
from klimb.stages.reward_kinds import Kind, Right
from klimb.types import Preference
from klimb.watch.statistics import Tally


def kind(centering: float) -> Kind:
    def loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return pair_loss(model, batch, totals, centering)

    return Kind(load_preferences, batch_of, loss, rightness)


def batch_of(pairs: Sequence[Preference]) -> TokenBatch:
    """2P samples, chosen before rejected; a pair is a group and stays together."""
    rows, groups, ids = [], [], []
    for place, pair in enumerate(pairs):
        rows += [
            [Row(pair.prompt, pair.chosen, pair.chosen_mask)],
            [Row(pair.prompt, pair.rejected, pair.rejected_mask)],
        ]
        groups += [place, place]
        ids += [f"{pair.id}/chosen", f"{pair.id}/rejected"]
    batch = TokenBatch.from_rows(rows, groups, ids, whole_groups=True)
    return batch.with_columns(
        margin=torch.tensor([pair.margin for pair in pairs for _ in range(2)]),
        strength=torch.tensor([pair.strength for pair in pairs for _ in range(2)]),
    )


def pair_loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals, centering: float) -> tuple[Tensor, Metrics]:
    scores, strength = model(batch), batch.get("strength")
    return reward_loss(
        scores[0::2], scores[1::2], margin=batch["margin"][0::2], centering=centering,
        strength=1.0 if strength is None else strength[0::2], pairs=totals.groups,
    )  # fmt: skip


@torch.no_grad()
def rightness(model: RewardModel, pairs: Sequence[Preference], budget: Budget) -> Right:
    scores = reward_scores(model, batch_of(pairs), budget=budget)
    return [Tally.of([value]) for value in (((scores[0::2] - scores[1::2]).sign() + 1) / 2).tolist()]
