"""The token bandit itself: everything it claims to know is counted once more, the slow way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from klimb.lab.bandit import TokenBandit, total_variation

BANDIT = TokenBandit.make(1)
LOGITS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def completion(row):
    return tuple(BANDIT.tokens[row][BANDIT.mask[row]].tolist())


def test_every_completion_is_listed_once():
    """All strings over a and b of at most three tokens, ended, and of four, cut: 1 + 2 + 4 + 8 + 16."""
    expected = {(*body, 2) for n in range(4) for body in itertools.product((0, 1), repeat=n)}
    expected |= set(itertools.product((0, 1), repeat=4))
    assert len(BANDIT) == 31
    assert {completion(row) for row in range(31)} == expected


def test_prefixes_are_shared_exactly_by_completions_that_begin_alike():
    seen = {}
    for row in range(31):
        for t in range(len(completion(row))):
            prefix = completion(row)[:t]
            assert seen.setdefault(prefix, BANDIT.prefixes[row, t].item()) == BANDIT.prefixes[row, t].item()
    assert sorted(seen.values()) == list(range(15))


def test_probabilities_are_products_of_steps_and_sum_to_one():
    probability = BANDIT.probabilities(LOGITS)
    assert probability.sum().item() == pytest.approx(1.0)
    step = LOGITS.softmax(-1)
    for row in range(31):
        steps = [step[BANDIT.prefixes[row, t], token].item() for t, token in enumerate(completion(row))]
        assert probability[row].item() == pytest.approx(math.prod(steps))


def test_the_optimum_is_where_the_gradient_vanishes_and_nowhere_better():
    optimum = BANDIT.optimum(0.5)
    logits = BANDIT.logits_of(optimum).requires_grad_()
    assert total_variation(BANDIT.probabilities(logits).detach(), optimum) < 1e-12
    best = BANDIT.objective(logits, 0.5)
    best.backward()
    assert logits.grad.abs().max() < 1e-12
    # max E[r] − β KL = β log Σ π_ref e^(r/β)
    soft = 0.5 * (BANDIT.probabilities(BANDIT.ref_logits) * (BANDIT.rewards / 0.5).exp()).sum().log()
    assert best.item() == pytest.approx(soft.item())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = logits.detach() + 0.3 * torch.randn(15, 3, generator=generator, dtype=torch.float64)
        assert BANDIT.objective(other, 0.5) < best


def test_kl_is_that_of_the_two_distributions():
    p, q = BANDIT.probabilities(LOGITS), BANDIT.probabilities(BANDIT.ref_logits)
    assert BANDIT.kl(LOGITS).item() == pytest.approx((p * (p / q).log()).sum().item())


def test_the_value_of_the_start_is_the_expected_reward():
    rewards = torch.zeros(31, 4, dtype=torch.float64)
    rewards[torch.arange(31), BANDIT.mask.sum(dim=1) - 1] = BANDIT.rewards
    values = BANDIT.values(LOGITS, rewards)
    assert torch.allclose(values[:, 0], BANDIT.expected_reward(LOGITS).expand(31))


def test_total_variation():
    assert total_variation(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.4, 0.4])) == pytest.approx(0.4)
