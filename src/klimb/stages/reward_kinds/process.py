"""Steps: a solution whose every step is right or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from klimb.batch import BatchTotals, Row, TokenBatch, pad_tokens
from klimb.data.judged import load_judged, steps
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel, step_logits
from klimb.models.packing import Budget
from klimb.objective.judging import Combine, right, step_loss
from klimb.stages.reward_kinds import Kind, Right, batch
from klimb.types import Judged
from klimb.watch.statistics import Tally


def kind(separator: str, combine: Combine) -> Kind:
    """combine: what the steps' probabilities of being right make of the whole."""
    facts = {"kind": "process", "separator": separator, "combine": combine}
    return Kind(partial(load_judged, steps(separator)), batch_of, loss, rightness, lambda *_: facts)


def batch_of(items: Sequence[Judged]) -> TokenBatch:
    """The last token of each step is marked, so that T counts steps."""
    masks = [[place == length - 1 for length in item.lengths for place in range(length)] for item in items]
    made = batch([Row(i.prompt, i.tokens, mask) for i, mask in zip(items, masks)], [i.id for i in items])
    return made.with_columns(labels=pad_tokens([item.values for item in items], made.mask))


def loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    return step_loss(model.steps(batch), batch["labels"], batch.mask, totals)


def rightness(model: RewardModel, items: Sequence[Judged], budget: Budget) -> Right:
    """Of every step."""
    logits = step_logits(model, batch_of(items), budget=budget)
    return [
        Tally.of(right(line[: len(item.values)], torch.tensor(item.values)).tolist())
        for line, item in zip(logits, items, strict=True)
    ]
