"""Importance corrections: what an engine that samples with numbers of its own does to the gradient, and its repair.

Three policies: μ sampled (an engine's numbers, or weights of some steps ago), π_old is the trainer's before the
update, π is learning. A correction weighs the surrogate's loss by a function of π_old/μ, while the surrogate restrains
π/π_old: the decoupled form. Without one the surrogate's own ratio is π/μ, as far as the trainer knows μ: the form of
two policies. Measured by enumeration on samples of another policy: the whole completion's product alone makes the
expectation right; a token's own ratio leaves out how its prefix came about, and every bound trades bias for variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative, Ordered, Positive
from klimb.objective.kl import bounded_exp

Importance = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log π_old − log μ (zero where not masked), mask, advantages [B, T] → weight [B, T] of the surrogate's loss. One with
``of_current = True`` is given log π − log μ instead."""


@dataclass(frozen=True)
class truncate(Bounded):
    """min(π_old/μ, cap) of each token: truncated importance sampling (TIS; F. Yao et al. 2025; Espeholt et al.,
    arXiv 1802.01561). Never drops a token; pulls the gradient towards what μ likes."""

    cap: Positive = 2.0

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        return bounded_exp(log_weight).clamp(max=self.cap)


@dataclass(frozen=True)
class drop_outside(Ordered):
    """π_old/μ of a token where it lies in [low, high], else 0 (IcePop, arXiv 2510.18855): no token too far off."""

    low: NotNegative = 0.5
    high: Positive = 2.0

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        return _inside(bounded_exp(log_weight), bounded_exp(log_weight), self.low, self.high)


@dataclass(frozen=True)
class sequence_truncate(Bounded):
    """min(Π_t π_old/μ, cap), one weight a completion. Unbiased at cap = inf; the product of a long completion is near 0
    or beyond any cap, so that few samples carry the batch."""

    cap: Positive = 2.0

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        return _product(log_weight).clamp(max=self.cap).expand_as(log_weight)


@dataclass(frozen=True)
class sequence_drop(Ordered):
    """Π_t π_old/μ where it lies in [low, high], else 0: whole completions leave (TRL's default, with high = 3)."""

    low: NotNegative = 0.0
    high: Positive = 3.0

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        weight = _product(log_weight)
        return _inside(weight, weight, self.low, self.high).expand_as(log_weight)


@dataclass(frozen=True)
class geometric_drop(Ordered):
    """π_old/μ of each token where their geometric mean over the completion lies in [low, high], else 0 (as in OpenRLHF
    and NVIDIA's NeMo RL, whose bounds these are).

    The mean does not grow with the length, unlike the product, and sees a steady drift better than one odd token.
    """

    low: NotNegative = 0.999
    high: Positive = 1.002

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        return _inside(bounded_exp(log_weight), bounded_exp(_mean(log_weight, mask)), self.low, self.high)


@dataclass(frozen=True)
class off_policy_drop(Bounded):
    """0 for a completion with A < 0 whose mean of log μ − log π is above `delta`, else 1 (the off-policy sequence mask
    of DeepSeek-V3.2, arXiv 2512.02556; it names no δ, 0.5 is TRL's).

    Bad samples that π would no longer draw push only further away. It looks at the present π, so it also counts the
    drift of the updates on this batch. It weighs nothing: what is kept stays as biased as it was.
    """

    delta: NotNegative = 0.5
    of_current: ClassVar[bool] = True

    def __call__(self, log_weight: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
        stray = -_mean(log_weight, mask) > self.delta
        return torch.where((advantages < 0) & stray, 0.0, 1.0).to(log_weight.dtype)


IMPORTANCES: Mapping[str, type] = {
    "truncate": truncate,
    "drop_outside": drop_outside,
    "sequence_truncate": sequence_truncate,
    "sequence_drop": sequence_drop,
    "geometric_drop": geometric_drop,
    "off_policy_drop": off_policy_drop,
}


def _product(log_weight: Tensor) -> Tensor:
    """[B, T] → [B, 1]."""
    return bounded_exp(log_weight.sum(dim=1, keepdim=True))


def _mean(log_weight: Tensor, mask: Tensor) -> Tensor:
    return log_weight.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _inside(weight: Tensor, by: Tensor, low: float, high: float) -> Tensor:
    return torch.where((by >= low) & (by <= high), weight, 0.0)
