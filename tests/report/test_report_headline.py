"""What the page claims in words, held against rows for which the honest answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from klimb.report.headline import baseline, headline, verdict
from klimb.report.load import Records, Row, Run

SFT = Row("SFT", "sft", proxy=0.0, gold=0.97, gold_low=0.90, gold_high=1.03, kl=0.0)
LEASHED = Row("GRPO β=0.15", "rl", proxy=0.82, gold=1.62, gold_low=1.55, gold_high=1.69, kl=1.3)
FREE = Row("GRPO β=0", "rl", proxy=1.47, gold=-1.97, gold_low=-2.17, gold_high=-1.77, kl=32.0)
BEST_OF = Row("best-of-32", "sample", proxy=1.4, gold=2.41, gold_low=2.3, gold_high=2.5, kl=2.5)


def records(*rows: Row, seed_rows: list[Row] | None = None, summary: dict | None = None) -> Records:
    runs = [
        Run("reward", "reward", "reward model", None, {}),
        *(Run(r.method, r.stage, r.method, None, {}) for r in rows),
    ]
    return Records("x", runs, list(rows), seed_rows or [], [0], summary or {}, "", {}, [], [])


def words(*rows: Row) -> str:
    told = headline(records(*rows), {})
    return " ".join([told.answer, *told.details])


def test_better_where_the_intervals_are_apart() -> None:
    told = headline(records(SFT, LEASHED), {})
    expected = "Better. GRPO β=0.15: gold 1.62 [1.55, 1.69] against 0.97 [0.90, 1.03] after SFT, at KL 1.3."
    assert told.answer == expected
    assert told.tone == "better"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.031, 1.20, "better"),
        (1.03, 1.20, "not shown"),  # touching is not apart
        (0.70, 0.95, "not shown"),
        (0.70, 0.90, "not shown"),
        (0.70, 0.899, "worse"),
        (None, 1.20, "not shown"),
        (1.10, None, "better"),  # the end that faces the baseline is what is compared
        (None, None, "not shown"),
    ],
)
def test_the_rule_at_its_edges(low: float | None, high: float | None, expected: str) -> None:
    row = replace(LEASHED, gold=1.0, gold_low=low, gold_high=high)
    assert verdict(row, SFT) == expected


def test_overlap_is_not_called_better_though_the_mean_is_higher() -> None:
    told = headline(records(SFT, replace(LEASHED, gold=1.1, gold_low=1.0, gold_high=1.2)), {})
    assert told.answer.startswith("Not shown to be better.")
    assert "intervals overlap" in told.answer
    assert told.tone == "open"


def test_without_intervals_nothing_is_shown() -> None:
    bare = [replace(row, gold_low=None, gold_high=None) for row in (SFT, LEASHED)]
    assert "Not shown to be better" in words(*bare)
    assert "without intervals nothing is shown" in words(*bare)


def test_over_optimisation_needs_a_higher_proxy_and_a_worse_gold() -> None:
    told = words(SFT, LEASHED, FREE)
    assert "Without a leash (GRPO β=0) the proxy ends higher (1.47 against 0.82)" in told
    assert "gold ends at −1.97 [−2.17, −1.77]: the reward model was climbed, not the task." in told
    lower_proxy = words(SFT, LEASHED, replace(FREE, proxy=0.5))
    assert "climbed" not in lower_proxy
    assert "GRPO β=0 is worse than SFT" in lower_proxy
    unclear = words(SFT, LEASHED, replace(FREE, gold=0.95, gold_low=0.88, gold_high=1.02))
    assert "climbed" not in unclear
    assert "Not shown to be better: GRPO β=0." in unclear


def test_a_small_leash_is_not_called_none() -> None:
    assert "Without a leash" not in words(SFT, LEASHED, replace(FREE, method="GRPO β=0.05"))
    assert "Without a leash" in words(SFT, LEASHED, replace(FREE, method="GRPO β=0.0"))


def test_the_peak_is_told_only_where_gold_ended_below_it() -> None:
    told = headline(records(SFT, LEASHED, FREE), {"GRPO β=0": (1.34, 8.0, 1.0)})
    assert any("after a peak of 1.34 at step 8 (KL 1.0)" in sentence for sentence in told.details)
    told = headline(records(SFT, LEASHED, FREE), {"GRPO β=0": (-2.5, 8.0, None)})
    assert not any("peak" in sentence for sentence in told.details)


def test_the_best_of_several_is_said_to_be_picked() -> None:
    assert "highest of 2 trained policies, picked after the fact" in words(SFT, LEASHED, FREE)
    assert "picked" not in words(SFT, LEASHED)


def test_best_of_n_is_a_yardstick_and_never_the_answer() -> None:
    told = headline(records(SFT, LEASHED, BEST_OF), {})
    assert told.answer.startswith("Better. GRPO β=0.15")
    assert any("best-of-32 with gold 2.41 [2.30, 2.50]; GRPO β=0.15 is below it" in text for text in told.details)


def test_paired_differences_over_seeds_decide() -> None:
    overlapping = replace(LEASHED, gold=1.05, gold_low=0.95, gold_high=1.15)
    assert verdict(overlapping, SFT) == "not shown"
    assert verdict(overlapping, SFT, {"GRPO β=0.15": (0.02, 0.14)}) == "better"
    assert verdict(overlapping, SFT, {"GRPO β=0.15": (-0.02, 0.14)}) == "not shown"
    assert verdict(LEASHED, SFT, {"GRPO β=0.15": (-0.9, -0.1)}) == "worse"


def test_seeds_are_counted() -> None:
    per_seed = [replace(row, seed=seed) for seed in (0, 1) for row in (SFT, LEASHED, FREE)]
    told = headline(records(SFT, LEASHED, FREE, seed_rows=per_seed), {})
    assert "GRPO β=0.15 2 of 2, GRPO β=0 0 of 2" in told.details[-1]


def test_no_gold_claims_nothing_about_the_policy() -> None:
    told = headline(records(replace(SFT, gold=None), replace(LEASHED, gold=None)), {})
    assert "no gold was given" in told.answer
    assert "GRPO β=0.15 0.82, from 0.00 after SFT" in told.answer
    assert told.tone == "open"


def test_the_worst_is_told_as_such() -> None:
    told = headline(records(SFT, FREE), {})
    assert told.answer.startswith("Worse. GRPO β=0")
    assert told.tone == "worse"


def test_shares_get_three_decimals() -> None:
    accuracy = [
        replace(SFT, gold=0.576, gold_low=0.56, gold_high=0.59),
        replace(LEASHED, gold=0.751, gold_low=0.74, gold_high=0.76),
    ]
    assert "gold 0.751 [0.740, 0.760] against 0.576 [0.560, 0.590]" in words(*accuracy)


def test_the_baseline_is_the_first_sft_row() -> None:
    control = replace(SFT, method="more SFT (control)")
    assert baseline([BEST_OF, SFT, control, LEASHED]) is SFT
    assert baseline([LEASHED]) is None
