"""Surrogates: the per-token loss whose gradient moves the policy, and what restrains it off-policy.

All take (logps, old_logps, advantages, mask), each [B, T], and are minimised. With r_t = π/π_old every one of
them has REINFORCE's gradient, −A ∇ log π, where r_t = 1, as in the first update after sampling; they differ
only later. One with ``anchor = "behavior"`` is given the log-probs stored at sampling as its old ones, whatever the
policy was before the update: an engine that samples with numbers of its own is then part of the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, NotNegative, OneOrMore, Positive
from klimb.objective.kl import LOG_BOUND, bounded_exp


class PerToken(NamedTuple):
    """loss [B, T]; clipped [B, T] bool: where the restraint is at work."""

    loss: Tensor
    clipped: Tensor


Surrogate = Callable[[Tensor, Tensor, Tensor, Tensor], PerToken]
Anchor = Literal["old", "behavior"]


def anchor_of(surrogate: Surrogate) -> Anchor:
    return getattr(surrogate, "anchor", "old")


def reinforce(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
    """−A log π (Williams 1992). Knows no ratio: right only for the first update after sampling.

    Fails after the first update on a batch: its samples are another policy's by then.
    """
    return PerToken(-advantages * logps, torch.zeros_like(mask))


def ratio(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
    """−A r: right after any number of updates, and bounded by nothing; something else has to keep r near 1."""
    return PerToken(-advantages * bounded_exp(logps - old_logps), torch.zeros_like(mask))


@dataclass(frozen=True)
class quadratic(Bounded):
    """−A log π + beta/2 · (log π/π_old)² (DRO as Kimi K1.5, arXiv 2501.12599, and verl have it, by token).

    A pull back to the policy of before the update instead of a clip. Not the DRO of arXiv 2405.19107, which pulls to
    π_ref and ends at π*: this one ends, on one batch, where beta · log π/π_old − A has the same pull on every token.
    """

    beta: NotNegative = 0.1

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        away = (logps - old_logps).square()
        return PerToken(-advantages * logps + self.beta / 2 * away, torch.zeros_like(mask))


@dataclass(frozen=True)
class clip(Bounded):
    """max(−A r, −A clip(r, 1 − low, 1 + high)) (PPO, arXiv 1707.06347, equation 7; high > low: DAPO).

    A token that already moved its way past the bound gets no gradient; one that moved the wrong way keeps all of
    it. Fails on a bad token whose ratio has become huge (see `dual_clip`). Degrades to `reinforce` with one
    update a batch, where every ratio is 1.
    """

    low: NotNegative = 0.2
    high: NotNegative = 0.2

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        return _clip(bounded_exp(logps - old_logps), advantages, self.low, self.high)


@dataclass(frozen=True)
class dual_clip(Bounded):
    """As `clip`, and for A < 0 never more than −bound · A (dual clip, arXiv 1912.09729; bound c = 3).

    Stops the one case that `clip` leaves open: a bad token whose ratio has become huge. The two-sided clip of
    INTELLECT-2 (arXiv 2505.07291, bound δ = 4), min(r, δ) before the minimum, is the same function. Fails as
    `clip` does on samples of a much older policy: hardly a token is left. Degrades to `reinforce` with one update
    a batch.
    """

    low: NotNegative = 0.2
    high: NotNegative = 0.2
    bound: OneOrMore = 3.0

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        ratio = bounded_exp(logps - old_logps)
        loss, clipped = _clip(ratio, advantages, self.low, self.high)
        beyond = (advantages < 0) & (ratio > self.bound)
        return PerToken(torch.where(beyond, -self.bound * advantages, loss), clipped | beyond)


@dataclass(frozen=True)
class sequence_clip(Bounded):
    """`clip` on s_i = (Π_t r_t)^(1/|y|), one for all tokens of a sample (GSPO, arXiv 2507.18071, equation 5).

    In the token form sg[s_i] · π/sg[π] (GSPO-token), which gives the same gradient and lets advantages differ by
    token. s_i stays very near 1, hence bounds of a few 1e-4. Belongs with `sequence_mean`. Fails with bounds that
    are meant for tokens: nothing is ever clipped. Degrades on long completions of mixed quality: it lets go of
    all their tokens or of none.
    """

    low: NotNegative = 3e-4
    high: NotNegative = 4e-4

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return _clip(bounded_exp(mean.detach() + logps - logps.detach()), advantages, self.low, self.high)


@dataclass(frozen=True)
class geometric_clip(Bounded):
    """−A (Π_t ρ_t)^(1/|y|), ρ_t = r_t held by e^−low and e^high on the side that A pushes to (GMPO, arXiv 2507.20673).

    The bounds are of log r. A geometric mean minds no single odd ratio, so that they can be wide; each token is
    clipped before the mean, unlike in `sequence_clip`. Belongs with `sequence_mean`; takes one advantage a
    sample. Degrades to `reinforce` with one update a batch.
    """

    low: NotNegative = 0.4
    high: NotNegative = 0.4

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        up, down = log_ratio.clamp(max=self.high), log_ratio.clamp(min=-self.low)
        held = torch.where(advantages > 0, up, torch.where(advantages < 0, down, log_ratio))
        mean = held.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return PerToken(-advantages * bounded_exp(mean), held != log_ratio)


@dataclass(frozen=True)
class product_clip(Bounded):
    """`clip` on the whole completion's importance weight Π_t r_t (RLOO in TRL: it is one action).

    A sample's loss is spread evenly over its tokens, so that `sequence_sum(1)` averages the losses of
    samples. Unbiased off-policy until it clips, which happens ever sooner the longer the completion.
    """

    low: NotNegative = 0.2
    high: NotNegative = 0.2

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        weight = bounded_exp(log_ratio.sum(dim=1, keepdim=True)).expand_as(logps)
        loss, clipped = _clip(weight, advantages, self.low, self.high)
        return PerToken(loss / mask.sum(dim=1, keepdim=True).clamp(min=1), clipped)


@dataclass(frozen=True)
class cispo(Bounded):
    """−sg[clip(r, 1 − low, 1 + high)] · A · log π (CISPO, MiniMax-M1, arXiv 2506.13585).

    Bounds the weight and never drops a token's gradient. No lower bound at low = 1; high = 4 is the weight of at
    most 5 that ScaleRL recommends (arXiv 2510.13786), MiniMax did not publish theirs. Fails to hold a policy that
    moves far: no gradient is dropped, its weight alone is bounded. Degrades to `reinforce` with one update a
    batch.
    """

    low: NotNegative = 1.0
    high: NotNegative = 4.0

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        ratio = bounded_exp(logps - old_logps).detach()
        weight = ratio.clamp(1 - self.low, 1 + self.high)
        return PerToken(-weight * advantages * logps, weight != ratio)


@dataclass(frozen=True)
class sapo(Bounded):
    """−A · 4/τ · σ(τ (r − 1)), τ by the sign of A (SAPO, arXiv 2511.20347): a gate that closes softly.

    The gradient is that of −A r times 4 σ (1 − σ), 1 at r = 1 and falling on both sides: a token that went the
    wrong way loses its gradient, too. "Clipped" counts gates less than half open. Degrades to `reinforce` with
    one update a batch.
    """

    positive: Positive = 1.0
    negative: Positive = 1.05

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        tau = _by_sign(advantages > 0, self.positive, self.negative, logps)
        gate = torch.sigmoid(tau * (bounded_exp(logps - old_logps) - 1))
        return PerToken(-advantages * gate * 4 / tau, 4 * gate.detach() * (1 - gate.detach()) < 0.5)


@dataclass(frozen=True)
class vespo(Bounded):
    """−sg[φ(w)] · A · log π, w = Π_t r_t, φ(w) = w^k e^(λ(1 − w)), k and λ by the sign of A (VESPO, arXiv 2602.10693).

    One weight for the whole completion without its length normalised away: it falls to 0 on both sides of about
    k/λ, and does so the sooner the longer the completion. "Clipped" counts weights below a half. Degrades on long
    completions: the weight of the whole sequence is near 0 or capped.
    """

    k_positive: NotNegative = 2.0
    decay_positive: NotNegative = 3.0
    k_negative: NotNegative = 3.0
    decay_negative: NotNegative = 2.0
    anchor: ClassVar[Anchor] = "behavior"

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps.detach() - old_logps, 0.0)
        log_w = log_ratio.sum(dim=1, keepdim=True).clamp(math.log(1e-8), LOG_BOUND)
        good = advantages >= 0
        k = _by_sign(good, self.k_positive, self.k_negative, logps)
        decay = _by_sign(good, self.decay_positive, self.decay_negative, logps)
        weight = (k * log_w + decay * (1 - log_w.exp())).exp()
        return PerToken(-weight * advantages * logps, weight < 0.5)


@dataclass(frozen=True)
class taper(Bounded):
    """−A log π of good samples, −sg[min(w, bound)] · A · log π of bad ones, w = Π_t r_t (TOPR, arXiv 2503.14286).

    What is good is imitated however unlikely it has become, what is bad is pushed away only as far as the policy still
    gives it: old samples of either kind can be learned from again and again, and no log π is driven to −∞. "Clipped"
    counts bad samples that are likelier than when they were sampled, by more than `bound`. Fails to correct for what
    the sampler preferred among good samples. Degrades to `reinforce` with one update a batch.
    """

    bound: NotNegative = 1.0
    anchor: ClassVar[Anchor] = "behavior"

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        log_ratio = torch.where(mask, logps.detach() - old_logps, 0.0)
        w = bounded_exp(log_ratio.sum(dim=1, keepdim=True))
        bad = advantages < 0
        weight = torch.where(bad, w.clamp(max=self.bound), torch.ones_like(w))
        return PerToken(-weight * advantages * logps, bad & (w > self.bound))


@dataclass(frozen=True)
class tv_mask(Bounded):
    """−A r while the token's probability has moved A's way by at most `low` (down) or `high` (up), else 0 (DPPO with
    binary total variation, arXiv 2602.04879, equation 13).

    A ratio says little about a rare token: from 1e-4 to 2e-4 it doubles and nothing has changed. Here such tokens move
    freely, and likely ones are stopped sooner than by `clip`.
    """

    low: NotNegative = 0.2
    high: NotNegative = 0.2
    anchor: ClassVar[Anchor] = "behavior"

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        moved = logps.detach().exp() - old_logps.exp()
        return _outward_mask(logps, old_logps, advantages, moved, moved.abs(), self.low, self.high)


@dataclass(frozen=True)
class kl_mask(Bounded):
    """As `tv_mask`, by the divergence μ log μ/π + (1 − μ) log (1 − μ)/(1 − π) of token or not (DPPO with binary KL,
    arXiv 2602.04879, equation 14; the bounds as in SkyRL)."""

    low: NotNegative = 0.05
    high: NotNegative = 0.05
    anchor: ClassVar[Anchor] = "behavior"

    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> PerToken:
        new = logps.detach()
        old, other = old_logps.exp(), _log_rest(old_logps)
        divergence = old * (old_logps - new) + other.exp() * (other - _log_rest(new))
        return _outward_mask(logps, old_logps, advantages, new.exp() - old, divergence, self.low, self.high)


SURROGATES: Mapping[str, Surrogate | type] = {
    "reinforce": reinforce,
    "ratio": ratio,
    "quadratic": quadratic,
    "clip": clip,
    "dual_clip": dual_clip,
    "sequence_clip": sequence_clip,
    "geometric_clip": geometric_clip,
    "product_clip": product_clip,
    "cispo": cispo,
    "sapo": sapo,
    "vespo": vespo,
    "taper": taper,
    "tv_mask": tv_mask,
    "kl_mask": kl_mask,
}


def _clip(ratio: Tensor, advantages: Tensor, low: float, high: float) -> PerToken:
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    outward = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return PerToken(loss, outward)


def _by_sign(good: Tensor, positive: float, negative: float, like: Tensor) -> Tensor:
    # Not torch.where of two numbers, which would be float32.
    return torch.where(good, like.new_tensor(positive), like.new_tensor(negative))


def _outward_mask(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, moved: Tensor, divergence: Tensor, low: float, high: float
) -> PerToken:
    beyond = ((advantages > 0) & (moved > 0) & (divergence > high)) | (
        (advantages < 0) & (moved < 0) & (divergence > low)
    )
    return PerToken(torch.where(beyond, 0.0, -advantages * bounded_exp(logps - old_logps)), beyond)


def _log_rest(logps: Tensor) -> Tensor:
    """log (1 − p), of a p at most 1 − 1e-6."""
    return (-torch.expm1(logps.clamp(max=-1e-6))).log()
