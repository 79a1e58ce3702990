"""Advantages against enumeration: whose gradient they have, and exact numbers where a formula is short."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch

from klimb.lab.bandit import TokenBandit, credit_of, expected_gradient
from klimb.objective import KL, NO_KL, REINFORCE, Rewards, k1
from klimb.objective.advantage import (
    Draws,
    batch_mean,
    discounted_return,
    gae,
    greedy_baseline,
    no_baseline,
    optimal_value,
    preferred,
    running_mean,
    whiten,
)
from klimb.objective.group_advantage import (
    best_of_group,
    group_mean,
    group_mean_batch_std,
    group_mean_scaled_up,
    group_zscore,
    leave_one_out,
    leave_one_out_zscore,
    length_weighted_mean,
    optimal_token_baseline,
    over_mean,
    parts_zscore,
)
from klimb.objective.grouped import has_variance

BETA = 0.5
PLAIN = replace(REINFORCE, advantage=no_baseline, kl=KL("reward", k1, BETA))
BANDIT = TokenBandit.make(1)
LOGITS = torch.randn(15, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def true_gradient():
    """Of −(E[r] − β KL), by differentiating the sum over all completions."""
    logits = LOGITS.clone().requires_grad_()
    (-BANDIT.objective(logits, BETA)).backward()
    return logits.grad


def outcomes(returns, group=None):
    """Rewards of samples of one token each."""
    returns = torch.tensor(returns, dtype=torch.float64)
    group = torch.zeros(len(returns), dtype=torch.long) if group is None else torch.tensor(group)
    return Rewards(returns[:, None], torch.ones(len(returns), 1, dtype=torch.bool), group)


def token_rewards(logits):
    """The bandit's shaped rewards per token, from their definition."""
    rewards = -BETA * (BANDIT.logps(logits) - BANDIT.logps(BANDIT.ref_logits))
    for row in range(len(BANDIT)):
        rewards[row, int(BANDIT.mask[row].sum()) - 1] += BANDIT.rewards[row]
    return torch.where(BANDIT.mask, rewards, 0.0)


@pytest.mark.parametrize(
    ("advantage", "size", "share"),
    [
        (no_baseline, 1, 1),
        (discounted_return(1.0), 1, 1),
        (leave_one_out, 2, 1),
        (leave_one_out, 3, 1),
        (group_mean, 2, 1 / 2),
        (group_mean, 3, 2 / 3),
    ],
)
def test_share_of_the_true_gradient(advantage, size, share):
    gradient = expected_gradient(BANDIT, replace(PLAIN, advantage=advantage), LOGITS, size)
    assert torch.allclose(gradient, share * true_gradient(), atol=1e-12)


@pytest.mark.parametrize("baseline", [0.7, -3.0])
def test_a_baseline_of_other_samples_is_unbiased(baseline):
    row = replace(PLAIN, advantage=greedy_baseline())
    assert torch.allclose(expected_gradient(BANDIT, row, LOGITS, baseline=baseline), true_gradient(), atol=1e-12)


def gradient_of(objective):
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(objective(BANDIT.probabilities(logits)), logits)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_the_best_of_a_group_climbs_the_expected_maximum(size):
    """Enumerated: E[max of G samples] as a sum over all G-tuples, differentiated as it stands."""
    row = replace(PLAIN, advantage=best_of_group(scale=False), kl=NO_KL)
    tuples = torch.cartesian_prod(*[torch.arange(len(BANDIT))] * size)
    expected = gradient_of(lambda p: -(p[tuples].prod(dim=1) * BANDIT.rewards[tuples].amax(dim=1)).sum())
    assert torch.allclose(expected_gradient(BANDIT, row, LOGITS, size), expected / size, atol=1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_over_the_mean_it_is_the_likelihood_of_success_up_to_order_g_minus_one(size):
    """For scores of 0 and 1: Σ_k (1 − p)^k ∇p up to k = G − 2, which is ∇ log p for G → ∞."""
    binary = replace(BANDIT, rewards=(BANDIT.rewards > 0.3).double())

    def objective(probabilities):
        success = (probabilities * binary.rewards).sum()
        return -success * sum((1 - success.detach()) ** k for k in range(size - 1))

    row = replace(PLAIN, advantage=over_mean, kl=NO_KL)
    assert torch.allclose(expected_gradient(binary, row, LOGITS, size), gradient_of(objective), atol=1e-12)


def test_where_all_completions_are_equally_long_length_weighs_nothing():
    rewards = outcomes([1.0, 5.0, 2.0, 5.5, 6.0], [7, 3, 7, 3, 7])
    assert torch.allclose(length_weighted_mean(rewards), group_mean(rewards))


def test_the_optimal_token_baseline_has_less_variance_than_the_mean():
    """Of the gradient in the logits, summed over all pairs of completions."""
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    group = torch.arange(len(pairs)).repeat_interleave(2)
    weight = BANDIT.probabilities(LOGITS)[pairs].prod(dim=1)
    steps = torch.nn.functional.one_hot(BANDIT.tokens, 3) - LOGITS.softmax(-1)[BANDIT.prefixes]
    spread = []
    for advantage in (optimal_token_baseline(), group_mean):
        credit = credit_of(BANDIT, replace(PLAIN, advantage=advantage, kl=NO_KL), LOGITS, pairs.flatten(), group)
        scaled = credit.advantages[..., None] * torch.where(BANDIT.mask[..., None], steps, 0.0)[pairs.flatten()]
        gradient = torch.zeros(len(group), 15, 3, dtype=torch.float64)
        gradient.scatter_add_(1, BANDIT.prefixes[pairs.flatten()][..., None].expand_as(scaled), scaled)
        gradient = gradient.view(-1, 2, 15, 3).sum(dim=1)
        mean = (weight[:, None, None] * gradient).sum(dim=0)
        spread.append((weight * (gradient - mean).square().sum(dim=(1, 2))).sum().item())
    assert spread[0] < 0.97 * spread[1]


def test_optimal_value_is_the_soft_maximum_of_its_draws():
    advantage = optimal_value(beta=0.5)
    assert advantage.summary(torch.tensor([1.0, 0.0, 0.0, 1.0])).item() == pytest.approx(
        0.5 * math.log((2 * math.exp(2) + 2) / 4)
    )
    assert advantage.summary(torch.full((8,), 3.0)).item() == pytest.approx(3.0)
    assert greedy_baseline().summary(torch.tensor([0.25, 0.75])).item() == 0.5


def test_which_further_samples_a_baseline_wants():
    assert greedy_baseline().draws == Draws(1, greedy=True, of_reference=False)
    assert optimal_value(samples=3).draws == Draws(3, greedy=False, of_reference=True)
    assert preferred(0.25, samples=3).draws == Draws(3, mixture=0.25)
    assert (Draws(3).greedy, Draws(3).of_reference, Draws(3).mixture) == (False, False, 0.0)
    assert preferred(samples=3).summary(torch.tensor([3.0, 5.0])).tolist() == [3.0, 5.0, 3.0]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=f"preferred: mixture = {share:g}: it has to be at least 0 and at most 1"):
        preferred(share)
    with pytest.raises(ValueError, match="preferred: samples = 0: it has to be a whole number, at least 1"):
        preferred(samples=0)


def test_a_preference_is_a_mean_over_opponents():
    rewards = replace(outcomes([1.0, 0.0]), baseline=torch.tensor([[0.0, 2.0], [0.0, -1.0]]))
    sigma = [1 / (1 + math.exp(-x)) for x in (1.0, -1.0, 0.0, 1.0)]
    assert preferred()(rewards).tolist() == pytest.approx([sum(sigma[:2]) / 2 - 0.5, sum(sigma[2:]) / 2 - 0.5])


def test_a_preference_needs_its_opponent():
    with pytest.raises(ValueError, match="advantage preferred: no baseline was given"):
        preferred()(outcomes([1.0]))


@pytest.mark.parametrize("returns", [[1.0, 5.0, 2.5, 4.0], [1.0, 5.0, 2.5]])
def test_leave_one_out_with_the_others_standard_deviation(returns):
    found = leave_one_out_zscore(eps=0.01)(outcomes(returns))
    for i, r in enumerate(returns):
        rest = returns[:i] + returns[i + 1 :]
        assert found[i].item() == pytest.approx((r - statistics.mean(rest)) / (statistics.stdev(rest) + 0.01))
    odd = outcomes([0.1, 0.1, 0.1, 7.0])  # where the others are all equal they have no scale
    assert leave_one_out_zscore()(odd)[3] == pytest.approx(6.9)
    low = outcomes([7.0, 7.0, 7.0, 0.1])
    assert leave_one_out_zscore()(low)[3] == pytest.approx(-6.9)
    for scale in (1.0, 1e8):  # where rounding leaves them a spread, it is none
        for values in ([1.0, 3.0], [0.1, 0.7], [0.3, 0.1]):
            two = outcomes([scale * value for value in values])
            assert torch.equal(leave_one_out_zscore()(two), leave_one_out(two))
    rounded = outcomes([4.3e5, 4.3e5, 4.3e5, 2.4])  # rounding makes a standard deviation of 0.004 of the three
    assert leave_one_out_zscore()(rounded)[3] == pytest.approx(2.4 - 4.3e5)


def test_numbers_of_groups_are_names():
    """Any integers, in any order."""
    returns, group = [1.0, 5.0, 2.0, 5.5, 6.0], [7, 3, 7, 3, 7]
    assert best_of_group(scale=False)(outcomes(returns, group)).tolist() == [0.0, 0.0, 0.0, 0.5, 4.0]
    sure = torch.zeros(5, 1, dtype=torch.float64)
    rewards = replace(outcomes(returns, group), logps=sure - 0.1, collisions=sure + 0.9)
    assert torch.allclose(optimal_token_baseline()(rewards)[:, 0], group_mean(rewards))


def test_two_samples_are_enough_for_a_standard_deviation_of_the_update():
    assert group_mean_batch_std(0.0)(outcomes([0.0, 2.0])).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    parts = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    rewards = replace(outcomes([0.0, 0.0]), parts=parts, part_weights=torch.ones(1))
    assert parts_zscore(0.0)(rewards).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_a_mean_of_zero_teaches_nothing_where_it_would_divide():
    assert over_mean(outcomes([-1.0, 1.0])).tolist() == [0.0, 0.0]
    assert over_mean(outcomes([0.0, 1.0])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("advantage", "given", "missing"),
    [
        (parts_zscore(), {"parts": torch.ones(1, 1)}, "parts"),
        (optimal_token_baseline(), {"logps": torch.zeros(1, 1)}, "collisions"),
    ],
)
def test_half_of_what_is_needed_is_not_enough(advantage, given, missing):
    with pytest.raises(ValueError, match=missing):
        advantage(replace(outcomes([1.0]), **given))


def test_the_optimal_token_baseline_of_nearly_and_of_wholly_certain_tokens():
    """Weights of 1 − 2 · 0.9 + 0.82 = 0.02 are as good as large ones; where all are 0 there is no baseline."""
    rewards = outcomes([1.0, 4.0])
    column = torch.ones(2, 1, dtype=torch.float64)
    nearly = replace(rewards, logps=math.log(0.9) * column, collisions=0.82 * column)
    assert optimal_token_baseline()(nearly)[:, 0].tolist() == pytest.approx([-1.5, 1.5])
    wholly = replace(rewards, logps=0 * column, collisions=column)
    assert optimal_token_baseline()(wholly)[:, 0].tolist() == [1.0, 4.0]


def test_the_optimal_token_baseline_lies_between_the_rewards_though_two_passes_round_otherwise():
    """Σ_v π² of another pass than the sampler's p, as in 16 bits: 1 − 2 · 0.9995 + 0.991 is below 0."""
    rewards = outcomes([1.0, 0.0])
    p = torch.tensor([[0.9995], [0.986]], dtype=torch.float64)
    found = optimal_token_baseline()(
        replace(rewards, logps=p.log(), collisions=torch.tensor([[0.991], [0.981]]).double())
    )
    assert 0 <= found[0, 0].item() <= 1
    assert found[0, 0].item() - found[1, 0].item() == pytest.approx(1)


def test_groups_that_teach_nothing_leave_the_gradient_as_large():
    rewards = outcomes([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], [0, 0, 1, 1, 2, 2])
    assert group_mean_scaled_up(rewards).tolist() == pytest.approx([0.75, -0.75, 0.0, 0.0, 0.75, -0.75])


def test_a_part_on_another_scale_keeps_its_say():
    parts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    rewards = replace(outcomes([0.0] * 4, [0, 0, 1, 1]), parts=parts, part_weights=torch.tensor([1.0, 2.0]))
    scaled = replace(rewards, parts=parts * torch.tensor([1.0, 1000.0]))
    assert torch.allclose(parts_zscore(0.0)(scaled), parts_zscore(0.0)(rewards))
    # z-scores of a pair are ±√½: totals √½ (1, −1, 3, −3), whose standard deviation is √½ · √(20/3).
    expected = [x / (20 / 3) ** 0.5 for x in (1.0, -1.0, 3.0, -3.0)]
    assert parts_zscore(0.0)(rewards).tolist() == pytest.approx(expected)


def test_gae_with_a_lambda_by_length():
    rewards, values, mask = ragged()
    found = gae(0.9, alpha=0.4)(Rewards(rewards, mask, torch.arange(3), values))
    for row, length in enumerate([4, 2, 1]):
        lam = max(0.0, 1 - 1 / (0.4 * length))  # 3/8 and, below 0, 0
        alone = Rewards(rewards[row : row + 1], mask[row : row + 1], torch.arange(1), values[row : row + 1])
        assert torch.allclose(found[row], gae(0.9, lam)(alone)[0])


def test_a_running_baseline_is_unbiased():
    state = {"baseline": torch.tensor(0.7, dtype=torch.float64)}
    gradient = expected_gradient(BANDIT, replace(PLAIN, advantage=running_mean()), LOGITS, state=state)
    assert torch.allclose(gradient, true_gradient(), atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_on_exact_values_is_unbiased_at_any_lambda(lam):
    values = BANDIT.values(LOGITS, token_rewards(LOGITS))
    gradient = expected_gradient(BANDIT, replace(PLAIN, advantage=gae(1.0, lam)), LOGITS, values=values)
    assert torch.allclose(gradient, true_gradient(), atol=1e-12)


def test_a_discount_points_elsewhere():
    gradient = expected_gradient(BANDIT, replace(PLAIN, advantage=discounted_return(0.8)), LOGITS)
    assert not torch.allclose(gradient, true_gradient(), rtol=0.1)


def test_zscoring_changes_the_direction():
    gradient = expected_gradient(BANDIT, replace(PLAIN, advantage=group_zscore(0.0)), LOGITS, 2)
    cosine = torch.cosine_similarity(gradient.flatten(), true_gradient().flatten(), dim=0)
    assert cosine < 0.99


def test_gae_with_exact_values_is_the_true_advantage():
    """Q(s, a) − V(s), both as conditional expectations over the completions that pass there."""
    rewards, probability = token_rewards(LOGITS), BANDIT.probabilities(LOGITS)
    values = BANDIT.values(LOGITS, rewards)
    credit = credit_of(
        BANDIT, replace(PLAIN, advantage=gae(1.0, 0.0)), LOGITS, torch.arange(31), torch.arange(31), values
    )
    for row in range(len(BANDIT)):
        for t in range(int(BANDIT.mask[row].sum())):
            to_go = rewards[:, t:].sum(dim=1)
            here = BANDIT.mask[:, t] & (BANDIT.prefixes[:, t] == BANDIT.prefixes[row, t])
            taken = here & (BANDIT.tokens[:, t] == BANDIT.tokens[row, t])
            q, v = ((probability * to_go)[which].sum() / probability[which].sum() for which in (taken, here))
            assert torch.allclose(credit.advantages[row, t], q - v)
            assert torch.allclose(values[row, t], v)


def ragged():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    generator = torch.Generator().manual_seed(3)
    draw = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return torch.where(mask, draw[0], 0.0), torch.where(mask, draw[1], torch.nan), mask


def test_gae_against_its_sum():
    """A_t = Σ_l (γλ)^l δ_{t+l}, with V = 0 beyond the last token, also for the row that fills the width."""
    rewards, values, mask = ragged()
    found = gae(0.9, 0.8)(Rewards(rewards, mask, torch.arange(3), values))
    for row, length in enumerate([4, 2, 1]):
        v = [*values[row, :length].tolist(), 0.0]
        delta = [rewards[row, t].item() + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, length))
            assert found[row, t].item() == pytest.approx(expected)
    assert (found[~mask] == 0).all()


def test_an_interrupted_sample_ends_before_its_last_token_with_that_tokens_value():
    rewards, values, mask = ragged()
    interrupted = torch.tensor([True, False, True])
    found = gae(0.9, 0.8)(Rewards(rewards, mask, torch.arange(3), values, interrupted))
    # Row 0 as a sample of three tokens whose last reward is topped up with γ V of the state that was reached.
    short = rewards[:1, :3].clone()
    short[0, 2] += 0.9 * values[0, 3]
    ended = gae(0.9, 0.8)(Rewards(short, mask[:1, :3], torch.arange(1), values[:1, :3]))
    assert torch.allclose(found[0, :3], ended[0])
    assert found[0, 3] == 0
    assert found[2, 0] == 0
    assert torch.allclose(found[1], gae(0.9, 0.8)(Rewards(rewards, mask, torch.arange(3), values))[1])


def test_gae_needs_values():
    with pytest.raises(ValueError, match="critic"):
        gae()(outcomes([1.0]))


def test_numbers_of_the_group_baselines():
    """Two groups, interleaved; the oracle is the statistics module."""
    returns, group = [1.0, 5.0, 2.0, 5.5, 6.0], [7, 3, 7, 3, 7]
    rewards = outcomes(returns, group)
    members = {g: [r for r, h in zip(returns, group) if h == g] for g in group}
    for i, (r, g) in enumerate(zip(returns, group)):
        mean, others = statistics.mean(members[g]), [*members[g]]
        others.remove(r)
        assert group_mean(rewards)[i].item() == pytest.approx(r - mean)
        assert leave_one_out(rewards)[i].item() == pytest.approx(r - statistics.mean(others))
        zscore = (r - mean) / (statistics.stdev(members[g]) + 0.01)
        assert group_zscore(eps=0.01)(rewards)[i].item() == pytest.approx(zscore)
    assert batch_mean(rewards).tolist() == pytest.approx([r - statistics.mean(returns) for r in returns])


@pytest.mark.parametrize("advantage", [group_mean, leave_one_out, group_zscore(0.0)])
@pytest.mark.parametrize(
    ("returns", "varies"),
    [
        ([0.1 + 0.2, 0.3, 0.3], False),  # equal but for rounding: the standard deviation is not zero
        ([1.0, 1.0 + 9e-7, 1.0], False),
        ([1.0, 1.0 + 1.5e-6, 1.0], True),
        ([0.0, 1e-6, 0.0], False),  # exactly the tolerance
        ([0.1, 0.1 + 5e-7, 0.1], False),  # which does not shrink with |R|
        ([1e6, 1e6 + 0.9, 1e6], False),  # the tolerance grows with |R|
        ([-1e6, -1e6 + 2.0, -1e6], True),
        ([5.0], False),
    ],
)
def test_a_group_without_variance_gets_exactly_zero(advantage, returns, varies):
    rewards = outcomes([*returns, 0.0, 1.0], [0] * len(returns) + [1, 1])
    found = advantage(rewards)
    assert bool((found[: len(returns)] != 0).any()) == varies
    assert (found[len(returns) :] != 0).all()
    assert has_variance(rewards.returns, rewards.group).tolist() == [varies] * len(returns) + [True] * 2


def test_the_running_mean_moves_after_it_was_used():
    advantage = running_mean(decay=0.9)
    first = outcomes([1.0, 3.0])
    assert advantage(first).tolist() == [-1.0, 1.0]
    state = advantage.next_state(first)
    second = replace(outcomes([4.0, 6.0]), state=state)
    assert advantage(second).tolist() == [2.0, 4.0]
    assert advantage.next_state(second)["baseline"].item() == pytest.approx(0.9 * 2 + 0.1 * 5)


def test_discounted_return_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    found = discounted_return(0.5)(Rewards(rewards, rewards != 0, torch.arange(2)))
    assert found.tolist() == [[3.0, 4.0, 4.0], [3.0, 0.0, 0.0]]


def test_whitening_takes_its_statistics_over_tokens():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = whiten(torch.tensor([[1.0, 1.0, 1.0], [5.0, 77.0, torch.nan]], dtype=torch.float64), mask)
    # Four tokens 1 1 1 5: mean 2, variance 3.
    assert found[mask].tolist() == pytest.approx([-1 / 3**0.5] * 3 + [3 / 3**0.5])
    assert (found[~mask] == 0).all()
    assert (whiten(torch.full((2, 3), 4.0, dtype=torch.float64), mask) == 0).all()
    tiny = torch.tensor([[0.0, 2e-8]], dtype=torch.float64)  # a standard deviation of 1e-8: the rest is what is added
    assert whiten(tiny, torch.ones(1, 2, dtype=torch.bool))[0].tolist() == pytest.approx([-0.5, 0.5])
