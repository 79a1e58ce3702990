"""What judges the policy: reward models from comparisons, and the critic that predicts the return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metric, Metrics
from klimb.objective.aggregate import pair_mean, token_mean
from klimb.objective.bounds import Bounded, Positive, Share


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    centering: float = 0.0,
    strength: Tensor | float = 1.0,
) -> Tensor:
    """Scores [P], [P] → −log σ(s_w − s_l − margin) + centering · (s_w + s_l)², per pair [P].

    strength [P] in (0.5, 1]: which share of judges would choose the chosen one. Then the first term is the
    cross-entropy of a coin of that share, lowest where s_w − s_l − margin = log(strength / (1 − strength)).

    margin [P]: by how much the better one is better (Llama 2, arXiv 2307.09288, equation 2). Comparisons
    leave the level of the scores open; centering (arXiv 2312.09244; 0.01 recommended) holds it near zero.
    """
    gap = chosen - rejected - margin
    likelihood = strength * logsigmoid(gap) + (1 - strength) * logsigmoid(-gap)
    return -likelihood + centering * (chosen + rejected).square()


def reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0, centering: float = 0.0,
    strength: Tensor | float = 1.0, pairs: int,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Loss of the reward model over a part of an update of `pairs` pairs in all; a tie is half right."""
    per_pair = bradley_terry(chosen, rejected, margin, centering, strength)
    gap = chosen - rejected
    return pair_mean(per_pair, pairs), {
        "loss": metrics.mean(per_pair),
        "accuracy": metrics.mean((gap.sign() + 1) / 2),
        "margin": metrics.mean(gap),
        "score/mean": metrics.mean(torch.cat([chosen, rejected])),
    }


@dataclass(frozen=True)
class Critic(Bounded):
    """PPO's second learner. value_clip: how far from its value at sampling time it may profit from moving.

    lam: λ of the returns it learns, where that differs from the advantage's (decoupled GAE, arXiv 2503.01491; VAPO: 1).
    """

    value_clip: Positive | None = 0.2
    lam: Share | None = None


def value_loss(values: Tensor, returns: Tensor, old_values: Tensor | None, value_clip: float | None) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±c) − R)²), per token [B, T]; c = None: ½ (V − R)².

    As in OpenAI's PPO; the larger of two errors, so that clipping never makes the loss look better than it
    is.
    """
    error = (values - returns).square()
    if value_clip is not None and old_values is not None:
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2


def critic_loss(
    critic: Critic,
    *,
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    mask: Tensor,
    totals: BatchTotals,
) -> tuple[Tensor, Metrics]:
    """The critic's loss over a part of an update, mean over the update's tokens. All tensors [B, T]."""
    values = torch.where(mask, values, 0.0)  # what stands elsewhere in the others ends with the mean
    old_values = None if old_values is None else old_values.to(values.dtype)
    per_token = value_loss(values, returns.to(values.dtype), old_values, critic.value_clip)
    return token_mean(per_token, mask, totals), {"critic/loss": metrics.mean(per_token, mask)}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Metric:
    """1 − Var(R − V) / Var(R) over the update's tokens: 1 for a perfect critic, 0 for a constant one."""
    target, error = returns[mask].double(), (returns - values)[mask].double()
    spread = (target - target.mean()).square().sum()
    return metrics.ratio(spread - (error - error.mean()).square().sum(), spread)
