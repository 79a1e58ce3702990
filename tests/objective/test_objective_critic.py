"""Reward-model and critic losses, by hand and against the likelihoods they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.metrics import merge, results
from klimb.objective import Critic, bradley_terry, critic_loss, reward_loss, value_loss
from klimb.objective.critic import explained_variance


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_by_hand():
    # −log σ(2 − 0.5 − 0.3) + 0.01 (2 + 0.5)²
    expected = math.log1p(math.exp(-1.2)) + 0.01 * 6.25
    assert bradley_terry(tensor(2.0), tensor(0.5), tensor(0.3), 0.01).item() == pytest.approx(expected)
    assert bradley_terry(tensor(1.0), tensor(1.0)).item() == pytest.approx(math.log(2))
    assert bradley_terry(tensor(-1e4), tensor(1e4)).isfinite()


def test_bradley_terry_is_lowest_at_the_scores_that_made_the_labels():
    """Population loss over three items with known scores; centering then fixes their level at zero."""
    truth = tensor(0.0, 1.0, -0.5)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    weight = torch.stack([torch.sigmoid(truth[i] - truth[j]) for i, j in pairs])
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        winners, losers = (torch.stack([scores[pair[k]] for pair in pairs]) for k in (0, 1))
        loss = (weight * bradley_terry(winners, losers)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = scores.detach()
    assert torch.allclose(fitted - fitted[0], truth - truth[0], atol=1e-5)


def test_reward_loss_parts_add_up_and_a_tie_is_half_right():
    chosen, rejected = tensor(1.0, 0.0, 2.0), tensor(0.5, 0.0, 3.0)
    whole, found = reward_loss(chosen, rejected, pairs=3)
    parts = [reward_loss(chosen[rows], rejected[rows], pairs=3) for rows in ([0], [1, 2])]
    assert torch.allclose(sum(loss for loss, _ in parts), whole)
    merged = results(merge(metrics for _, metrics in parts))
    assert merged == pytest.approx(results(found))
    assert merged["accuracy"] == 0.5
    assert merged["margin"] == pytest.approx(-0.5 / 3)
    assert merged["score/mean"] == pytest.approx(6.5 / 6)
    expected = [math.log1p(math.exp(-gap)) for gap in (0.5, 0.0, -1.0)]  # without margin or centering
    assert whole.item() == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.0, 1.0, 3.0, 2.0),  # ½ · 2²: nothing moved
        (1.5, 1.0, 3.0, 0.5 * 1.8**2),  # moved towards the target, more than 0.2: counts as 1.2
        (0.5, 1.0, 3.0, 0.5 * 2.5**2),  # moved away: the larger error is the unclipped one
        (3.5, 3.0, 3.0, 0.5 * 0.5**2),  # overshot from the target itself
        (0.5, 1.0, -1.0, 0.5 * 1.8**2),  # moved down towards the target, more than 0.2: counts as 0.8
    ],
)
def test_value_loss_by_hand(value, old, target, expected):
    found = value_loss(tensor(value), tensor(target), tensor(old), 0.2)
    assert found.item() == pytest.approx(expected)
    for before, bound in ((None, None), (tensor(old), None), (None, 0.2)):
        whole = value_loss(tensor(value), tensor(target), before, bound).item()
        assert whole == pytest.approx((value - target) ** 2 / 2)


def test_a_clipped_value_gets_no_gradient():
    values = tensor(1.5).requires_grad_()
    value_loss(values, tensor(3.0), tensor(1.0), 0.2).sum().backward()
    assert values.grad == 0


def test_critic_loss_over_any_split_with_nan_where_no_token_is():
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    totals = BatchTotals.of(mask, torch.arange(3))
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (
        torch.where(mask, x, torch.nan) for x in torch.randn(3, 3, 2, generator=generator, dtype=torch.float64)
    )
    values.requires_grad_()

    def part(rows):
        return critic_loss(
            Critic(0.2),
            values=values[rows],
            old_values=old[rows],
            returns=returns[rows],
            mask=mask[rows],
            totals=totals,
        )

    whole, found = part([0, 1, 2])
    parts = [part([2]), part([0]), part([1])]
    assert torch.allclose(sum(loss for loss, _ in parts), whole)
    assert results(found)["critic/loss"] == pytest.approx(whole.item())
    whole.backward()
    assert values.grad.isfinite().all()
    assert (values.grad[~mask] == 0).all()
    assert whole.item() == pytest.approx(value_loss(values, returns, old, 0.2)[mask].mean().item())


def test_explained_variance():
    mask = torch.tensor([[True, True], [True, False]])
    returns = torch.tensor([[1.0, 2.0], [6.0, torch.nan]])
    assert explained_variance(returns, returns, mask).result() == pytest.approx(1.0)
    assert explained_variance(torch.full((2, 2), 3.0), returns, mask).result() == pytest.approx(0.0)
    # Halfway to each return: a quarter of the variance is left.
    assert explained_variance(returns / 2, returns, mask).result() == pytest.approx(0.75)
