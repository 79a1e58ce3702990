"""Means with intervals, and what best-of-n would give: plain numbers, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_Z = 1.959964  # 97.5 % point of the normal distribution
_MANY = 30  # prompts from which on they are treated as a sample of prompts


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Tally(NamedTuple):
    """What an interval needs of a group of values: how many, their sum, and their variance (unbiased, 0 of one)."""

    size: int
    total: float
    variance: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Tally:
        return cls(len(values), math.fsum(values), _variance(values))


def mean_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """As `tally_interval`, from the values themselves."""
    return tally_interval([Tally.of(group) for group in groups])


def tally_interval(groups: Sequence[Tally]) -> Interval:
    """Mean over the groups' means (one group a prompt) with a normal 95 % interval.

    From 30 prompts on the prompts are the sample (answers to one prompt are alike, so they count once); fewer are a
    fixed panel, and the interval tells how well *its* mean is known: Σ_g s²_g / n_g over the squared number of groups.
    """
    groups = [group for group in groups if group.size]
    if not groups:
        return Interval(math.nan, math.nan, math.nan)
    means = [group.total / group.size for group in groups]
    mean = math.fsum(means) / len(means)
    if len(groups) >= _MANY:
        variance = _variance(means) / len(means)
    else:
        variance = math.fsum(group.variance / group.size for group in groups) / len(groups) ** 2
    half = _Z * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def _variance(values: Sequence[float]) -> float:
    """Unbiased; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def best_of_n(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the sample that scores best among n drawn without replacement from a pool of N ≥ n.

    Unbiased: the sample of rank i (1 = worst) is the best of n with probability C(i−1, n−1) / C(N, n)
    (Nakano et al. 2021, arXiv 2112.09332, appendix I). Equal scores share their places.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of {n} needs at least {n} samples a prompt, there are {len(scores)}")
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    total = 0.0
    place = 0
    while place < len(order):
        tied = [i for i in order[place:] if scores[i] == scores[order[place]]]
        weight = _best_below(place + len(tied), n, len(scores)) - _best_below(place, n, len(scores))
        total += weight * math.fsum(values[i] for i in tied) / len(tied)
        place += len(tied)
    return total


def _best_below(rank: int, n: int, pool: int) -> float:
    """Probability that all n draws are among the `rank` worst: C(rank, n) / C(pool, n)."""
    if rank < n:
        return 0.0
    return math.exp(_log_choose(rank, n) - _log_choose(pool, n))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best-of-n ‖ policy): ln n − (n−1)/n nats (Stiennon et al. 2020; Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def seeds_interval(values: Sequence[float]) -> Interval:
    """Mean over a few seeds with a 95 % Student t interval; of one value the interval is unknown (NaN)."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = _T[min(len(values) - 1, len(_T)) - 1] * math.sqrt(_variance(values) / len(values))
    return Interval(mean, mean - half, mean + half)


# 97.5 % points of Student's t for 1, 2, … degrees of freedom; from 30 on the normal's is close enough.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
