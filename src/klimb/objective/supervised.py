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


def generalised_jsd(teacher_logps: Tensor, student_logps: Tensor, beta: float) -> Tensor:
    """β KL(T ‖ M) + (1 − β) KL(S ‖ M) with M = βT + (1 − β)S: [N, V], [N, V] → [N] (GKD, arXiv 2306.13649, section 3).

    Bounded by ln 2, and symmetric at β = ½. At its ends it vanishes, so that there stand what its slopes tend to:
    `forward_kl` at 0 and `reverse_kl` at 1.
    """
    if beta == 0:
        return forward_kl(teacher_logps, student_logps)
    if beta == 1:
        return reverse_kl(teacher_logps, student_logps)
    weights = student_logps.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logsumexp(torch.stack([teacher_logps + weights[0], student_logps + weights[1]]), dim=0)
    return beta * _kl(teacher_logps, mixture) + (1 - beta) * _kl(student_logps, mixture)


def distillation_loss(divergence: Tensor, mask: Tensor, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    """Mean over the update's tokens of a divergence from the teacher, [B, T], in nats."""
    return token_mean(divergence, mask, totals), {"loss": metrics.mean(divergence, mask)}


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 · log 0 = 0; written so that a token of probability zero leaves no NaN in the gradient either.
    possible = p > -torch.inf
    gap = torch.where(possible, p, 0.0) - torch.where(possible, q, 0.0)
    return (p.exp() * gap).sum(dim=-1)
