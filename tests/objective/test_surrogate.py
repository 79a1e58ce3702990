"""Surrogates: REINFORCE's gradient at ratio 1, and exactly where each one lets go."""

from __future__ import annotations

import math

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.objective.aggregate import sequence_mean, sequence_sum
from klimb.objective.surrogate import (
    SURROGATES,
    cispo,
    clip,
    dual_clip,
    geometric_clip,
    kl_mask,
    product_clip,
    reinforce,
    sapo,
    sequence_clip,
    taper,
    tv_mask,
    vespo,
)

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
TOTALS = BatchTotals.of(MASK, torch.arange(3))
PER_SAMPLE = torch.tensor([1.5, -0.7, -2.0], dtype=torch.float64)
ADVANTAGES = torch.where(MASK, PER_SAMPLE[:, None], 0.0)


def moved(scale, seed=0):
    """logps that require grad, and old ones at about `scale` from them."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.where(MASK, -torch.rand(3, 3, generator=generator, dtype=torch.float64) - 0.5, 0.0)
    step = scale * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return torch.where(MASK, old + step, 0.0).requires_grad_(), old


def one(surrogate, ratio, advantage):
    """Loss, gradient with respect to log π and the clipped flag of a single token."""
    old = torch.zeros(1, 1, dtype=torch.float64)
    logps = torch.full_like(old, math.log(ratio)).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, clipped = surrogate(logps, old, torch.full_like(old, advantage), mask)
    loss.sum().backward()
    return loss.item(), logps.grad.item(), clipped.item()


@pytest.mark.parametrize("name", SURROGATES)
def test_at_ratio_one_the_gradient_is_reinforces(name):
    surrogate = SURROGATES[name]() if isinstance(SURROGATES[name], type) else SURROGATES[name]
    logps, _ = moved(0.0)
    loss, clipped = surrogate(logps, logps.detach(), ADVANTAGES, MASK)
    torch.where(MASK, loss, 0.0).sum().backward()
    assert torch.allclose(logps.grad, -ADVANTAGES)
    assert not clipped.any()


@pytest.mark.parametrize("kind", [clip, sequence_clip, product_clip, dual_clip])
@pytest.mark.parametrize(
    ("ratio", "advantage", "killed"),
    [
        (1.31, 2.0, True),  # up, and already past the upper bound
        (1.29, 2.0, False),
        (0.79, 2.0, False),  # up, from below: it has to come back
        (0.79, -2.0, True),  # down, and already past the lower bound
        (0.81, -2.0, False),
        (1.31, -2.0, False),  # down, from above
        (1.31, 0.5, True),  # however small A is
        (0.79, 0.5, False),
        (1.31, 0.0, False),
        (0.79, 0.0, False),
    ],
)
def test_the_clip_lets_go_on_the_outward_side_only(kind, ratio, advantage, killed):
    loss, gradient, clipped = one(kind(low=0.2, high=0.3), ratio, advantage)
    assert clipped == killed
    assert gradient == pytest.approx(0.0 if killed else -advantage * ratio)
    bound = 1.3 if advantage > 0 else 0.8
    assert loss == pytest.approx(-advantage * (bound if killed else ratio))


def test_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely():
    assert one(dual_clip(0.2, 0.2, bound=3.0), 5.0, -1.5) == pytest.approx((4.5, 0.0, True))
    assert one(clip(0.2, 0.2), 5.0, -1.5) == pytest.approx((7.5, 7.5, False))
    assert one(dual_clip(0.2, 0.2, bound=3.0), 2.9, -1.5) == pytest.approx((4.35, 4.35, False))
    assert one(dual_clip(0.2, 0.2, bound=1.0), 1.0, -1.5) == (1.5, 1.5, False)  # on the bound it still learns
    assert one(dual_clip(0.2, 0.2, bound=3.0), 5.0, 0.5) == pytest.approx((-0.6, 0.0, True))  # a good one: as clip
    assert one(dual_clip(0.2, 0.2, bound=3.0), 5.0, 0.0) == (0.0, 0.0, False)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_nothing_that_has_not_moved_is_clipped_however_tight_the_bounds(advantage):
    assert one(clip(0.0, 0.0), 1.0, advantage)[2] is False


def pair(surrogate, log_ratios, advantage):
    """Loss of the first token, gradients with respect to both log π, and both flags, of a sample of two tokens."""
    logps = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    loss, clipped = surrogate(
        logps, torch.zeros(1, 2).double(), torch.full((1, 2), advantage).double(), torch.ones(1, 2).bool()
    )
    loss.sum().backward()
    return loss[0, 0].item(), logps.grad[0].tolist(), clipped[0].tolist()


def test_a_geometric_mean_holds_the_tokens_that_went_the_way_of_the_advantage():
    """Log-ratios of ½ and −½, held by 0.3 above or 0.1 below: means of −0.1 and of 0.2; its two tokens share −A s."""
    held = geometric_clip(low=0.1, high=0.3)
    for advantage in (1.0, 0.5):
        loss, gradient, clipped = pair(held, [0.5, -0.5], advantage)
        assert loss == pytest.approx(-advantage * math.exp(-0.1))
        assert gradient == pytest.approx([0.0, -advantage * math.exp(-0.1)])
        assert clipped == [True, False]
    loss, gradient, clipped = pair(held, [0.5, -0.5], -1.0)
    assert loss == pytest.approx(math.exp(0.2))
    assert gradient == pytest.approx([math.exp(0.2), 0.0])
    assert clipped == [False, True]
    assert pair(held, [0.5, -0.5], 0.0)[2] == [False, False]


def test_a_soft_gate_counts_as_clipped_when_it_is_less_than_half_open():
    """4 σ (1 − σ) = ½ at σ = (1 + √½)/2, that is at τ (r − 1) = ±1.763."""
    assert [one(sapo(positive=1.0), ratio, 1.0)[2] for ratio in (2.75, 2.77)] == [False, True]
    assert [one(sapo(positive=3.0), ratio, 1.0)[2] for ratio in (0.42, 0.40)] == [False, True]
    assert [one(sapo(negative=2.0), ratio, -1.0)[2] for ratio in (1.88, 1.89)] == [False, True]
    assert one(sapo(positive=1.0, negative=5.0), 2.0, 0.0)[2]  # τ for A > 0, and for all others


def test_the_weight_of_a_sequence_is_bounded_before_it_is_shaped():
    """w in [1e-8, e^20]; with k alone it is w^k."""
    shape = vespo(0.1, 0.0, 0.1, 0.0)
    for ratio, bounded in ((math.exp(-30), 1e-8), (math.exp(30), math.exp(20)), (2.0, 2.0)):
        assert one(shape, ratio, 1.0)[1] == pytest.approx(-(bounded**0.1))
    assert [one(vespo(1.0, 0.0), ratio, 1.0)[2] for ratio in (0.6, 0.5, 0.49)] == [False, False, True]
    assert not one(vespo(k_negative=30.0), 0.8, 0.0)[2]  # A = 0 counts as good


@pytest.mark.parametrize(
    "surrogate", [sequence_clip(0.9, 9.0), geometric_clip(9.0, 9.0), product_clip(), vespo(), taper(1e9)]
)
def test_a_ratio_of_a_sequence_is_made_of_its_own_tokens(surrogate):
    """Whatever stands beyond them; and a sample without a token leaves no NaN."""
    logps, old = moved(0.1)
    mask = MASK & torch.tensor([[True], [True], [False]])
    beyond = torch.where(mask, logps.detach(), 7.0)
    for advantages in (ADVANTAGES, -ADVANTAGES):
        clean, holed = (surrogate(x, old, advantages, mask).loss for x in (logps, beyond))
        assert torch.equal(clean[mask], holed[mask])
        assert clean.isfinite().all()


@pytest.mark.parametrize(("ratio", "weight"), [(9.0, 5.0), (4.9, 4.9), (0.01, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_keeps_every_gradient(ratio, weight, advantage):
    loss, gradient, clipped = one(cispo(1.0, 4.0), ratio, advantage)
    assert gradient == pytest.approx(-advantage * weight)
    assert loss == pytest.approx(-advantage * weight * math.log(ratio))
    assert clipped == (ratio != weight)


@pytest.mark.parametrize(
    ("surrogate", "old", "new", "advantage", "killed"),
    [
        (tv_mask(low=0.2, high=0.3), 0.3, 0.65, 1.0, True),  # 0.35 up, past 0.3
        (tv_mask(low=0.2, high=0.3), 0.3, 0.55, 1.0, False),
        (tv_mask(low=0.2, high=0.3), 0.3, 0.65, -1.0, False),  # it has to come back
        (tv_mask(low=0.2, high=0.3), 0.3, 0.05, -1.0, True),  # 0.25 down, past 0.2
        (tv_mask(low=0.2, high=0.3), 0.3, 0.15, -1.0, False),
        (tv_mask(low=0.2, high=0.3), 0.3, 0.05, 1.0, False),
        (tv_mask(), 1e-4, 1e-3, 1.0, False),  # ten times as likely, and next to nothing has moved
        (tv_mask(low=0.2, high=0.25), 0.25, 0.5, 1.0, False),  # by the bound itself
        (tv_mask(low=0.25, high=0.2), 0.5, 0.25, -1.0, False),
        # A certain token counts as 1 − 1e-6: ½ log ½ + ½ (log ½ − log 1e-6) = 6.21 from ½, log 2 on the way back.
        (kl_mask(low=6.0, high=6.0), 0.5, 1.0, 1.0, True),
        (kl_mask(low=6.3, high=6.3), 0.5, 1.0, 1.0, False),
        (kl_mask(), 1.0, 0.5, -1.0, True),
        # 0.3 log(0.3/π) + 0.7 log(0.7/(1 − π)): 0.253 at 0.65, 0.0057 at 0.35, 0.324 at 0.05.
        (kl_mask(low=0.3, high=0.2), 0.3, 0.65, 1.0, True),
        (kl_mask(low=0.3, high=0.3), 0.3, 0.65, 1.0, False),
        (kl_mask(low=0.3, high=0.005), 0.3, 0.35, 1.0, True),
        (kl_mask(low=0.3, high=0.006), 0.3, 0.35, 1.0, False),
        (kl_mask(low=0.2, high=0.2), 0.3, 0.65, -1.0, False),
        (kl_mask(low=0.3, high=0.2), 0.3, 0.05, -1.0, True),
        (kl_mask(low=0.4, high=0.2), 0.3, 0.05, -1.0, False),
    ],
)
def test_a_divergence_lets_go_on_the_outward_side_only(surrogate, old, new, advantage, killed):
    logps = torch.tensor([[math.log(new)]], dtype=torch.float64, requires_grad=True)
    before, mask = torch.tensor([[math.log(old)]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    loss, clipped = surrogate(logps, before, torch.full_like(before, advantage), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert clipped.item() == killed
    assert gradient.item() == pytest.approx(0.0 if killed else -advantage * new / old)


@pytest.mark.parametrize("ratio", [1e-6, 0.3, 1.0, 4.0])
def test_a_taper_imitates_the_good_and_lets_go_of_the_bad(ratio):
    """A good sample pulls alike however rare it is; a bad one by what is left of it, never by more than the bound."""
    assert one(taper(), ratio, 2.0)[1:] == pytest.approx((-2.0, False))
    assert one(taper(), 9.0, 0.0)[2] is False
    assert one(taper(), ratio, -2.0)[1:] == pytest.approx((2.0 * min(ratio, 1.0), ratio > 1))
    assert one(taper(bound=3.0), ratio, -2.0)[1:] == pytest.approx((2.0 * min(ratio, 3.0), ratio > 3))


def test_a_taper_is_of_the_whole_completion():
    """Weights of ½ and 1½ for its tokens are one of ¾ for both, 1 if it is good."""
    log_ratios = [math.log(0.5), math.log(1.5)]
    assert pair(taper(), log_ratios, -2.0)[1:] == (pytest.approx([1.5, 1.5]), [False, False])
    assert pair(taper(), log_ratios, 2.0)[1:] == (pytest.approx([-2.0, -2.0]), [False, False])
    assert pair(taper(), [math.log(0.5), math.log(2.5)], -2.0)[1:] == (pytest.approx([2.0, 2.0]), [True, True])


def test_cispo_lower_bound():
    assert one(cispo(0.2, 0.4), 0.5, 1.0)[1] == pytest.approx(-0.8)


def test_reinforce_ignores_how_far_the_policy_has_moved():
    assert one(reinforce, 9.0, 2.0)[1] == -2.0


def written_out(logps, old, low, high, power):
    """1/B Σ_i max(−A s, −A clip(s)) with s_i = exp(power_i · Σ log r), differentiated as it stands."""
    total = 0.0
    for row in range(3):
        length = int(MASK[row].sum())
        s = ((logps - old)[row, :length].sum() * power(length)).exp()
        total = total + torch.maximum(-PER_SAMPLE[row] * s, -PER_SAMPLE[row] * s.clamp(1 - low, 1 + high))
    return total / 3


@pytest.mark.parametrize(
    ("surrogate", "aggregate", "power"),
    [
        (sequence_clip(0.1, 0.15), sequence_mean, lambda n: 1 / n),  # GSPO
        (product_clip(0.1, 0.15), sequence_sum(1.0), lambda n: 1.0),  # RLOO as TRL has it
    ],
)
def test_ratios_of_whole_sequences(surrogate, aggregate, power):
    clipped_rows = set()
    for seed in range(16):
        logps, old = moved(0.25, seed)
        per_token, clipped = surrogate(logps, old, ADVANTAGES, MASK)
        clipped_rows |= {(row, bool(clipped[row, 0])) for row in range(3)}
        loss = aggregate(per_token, MASK, TOTALS)
        expected = written_out(logps, old, 0.1, 0.15, power)
        assert torch.allclose(loss, expected)
        ours, theirs = (torch.autograd.grad(x, logps)[0] for x in (loss, expected))
        assert torch.allclose(ours, theirs)
    assert len(clipped_rows) == 6  # every sample was seen clipped and not clipped


def test_the_token_form_of_a_sequence_ratio_keeps_each_tokens_own_advantage():
    """sg[s_i] · π/sg[π]: value s_i on every token, gradient −A_t s_i on its own."""
    logps, old = moved(0.1)
    advantages = torch.where(MASK, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 0.0)
    loss, _ = sequence_clip(0.9, 9.0)(logps, old, advantages, MASK)
    loss.sum().backward()
    s = ((logps - old).sum(dim=1) / MASK.sum(dim=1)).exp().detach()
    assert torch.allclose(loss, -advantages * s[:, None])
    assert torch.allclose(logps.grad, -advantages * s[:, None])


@pytest.mark.parametrize("name", SURROGATES)
def test_absurd_ratios_stay_finite(name):
    surrogate = SURROGATES[name]() if isinstance(SURROGATES[name], type) else SURROGATES[name]
    for sign in (1.0, -1.0):
        logps = (sign * 1e4 * MASK).float().requires_grad_()
        loss, _ = surrogate(logps, torch.zeros(3, 3), ADVANTAGES.float(), MASK)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logps.grad.isfinite().all()
