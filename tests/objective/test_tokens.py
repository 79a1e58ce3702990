"""Which tokens teach: each filter's choice by its definition, and that it is a choice of the whole update."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from klimb.objective.tokens import TOKEN_FILTERS, Tokens, clip_cov, imitate_correct, kl_cov, second_moment, top_entropy

LENGTHS = torch.tensor([40, 13, 0, 27])
MASK = torch.arange(40)[None, :] < LENGTHS[:, None]


def tokens(seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, *MASK.shape, generator=generator, dtype=torch.float64)
    given = {
        "mask": MASK, "logps": torch.where(MASK, -draw[0].abs(), 0.0),
        "behavior_logps": torch.where(MASK, -draw[0].abs() + 0.3 * draw[1], 0.0),
        "advantages": torch.where(MASK, 2 * draw[2], 0.0), "entropy": torch.where(MASK, draw[3].abs(), torch.nan),
        "scores": torch.tensor([1.0, 0.0, 1.0, 1.0]), "clipped": draw[1] > 1,
    }  # fmt: skip
    return Tokens(**{**given, **changes})


def covariances(given):
    a, x = given.advantages[MASK].tolist(), given.logps[MASK].tolist()
    means = statistics.mean(a), statistics.mean(x)
    return [(p - means[0]) * (q - means[1]) for p, q in zip(a, x)]


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 1e-9])
def test_the_least_sure_tokens(share):
    given = tokens()
    kept = top_entropy(share)(given)
    ranked = sorted(given.entropy[MASK].tolist())
    assert given.entropy[kept].min().item() >= ranked[-int(kept.sum())]
    assert int(kept.sum()) == max(1, round(share * 80 + 0.5 - 1e-9) if share < 1 else 80)
    assert not (kept & ~MASK).any()


@pytest.mark.parametrize("share", ["1/10", "1/5", "3/10", "7/10"])
def test_how_many_are_the_least_sure_is_a_matter_of_whole_numbers(share):
    """All but ⌈(n − 1)(1 − share)⌉, as exact fractions have it: 0.9 · 70 is above 63 in floats."""
    for n in range(1, 120):
        mask = torch.ones(1, n, dtype=torch.bool)
        given = tokens(mask=mask, entropy=torch.arange(n).double()[None])
        expected = n - math.ceil((n - 1) * (1 - Fraction(share)))
        assert int(top_entropy(float(Fraction(share)))(given).sum()) == expected


def few(advantages, logps, **changes):
    """One sample of these tokens, and room for one more."""
    mask = torch.tensor([[True] * len(logps) + [False]])
    columns = [torch.tensor([[*values, 0.0]], dtype=torch.float64) for values in (advantages, logps)]
    return Tokens(
        mask, columns[1], changes.pop("behavior_logps", columns[1]), columns[0], torch.ones(1),
        changes.pop("clipped", torch.zeros_like(mask)), **changes,
    )  # fmt: skip


def test_the_range_of_clip_cov_is_open_and_clipped_tokens_are_not_in_it():
    """Both tokens have (±1) · (±1) = 1."""
    given = few([1.0, -1.0], [-1.0, -3.0])
    every = {"share": 1.0}
    assert clip_cov(**every, low=0.5, high=1.5)(given).tolist() == [[False, False, False]]
    for low, high in ((1.0, 2.0), (0.0, 1.0)):
        assert clip_cov(**every, low=low, high=high)(given).tolist() == [[True, True, False]]
    half = few([1.0, -1.0], [-1.0, -3.0], clipped=torch.tensor([[True, False, False]]))
    assert clip_cov(**every, low=0.5, high=1.5)(half).tolist() == [[True, False, False]]
    assert int(clip_cov(share=1e-9, low=0.5, high=1.5)(given).sum()) == 1  # one at least


def test_kl_cov_charges_a_token_even_where_all_covariances_are_negative():
    assert int(kl_cov(share=0.5)(few([1.0, -1.0], [-3.0, -1.0])).sum()) == 1


def test_a_mean_at_the_limit_is_not_below_it():
    moved = few([0.0] * 3, [-1.0] * 3, behavior_logps=torch.tensor([[-1.5, -1.5, -1.5, 0.0]], dtype=torch.float64))
    assert int(second_moment(0.25)(moved).sum()) == 1  # one at least
    assert int(second_moment(0.26)(moved).sum()) == 3


def test_a_single_correct_token_has_all_of_the_weight():
    assert imitate_correct(0.1)(few([0.0], [-1.0])).tolist() == [[0.1, 0.0]]


def test_clip_cov_draws_among_the_tokens_in_the_range_that_are_not_clipped_yet():
    given, rule = tokens(), clip_cov(share=0.05, low=0.5, high=3.0)
    left_out = (MASK & ~rule(given))[MASK].tolist()
    within = [0.5 < c < 3.0 and not clipped for c, clipped in zip(covariances(given), given.clipped[MASK].tolist())]
    assert sum(left_out) == 4  # a twentieth of 80
    assert sum(within) > 4
    assert all(inside for inside, out in zip(within, left_out) if out)
    assert torch.equal(rule(given), rule(given))
    assert not torch.equal(rule(given), rule(replace(given, seed=1)))
    assert (clip_cov(low=100.0, high=200.0)(given) == MASK).all()


def test_kl_cov_charges_the_largest_covariances():
    given = tokens()
    charged = (MASK & ~kl_cov(share=0.05)(given))[MASK].tolist()
    bound = sorted(covariances(given))[-4]
    assert [c >= bound for c in covariances(given)] == charged
    assert int((MASK & ~kl_cov(share=1e-9)(given)).sum()) == 1


@pytest.mark.parametrize("limit", [0.01, 0.04, 1e9, 1e-30])
def test_the_second_moment_of_what_is_left_is_below_the_limit(limit):
    given = tokens()
    kept = second_moment(limit)(given)
    moment = (given.logps - given.behavior_logps).square()
    ranked = sorted(moment[MASK].tolist())
    count = int(kept.sum())
    assert sorted(moment[kept].tolist()) == ranked[:count]
    if limit == 1e9:
        assert count == 80
    elif limit == 1e-30:
        assert count == 1
    else:
        assert statistics.mean(ranked[:count]) < limit <= statistics.mean(ranked[: count + 1])
    assert (second_moment(limit)(tokens(logps=given.behavior_logps)) == MASK).all()


@pytest.mark.parametrize("name", TOKEN_FILTERS)
def test_an_update_without_tokens(name):
    nothing = torch.zeros_like(MASK)
    assert not TOKEN_FILTERS[name]()(tokens(mask=nothing)).any()


def test_imitation_is_a_mean_over_the_tokens_of_correct_samples():
    weights = imitate_correct(0.1)(tokens())
    assert weights.sum().item() == pytest.approx(0.1)
    assert (weights > 0).sum(dim=1).tolist() == [40, 0, 0, 27]
    assert weights.unique().tolist() == pytest.approx([0.0, 0.1 / 67])
    assert (imitate_correct(0.1, above=1.0)(tokens()) == 0).all()
