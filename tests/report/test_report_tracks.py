"""Smoothing, thinning and peaks against values that can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from klimb.report.charts import ticks
from klimb.report.load import Run
from klimb.report.tracks import BUDGET, moving_mean, panels_of, peaks, tracks_of, trend


def run(metrics: list[dict[str, float]], method: str = "GRPO", stage: str = "rl") -> Run:
    return Run(method, stage, method, None, {}, metrics)


def test_moving_mean_is_centred_and_shrinks_at_the_ends() -> None:
    assert moving_mean([0, 3, 6, 9], window=3) == [1.5, 3, 6, 7.5]
    assert moving_mean([1, None, 3], window=3) == [1, None, 3]
    assert moving_mean([]) == []


def test_peak_is_of_the_moving_mean_not_of_a_spike() -> None:
    # A lone spike of 5 in nine zeros is worth 5/9; the plateau of ones later is the peak.
    gold = [0.0] * 5 + [5.0] + [0.0] * 10 + [1.0] * 10
    metrics = [{"step": float(i), "gold/mean": value, "kl": float(i)} for i, value in enumerate(gold)]
    value, step, kl = peaks([run(metrics)])["GRPO"]
    assert value == 1.0
    assert step >= 20
    assert kl == pytest.approx(step, abs=2)  # the window shrinks at the end, which shifts its mean by at most 2


def test_two_runs_of_a_method_have_no_single_peak() -> None:
    metrics = [{"step": 1.0, "gold/mean": 1.0}]
    assert peaks([run(metrics), run(metrics)]) == {}


def test_trend_is_first_and_last_nine() -> None:
    metrics = [{"step": float(i), "loss": float(i)} for i in range(30)]
    assert trend(run(metrics), "loss") == (4.0, 25.0)
    assert trend(run(metrics[:17]), "loss") is None


def test_seeds_give_raw_lines_and_their_mean_as_far_as_all_have_come() -> None:
    short = run([{"step": float(i), "kl": 1.0} for i in range(1, 4)])
    long = run([{"step": float(i), "kl": 3.0, "time/step": 2.0} for i in range(1, 6)])
    panels = panels_of("rl", [short, long])
    tracks, stride = tracks_of([short, long], panels, {"GRPO": 2})
    assert [panel.title for panel in panels] == ["KL to the reference"]
    assert [(track.raw, len(track.x["step"])) for track in tracks] == [(True, 3), (True, 5), (False, 3)]
    assert tracks[-1].values["kl"] == [2.0, 2.0, 2.0]
    assert tracks[1].x["seconds"] == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert tracks[0].x["seconds"] == [None] * 3
    assert stride == 1


def test_long_runs_are_thinned_but_keep_their_end() -> None:
    steps = 2 * BUDGET
    long = run([{"step": float(i), "kl": float(i)} for i in range(steps)])
    tracks, stride = tracks_of([long], panels_of("rl", [long]), {"GRPO": 2})
    assert stride == 4
    for track in tracks:
        assert len(track.x["step"]) <= BUDGET // 2 + 1
        assert track.x["step"][-1] == steps - 1


def test_evaluations_are_not_smoothed() -> None:
    metrics: list[dict[str, float]] = [{"step": float(i), "loss": 1.0} for i in range(10)]
    metrics[4]["eval/loss"], metrics[9]["eval/loss"] = 5.0, 1.0
    sft = run(metrics, "SFT", "sft")
    tracks, _ = tracks_of([sft], panels_of("sft", [sft]), {"SFT": 0})
    assert [v for v in tracks[-1].values["eval/loss"] if v is not None] == [5.0, 1.0]


def test_reward_components_get_panels_only_beside_others() -> None:
    both = run([{"step": 1.0, "reward/mean": 1.0, "reward/std": 0.1, "reward/length": 0.5, "reward/exact": 0.5}])
    assert [p.title for p in panels_of("rl", [both])] == ["Reward (proxy)", "Reward: exact", "Reward: length"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-4.2, 2.9), (0, 57), (0.003, 0.0031), (-1e6, 1e6)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * (high - low) <= value <= high + 1e-9 * (high - low) for value in found)
    assert len({f"{b - a:.6g}" for a, b in pairwise(found)}) == 1


def test_rows_without_a_score_get_a_panel_where_there_were_some() -> None:
    counts = {"verdict/ok": 3.0, "verdict/error": 0.0, "verdict/timeout": 0.0, "verdict/gate/abstain": 0.0}
    both = run([{"step": 1.0, **counts}, {"step": 2.0, **counts, "verdict/timeout": 2.0, "verdict/gate/abstain": 1.0}])
    assert [p.title for p in panels_of("rl", [both])] == ["Unscored: gate/abstain", "Unscored: timeout"]
