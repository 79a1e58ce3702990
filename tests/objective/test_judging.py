"""What reward models learn, by hand and against torch's own losses; and what steps earn, by enumeration."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from klimb.batch import BatchTotals
from klimb.lab.bandit import TokenBandit, credit_of
from klimb.metrics import merge, results
from klimb.objective import ALGORITHMS, assign_credit, bradley_terry, parse_algorithm, policy_loss
from klimb.objective.judging import (
    combined,
    label_loss,
    level_logps,
    ordered,
    ordinal_loss,
    ranking_loss,
    rating_loss,
    so_far,
    step_loss,
    step_rewards,
)
from klimb.objective.refusals import adds_up


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_strength_of_preference_by_hand():
    # d = 2 − 0.5 − 0.3 = 1.2; three of four judges
    expected = 0.75 * math.log1p(math.exp(-1.2)) + 0.25 * math.log1p(math.exp(1.2))
    assert bradley_terry(tensor(2.0), tensor(0.5), 0.3, strength=tensor(0.75)).item() == pytest.approx(expected)
    gap = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    sure = bradley_terry(gap, tensor(0.0)).sum()
    assert torch.equal(*(torch.autograd.grad(loss, gap)[0] for loss in (
        sure, bradley_terry(gap, tensor(0.0), strength=tensor(1.0)).sum()
    )))  # fmt: skip


@pytest.mark.parametrize("strength", [0.55, 0.75, 0.9])
def test_strength_is_what_the_gap_settles_at(strength):
    """The slope vanishes where σ(gap) is the share of the judges."""
    gap = torch.tensor([math.log(strength / (1 - strength))], dtype=torch.float64, requires_grad=True)
    bradley_terry(gap, tensor(0.0), strength=strength).sum().backward()
    assert gap.grad.abs().item() < 1e-15


SCORES = tensor(0.3, -1.0, 2.0, 0.7, 1.1, 0.2, 0.4)
WORTH = tensor(3.0, 1.0, 2.0, 2.0, 0.0, 5.0, -1.0)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1])


def by_hand(centering):
    """Each pair on its own, ties left out, 1 / (K choose 2), mean over the prompts."""
    total = 0.0
    for rows in ([0, 1, 2, 3], [4, 5, 6]):
        for i, j in itertools.permutations(rows, 2):
            if WORTH[i] > WORTH[j]:
                a, b = SCORES[i].item(), SCORES[j].item()
                total += (math.log1p(math.exp(b - a)) + centering * (a + b) ** 2) / math.comb(len(rows), 2)
    return total / 2


@pytest.mark.parametrize("centering", [0.0, 0.03])
def test_a_ranking_is_all_its_pairs(centering):
    loss, found = ranking_loss(SCORES, WORTH, GROUP, centering=centering, groups=2)
    assert loss.item() == pytest.approx(by_hand(centering), rel=1e-12)
    assert results(found)["loss"] == pytest.approx(by_hand(centering), rel=1e-12)
    right = [SCORES[i] > SCORES[j] for rows in ([0, 1, 2, 3], [4, 5, 6]) for i in rows for j in rows
             if WORTH[i] > WORTH[j]]  # fmt: skip
    assert results(found)["accuracy"] == pytest.approx(sum(map(float, right)) / len(right))


def test_a_ranking_of_two_is_a_pair():
    loss, _ = ranking_loss(SCORES[:2], WORTH[:2], GROUP[:2], groups=1)
    assert loss.item() == bradley_terry(SCORES[0], SCORES[1]).item()


def test_rankings_in_parts_are_the_rankings():
    whole, figures = ranking_loss(SCORES, WORTH, GROUP, groups=2)
    parts = [ranking_loss(SCORES[p], WORTH[p], GROUP[p], groups=2) for p in (slice(0, 4), slice(4, 7))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert results(merge([found for _, found in parts])) == pytest.approx(results(figures))


def test_labels_are_logistic_regression():
    labels = (WORTH > 1).double()
    loss, found = label_loss(SCORES, labels, samples=len(SCORES))
    assert loss.item() == pytest.approx(binary_cross_entropy_with_logits(SCORES, labels).item(), rel=1e-12)
    assert results(found)["accuracy"] == pytest.approx(((SCORES > 0) == (labels > 0)).double().mean().item())


def test_steps_are_classified_one_by_one_and_each_weighs_the_same():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4)[None] < torch.tensor([4, 1, 2])[:, None]
    labels = (torch.arange(12).reshape(3, 4) % 3 > 0).double()
    loss, found = step_loss(logits.where(mask, math.nan), labels, mask, BatchTotals.of(mask, torch.arange(3)))
    expected = binary_cross_entropy_with_logits(logits[mask], labels[mask])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert results(found)["loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_ratings_by_hand():
    loss, _ = rating_loss(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[3.0, 2.0], [1.0, 1.0]]), samples=2)
    assert loss.item() == pytest.approx((4 + 0 + 1 + 9) / 4)


# Levels -----------------------------------------------------------------------------------------------------------

RAW = tensor(-1.3, 0.4, -0.7)  # θ = −1.3, 0.19, 0.69: four levels
LEVELS = torch.tensor([0, 3, 2, 1, 3, 0, 2])


def ordinal_by_hand(scores, raw):
    """Mean −log(σ(θ_k − s) − σ(θ_{k−1} − s)) with θ_0 = −∞ and θ_K = ∞, in numpy."""
    theta = np.concatenate([[-np.inf], raw[:1], raw[0] + np.cumsum(np.exp(raw[1:])), [np.inf]])
    below = 1 / (1 + np.exp(-(theta[None] - scores[:, None])))
    return -np.log(np.diff(below, axis=1)[np.arange(len(scores)), LEVELS.numpy()]).mean()


def slope(function, values):
    """Central differences."""
    found = np.zeros_like(values)
    for place in range(len(values)):
        step = np.zeros_like(values)
        step[place] = 1e-6
        found[place] = (function(values + step) - function(values - step)) / 2e-6
    return found


def test_levels_are_differences_of_sigmoids_and_so_is_the_gradient():
    scores, raw = SCORES.clone().requires_grad_(), RAW.clone().requires_grad_()
    loss, found = ordinal_loss(scores, LEVELS, ordered(raw), samples=len(scores))
    loss.backward()
    s, r = SCORES.numpy(), RAW.numpy()
    assert loss.item() == pytest.approx(ordinal_by_hand(s, r), rel=1e-12)
    assert results(found)["loss"] == pytest.approx(loss.item(), rel=1e-12)
    # Central differences of 1e-6 are right to about 1e-9.
    assert scores.grad.numpy() == pytest.approx(slope(lambda x: ordinal_by_hand(x, r), s), abs=1e-8)
    assert raw.grad.numpy() == pytest.approx(slope(lambda x: ordinal_by_hand(s, x), r), abs=1e-8)


def test_levels_are_all_there_is_also_far_out():
    theta = ordered(RAW)
    logps = level_logps(tensor(-700.0, -3.0, 0.2, 5.0, 700.0), theta)
    assert logps.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 5, rel=1e-12)
    assert logps.isfinite().all()
    assert logps[0, 3].item() == pytest.approx(-700 - theta[-1].item(), rel=1e-12)  # log σ(−x) = −x out there
    assert logps.argmax(dim=1).tolist() == [0, 0, 3, 3, 3]


def test_of_two_levels_it_is_logistic_regression():
    labels = (WORTH > 1).long()
    loss, found = ordinal_loss(SCORES, labels, tensor(0.25), samples=len(SCORES))
    expected = binary_cross_entropy_with_logits(SCORES - 0.25, labels.double())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    right = ((SCORES > 0.25) == (labels > 0)).double().mean().item()
    assert results(found)["accuracy"] == pytest.approx(right)


def test_levels_in_parts_are_the_levels():
    whole, figures = ordinal_loss(SCORES, LEVELS, ordered(RAW), samples=7)
    parts = [ordinal_loss(SCORES[p], LEVELS[p], ordered(RAW), samples=7) for p in (slice(0, 3), slice(3, 7))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert results(merge([found for _, found in parts])) == pytest.approx(results(figures))


def test_a_level_that_nobody_gives_vanishes_without_a_trace_in_the_gradient():
    raw = torch.tensor([0.0, 0.0, -18.0, 0.0], requires_grad=True)
    loss, _ = ordinal_loss(torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0, 1, 4]), ordered(raw), samples=3)
    loss.backward()
    assert ordered(raw).diff().min() > 0
    assert raw.grad.isfinite().all()


def test_thresholds_rise_whatever_is_learnt():
    raw = 4 * torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert all((ordered(line).diff() > 0).all() for line in raw)


# Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        ("min", [0.9, 0.5, 0.5]),
        ("product", [0.9, 0.45, 0.36]),
        ("mean", [0.9, 0.7, 2.2 / 3]),
        ("last", [0.9, 0.5, 0.8]),
    ],
)
def test_steps_make_a_completion(combine, expected):
    lines = tensor([0.9, 0.5, 0.8], [0.4, math.nan, math.nan], [math.nan] * 3)
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3])
    assert so_far(lines, mask, combine)[0].tolist() == pytest.approx(expected)
    assert combined(lines, mask, combine).tolist() == pytest.approx([expected[-1], 0.4, 0.0])
    paid = step_rewards(so_far(lines, mask, combine), mask)
    assert paid.sum(dim=1).tolist() == pytest.approx([expected[-1], 0.4, 0.0])


def test_only_steps_are_classified_and_what_stands_elsewhere_does_not_matter():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    labels = tensor([1.0, 0.0, 0.0], [0.0, 1.0, 1.0])
    logits = tensor([2.0, 1.0, math.nan], [-3.0, math.nan, math.nan]).requires_grad_()
    loss, found = step_loss(logits, labels, mask, BatchTotals.of(mask, torch.arange(2)))
    expected = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(1.0)), math.log1p(math.exp(-3.0))]
    assert loss.item() == pytest.approx(statistics.mean(expected))
    figures = results(found)
    assert figures["loss"] == pytest.approx(statistics.mean(expected))
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["score/mean"] == pytest.approx(0.0)
    loss.backward()
    assert torch.equal(logits.grad != 0, mask)


# Steps in reinforcement learning ----------------------------------------------------------------------------------

BANDIT = TokenBandit.make(1)
LOGITS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PAID = torch.where(BANDIT.mask, torch.randn(BANDIT.mask.shape, dtype=torch.float64,
                                            generator=torch.Generator().manual_seed(5)), 0.0)  # fmt: skip
"""At every token of every completion, and of the same prefix not even the same: any split of the score will do."""


def gradient(advantage, step_rewards, lam=1.0):
    """E[∇ loss] over all 31 completions, each weighed by its probability."""
    algorithm = replace(parse_algorithm({"name": "reinforce", "advantage": advantage, "kl": "none"}), critic=None)
    policy = LOGITS.clone().requires_grad_()
    mask, group = BANDIT.mask, torch.arange(len(BANDIT))
    table = BANDIT.logps(policy)
    credit = assign_credit(
        algorithm, scores=BANDIT.rewards, mask=mask, group=group, logps=table.detach(), step_rewards=step_rewards,
        values=torch.zeros(mask.shape, dtype=torch.float64),
    )  # fmt: skip
    weight = BANDIT.probabilities(LOGITS) * len(BANDIT)
    loss, _ = policy_loss(
        algorithm.resolve(max_length=1), logps=table, behavior_logps=table.detach(),
        advantages=credit.advantages * weight[:, None], mask=mask, totals=BatchTotals.of(mask, group),
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss, policy)
    return found, credit


def prefix_rewards():
    """Paid at each token by what stands up to it, as a reward model would: differences of a number of each prefix."""
    potential = torch.randn(BANDIT.mask.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    names = {}
    worth = torch.zeros(BANDIT.mask.shape, dtype=torch.float64)
    for row, t in BANDIT.mask.nonzero().tolist():
        key = tuple(BANDIT.tokens[row, : t + 1].tolist())
        worth[row, t] = potential[names.setdefault(key, len(names)) % len(potential)]
    worth = torch.where(BANDIT.mask, worth, 0.0)
    last = BANDIT.mask.sum(dim=1, keepdim=True) - 1
    worth.scatter_(1, last, BANDIT.rewards[:, None])  # the whole is worth its score
    return step_rewards(worth, BANDIT.mask)


@pytest.mark.parametrize("advantage", ["none", "discounted_return", {"gae": {"lam": 1.0}}])
def test_dense_rewards_that_add_up_to_the_score_have_its_expected_gradient(advantage):
    outcome, _ = gradient(advantage, None)
    assert outcome.abs().max() > 0.01
    dense, credit = gradient(advantage, prefix_rewards())
    assert torch.allclose(dense, outcome, rtol=0, atol=1e-14)
    whole = -torch.autograd.functional.jacobian(BANDIT.expected_reward, LOGITS)
    assert torch.allclose(dense, whole, rtol=0, atol=1e-14)
    if advantage != "none":  # and yet each sample's credit is another
        assert not torch.allclose(credit.advantages, gradient(advantage, None)[1].advantages, atol=0.1)


def test_rewards_to_go_see_a_step_up_to_its_end_and_not_behind():
    _, credit = gradient("discounted_return", PAID)
    for row in range(len(BANDIT)):
        length = int(BANDIT.mask[row].sum())
        own = PAID[row].clone()
        own[length - 1] += BANDIT.rewards[row] - PAID[row].sum()
        assert credit.advantages[row, :length].tolist() == pytest.approx(
            [own[t:].sum().item() for t in range(length)], abs=1e-12
        )


def test_what_compares_whole_completions_adds_steps_up():
    group = torch.zeros(len(BANDIT), dtype=torch.long)
    for name in ("grpo", "rloo", "dr_grpo"):
        plain = credit_of(BANDIT, ALGORITHMS[name], LOGITS, torch.arange(len(BANDIT)), group)
        dense = assign_credit(
            ALGORITHMS[name], scores=BANDIT.rewards, mask=BANDIT.mask, group=group,
            logps=BANDIT.logps(LOGITS), ref_logps=BANDIT.logps(BANDIT.ref_logits), step_rewards=PAID,
        )  # fmt: skip
        assert torch.allclose(plain.advantages, dense.advantages, atol=1e-12), name


def test_which_algorithms_would_ignore_where_a_reward_is_paid():
    assert {name for name, algorithm in ALGORITHMS.items() if not adds_up(algorithm)} >= {"ppo", "reinforce++"}
    assert all(adds_up(ALGORITHMS[name]) for name in ("grpo", "rloo", "dapo", "gspo", "remax", "dro"))
    mine = replace(ALGORITHMS["grpo"], advantage=lambda rewards: rewards.per_token)
    assert not adds_up(mine)  # nobody knows what it looks at
