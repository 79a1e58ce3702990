"""Preference losses as people write them, what they refuse, and what is reported while they train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from klimb.metrics import results
from klimb.objective.preference import PREFERENCE_LOSSES, Completions, Mixed, Pairs, parse_preference, preference_loss
from klimb.objective.preference.likelihood import chosen_nll, simpo
from klimb.objective.preference.margin import cdpo, dpo, ipo, ipo_average
from klimb.objective.preference.pointwise import bco_pair, kto

NAMES = list(PREFERENCE_LOSSES)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("dpo", dpo(0.1)),
        ({"dpo": 0.05}, dpo(0.05)),
        ({"name": "dpo"}, dpo(0.1)),
        ({"name": "cdpo", "epsilon": 0.2}, cdpo(0.1, 0.2)),
        ({"ipo": {"beta": "5e-2"}}, ipo(0.05)),
        (ipo_average(0.2), ipo_average(0.2)),
        ("mpo", Mixed(((0.8, dpo()), (0.2, bco_pair()), (1.0, chosen_nll())))),
        ({"mix": {"dpo": 0.5, "kto": 1}}, None),
        ({"mix": {"dpo": 0.5, "ipo": {"weight": 2, "beta": 0.2}}}, Mixed(((0.5, dpo()), (2.0, ipo(0.2))))),
        ({"name": "mix", "kto": 1}, Mixed(((1.0, kto()),))),
    ],
)
def test_what_people_write(spec: Any, expected: Any) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"loss.mix: its parts take different data \(labels, pairs\)"):
            parse_preference(spec)
        return
    assert parse_preference(spec) == expected
    assert replace(expected) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dop", r"loss: unknown 'dop', did you mean 'dpo'\? Known: alphapo, aot, "),
        ({"mix": {"dpo": {"beta": 0.1}}}, "loss.mix.dpo: it has no weight"),
        ({"mix": ["dpo"]}, "loss.mix: expected names with weights"),
        ({"mix": {}}, "loss.mix: nothing to mix"),
        ({"exo": {"epsilon": 0}}, "exo: epsilon = 0: it has to be above 0 and below 0.5"),
        ({"robust": {"epsilon": 0.5}}, "robust: epsilon = 0.5: it has to be at least 0 and below 0.5"),
        ({"kto": {"desirable": -1}}, "kto: desirable = -1: it has to be at least 0"),
        ({"dpo": -0.1}, r"dpo: beta = -0\.1: it has to be above 0"),
        ({"ipo": 0}, "ipo: beta = 0: it has to be above 0"),
        ({"cdpo": [0.1, 0.9]}, r"cdpo: epsilon = 0\.9: it has to be at least 0 and below 0\.5"),
        ({"discopop": [0.1, 0]}, "discopop: tau = 0: it has to be above 0"),
        ({"simpo": float("nan")}, "simpo: beta = nan: it has to be above 0"),
        ({"mix": {"dpo": -1}}, "loss.mix: -1: a weight is a finite number of at least 0"),
        ({"ld_dpo": {"alpha": 2}}, "ld_dpo: alpha = 2"),
        ({"fdpo_alpha": {"alpha": -1}}, "fdpo_alpha: alpha = -1"),
        ({"fdpo_alpha": {"alpha": 2}}, "fdpo_alpha: alpha = 2"),
        ({"beta_dpo": {"keep": 0}}, "beta_dpo: keep = 0"),
        ({"beta_dpo": {"keep": 1.5}}, r"beta_dpo: keep = 1\.5"),
        ({"beta_dpo": {"momentum": 1}}, "beta_dpo: momentum = 1"),
    ],
)
def test_what_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_preference(spec)


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_what_a_person_has_to_know(name: str) -> None:
    page = parse_preference(name).page
    assert all((page.formula, page.source, page.failure, page.degrades))
    assert type(parse_preference(name)).__doc__


def test_displacement_is_counted() -> None:
    """Chosen below the reference and margin above 0: three of eight; a margin of 0, or a chosen that stays, is none."""
    chosen = torch.tensor([[-1.0], [-1.0], [1.0], [0.0], [-3.0], [0.0], [-2.0], [-1.0]])
    rejected = torch.tensor([[-2.0], [-0.5], [0.0], [0.0], [-5.0], [-1.0], [-2.0], [-4.0]])
    sides = [Completions(x, torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)) for x in (chosen, rejected)]
    found = results(preference_loss(dpo(), Pairs(*sides), 8)[1])
    assert found["displaced"] == 3 / 8
    assert found["chosen_logps"] == found["chosen_log_ratio"] == -7 / 8
    assert found["accuracy"] == pytest.approx((1 + 0 + 1 + 0.5 + 1 + 1 + 0.5 + 1) / 8)
    assert found["rejected_logps"] == found["rejected_log_ratio"] == -14.5 / 8
    assert found["margin"] == 7.5 / 8


def test_what_is_reported_of_labels_and_without_a_reference() -> None:
    """Desirable completions at h = −1, 2, 0 and 0.5, undesirable ones at −1, −3 and 1: 2½ and two of seven are on their
    side, one of four fell."""
    up, down = torch.tensor([[-1.0], [2.0], [0.0], [0.5]]), torch.tensor([[-1.0], [-3.0], [1.0]])
    sides = [Completions(x, torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)) for x in (up, down)]
    found = results(preference_loss(kto(), Pairs(*sides, given={"baseline": torch.zeros(())}), 7)[1])
    assert (found["displaced"], found["accuracy"]) == (0.25, pytest.approx(4.5 / 7))
    assert "margin" not in found
    logps, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    free = Pairs(Completions(logps, None, mask), Completions(2 * logps, None, mask))
    found = results(preference_loss(simpo(), free, 1)[1])
    assert (found["chosen_logps_per_token"], found["margin"], found["accuracy"]) == (-1.5, 1.5, 1.0)
    assert not {"displaced", "chosen_log_ratio", "rejected_log_ratio"} & found.keys()
