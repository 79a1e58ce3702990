"""Surrogates: the per-token loss whose gradient moves the policy, and what restrains it off-policy.

All take (logps, old_logps, advantages, mask), each [B, T], and are minimised. With r_t = π/π_old every one of
them has REINFORCE's gradient, −A ∇ log π, where r_t = 1, as in the first update after sampling; they differ
only later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from klimb.objective.kl import bounded_exp


class PerToken(NamedTuple):
    """loss [B, T]; clipped [B, T] bool: where the restraint is at work."""

    loss: Tensor
    clipped: Tensor


Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], PerToken]


def reinforce(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
    """−A log π (Williams 1992). Knows no ratio: right only for the first update after sampling."""
    return PerToken(-advantages * logps, torch.zeros_like(mask))


@dataclass(frozen=True)
class clip:
    """max(−A r, −A clip(r, 1 − low, 1 + high)) (PPO, arXiv 1707.06347, equation 7; high > low: DAPO).

    A token that already moved its way past the bound gets no gradient; one that moved the wrong way keeps all
    of it.
    """

    low: float = 0.2
    high: float = 0.2

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        return _clip(bounded_exp(logps - old_logps), advantages, self.low, self.high)


@dataclass(frozen=True)
class dual_clip:
    """As `clip`, and for A < 0 never more than −bound · A (dual clip, arXiv 1912.09729; bound c = 3).

    Stops the one case that `clip` leaves open: a bad token whose ratio has become huge.
    """

    low: float = 0.2
    high: float = 0.2
    bound: float = 3.0

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        ratio = bounded_exp(logps - old_logps)
        loss, clipped = _clip(ratio, advantages, self.low, self.high)
        beyond = (advantages < 0) & (ratio > self.bound)
        return PerToken(torch.where(beyond, -self.bound * advantages, loss), clipped | beyond)


@dataclass(frozen=True)
class sequence_clip:
    """`clip` on s_i = (Π_t r_t)^(1/|y|), one for all tokens of a sample (GSPO, arXiv 2507.18071, equation 5).

    In the token form sg[s_i] · π/sg[π] (GSPO-token), which gives the same gradient and lets advantages differ
    by token. s_i stays very near 1, hence bounds of a few 1e-4. Belongs with `sequence_mean`.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return _clip(bounded_exp(mean.detach() + logps - logps.detach()), advantages, self.low, self.high)


@dataclass(frozen=True)
class product_clip:
    """`clip` on the whole completion's importance weight Π_t r_t (RLOO in TRL: it is one action).

    A sample's loss is spread evenly over its tokens, so that `sequence_sum(1)` averages the losses of
    samples. Unbiased off-policy until it clips, which happens ever sooner the longer the completion.
    """

    low: float = 0.2
    high: float = 0.2

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        weight = bounded_exp(log_ratio.sum(dim=1, keepdim=True)).expand_as(logps)
        loss, clipped = _clip(weight, advantages, self.low, self.high)
        return PerToken(loss / mask.sum(dim=1, keepdim=True).clamp(min=1), clipped)


@dataclass(frozen=True)
class cispo:
    """−sg[clip(r, 1 − low, 1 + high)] · A · log π (CISPO, MiniMax-M1, arXiv 2506.13585).

    Bounds the weight and never drops a token's gradient. No lower bound at low = 1; high = 4 is the weight of
    at most 5 that ScaleRL recommends (arXiv 2510.13786), MiniMax did not publish theirs.
    """

    low: float = 1.0
    high: float = 4.0

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        ratio = bounded_exp(logps - old_logps).detach()
        weight = ratio.clamp(1 - self.low, 1 + self.high)
        return PerToken(-weight * advantages * logps, weight != ratio)


SURROGATES: Mapping[str, Surrogate | type] = {
    "reinforce": reinforce,
    "clip": clip,
    "dual_clip": dual_clip,
    "sequence_clip": sequence_clip,
    "product_clip": product_clip,
    "cispo": cispo,
}


Importance = Callable[[Tensor], Tensor]
"""log π_old − log μ [B, T] → weight [B, T] of the surrogate's loss, μ being the engine that sampled."""


@dataclass(frozen=True)
class truncate:
    """min(π_old/μ, cap): truncated importance sampling, for an engine whose numbers are not the trainer's."""

    cap: float = 2.0

    def __call__(self, log_weight: Tensor) -> Tensor:
        return bounded_exp(log_weight).clamp(max=self.cap)


@dataclass(frozen=True)
class drop_outside:
    """π_old/μ where it lies in [low, high], else 0 (IcePop, arXiv 2510.18855): no token too far off."""

    low: float = 0.5
    high: float = 2.0

    def __call__(self, log_weight: Tensor) -> Tensor:
        weight = bounded_exp(log_weight)
        return torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)


IMPORTANCES: Mapping[str, type] = {"truncate": truncate, "drop_outside": drop_outside}


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> PerToken:
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    outward = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return PerToken(loss, outward)
