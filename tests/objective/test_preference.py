"""Preference losses: known starts, gradients that raise the chosen, and where each stops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from klimb.metrics import merge, results
from klimb.objective import (
    PREFERENCE_LOSSES,
    cdpo,
    dpo,
    ipo,
    ipo_average,
    known_start,
    parse_preference,
    preference_loss,
)


def one(loss, chosen, rejected, lengths=(1, 1)):
    """Loss and its gradients with respect to the two log-ratios, for one pair."""
    h = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    value = loss(*h, *(torch.tensor([float(n)], dtype=torch.float64) for n in lengths))
    value.backward()
    return value.item(), h[0].grad.item(), h[1].grad.item()


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (dpo(0.1), math.log(2)),
        (cdpo(0.3, 0.2), math.log(2)),
        (ipo(0.1), 25.0),  # 1/(4β²)
        (ipo_average(0.5), 1.0),
    ],
)
def test_the_loss_of_a_policy_that_is_its_reference(loss, start):
    assert known_start(loss) == pytest.approx(start)
    _, chosen, rejected = one(loss, 0.0, 0.0)
    assert chosen < 0 < rejected  # descent raises the chosen and lowers the rejected
    assert chosen == -rejected


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (dpo(0.5), -math.log(1 / (1 + math.exp(-0.5 * 1.4)))),
        (cdpo(0.5, 0.2), 0.8 * math.log1p(math.exp(-0.7)) + 0.2 * math.log1p(math.exp(0.7))),
        (ipo(0.5), (1.4 - 1.0) ** 2),
        (ipo_average(0.5), (2.0 / 4 - 0.6 / 3 - 1.0) ** 2),
    ],
)
def test_values_by_hand(loss, value):
    assert one(loss, 2.0, 0.6, (4, 3))[0] == pytest.approx(value)


def test_where_each_stops():
    """cDPO where σ(βΔ) = 1 − ε, IPO at Δ = 1/(2β), DPO nowhere."""
    margin = math.log(0.8 / 0.2) / 0.5
    assert one(cdpo(0.5, 0.2), margin, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(ipo(0.25), 2.0, 0.0)[1] == pytest.approx(0.0, abs=1e-12)
    assert one(dpo(0.5), 100.0, 0.0)[1] < 0


def test_large_margins_stay_finite():
    for loss in (dpo(1.0), cdpo(1.0, 0.1)):
        for sign in (1.0, -1.0):
            assert all(math.isfinite(x) for x in one(loss, sign * 1e4, 0.0))


def test_cdpo_without_noise_is_dpo():
    assert one(cdpo(0.3, 0.0), 1.0, -2.0) == pytest.approx(one(dpo(0.3), 1.0, -2.0))


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_parts_add_up(name):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([3, 1, 4, 1, 5], dtype=torch.float64)

    def part(rows):
        return preference_loss(
            PREFERENCE_LOSSES[name](),
            chosen_log_ratio=chosen[rows],
            rejected_log_ratio=rejected[rows],
            chosen_tokens=lengths[rows],
            rejected_tokens=lengths.flip(0)[rows],
            pairs=5,
        )

    whole, found = part([0, 1, 2, 3, 4])
    parts = [part([0, 3]), part([1]), part([2, 4])]
    assert torch.allclose(sum(loss for loss, _ in parts), whole)
    merged = results(merge(metrics for _, metrics in parts))
    assert merged == pytest.approx(results(found))
    assert merged["loss"] == pytest.approx(whole.item())
    assert merged["accuracy"] == pytest.approx(((chosen > rejected).sum() / 5).item())
    assert merged["margin"] == pytest.approx((chosen - rejected).mean().item())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dpo", dpo(0.1)),
        ({"dpo": 0.05}, dpo(0.05)),
        ({"name": "cdpo", "epsilon": 0.2}, cdpo(0.1, 0.2)),
        ({"ipo": {"beta": "5e-2"}}, ipo(0.05)),
        (ipo_average(0.2), ipo_average(0.2)),
    ],
)
def test_what_people_write(spec, expected):
    assert parse_preference(spec) == expected
    assert replace(expected) == expected


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"loss: unknown 'dop', did you mean 'dpo'\? Known: cdpo, dpo, ipo"):
        parse_preference("dop")
