"""Where training ends. It is decided by where the KL enters and whose gradient it has.

Every claim is trained through `assign_credit` and `policy_loss` and compared with a closed form: π* ∝ π_ref
e^(r/β), or the other policy that the derivation beside the test says. Most runs follow the exact expected
gradient.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.lab.bandit import (
    TokenBandit,
    credit_of,
    expected_gradient,
    total_variation,
    train_exactly,
    train_on_samples,
)
from klimb.objective import GRPO, KL, PPO, REINFORCE, RLOO, Algorithm, k1, k2, k3, policy_loss
from klimb.objective.advantage import discounted_return, group_mean, group_zscore, leave_one_out, no_baseline
from klimb.objective.aggregate import sequence_mean, sequence_sum
from klimb.objective.surrogate import clip, reinforce

BETA = 0.5
BANDIT = TokenBandit.make(1)
OPTIMUM = BANDIT.optimum(BETA)
IN_REWARD = KL("reward", k1, BETA)
PLAIN = replace(REINFORCE, advantage=no_baseline, kl=IN_REWARD)
SEQUENCE_K2 = KL("loss", k2, BETA, level="sequence")


def reached(algorithm, group_size=1):
    return BANDIT.probabilities(train_exactly(BANDIT, algorithm, group_size=group_size))


def backwards(local, discount=1.0):
    """A policy defined state by state from the end: local(q [3], ref [3]) → (π(·|s) [3], value of s)."""
    q, policy, value = (torch.zeros_like(BANDIT.ref_logits) for _ in range(3))
    ref = BANDIT.ref_logits.softmax(-1)
    length = BANDIT.mask.sum(dim=1)
    for state in reversed(range(len(q))):  # longer prefixes have higher numbers
        for token in range(3):
            row, t = ((BANDIT.prefixes == state) & (BANDIT.tokens == token) & BANDIT.mask).nonzero()[0].tolist()
            ends = length[row] == t + 1
            q[state, token] = BANDIT.rewards[row] if ends else discount * value[BANDIT.prefixes[row, t + 1], 0]
        policy[state], value[state] = local(q[state], ref[state])
    return BANDIT.probabilities(policy.log())


def soft(q, ref):
    """The KL still to come is part of the value: V = β log Σ ref e^(q/β)."""
    return (ref.log() + q / BETA).softmax(0), BETA * (ref * (q / BETA).exp()).sum().log()


def test_backwards_induction_with_the_soft_value_is_the_optimum():
    assert total_variation(backwards(soft), OPTIMUM) < 1e-12


@pytest.mark.parametrize(
    ("algorithm", "group_size"),
    [
        (PLAIN, 1),
        (replace(PLAIN, advantage=discounted_return(1.0)), 1),
        (replace(PLAIN, advantage=leave_one_out), 2),
        (replace(PLAIN, advantage=group_mean), 2),
        (replace(PLAIN, advantage=group_zscore(0.0)), 2),
        (replace(PLAIN, advantage=leave_one_out, aggregate=sequence_mean), 2),
        (replace(PLAIN, kl=SEQUENCE_K2), 1),
    ],
)
def test_these_end_at_the_optimum(algorithm, group_size):
    """At π* the shaped reward r − β log π*/π_ref = β log Z is the same for every completion.

    So with the KL in the reward any baseline leaves zero there, and scaling, z-scores and weights by length
    scale zero.
    """
    assert total_variation(reached(algorithm, group_size), OPTIMUM) < 1e-3


@pytest.mark.parametrize("advantage", [leave_one_out, group_zscore(0.0)])
def test_with_the_kl_in_the_reward_no_sample_moves_the_optimum(advantage):
    """Not only in expectation: every advantage is exactly zero, noise dies out and no clip can matter."""
    logits = BANDIT.logits_of(OPTIMUM)
    pairs = torch.combinations(torch.arange(31), 2).flatten()
    credit = credit_of(BANDIT, replace(PLAIN, advantage=advantage), logits, pairs, torch.arange(len(pairs)) // 2)
    assert (credit.advantages == 0).all()


def test_k2_per_token_in_the_loss_is_shortsighted():
    """It pulls on each step alone.

    Stationarity at s: Σ_a π ∇log π [Q_r(s, a) − β log π/π_ref] = 0 with Q_r the expected *raw* reward to go,
    hence π(a|s) ∝ ref e^(Q_r/β): the KL of later steps is missing from the value.
    """

    def local(q, ref):
        policy = (ref.log() + q / BETA).softmax(0)
        return policy, (policy * q).sum()

    found = reached(replace(PLAIN, kl=KL("loss", k2, BETA)))
    assert total_variation(found, backwards(local)) < 1e-3
    assert total_variation(found, OPTIMUM) > 0.1


def test_k3_per_token_in_the_loss_is_another_divergence():
    """It has the gradient of KL(π_ref ‖ π).

    E_π[∇k3] = Σ_a (π − ref) ∇log π, so that at s: π(a) (Q_r(a) − V) = β (π(a) − ref(a)), hence
    π(a) = β ref(a) / (β + V − Q_r(a)) with V = Σ π Q_r, which Σ π = 1 fixes.
    """

    def local(q, ref):
        low, high = q.max() - BETA, q.max() + 100 * BETA  # Σ π falls from infinity to below 1 between them
        for _ in range(200):
            value = (low + high) / 2
            low, high = (value, high) if (BETA * ref / (BETA + value - q)).sum() > 1 else (low, value)
        return BETA * ref / (BETA + value - q), value

    found = reached(replace(PLAIN, kl=KL("loss", k3, BETA)))
    assert total_variation(found, backwards(local)) < 1e-3
    assert total_variation(found, OPTIMUM) > 0.1


def test_a_discount_forgets_the_score():
    """γ < 1, KL in the reward: each state is soft-optimal for its own discounted return, q = γ V(next)."""
    found = reached(replace(PLAIN, advantage=discounted_return(0.8)))
    assert total_variation(found, backwards(soft, discount=0.8)) < 1e-3
    assert total_variation(found, OPTIMUM) > 0.1


def test_zscores_with_the_kl_in_the_loss_weigh_ranks_against_it():
    """For a pair, mean and std leave sign(r_1 − r_2)/√2 of the rewards.

    Hence β log π/π_ref(y) = E_{y'~π} sign(r(y) − r(y'))/√2 up to a constant: the size of the reward no
    longer counts against β.
    """
    found = reached(replace(PLAIN, advantage=group_zscore(0.0), kl=SEQUENCE_K2), 2)
    wins = (BANDIT.rewards[:, None] - BANDIT.rewards[None, :]).sign() @ found
    assert total_variation(found, BANDIT.tilted(wins / 2**0.5 / BETA)) < 1e-3
    assert total_variation(found, OPTIMUM) > 0.1


CLIPPED = Algorithm(
    name="clipped", advantage=leave_one_out, surrogate=clip(), aggregate=sequence_sum(1.0), kl=SEQUENCE_K2
)


def expected_step(algorithm, logits, lr, updates):
    """E[Δ logits] of `updates` steps on one pair of samples: exact, each of 31² pairs on its own copy."""
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    completions, group = pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2)
    mask = BANDIT.mask[completions]
    credit = credit_of(BANDIT, algorithm, logits, completions, group)
    copies = logits.expand(len(pairs), 15, 3)
    for _ in range(updates):
        copies = copies.detach().requires_grad_()
        steps = copies.log_softmax(-1)[group[:, None], BANDIT.prefixes[completions], BANDIT.tokens[completions]]
        loss, _ = policy_loss(
            algorithm,
            logps=steps,
            old_logps=BANDIT.logps(logits)[completions],
            ref_logps=BANDIT.logps(BANDIT.ref_logits)[completions],
            advantages=credit.advantages,
            mask=mask,
            totals=BatchTotals.of(mask, group),
        )
        (gradient,) = torch.autograd.grad(len(pairs) * loss, copies)
        copies = copies - lr * gradient
    weight = BANDIT.probabilities(logits)[pairs].prod(dim=1)
    return (weight[:, None, None] * (copies.detach() - logits)).sum(dim=0)


def test_an_active_clip_over_several_updates_drives_away_from_the_optimum():
    """With the KL in the loss π* is a balance of two forces, and the clip stops one of them.

    Inactive, several updates on the same samples leave a drift per unit of learning rate that vanishes with
    it. A clip that bites at every learning rate leaves one that does not.
    """
    logits = BANDIT.logits_of(OPTIMUM)

    def drift(algorithm, lr):
        return expected_step(algorithm, logits, lr, updates=4).norm().item() / lr

    wide = replace(CLIPPED, surrogate=clip(1.0, 1e3))
    assert drift(wide, 1e-3) == pytest.approx(drift(wide, 1e-2) / 10, rel=0.05)
    coarse, fine = (drift(replace(CLIPPED, surrogate=clip(lr / 50, lr / 50)), lr) for lr in (1e-2, 1e-3))
    assert coarse == pytest.approx(fine, rel=0.05)
    assert fine > 100 * drift(wide, 1e-3)
    in_reward = replace(CLIPPED, surrogate=clip(1e-4, 1e-4), kl=IN_REWARD)
    assert expected_step(in_reward, logits, 0.1, updates=4).abs().max() == 0


def test_a_clip_that_always_bites_acts_like_a_heavier_leash():
    """Of four updates the surrogate then acts fully in the first, the KL in all of them."""
    tight, logits = replace(CLIPPED, surrogate=clip(2e-4, 2e-4)), BANDIT.logits_of(OPTIMUM)
    before = BANDIT.kl(logits)
    for _ in range(50):
        logits = logits + 20 * expected_step(tight, logits, lr=0.01, updates=4)
    found = BANDIT.probabilities(logits)
    assert BANDIT.kl(logits) < before / 2
    assert total_variation(found, OPTIMUM) > 0.2
    assert total_variation(found, BANDIT.optimum(3 * BETA)) < total_variation(found, OPTIMUM)


@pytest.mark.parametrize(
    ("algorithm", "run"),
    [
        (replace(REINFORCE, kl=IN_REWARD), {}),
        (replace(RLOO, kl=IN_REWARD), {"group_size": 4}),
        (replace(PPO, kl=IN_REWARD, normalise=None), {"updates": 2}),
        (replace(GRPO, kl=IN_REWARD), {"group_size": 4, "updates": 2}),
    ],
)
def test_training_on_samples_ends_at_the_optimum(algorithm, run):
    assert total_variation(BANDIT.probabilities(BANDIT.ref_logits), OPTIMUM) > 0.5
    for seed in range(2):
        logits = train_on_samples(BANDIT, algorithm, steps=300, lr=0.15, seed=seed, **run)
        assert total_variation(BANDIT.probabilities(logits), OPTIMUM) <= 0.02


def test_reinforce_is_the_surrogate_of_the_plain_runs():
    """Guards the table above: they must not go through a ratio."""
    assert PLAIN.surrogate is reinforce
    assert torch.allclose(
        expected_gradient(BANDIT, PLAIN, BANDIT.ref_logits),
        expected_gradient(BANDIT, replace(PLAIN, surrogate=clip()), BANDIT.ref_logits),
    )
