"""Aggregates: the one place where per-token losses become a scalar.

Each sums what it is given and divides by a denominator of the *whole* update (all micro-batches, all ranks),
so that the parts add up to the whole however it was split. A sample's own length is in its own line of the
mask. Samples without a policy token are in no denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.batch import BatchTotals
from klimb.objective.bounds import Bounded, Positive

Aggregate = Callable[[Tensor, Tensor, BatchTotals], Tensor]
"""per_token, mask [B, T], totals → scalar."""


def token_mean(per_token: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    """Σ_i Σ_t ℓ / Σ_i |y_i|: every token weighs the same, hence long completions more (DAPO).

    Degrades when a few very long completions hold most of the tokens: the update is theirs.
    """
    return _kept(per_token, mask).sum() / max(totals.tokens, 1)


def sequence_mean(per_token: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    """1/B Σ_i 1/|y_i| Σ_t ℓ: every completion weighs the same, hence tokens of long ones less (GRPO).

    Degrades when wrong answers are long: each of their tokens is punished less, so that they grow.
    """
    length = mask.sum(dim=1).clamp(min=1)
    return (_kept(per_token, mask).sum(dim=1) / length).sum() / max(totals.samples, 1)


@dataclass(frozen=True)
class sequence_sum(Bounded):
    """1/(B · constant) Σ_i Σ_t ℓ: no weighing by length; at constant = 1 the policy gradient itself.

    Without a constant the run's longest completion is filled in (Dr. GRPO, arXiv 2503.20783, section 3.2).
    Degrades when lengths differ by orders of magnitude: the longest completions decide.
    """

    constant: Positive | None = None

    def __call__(self, per_token: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
        if self.constant is None:
            raise ValueError("aggregate sequence_sum: its constant is open; call algorithm.resolve(max_length=...).")
        return _kept(per_token, mask).sum() / (max(totals.samples, 1) * self.constant)


AGGREGATES: Mapping[str, Aggregate | type] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
}


def pair_mean(per_pair: Tensor, pairs: int) -> Tensor:
    """Loss of pairs [P] → scalar, `pairs` being how many the whole update has."""
    return per_pair.sum() / max(pairs, 1)


def _kept(per_token: Tensor, mask: Tensor) -> Tensor:
    # Not per_token * mask: 0 · NaN is NaN.
    return torch.where(mask, per_token, 0.0)
