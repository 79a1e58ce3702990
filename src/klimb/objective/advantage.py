"""Advantages: how much better than expected a completion (or a token) turned out.

An advantage is a pure function of the update's `Rewards`, to one number a sample [B] or a token [B, T]. What
it subtracts must not depend on the sample's own tokens, or the gradient points elsewhere; each says whether
that holds. One that remembers something between updates has ``next_state(rewards)`` besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.kl import State

VARIANCE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Rewards:
    """The shaped rewards of one whole update, and what they may be compared with.

    per_token [B, T] float64, zero where not masked; mask [B, T]; group [B] numbers the prompts; values [B, T]
    are V of the state *before* each token; interrupted [B] marks samples that were cut off and carry no
    score.
    """

    per_token: Tensor
    mask: Tensor
    group: Tensor
    values: Tensor | None = None
    interrupted: Tensor | None = None
    state: State = field(default_factory=dict)

    @property
    def returns(self) -> Tensor:
        """R_i = Σ_t rewards, [B]: the whole completion as one action."""
        return self.per_token.sum(dim=1)


Advantage = Callable[[Rewards], Tensor]
"""Rewards → [B] or [B, T], float64."""


def has_variance(returns: Tensor, group: Tensor) -> Tensor:
    """[B], [B] → [B] bool: whether the sample's group differs at all, by more than rounding.

    By max − min ≤ 1e-6 · max(1, |R|) and never by the standard deviation, which is not zero for equal floats.
    """
    index = _index(group)
    low, high = (
        returns.new_zeros(len(index)).scatter_reduce(0, index, returns, how, include_self=False)[index]
        for how in ("amin", "amax")
    )
    return high - low > VARIANCE_TOLERANCE * torch.maximum(low.abs(), high.abs()).clamp(min=1)


def no_baseline(rewards: Rewards) -> Tensor:
    """A = R. Unbiased, and as noisy as the score's distance from zero (Williams 1992)."""
    return rewards.returns


def batch_mean(rewards: Rewards) -> Tensor:
    """A = R − mean over the update. (B−1)/B of the true gradient: each sample is in its own baseline."""
    return rewards.returns - rewards.returns.mean()


@dataclass(frozen=True)
class running_mean:
    """A = R − b, b ← decay · b + (1 − decay) · mean R: unbiased, since b stems from earlier updates alone.

    The moving-average baseline of arXiv 2402.14740 (its part on REINFORCE) as an exponential one. The first update has
    no past and uses its own mean. Degrades when prompts differ much in difficulty.
    """

    decay: float = 0.9

    def __call__(self, rewards: Rewards) -> Tensor:
        return rewards.returns - self._baseline(rewards)

    def next_state(self, rewards: Rewards) -> dict[str, Tensor]:
        mean = rewards.returns.mean()
        return {"baseline": self.decay * self._baseline(rewards) + (1 - self.decay) * mean}

    def _baseline(self, rewards: Rewards) -> Tensor:
        return rewards.state.get("baseline", rewards.returns.mean())


def group_mean(rewards: Rewards) -> Tensor:
    """A = R − mean of the group (Dr. GRPO, arXiv 2503.20783). Exactly (G−1)/G of the true gradient."""
    returns, group = rewards.returns, rewards.group
    return _zero_without_variance(returns - _group_sum(returns, group) / _group_size(group), rewards)


def leave_one_out(rewards: Rewards) -> Tensor:
    """A = R − mean of the *other* samples of the group (RLOO, arXiv 2402.14740). Unbiased; needs two."""
    returns, group = rewards.returns, rewards.group
    others = (_group_sum(returns, group) - returns) / (_group_size(group) - 1).clamp(min=1)
    return _zero_without_variance(returns - others, rewards)


@dataclass(frozen=True)
class group_zscore:
    """A = (R − mean) / (std + eps) of the group, std unbiased (GRPO, arXiv 2402.03300, section 4.1.2).

    Every prompt pulls equally hard whether its samples differ by much or little: no longer the gradient of
    the expected reward, not even in direction, and near-ties are blown up (eps, TRL's 1e-4, damps that).
    """

    eps: float = 1e-4

    def __call__(self, rewards: Rewards) -> Tensor:
        returns, group = rewards.returns, rewards.group
        size = _group_size(group)
        centred = returns - _group_sum(returns, group) / size
        std = (_group_sum(centred.square(), group) / (size - 1).clamp(min=1)).sqrt()
        return _zero_without_variance(centred / (std + self.eps).where(std > 0, 1.0), rewards)


@dataclass(frozen=True)
class discounted_return:
    """A_t = Σ_{k≥t} γ^(k−t) r_k: rewards to go, no baseline (REINFORCE++, arXiv 2501.03262), to be whitened.

    γ < 1 forgets a score at the end of a long completion, and shifts where training ends.
    """

    gamma: float = 1.0

    def __call__(self, rewards: Rewards) -> Tensor:
        return discounted_sum(rewards.per_token, self.gamma)


@dataclass(frozen=True)
class gae:
    """δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (arXiv 1506.02438, equation 16) over policy tokens.

    A completion ends where its tokens end, also when it was cut by length: its score is its reward and V
    beyond is 0. An interrupted sample carries no score: it counts as ended just before its last token, whose
    V stands for all that would have come, and that token itself (its outcome is unknown) gets no advantage.
    """

    gamma: float = 1.0
    lam: float = 0.95
    needs_values: ClassVar[bool] = True

    def __call__(self, rewards: Rewards) -> Tensor:
        if rewards.values is None:
            raise ValueError("advantage gae: no values were given; it needs a critic, or use leave_one_out.")
        values = torch.where(rewards.mask, rewards.values.double(), 0.0)
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        delta = rewards.per_token + self.gamma * following - values
        if rewards.interrupted is not None:
            delta = torch.where(rewards.interrupted[:, None] & last_token(rewards.mask), 0.0, delta)
        return discounted_sum(delta, self.gamma * self.lam)


ADVANTAGES: Mapping[str, Advantage | type] = {
    "none": no_baseline,
    "batch_mean": batch_mean,
    "running_mean": running_mean,
    "group_mean": group_mean,
    "group_zscore": group_zscore,
    "leave_one_out": leave_one_out,
    "discounted_return": discounted_return,
    "gae": gae,
}


Normalise = Callable[[Tensor, Tensor], Tensor]
"""advantages, mask [B, T] → advantages [B, T], with statistics of the whole update."""


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the update's tokens (REINFORCE++, arXiv 2501.03262; PPO by custom).

    Takes the advantage of a group without variance away from zero, because it shifts every token alike.
    """
    tokens = advantages[mask]
    std, mean = torch.std_mean(tokens, correction=0)
    return torch.where(mask, (advantages - mean) / (std + 1e-8), 0.0)


NORMALISATIONS: Mapping[str, Normalise] = {"whiten": whiten}


def discounted_sum(values: Tensor, decay: float) -> Tensor:
    """[B, T] → y with y_t = x_t + decay · y_{t+1}."""
    sums = values.clone()
    for t in range(values.shape[1] - 2, -1, -1):
        sums[:, t] += decay * sums[:, t + 1]
    return sums


def last_token(mask: Tensor) -> Tensor:
    """[B, T] left aligned → [B, T] bool, True at each sample's last policy token."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) == mask.sum(dim=1, keepdim=True) - 1)


def _zero_without_variance(advantages: Tensor, rewards: Rewards) -> Tensor:
    return torch.where(has_variance(rewards.returns, rewards.group), advantages, 0.0)


def _index(group: Tensor) -> Tensor:
    return group.unique(return_inverse=True)[1]


def _group_sum(values: Tensor, group: Tensor) -> Tensor:
    """[B] → [B]: each sample gets its group's sum."""
    index = _index(group)
    return values.new_zeros(len(index)).index_add(0, index, values)[index]


def _group_size(group: Tensor) -> Tensor:
    return _group_sum(torch.ones(len(group), dtype=torch.float64, device=group.device), group)
