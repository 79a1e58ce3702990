"""The policy's loss: one row of the table, composed.

surrogate(log π, A) × importance + β·KL − entropy bonus → aggregate
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metrics
from klimb.objective.algorithms import Algorithm
from klimb.objective.kl import bounded_exp, k3


def policy_loss(
    algorithm: Algorithm,
    *,
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    totals: BatchTotals,
    old_logps: Tensor | None = None,
    behavior_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of a part of an update, divided by the totals of the whole one: parts add up to the whole.

    All tensors [B, T] in a common dtype (advantages are cast to that of logps); what stands where `mask` does
    not hold, NaN too, reaches neither loss nor gradient. old_logps None: the policy is the one that sampled,
    all ratios are 1. Raises ValueError when an input that the algorithm needs is missing.
    """

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor, 0.0).to(logps.dtype)

    logps, advantages = masked(logps), masked(advantages)
    old_logps = logps.detach() if old_logps is None else masked(old_logps)
    kl = algorithm.kl

    per_token, clipped = algorithm.surrogate(logps, old_logps, advantages, mask)
    found = {"clip_fraction": metrics.mean(clipped.double(), mask)}
    if algorithm.importance is not None:
        behavior = masked(_required("behavior_logps", behavior_logps, algorithm))
        per_token = per_token * algorithm.importance(old_logps - behavior)
    if kl.in_loss:
        log_ratio = logps - masked(_required("ref_logps", ref_logps, algorithm))
        penalty = float(kl.coefficient(state or {})) * kl.penalty(log_ratio, mask)
        found["loss/kl"] = metrics.total(algorithm.aggregate(penalty, mask, totals))
        per_token = per_token + penalty
    if algorithm.entropy_bonus:
        per_token = per_token - algorithm.entropy_bonus * masked(_required("entropy", entropy, algorithm))

    loss = algorithm.aggregate(per_token, mask, totals)
    moved = (logps - old_logps).detach()
    found |= {
        "loss": metrics.total(loss),
        "ratio/max": metrics.largest(bounded_exp(moved), mask),
        "approx_kl": metrics.mean(k3(-moved), mask),
    }
    if entropy is not None:
        found["entropy"] = metrics.mean(entropy, mask)
    return loss, found


def _required(name: str, tensor: Tensor | None, algorithm: Algorithm) -> Tensor:
    if tensor is None:
        raise ValueError(f"{algorithm.name}: policy_loss needs {name} and got None; see algorithm.needs.")
    return tensor
