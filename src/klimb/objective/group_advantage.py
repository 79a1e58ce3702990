"""Advantages that compare a sample with the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative
from klimb.objective.grouped import (
    VARIANCE_TOLERANCE,
    Rewards,
    discounted_sum,
    group_index,
    group_size,
    group_sum,
    has_variance,
    zero_without_variance,
)


def group_mean(rewards: Rewards) -> Tensor:
    """A = R − mean of the group (Dr. GRPO, arXiv 2503.20783). Exactly (G−1)/G of the true gradient.

    Fails silently where all samples of a group score alike: such groups teach nothing. Degrades as groups get
    smaller: of two samples half of the gradient is left.
    """
    returns, group = rewards.returns, rewards.group
    return zero_without_variance(returns - group_sum(returns, group) / group_size(group), rewards)


def leave_one_out(rewards: Rewards) -> Tensor:
    """A = R − mean of the *other* samples of the group (RLOO, arXiv 2402.14740). Unbiased; needs two.

    Fails silently where all samples of a group score alike: such groups teach nothing. Degrades as groups get
    smaller: a mean of few others is a noisy baseline.
    """
    returns, group = rewards.returns, rewards.group
    others = (group_sum(returns, group) - returns) / (group_size(group) - 1)
    return zero_without_variance(returns - others, rewards)


@dataclass(frozen=True)
class group_zscore(Bounded):
    """A = (R − mean) / (std + eps) of the group, std unbiased (GRPO, arXiv 2402.03300, section 4.1.2).

    Every prompt pulls equally hard whether its samples differ by much or little: no longer the gradient of the
    expected reward, not even in direction, and near-ties are blown up (eps, TRL's 1e-4, damps that). Fails on
    prompts that are almost never (or almost always) solved: the one odd sample gets (G − 1)/√G. Degrades with
    groups of two: any difference, however small, becomes ±1/√2.
    """

    eps: NotNegative = 1e-4

    def __call__(self, rewards: Rewards) -> Tensor:
        return zero_without_variance(_zscore(rewards.returns, rewards.group, self.eps), rewards)


@dataclass(frozen=True)
class leave_one_out_zscore(Bounded):
    """A = (R − mean) / (std + eps), both of the *other* samples of the group (as in NVIDIA's NeMo RL).

    The scale no longer depends on the sample itself, and one odd sample is no longer bounded by its own std:
    where the others are all equal, and in groups of two, only the mean is taken off. Fails with few samples: the
    std of two or three others is mostly noise. Degrades to `leave_one_out` with groups of two.
    """

    eps: NotNegative = 1e-6

    def __call__(self, rewards: Rewards) -> Tensor:
        returns, group = rewards.returns, rewards.group
        size = group_size(group)
        centred = returns - group_sum(returns, group) / size
        squares = group_sum(centred.square(), group) - centred.square() * size / (size - 1)
        std = (squares / (size - 2).clamp(min=1)).sqrt()
        spread = std > VARIANCE_TOLERANCE * centred.abs()  # nor is the NaN of a group of one, or of rounding below 0
        return leave_one_out(rewards) / torch.where(spread, std + self.eps, 1.0)


@dataclass(frozen=True)
class group_mean_batch_std(Bounded):
    """A = (R − mean of the group) / (std of all rewards of the update + eps) (Lite PPO, arXiv 2508.08221).

    One scale for all prompts, so that near-ties stay small. It moves with what the other prompts of the batch
    are. Fails where the scale of scores differs by prompt: one scale is used for all. Degrades to a rescaled
    `group_mean` in large batches.
    """

    eps: NotNegative = 1e-4

    def __call__(self, rewards: Rewards) -> Tensor:
        returns = rewards.returns
        std = returns.std() if len(returns) > 1 else returns.new_zeros(())
        return group_mean(rewards) / (std + self.eps)


def length_weighted_mean(rewards: Rewards) -> Tensor:
    """A = R − Σ |y| R / Σ |y| of the group (OPO, arXiv 2505.23585): the baseline of least variance where a sample's
    squared gradient grows with its length. Each sample is in its own baseline, as with `group_mean`; exactly on-policy.

    Fails silently where all samples of a group score alike. Degrades to `group_mean` where all are of one length.
    """
    length = rewards.mask.sum(dim=1).double()
    baseline = group_sum(length * rewards.returns, rewards.group) / group_sum(length, rewards.group)
    return zero_without_variance(rewards.returns - baseline, rewards)


def group_mean_scaled_up(rewards: Rewards) -> Tensor:
    """A = α (R − mean of the group), α = B / samples in groups that differ (GPG, arXiv 2504.02546, with F_norm = 1).

    Groups without variance then leave the size of the gradient as it is. With few groups left, these few get it
    all. verl counts scores other than 0 for α instead. Fails where nearly all scores are 0: the few that are not
    are scaled up without bound. Degrades to `group_mean` where all samples count.
    """
    kept = has_variance(rewards.returns, rewards.group).sum().clamp(min=1)
    return group_mean(rewards) * (len(rewards.group) / kept)


@dataclass(frozen=True)
class best_of_group(Bounded):
    """A = R_max − R_second for the best sample, 0 for the others (pass@k-GRPO, arXiv 2503.19595, k = G): without scale
    exactly the gradient of E[max of the group] / G.

    scale: divided by the group's std + eps, as in verl. A tie for the best teaches nothing; once most samples are
    right, hardly any group does. Fails to teach anything but the best sample, and nothing where two share the
    lead. Degrades with larger groups: one sample of G is learnt from.
    """

    scale: bool = True
    eps: NotNegative = 1e-6

    def __call__(self, rewards: Rewards) -> Tensor:
        returns, group = rewards.returns, rewards.group
        index = group_index(group)
        low = returns.new_full((len(index),), -torch.inf)
        best = low.scatter_reduce(0, index, returns, "amax")[index]
        first = returns == best
        second = low.scatter_reduce(0, index, torch.where(first, -torch.inf, returns), "amax")[index]
        gap = torch.where(first & (group_sum(first.double(), group) == 1), best - second, 0.0)
        if self.scale:
            gap = gap / (_std(returns, group) + self.eps)
        return zero_without_variance(gap, rewards)


def over_mean(rewards: Rewards) -> Tensor:
    """A = (R − mean) / mean of the group, 0 where the mean is not above 0 (MaxRL, arXiv 2602.02710).

    For scores of 0 and 1 the expected gradient is (1 − (1 − p)^(G−1)) / p · ∇p, towards that of log p as G grows:
    hard prompts pull hardest. For other scores than 0 and 1 (a KL in the reward too) the quotient means nothing.
    Fails with scores below zero: a group with a mean of 0 or less teaches nothing. Degrades on rarely solved
    prompts: an advantage grows as 1/mean.
    """
    returns, group = rewards.returns, rewards.group
    mean = group_sum(returns, group) / group_size(group)
    return zero_without_variance(torch.where(mean > 0, (returns - mean) / mean, 0.0), rewards)


@dataclass(frozen=True)
class parts_zscore(Bounded):
    """Each part of the reward z-scored in its group, their weighted sum z-scored over the update (GDPO, arXiv
    2601.05242): two rewards of different scale or spread keep their say, which the z-score of their sum takes.

    Group scores add up to 0, so the mean over the update is 0 as well, and a group in which no part differs stays
    at exactly 0. What is not a part does not count: no KL in the reward, no penalty for length. Fails where a
    part of the score hardly varies: its noise weighs as much as the others. Degrades to `group_zscore` and
    whitening with a single part.
    """

    eps: NotNegative = 1e-4
    needs_parts: ClassVar[bool] = True

    def __call__(self, rewards: Rewards) -> Tensor:
        if rewards.parts is None or rewards.part_weights is None:
            raise ValueError("advantage parts_zscore: no parts were given; it needs a reward of several parts.")
        total = torch.zeros_like(rewards.returns)
        for part, weight in zip(rewards.parts.unbind(dim=1), rewards.part_weights.tolist(), strict=True):
            zscore = _zscore(part, rewards.group, self.eps)
            total = total + weight * torch.where(has_variance(part, rewards.group), zscore, 0.0)
        std = total.std() if len(total) > 1 else total.new_zeros(())
        return total / (std + self.eps)


@dataclass(frozen=True)
class optimal_token_baseline:
    """A_t = G_t − B_t, B_t = Σ G_t W_t / Σ W_t over the group's samples that have a token t, G_t the rewards to go and
    W_t = Σ_{j≤t} (1 − 2 π_j + Σ_v π_j(v)²) the squared gradient so far (the optimal token baseline, as in verl).

    Least variance a token; each sample is in its own baseline, and the longest sample is its own where it is
    alone. Fails where few samples of a group are long: late tokens have hardly anybody to be compared with.
    Degrades to `group_mean` where tokens are equally sure.
    """

    needs_collisions: ClassVar[bool] = True

    def __call__(self, rewards: Rewards) -> Tensor:
        if rewards.logps is None or rewards.collisions is None:
            raise ValueError(
                "advantage optimal_token_baseline: it needs logps and collisions, Σ_v π(v)² of each token."
            )
        mask, to_go = rewards.mask, discounted_sum(rewards.per_token, 1.0)
        p = rewards.logps.double().exp()
        # Σ_v π² is of the trainer's numbers, p of the sampler's: in 16 bits far enough apart to make energy negative.
        energy = torch.maximum(1 - 2 * p + rewards.collisions.double(), (1 - p).square())
        weight = torch.where(mask, energy.cumsum(dim=1), 0.0)
        index = group_index(rewards.group)
        sums = [torch.zeros_like(weight).index_add(0, index, part)[index] for part in (weight * to_go, weight)]
        baseline = sums[0] / sums[1].where(sums[1] > 0, 1.0)
        differs = has_variance(rewards.returns, rewards.group)[:, None]
        return torch.where(mask & differs, to_go - baseline, 0.0)


COMPARING: tuple[Any, ...] = (
    group_mean, group_zscore, group_mean_batch_std, group_mean_scaled_up, length_weighted_mean, best_of_group,
    over_mean, parts_zscore, leave_one_out, leave_one_out_zscore, optimal_token_baseline,
)  # fmt: skip
"""Those that compare the samples of a prompt: of a single one they make 0."""


def _std(values: Tensor, group: Tensor) -> Tensor:
    """[B], [B] → [B]: the unbiased standard deviation of the sample's group; NaN of one alone."""
    size = group_size(group)
    centred = values - group_sum(values, group) / size
    return (group_sum(centred.square(), group) / (size - 1)).sqrt()


def _zscore(values: Tensor, group: Tensor, eps: float) -> Tensor:
    """NaN where a group does not differ, at eps = 0 or of one alone: `has_variance` has the word there."""
    return (values - group_sum(values, group) / group_size(group)) / (_std(values, group) + eps)
