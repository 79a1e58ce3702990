"""The rewards of one whole update, and sums over its groups: what every advantage is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from klimb.objective.kl import State

VARIANCE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rewards:
    """The shaped rewards of one whole update, and what they may be compared with.

    per_token [B, T] float64, zero where not masked; mask [B, T]; group [B] numbers the prompts; values [B, T]
    are V of the state *before* each token; interrupted [B] marks samples that were cut off and carry no
    score. Only for advantages that say so: parts [B, K], the components of the score before they are added up
    with part_weights [K]; baseline [B] or [B, N], made of further samples of the prompt; leash [B], β · log π/π_ref of
    the sample where the loss is a regression on it; logps [B, T] as sampled and collisions [B, T], Σ_v π(v)².
    """

    per_token: Tensor
    mask: Tensor
    group: Tensor
    values: Tensor | None = None
    interrupted: Tensor | None = None
    state: State = field(default_factory=dict)
    parts: Tensor | None = None
    part_weights: Tensor | None = None
    baseline: Tensor | None = None
    leash: Tensor | None = None
    logps: Tensor | None = None
    collisions: Tensor | None = None

    @property
    def returns(self) -> Tensor:
        """R_i = Σ_t rewards, [B]: the whole completion as one action."""
        return self.per_token.sum(dim=1)


def has_variance(returns: Tensor, group: Tensor) -> Tensor:
    """[B], [B] → [B] bool: whether the sample's group differs at all, by more than rounding.

    By max − min ≤ 1e-6 · max(1, |R|) and never by the standard deviation, which is not zero for equal floats.
    """
    index = group_index(group)
    low, high = (
        returns.new_zeros(len(index)).scatter_reduce(0, index, returns, how, include_self=False)[index]
        for how in ("amin", "amax")
    )
    return high - low > VARIANCE_TOLERANCE * torch.maximum(low.abs(), high.abs()).clamp(min=1)


def zero_without_variance(advantages: Tensor, rewards: Rewards) -> Tensor:
    return torch.where(has_variance(rewards.returns, rewards.group), advantages, 0.0)


def group_index(group: Tensor) -> Tensor:
    return group.unique(return_inverse=True)[1]


def group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[B] → [B]: each sample gets its group's sum."""
    index = group_index(group)
    return values.new_zeros(len(index)).index_add(0, index, values)[index]


def group_size(group: Tensor) -> Tensor:
    return group_sum(torch.ones(len(group), dtype=torch.float64, device=group.device), group)


def discounted_sum(values: Tensor, decay: float | Tensor) -> Tensor:
    """[B, T] → y with y_t = x_t + decay · y_{t+1}; decay may differ by sample, [B]."""
    sums = values.clone()
    for t in range(values.shape[1] - 2, -1, -1):
        sums[:, t] += decay * sums[:, t + 1]
    return sums


def last_token(mask: Tensor) -> Tensor:
    """[B, T] left aligned → [B, T] bool, True at each sample's last policy token."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1)
