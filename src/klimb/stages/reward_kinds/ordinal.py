"""Ordered levels: one score, and thresholds on it between the levels of a rating (McCullagh 1980)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from klimb.batch import BatchTotals, TokenBatch
from klimb.data.judged import levels, load_judged
from klimb.data.render import Renderer
from klimb.errors import DataError
from klimb.metrics import Metrics
from klimb.models.faces import reward_scores
from klimb.models.packing import Budget
from klimb.models.rated import Ordinal
from klimb.objective.judging import level_logps, ordinal_loss
from klimb.stages.reward_kinds import Kind, Right, exactly, in_order
from klimb.stages.reward_kinds.attributes import batch_of
from klimb.types import Judged


def kind(rating: str) -> Kind:
    """Proportional odds: that 4 is better than 3 is learnt, how much better is not assumed but found, as θ's.

    The likelihood of the level itself is maximised, and not K − 1 separate crossings of thresholds (CORAL, arXiv
    1901.07884): only that is a probability of what was observed. rating: the column with the levels.
    """

    def facts(renderer: Renderer, conversational: bool, items: Sequence[Judged]) -> dict[str, Any]:
        counts = sorted(Counter(int(item.values[0]) for item in items).items())
        if len(counts) < 2:
            raise DataError(f"{rating} is {counts[0][0]} in every row to learn from", where="data",
                            why="one level has no order", fix="use rows with at least two levels")  # fmt: skip
        return {"kind": "ordinal", "rating": rating, "levels": [level for level, _ in counts],
                "thresholds": thresholds_at_zero([count for _, count in counts])}  # fmt: skip

    def figures(model: Ordinal, items: Sequence[Judged], budget: Budget) -> dict[str, Any]:
        scores = reward_scores(model, batch_of(items), budget=budget)
        likeliest = level_logps(scores, model.thresholds.detach().double().cpu()).argmax(dim=1)
        return exactly([rating], model.levels.double().cpu()[likeliest, None], worth_of(items)[:, None])

    return Kind(partial(load_judged, levels(rating)), batch_of, loss, rightness, facts, learned, figures)


def thresholds_at_zero(counts: Sequence[int]) -> list[float]:
    """[K] → [K − 1]: with them a score of 0 says of each level how frequent it is, and with that training begins."""
    below = list(accumulate(counts))
    return [math.log(count / (below[-1] - count)) for count in below[:-1]]


def worth_of(items: Sequence[Judged]) -> Tensor:
    return torch.tensor([item.values[0] for item in items], dtype=torch.float64)


def loss(model: Ordinal, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    levels = torch.searchsorted(model.levels, batch["rating0"].to(model.levels.device))
    return ordinal_loss(model(batch), levels, model.thresholds, samples=totals.samples)


def rightness(model: Ordinal, items: Sequence[Judged], budget: Budget) -> Right:
    return in_order(reward_scores(model, batch_of(items), budget=budget), worth_of(items))


def learned(model: Ordinal) -> dict[str, Any]:
    return {"thresholds": model.thresholds.tolist()}
