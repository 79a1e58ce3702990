"""Aggregates: hand-made numbers, and the law that parts add up to the whole."""

from __future__ import annotations

import itertools

import pytest
import torch

from klimb.batch import BatchTotals
from klimb.objective.aggregate import pair_mean, sequence_mean, sequence_sum, token_mean

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
GROUP = torch.tensor([0, 0, 1, 1])
LOSS = torch.where(MASK, torch.tensor([[1.0, 2, 3], [10, 0, 0], [0, 0, 0], [4, 6, 0]]), torch.nan).double()
AGGREGATES = [token_mean, sequence_mean, sequence_sum(1.0), sequence_sum(8.0)]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (token_mean, 26 / 6),
        (sequence_mean, (2 + 10 + 5) / 3),  # the sample without a token is in no denominator
        (sequence_sum(1.0), 26 / 3),
        (sequence_sum(8.0), 26 / 24),
    ],
)
def test_numbers(aggregate, expected):
    assert aggregate(LOSS, MASK, BatchTotals.of(MASK, GROUP)).item() == pytest.approx(expected)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_any_split_adds_up(aggregate):
    totals = BatchTotals.of(MASK, GROUP)
    whole = aggregate(LOSS, MASK, totals)
    for labels in itertools.product(range(3), repeat=4):  # every assignment of the samples to three parts
        parts = [[i for i in range(4) if labels[i] == part] for part in range(3)]
        total = sum(aggregate(LOSS[part], MASK[part], totals) for part in parts)
        assert torch.allclose(total, whole, rtol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_nan_where_there_is_no_token_reaches_neither_loss_nor_gradient(aggregate):
    loss = LOSS.clone().requires_grad_()
    value = aggregate(loss, MASK, BatchTotals.of(MASK, GROUP))
    value.backward()
    assert value.isfinite()
    assert loss.grad.isfinite().all()
    assert (loss.grad[~MASK] == 0).all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_update_without_tokens_is_zero(aggregate):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(LOSS[:2], mask, BatchTotals.of(mask, GROUP[:2])) == 0


def test_an_open_constant_is_an_error():
    with pytest.raises(ValueError, match="resolve"):
        sequence_sum()(LOSS, MASK, BatchTotals.of(MASK, GROUP))


@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean, sequence_sum(1.0)])
def test_an_update_of_one_token_is_that_token(aggregate):
    mask = torch.tensor([[True, False]])
    assert aggregate(torch.tensor([[3.0, 9.0]]), mask, BatchTotals.of(mask, GROUP[:1])) == 3.0


def test_pairs():
    assert pair_mean(torch.tensor([3.0]), 1) == 3.0
    assert pair_mean(torch.zeros(0), 0) == 0.0
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert pair_mean(losses[:1], 3) + pair_mean(losses[1:], 3) == pytest.approx(3.0)
