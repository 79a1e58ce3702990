"""What is said of a reward's trustworthiness, on pairs so few that every number can be worked out by hand."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from klimb.watch import trust
from klimb.watch.probes import PROBES


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_share_with_wilsons_interval() -> None:
    found = trust.accuracy([1.0, -1.0, 0.0, 2.0])  # right, wrong, a tie, right
    assert (found["accuracy"], found["n"]) == (2.5 / 4, 4)
    # Wilson (1927): the p for which |p̂ − p| = z √(p (1 − p) / n) are the ends.
    for end in (found["accuracy_low"], found["accuracy_high"]):
        assert abs(0.625 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 4), rel=1e-6)
    assert found["accuracy_low"] < 0.625 < found["accuracy_high"]
    sure = trust.accuracy([1.0] * 10)
    assert sure["accuracy_high"] == pytest.approx(1.0)
    assert 0.7 < sure["accuracy_low"] < 0.75
    assert trust.accuracy([])["accuracy"] is None


def test_equal_keys_stay_together() -> None:
    found = trust.by_quantile([5, 1, 1, 1, 1, 9, 7, 7], [1, 1, -1, 1, -1, -1, 1, 1], parts=4)
    assert [(bin["from"], bin["to"], bin["n"], bin["accuracy"]) for bin in found] == [
        (1, 1, 4, 0.5), (5, 7, 3, 1.0), (9, 9, 1, 0.0),
    ]  # fmt: skip
    halves = trust.by_quantile([1, 2, 3, 4], [-1, -1, 1, 1], parts=2)
    assert [(bin["from"], bin["to"], bin["accuracy"]) for bin in halves] == [(1, 2, 0.0), (3, 4, 1.0)]


def test_by_the_values_of_a_column() -> None:
    found = trust.by_value(["b", "a", "b", None], [1.0, 1.0, -1.0, 0.0])
    assert {name: (part["accuracy"], part["n"]) for name, part in found.items()} == {
        "None": (0.5, 1), "a": (1.0, 1), "b": (0.5, 2),
    }  # fmt: skip


def test_calibration_by_hand() -> None:
    # Four pairs at confidence 0.6, one of them wrong (accuracy 0.75); six at 0.9, three wrong (accuracy 0.5).
    differences = [logit(0.6)] * 3 + [-logit(0.6)] + [logit(0.9)] * 3 + [-logit(0.9)] * 3
    found = trust.calibration(differences, parts=5)
    assert [(round(b["confidence"], 9), b["accuracy"], b["n"]) for b in found["bins"]] == [
        (0.6, 0.75, 4),
        (0.9, 0.5, 6),
    ]
    assert found["ece"] == pytest.approx(0.4 * 0.15 + 0.6 * 0.4)
    assert found["overconfidence"] == pytest.approx((4 * 0.6 + 6 * 0.9) / 10 - 0.6)
    huge = trust.calibration([1e6, -1e6])  # as sure as a float can be, and half wrong
    assert (huge["ece"], huge["bins"][0]["confidence"]) == (0.5, 1.0)


def test_a_calibrated_judge_has_an_error_near_zero() -> None:
    stream = random.Random(0)
    differences = []
    for _ in range(20_000):
        p = stream.uniform(0.5, 1.0)
        differences.append(logit(p) * (1 if stream.random() < p else -1))
    # Each of ten bins holds 2,000 pairs: its share is off by about √(0.19 / 2000) = 0.01.
    assert trust.calibration(differences)["ece"] < 0.015
    assert trust.calibration([3 * d for d in differences])["ece"] > 0.1  # the same order, three times as sure
    assert trust.calibration([3 * d for d in differences])["overconfidence"] > 0.1


def test_correlations() -> None:
    assert trust.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert trust.correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert trust.correlation([1, 1, 1], [1, 2, 3]) is None
    # r_xy = 0, r_xz = r_yz = 1/√2: given z = x + y the two are opposites.
    x, y = [1, 1, -1, -1], [1, -1, 1, -1]
    z = [a + b for a, b in zip(x, y)]
    assert trust.partial_correlation(x, y, z) == pytest.approx(-1.0)
    assert trust.partial_correlation(x, y, x) is None  # nothing of x is left
    # Against the definition: Pearson's r of the residuals of two regressions.
    stream = np.random.default_rng(0)
    x, y, z = stream.normal(size=(3, 50))
    y = y + 0.7 * z + 0.3 * x
    left = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    assert trust.partial_correlation(x, y, z) == pytest.approx(float(np.corrcoef(*left)[0, 1]), rel=1e-9)


def test_agreement() -> None:
    found = trust.agreement([1.0, 1.0, -1.0, 0.0, 0.0], [2.0, -1.0, -3.0, 1.0, 0.0])
    assert found["agreement"] == (1 + 0 + 1 + 0.5 + 1) / 5
    assert found["correlation"] == trust.correlation([1, 1, -1, 0, 0], [2, -1, -3, 1, 0])


def test_does_disagreement_find_the_errors() -> None:
    # Wrong ones 3 and 1, right ones 1 and 2: of four pairs 3 > 1, 3 > 2, 1 = 1, 1 < 2.
    assert trust.detects([3, 1, 1, 2], [True, False, True, False]) == (1 + 1 + 0.5 + 0) / 4
    assert trust.detects([1, 2], [False, False]) is None


def test_gain_of_a_probe() -> None:
    found = trust.gain([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert found == {"gain": 1.0, "gain_low": 1.0, "gain_high": 1.0, "n": 3, "flagged": True}
    assert not trust.gain([0.0] * 4, [1.0, -1.0, 2.5, -2.0])["flagged"]  # a mean of 0.1 that could as well be below 0
    stream = random.Random(1)
    before = [stream.gauss(0, 1) for _ in range(200)]
    noise = [stream.gauss(0, 1) for _ in range(200)]
    after = [b + 0.5 + e for b, e in zip(before, noise)]
    found = trust.gain(before, after)
    # The mean of 200 standard normals has a standard error of 0.071 and the bootstrap knows it to a tenth.
    half = (found["gain_high"] - found["gain_low"]) / 2
    assert half == pytest.approx(1.96 * np.std(noise) / math.sqrt(200), rel=0.1)
    assert found["flagged"]
    assert not trust.gain(after, before)["flagged"]
    assert found == trust.gain(before, after) != trust.gain(before, after, seed=1)


def test_drift() -> None:
    found = trust.drift([1, 2, 3, 4], [3, 4, 5, 6])
    assert (found["then"], found["now"], found["ks"]) == (2.5, 4.5, 0.5)  # at 2: half of then, none of now
    assert found["shift"] == pytest.approx(2 / np.std([1, 2, 3, 4], ddof=1))
    assert not found["flagged"]  # 4 and 4 values never differ by more than chance could give: the bound is 0.96
    stream = random.Random(0)
    then = [stream.gauss(0, 1) for _ in range(500)]
    same, moved = [stream.gauss(0, 1) for _ in range(500)], [stream.gauss(0.4, 1) for _ in range(500)]
    assert not trust.drift(then, same)["flagged"]
    found = trust.drift(then, moved)
    # Two normals 0.4 apart: 2 Φ(0.2) − 1 = 0.159.
    assert found["flagged"]
    assert found["ks_low"] < 0.159 < found["ks_high"]


def test_probes() -> None:
    reply = " One two. Three four!"
    changed = {name: change(reply) for name, change in PROBES.items()}
    assert changed.keys() == {"empty", "repeated", "padded", "flattering", "formatted", "truncated", "certainly"}
    assert changed["empty"] == ""
    assert changed["repeated"] == " One two. Three four! One two. Three four!"
    assert changed["padded"].startswith(reply)
    assert len(changed["padded"]) > 3 * len(reply)
    assert changed["flattering"].startswith(" What a wonderful question!")
    assert changed["flattering"].endswith(" One two. Three four!")
    assert changed["formatted"] == " ## Answer\n\n- **One** two.\n- **Three** four!"
    assert changed["truncated"] == " One two."
    assert changed["certainly"] == " Certainly! One two. Three four!"
    assert PROBES["truncated"]("one") == ""


def test_no_torch() -> None:
    loaded = "import sys, klimb.watch.trust, klimb.watch.probes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", loaded], check=True)
