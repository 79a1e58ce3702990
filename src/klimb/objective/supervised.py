"""Learning from what others wrote: demonstrations, and the distributions of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metrics
from klimb.objective.aggregate import token_mean


def nll(logps: Tensor) -> Tensor:
    """−log π, per token, any shape."""
    return -logps


def sft_loss(logps: Tensor, mask: Tensor, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    """Mean negative log-likelihood in nats over the update's trained tokens. logps, mask [B, T]."""
    per_token = nll(torch.where(mask, logps, 0.0))
    return token_mean(per_token, mask, totals), {"loss": metrics.mean(per_token, mask)}


def forward_kl(teacher_logps: Tensor, student_logps: Tensor) -> Tensor:
    """KL(teacher ‖ student) = Σ_v p_T (log p_T − log p_S): [N, V], [N, V] → [N]. It covers every mode."""
    return _kl(teacher_logps, student_logps)


def reverse_kl(teacher_logps: Tensor, student_logps: Tensor) -> Tensor:
    """KL(student ‖ teacher): [N, V], [N, V] → [N]. The student settles on what the teacher finds likely."""
    return _kl(student_logps, teacher_logps)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 · log 0 = 0; written so that a token of probability zero leaves no NaN in the gradient either.
    possible = p > -torch.inf
    gap = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return torch.where(possible, p.exp() * gap, 0.0).sum(dim=-1)
