"""Learning from what others wrote: demonstrations, and the distributions of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metrics
from klimb.objective.aggregate import token_mean


def nll(logps: Tensor) -> Tensor:
    """−log π, per token, any shape."""
    return -logps


def dft(logps: Tensor) -> Tensor:
    """−sg(π) log π, per token, any shape: dynamic fine-tuning (arXiv 2508.05629, equation 9).

    SFT's gradient is that of a reward 1/π, which is largest where the policy knows least; weighed by π it is that of a
    reward of 1. Tokens that the policy finds impossible are hardly learnt: start from one that knows the task.
    """
    return -logps.detach().exp() * logps


TOKEN_LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}


def sft_loss(
    logps: Tensor, mask: Tensor, totals: BatchTotals, loss: Callable[[Tensor], Tensor] = nll
) -> tuple[Tensor, Metrics]:
    """Mean of `loss` in nats over the update's trained tokens: negative log-likelihood. logps, mask [B, T]."""
    kept = torch.where(mask, logps, 0.0)
    per_token = loss(kept)
    measured = {"loss": metrics.mean(per_token, mask)}
    return token_mean(per_token, mask, totals), measured if loss is nll else {
        **measured,
        "nll": metrics.mean(-kept, mask),
    }


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
