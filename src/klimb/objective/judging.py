"""What reward models learn from rankings, labels, ratings and steps; and what steps make of a whole completion."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from klimb import metrics
from klimb.batch import BatchTotals
from klimb.metrics import Metrics
from klimb.objective.aggregate import pair_mean, token_mean
from klimb.objective.critic import bradley_terry
from klimb.objective.grouped import group_size

Combine = Literal["min", "product", "mean", "last"]


def ordered_pairs(worth: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """worth, group [B] → the places [P], [P] of every better and worse sample of the same group. Ties are no pairs."""
    better = (group[:, None] == group[None, :]) & (worth[:, None] > worth[None, :])
    places = better.nonzero()
    return places[:, 0], places[:, 1]


def ranking_loss(
    scores: Tensor, worth: Tensor, group: Tensor, *, centering: float = 0.0, groups: int
) -> tuple[Tensor, Metrics]:
    """All pairs of a prompt's K completions together, each weighing 1 / (K choose 2), mean over the update's groups.

    scores, worth, group [B]: of whole groups; what the model gives, and the higher the better in truth. InstructGPT
    (arXiv 2203.02155, equation 1): K forward passes for all pairs, and no completion is trained on K − 1 times as one
    of a pair would be. A tie leaves its pair out and the weights of the others as they are.
    """
    better, worse = ordered_pairs(worth, group)
    size = group_size(group).to(scores.dtype)[better]
    per_pair = bradley_terry(scores[better], scores[worse], centering=centering)
    gap = scores[better] - scores[worse]
    return pair_mean(per_pair * 2 / (size * (size - 1)), groups), {
        "loss": metrics.ratio((per_pair * 2 / (size * (size - 1))).sum(), group.unique().numel()),
        "accuracy": metrics.mean((gap.sign() + 1) / 2),
        "margin": metrics.mean(gap),
        "score/mean": metrics.mean(scores),
    }


def label_loss(scores: Tensor, labels: Tensor, *, samples: int) -> tuple[Tensor, Metrics]:
    """−log σ(±s), per completion [B]: logistic regression on the score, of labels [B] that are good (1) or bad (0)."""
    per_sample = -logsigmoid(scores * (2 * labels - 1))
    return pair_mean(per_sample, samples), {
        "loss": metrics.mean(per_sample),
        "accuracy": metrics.mean(right(scores, labels)),
        "score/mean": metrics.mean(scores),
    }


def step_loss(logits: Tensor, labels: Tensor, mask: Tensor, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    """−log σ(±logit) of every step, mean over the update's steps; logits, labels, mask [B, T], T the steps of one.

    Uesato et al. (arXiv 2211.14275): each step is classified as right or wrong, from what stands up to its end.
    """
    per_step = -logsigmoid(torch.where(mask, logits * (2 * labels - 1), 0.0))
    return token_mean(per_step, mask, totals), {
        "loss": metrics.mean(per_step, mask),
        "accuracy": metrics.mean(right(logits, labels), mask),
        "score/mean": metrics.mean(logits, mask),
    }


def rating_loss(predicted: Tensor, ratings: Tensor, *, samples: int) -> tuple[Tensor, Metrics]:
    """Mean squared error over K attributes, [B, K], mean over the update's samples (HelpSteer2, arXiv 2406.08673)."""
    per_sample = (predicted - ratings).square().mean(dim=1)
    return pair_mean(per_sample, samples), {
        "loss": metrics.mean(per_sample),
        "score/mean": metrics.mean(predicted),
    }


_LEAST_LOG_STEP = -12.0
"""A step below 6e-6 would vanish in float32 beside the threshold that it is added to."""


def ordered(raw: Tensor) -> Tensor:
    """The first threshold and the logs of the steps between them → thresholds [K − 1], rising whatever is learnt."""
    steps = raw[1:].clamp(min=_LEAST_LOG_STEP).exp()
    return torch.cat([raw[:1], raw[:1] + steps.cumsum(0)])


def level_logps(scores: Tensor, thresholds: Tensor) -> Tensor:
    """log P(level) of K ordered levels, [B], [K − 1] → [B, K]: P(above level k) = σ(score − θ_k).

    The proportional odds of McCullagh (1980), with P(level k) = σ(θ_k − s) − σ(θ_{k−1} − s) written as the product
    σ(θ_k − s) · σ(s − θ_{k−1}) · (1 − e^{θ_{k−1} − θ_k}): no difference of two numbers near 1 is taken.
    """
    apart = thresholds - scores[:, None]
    between = torch.log(-torch.expm1(-thresholds.diff()))
    return pad(logsigmoid(apart), (0, 1)) + pad(logsigmoid(-apart), (1, 0)) + pad(between, (1, 1))


def ordinal_loss(scores: Tensor, levels: Tensor, thresholds: Tensor, *, samples: int) -> tuple[Tensor, Metrics]:
    """−log P(level), mean over the update's samples. scores [B]; levels [B] are the places 0 … K − 1 of the right ones;
    thresholds [K − 1], rising."""
    logps = level_logps(scores, thresholds)
    per_sample = -logps.gather(1, levels[:, None]).squeeze(1)
    return pair_mean(per_sample, samples), {
        "loss": metrics.mean(per_sample),
        "accuracy": metrics.mean((logps.argmax(dim=1) == levels).to(scores.dtype)),
        "score/mean": metrics.mean(scores),
    }


def right(scores: Tensor, labels: Tensor) -> Tensor:
    """1 where a score has the sign of its label (1 or 0), else 0; ½ where it is 0."""
    return ((scores * (2 * labels - 1)).sign() + 1) / 2


def so_far(probabilities: Tensor, mask: Tensor, combine: Combine) -> Tensor:
    """P(right) of each step [B, T], left aligned → what they make of the completion up to each step [B, T]."""
    if combine == "last":
        found = probabilities
    elif combine == "mean":
        found = probabilities.cumsum(dim=1) / torch.arange(1, mask.shape[1] + 1, device=mask.device)
    else:
        found = probabilities.cummin(dim=1).values if combine == "min" else probabilities.cumprod(dim=1)
    return torch.where(mask, found, 0.0)  # what comes behind the last step is in no number before it


def combined(probabilities: Tensor, mask: Tensor, combine: Combine) -> Tensor:
    """P(right) of each step [B, T] → one number a completion [B]; 0 of one without steps."""
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return so_far(probabilities, mask, combine).gather(1, last).squeeze(1)


def step_rewards(prefixes: Tensor, mask: Tensor, start: float = 0.0) -> Tensor:
    """By how much each step changes the score so far, [B, T] both: they add up to the score less `start`.

    Differences of a potential (Ng, Harada & Russell 1999): what a token may still earn is the final score less what
    depends on earlier tokens alone, so that the expected policy gradient is that of the final score. The steps' own
    scores, added up, would pay for steps.
    """
    before = torch.cat([torch.full_like(prefixes[:, :1], start), prefixes[:, :-1]], dim=1)
    return torch.where(mask, prefixes - before, 0.0)
