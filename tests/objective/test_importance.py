"""Corrections for samples of another policy: their expectation, over all completions, is what each one promises."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.lab.bandit import TokenBandit, expected_gradient
from klimb.objective import GRPO, REINFORCE, policy_loss
from klimb.objective.advantage import no_baseline
from klimb.objective.importance import (
    IMPORTANCES,
    drop_outside,
    geometric_drop,
    off_policy_drop,
    sequence_drop,
    sequence_truncate,
    truncate,
)
from klimb.objective.kl import NO_KL
from klimb.objective.surrogate import clip

PLAIN = replace(REINFORCE, advantage=no_baseline, kl=NO_KL)
BANDIT = TokenBandit.make(1)
LOGITS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
SAMPLER = LOGITS + 0.5 * torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def written_out(weights):
    """−Σ_y μ(y) R(y) Σ_t w_t ∇ log π_t, with w_t = weights(log π/μ of the tokens of y, R(y)), plain numbers."""
    logits = LOGITS.clone().requires_grad_()
    logps, sampled = BANDIT.logps(logits), BANDIT.logps(SAMPLER)
    total = torch.zeros((), dtype=torch.float64)
    for y in range(len(BANDIT)):
        span = range(int(BANDIT.mask[y].sum()))
        reward = BANDIT.rewards[y].item()
        w = weights([(logps[y, t] - sampled[y, t]).item() for t in span], reward)
        mu = math.exp(sum(sampled[y, t].item() for t in span))
        total = total - mu * reward * sum(w[t] * logps[y, t] for t in span)
    return torch.autograd.grad(total, logits)[0]


def true_gradient():
    logits = LOGITS.clone().requires_grad_()
    (-BANDIT.expected_reward(logits)).backward()
    return logits.grad


def inside(value, low, high):
    return value if low <= value <= high else 0.0


CLAIMS = {
    "token truncation": (truncate(1.3), lambda x, r: [min(math.exp(a), 1.3) for a in x]),
    "token mask": (drop_outside(0.7, 1.4), lambda x, r: [inside(math.exp(a), 0.7, 1.4) for a in x]),
    "sequence truncation": (sequence_truncate(1.2), lambda x, r: [min(math.exp(sum(x)), 1.2)] * len(x)),
    "sequence mask": (sequence_drop(0.6, 1.5), lambda x, r: [inside(math.exp(sum(x)), 0.6, 1.5)] * len(x)),
    "geometric mask": (
        geometric_drop(0.8, 1.2),
        lambda x, r: [math.exp(a) if 0.8 <= math.exp(sum(x) / len(x)) <= 1.2 else 0.0 for a in x],
    ),
    "off-policy sequence mask": (
        off_policy_drop(0.1),
        lambda x, r: [0.0 if r < 0 and -sum(x) / len(x) > 0.1 else 1.0] * len(x),
    ),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_expectation_is_the_claimed_one(claim):
    importance, weights = CLAIMS[claim]
    found = expected_gradient(BANDIT, replace(PLAIN, importance=importance), LOGITS, sampler=SAMPLER)
    assert torch.allclose(found, written_out(weights), atol=1e-12)
    assert not torch.allclose(found, true_gradient(), rtol=0.01)


def test_the_whole_ratio_is_unbiased_and_no_correction_is_not():
    unbounded = replace(PLAIN, importance=sequence_truncate(math.inf))
    assert torch.allclose(expected_gradient(BANDIT, unbounded, LOGITS, sampler=SAMPLER), true_gradient(), atol=1e-12)
    by_token = replace(PLAIN, importance=truncate(math.inf))
    for biased in (PLAIN, by_token):
        found = expected_gradient(BANDIT, biased, LOGITS, sampler=SAMPLER)
        assert not torch.allclose(found, true_gradient(), rtol=0.05)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_the_policys_own_samples_are_left_alone(name):
    found = expected_gradient(BANDIT, replace(PLAIN, importance=IMPORTANCES[name]()), LOGITS)
    assert torch.allclose(found, true_gradient(), atol=1e-12)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_odd_inputs_stay_finite(name):
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    advantages = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    for scale in (1e4, -1e4, 0.0):
        weight = IMPORTANCES[name]()(scale * mask.float(), mask, advantages)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert scale or (weight == 1).all()


def weights_of(importance, log_weight, advantage=-1.0):
    log_weight = torch.tensor([log_weight], dtype=torch.float64)
    advantages = torch.full_like(log_weight, advantage)
    return importance(log_weight, torch.ones_like(log_weight, dtype=torch.bool), advantages)[0].tolist()


def test_bounds_belong_to_what_they_bound():
    assert weights_of(drop_outside(1.0, 1.0), [0.0, 0.1, -0.1]) == [1.0, 0.0, 0.0]
    assert weights_of(off_policy_drop(0.5), [-0.5, -0.5]) == [1.0, 1.0]
    assert weights_of(off_policy_drop(0.5), [-0.5, -0.6]) == [0.0, 0.0]
    assert weights_of(off_policy_drop(0.5), [-0.5, -0.6], advantage=0.0) == [1.0, 1.0]


def one(algorithm, new, old, sampled, advantage=1.0):
    """Loss and gradient of a single token whose probability is `new` now, `old` before the update, `sampled` where it
    was drawn."""
    logps = torch.tensor([[math.log(new)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(
        algorithm, logps=logps, old_logps=torch.tensor([[math.log(old)]]).double(),
        behavior_logps=torch.tensor([[math.log(sampled)]]).double(), advantages=torch.full((1, 1), advantage),
        mask=mask, totals=BatchTotals.of(mask, torch.zeros(1)),
    )  # fmt: skip
    loss.backward()
    return loss.item(), logps.grad.item()


def test_two_policies_and_three():
    """Sampled at 0.25, 0.5 before the update, 0.55 now. Decoupled: min(2, cap) · clip(1.1). Coupled: clip(2.2)."""
    base = replace(GRPO, kl=NO_KL, surrogate=clip(0.2, 0.2))
    assert one(replace(base, importance=truncate(3.0)), 0.55, 0.5, 0.25) == pytest.approx((-2.2, -2.2))
    assert one(replace(base, importance=truncate(1.5)), 0.55, 0.5, 0.25) == pytest.approx((-1.65, -1.65))
    assert one(base, 0.55, 0.25, 0.25) == pytest.approx((-1.2, 0.0))


def test_the_off_policy_mask_looks_at_the_policy_of_now():
    """μ 0.5, before the update 0.5, now 0.2: log μ/π = 0.92 > 0.5 though π_old/μ is 1."""
    base = replace(GRPO, kl=NO_KL, importance=off_policy_drop(0.5))
    assert one(base, 0.2, 0.5, 0.5, advantage=-1.0) == pytest.approx((0.0, 0.0))
    assert one(base, 0.2, 0.5, 0.5, advantage=1.0)[0] == pytest.approx(-0.4)
    assert one(base, 0.4, 0.5, 0.5, advantage=-1.0)[0] == pytest.approx(0.8)
