"""The policy's loss: one row of the table, composed.

surrogate(log π, A) × importance, of the tokens that count, + β·KL − entropy bonus → aggregate
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metrics
from klimb.objective.algorithm import Algorithm
from klimb.objective.entropy import entropy_coefficient
from klimb.objective.kl import bounded_exp, k3
from klimb.objective.surrogate import anchor_of
from klimb.objective.tokens import Tokens


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
    kept: Tensor | None = None,
    imitation: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of a part of an update, divided by the totals of the whole one: parts add up to the whole.

    All tensors [B, T] in a common dtype (advantages are cast to that of logps); what stands where `mask` does
    not hold, NaN too, reaches neither loss nor gradient. old_logps None: the policy is the one that sampled,
    all ratios are 1. kept and imitation: what `update_columns` found for the whole update. Raises ValueError when an
    input that the algorithm needs is missing.
    """

    def masked(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor, 0.0).to(logps.dtype)

    logps, advantages = masked(logps), masked(advantages)
    old_logps = logps.detach() if old_logps is None else masked(old_logps)
    kl, state = algorithm.kl, state or {}

    anchored = anchor_of(algorithm.surrogate) == "behavior"
    anchor = masked(_required("behavior_logps", behavior_logps, algorithm)) if anchored else old_logps
    per_token, clipped = algorithm.surrogate(logps, anchor, advantages, mask)
    found = {"clip_fraction": metrics.mean(clipped.double(), mask)}
    if algorithm.importance is not None:
        behavior = masked(_required("behavior_logps", behavior_logps, algorithm))
        numerator = logps.detach() if getattr(algorithm.importance, "of_current", False) else old_logps
        per_token = per_token * algorithm.importance(numerator - behavior, mask, advantages)
    if algorithm.token_filter is not None:
        penalty = getattr(algorithm.token_filter, "penalty", None)
        other = 0.0 if penalty is None else per_token + penalty * (logps - old_logps).abs()
        per_token = torch.where(_required("kept", kept, algorithm), per_token, other)
    if kl.in_loss:
        log_ratio = logps - masked(_required("ref_logps", ref_logps, algorithm))
        penalty = float(kl.coefficient(state)) * kl.penalty(log_ratio, mask)
        if kl.corrected:
            penalty = penalty * kl.weight(logps, old_logps)
        found["loss/kl"] = metrics.total(algorithm.aggregate(penalty, mask, totals))
        per_token = per_token + penalty
    if algorithm.entropy_bonus:
        bonus = entropy_coefficient(algorithm.entropy_bonus, state)
        per_token = per_token - bonus * masked(_required("entropy", entropy, algorithm))

    loss = algorithm.aggregate(per_token, mask, totals)
    if algorithm.imitation is not None:
        imitated = -(masked(_required("imitation", imitation, algorithm)) * logps).sum()
        found["loss/imitation"] = metrics.total(imitated)
        loss = loss + imitated
    moved = (logps - old_logps).detach()
    found |= {
        "loss": metrics.total(loss),
        "ratio/max": metrics.largest(bounded_exp(moved), mask),
        "approx_kl": metrics.mean(k3(-moved), mask),
    }
    if entropy is not None:
        found["entropy"] = metrics.mean(entropy, mask)
    return loss, found


def update_columns(
    algorithm: Algorithm,
    *,
    logps: Tensor,
    old_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    scores: Tensor,
    mask: Tensor,
    entropy: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """What `policy_loss` has to know of a whole update before it is split: `kept` and `imitation`, each [B, T], where
    the algorithm has a token filter or imitates. logps (and entropy) are those of the policy now, without gradient.
    """
    if algorithm.token_filter is None and algorithm.imitation is None:
        return {}
    filled = [torch.where(mask, column, 0.0) for column in (logps, old_logps, behavior_logps, advantages)]
    logps, old_logps, behavior_logps, advantages = filled
    anchor = behavior_logps if anchor_of(algorithm.surrogate) == "behavior" else old_logps
    clipped = algorithm.surrogate(logps, anchor, advantages.to(logps.dtype), mask).clipped
    tokens = Tokens(mask, logps, behavior_logps, advantages, scores, clipped, entropy, seed)
    columns = {}
    if algorithm.token_filter is not None:
        columns["kept"] = algorithm.token_filter(tokens)
    if algorithm.imitation is not None:
        columns["imitation"] = algorithm.imitation(tokens)
    return columns


def _required(name: str, tensor: Tensor | None, algorithm: Algorithm) -> Tensor:
    if tensor is None:
        raise ValueError(f"{algorithm.name}: policy_loss needs {name} and got None; see algorithm.needs.")
    return tensor
