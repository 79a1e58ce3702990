"""Which tokens of an update teach: decided over the whole update before it is split, so that no split changes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative, Ordered, Positive, Share, SomeShare


@dataclass(frozen=True)
class Tokens:
    """A whole update as the policy sees it now. mask and clipped (where the surrogate lets go) [B, T] bool; logps and
    behavior_logps, advantages and entropy in nats [B, T]; scores [B]; seed for those that draw."""

    mask: Tensor
    logps: Tensor
    behavior_logps: Tensor
    advantages: Tensor
    scores: Tensor
    clipped: Tensor
    entropy: Tensor | None = None
    seed: int = 0


TokenFilter = Callable[[Tokens], Tensor]
"""The update → [B, T] bool: True where the surrogate's loss counts. The others stay in the denominator. With a
`penalty` they count, too, and pay penalty · |log π/π_old| on top. ``needs_entropy = True``: it looks at the entropy."""


@dataclass(frozen=True)
class top_entropy(Bounded):
    """Only the `share` of tokens where the policy is least sure (80/20 rule, arXiv 2506.01939).

    The forks of a text rather than what follows from them. Where most tokens are sure, ties at 0 count as on top.
    """

    share: SomeShare = 0.2
    needs_entropy: ClassVar[bool] = True

    def __call__(self, tokens: Tokens) -> Tensor:
        assert tokens.entropy is not None
        ranked = tokens.entropy[tokens.mask].sort().values
        if not len(ranked):
            return tokens.mask
        least = math.ceil((len(ranked) - 1) * (1 - self.share) - 1e-9)  # 0.8 · n is at times above a whole number
        return tokens.mask & (tokens.entropy >= ranked[least])


@dataclass(frozen=True)
class clip_cov(Ordered):
    """A random `share` of all tokens does not count: of those with low < (A − mean A)(log π − mean log π) < high
    (Clip-Cov, arXiv 2505.22617).

    Likely tokens that are rewarded, or unlikely ones that are punished, are what brings the entropy down. Works as
    long as some tokens lie in the range, which is of the scale of A².
    """

    share: Share = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __call__(self, tokens: Tokens) -> Tensor:
        covariance = _covariance(tokens)
        within = tokens.mask & ~tokens.clipped & (covariance > self.low) & (covariance < self.high)
        places = within.flatten().nonzero().squeeze(1)
        count = max(int(self.share * int(tokens.mask.sum())), 1)
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(tokens.seed))
        kept = tokens.mask.flatten().clone()
        kept[places[order[:count].to(places.device)]] = False
        return kept.view_as(tokens.mask)


@dataclass(frozen=True)
class kl_cov(Bounded):
    """The `share` of tokens with the largest (A − mean A)(log π − mean log π) pays penalty · |log π/π_old| besides
    (KL-Cov, arXiv 2505.22617), at least one. Nothing at ratio 1, so with one update a batch it does nothing."""

    share: Share = 2e-4
    penalty: NotNegative = 1.0

    def __call__(self, tokens: Tokens) -> Tensor:
        covariance = torch.where(tokens.mask, _covariance(tokens), -torch.inf).flatten()
        count = min(max(int(self.share * int(tokens.mask.sum())), 1), int(tokens.mask.sum()))
        kept = tokens.mask.flatten().clone()
        kept[covariance.topk(count).indices] = False
        return kept.view_as(tokens.mask)


@dataclass(frozen=True)
class second_moment(Bounded):
    """Tokens with the largest (log π/μ)² do not count, until the mean of the others is below `limit` (M2PO, Zheng et
    al. 2025, "Prosperity before collapse", as in AReaL; limit 0.04).

    A bound on the batch instead of on each token, for samples of many updates ago; a fresh batch loses nothing.
    """

    limit: Positive = 0.04

    def __call__(self, tokens: Tokens) -> Tensor:
        moment = (tokens.logps - tokens.behavior_logps).double().square()
        ranked, order = moment[tokens.mask].sort()
        means = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1, device=ranked.device)
        count = max(int((means < self.limit).sum()), min(len(ranked), 1))  # means only grow
        chosen = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        chosen[order[:count]] = True
        kept = tokens.mask.clone()
        kept[tokens.mask] = chosen
        return kept


TOKEN_FILTERS: Mapping[str, type] = {
    "top_entropy": top_entropy,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
    "second_moment": second_moment,
}


@dataclass(frozen=True)
class imitate_correct(Bounded):
    """+ weight · mean of −log π over the tokens of correct samples (VAPO, arXiv 2504.05118, its part on the positive
    example loss; μ = 0.1). Correct is a score, unshaped, above `above`.

    Brings rare successes back more surely than their advantage, and narrows the policy to what it can do already.
    """

    weight: NotNegative = 0.1
    above: float = 0.0

    def __call__(self, tokens: Tokens) -> Tensor:
        """[B, T]: what −log π of each token is multiplied with in the sum over the whole update."""
        chosen = tokens.mask & (tokens.scores > self.above)[:, None]
        return chosen.double() * (self.weight / max(int(chosen.sum()), 1))


IMITATIONS: Mapping[str, type] = {"imitate_correct": imitate_correct}


def _covariance(tokens: Tokens) -> Tensor:
    """[B, T]: each token's part in the covariance of advantage and log-prob over the update; anything where masked."""
    centred = (values - values[tokens.mask].mean() for values in (tokens.advantages, tokens.logps.double()))
    return next(centred) * next(centred)
