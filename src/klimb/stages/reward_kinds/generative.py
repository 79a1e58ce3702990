"""A verifier that answers Yes or No in words, and whose odds are the reward (GenRM, arXiv 2408.15240)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.judged import load_judged, verdict_tokens, verdicts
from klimb.data.render import Renderer
from klimb.metrics import Metrics
from klimb.models.faces import Verdicts
from klimb.models.packing import Budget
from klimb.objective import supervised
from klimb.objective.judging import right
from klimb.stages.reward_kinds import Kind, Right, batch, labelled_right
from klimb.types import Labelled


def kind(instruction: str) -> Kind:
    """Supervised fine-tuning on the verdict's token, under the whole vocabulary."""

    def facts(renderer: Renderer, conversational: bool, items: Sequence[Labelled]) -> dict[str, Any]:
        yes, no = verdict_tokens(renderer, instruction, conversational)
        return {"kind": "generative", "instruction": instruction, "yes": yes, "no": no}

    return Kind(partial(load_judged, verdicts(instruction)), batch_of, loss, rightness, facts)


def batch_of(items: Sequence[Labelled]) -> TokenBatch:
    made = batch([Row(i.prompt, i.completion, i.mask) for i in items], [i.id for i in items])
    return made.with_columns(label=torch.tensor([item.label for item in items], dtype=torch.float32))


def loss(model: Verdicts, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    logps, labels = model.logps(batch), batch["label"]
    verdict = torch.where(labels > 0, model.yes, model.no)[:, None]
    loss, found = supervised.sft_loss(logps.gather(1, verdict), batch.mask, totals)
    scores = (logps[:, model.yes] - logps[:, model.no]).detach()
    return loss, {**found, "accuracy": metrics.mean(right(scores, labels)), "score/mean": metrics.mean(scores)}


def rightness(model: Verdicts, items: Sequence[Labelled], budget: Budget) -> Right:
    return labelled_right(model, batch_of(items), [item.label for item in items], budget)
