"""How far a reward can be trusted: its accuracy and where it lies, its calibration, what else it follows. No torch.

A pair is known by its difference, the chosen reply's score minus the rejected one's: above 0 is right, 0 is half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_Z = 1.959964  # 97.5 % point of the normal distribution
_KS_5 = 1.358  # √(−½ ln(0.05 / 2)): Kolmogorov's 5 % point
RESAMPLES = 2000

Figures = dict[str, Any]
"""Numbers by name, as they stand in a result."""


def share(right: Sequence[float], name: str = "accuracy") -> Figures:
    """Mean of values in [0, 1] with the 95 % interval of Wilson's score, which holds for a few pairs, too."""
    n = len(right)
    if n == 0:
        return {name: None, f"{name}_low": None, f"{name}_high": None, "n": 0}
    p = math.fsum(right) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return {name: p, f"{name}_low": max(0.0, centre - half), f"{name}_high": min(1.0, centre + half), "n": n}


def in_order(differences: Sequence[float]) -> list[float]:
    """1 where the chosen reply scores higher, ½ at a tie, else 0."""
    return [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences]


def accuracy(differences: Sequence[float]) -> Figures:
    return share(in_order(differences))


def by_quantile(keys: Sequence[float], differences: Sequence[float], parts: int = 4) -> list[Figures]:
    """Accuracy in up to `parts` equal parts of the pairs, by rising key; equal keys are never parted.

    Each with the lowest and highest key in it, `from` and `to`.
    """
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    first: dict[float, int] = {}
    for place, i in enumerate(order):
        first.setdefault(keys[i], place)
    bins: dict[int, list[int]] = {}
    for i in order:
        bins.setdefault(first[keys[i]] * parts // len(keys), []).append(i)
    return [
        {"from": keys[inside[0]], "to": keys[inside[-1]], **accuracy([differences[i] for i in inside])}
        for inside in bins.values()
    ]


def by_value(values: Sequence[Any], differences: Sequence[float]) -> dict[str, Figures]:
    """Accuracy for each value of a column, such as the subset of a benchmark's pair."""
    found: dict[str, list[float]] = {}
    for value, difference in zip(values, differences, strict=True):
        found.setdefault(str(value), []).append(difference)
    return {value: accuracy(inside) for value, inside in sorted(found.items())}


def calibration(differences: Sequence[float], parts: int = 10) -> Figures:
    """Is a pair put in order with probability σ(|difference|) in order that often?

    differences: on the scale that Bradley–Terry was fitted on. `bins` are of equal width in [½, 1]; `ece` is
    Σ n_b/n · |accuracy_b − confidence_b| (expected calibration error; of few pairs too high), `overconfidence` the mean
    confidence less the accuracy.
    """
    confidence = [1 / (1 + math.exp(-min(abs(d), 700.0))) for d in differences]
    right = in_order(differences)
    bins: dict[int, list[int]] = {}
    for i, sure in enumerate(confidence):
        bins.setdefault(min(int((sure - 0.5) * 2 * parts), parts - 1), []).append(i)
    found = [
        {"confidence": math.fsum(confidence[i] for i in inside) / len(inside), **share([right[i] for i in inside])}
        for _, inside in sorted(bins.items())
    ]
    n = len(differences)
    return {
        "ece": math.fsum(each["n"] / n * abs(each["accuracy"] - each["confidence"]) for each in found),
        "overconfidence": math.fsum(confidence) / n - math.fsum(right) / n,
        "bins": found,
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None where one of them is constant."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return max(-1.0, min(1.0, float(a @ b) / size)) if size > 0 else None


def partial_correlation(x: Sequence[float], y: Sequence[float], given: Sequence[float]) -> float | None:
    """Pearson's r of what is left of x and y once `given` has explained its (linear) part of both."""
    xy, xz, yz = correlation(x, y), correlation(x, given), correlation(y, given)
    if xy is None or xz is None or yz is None or abs(xz) > 1 - 1e-12 or abs(yz) > 1 - 1e-12:
        return None
    return (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))


def agreement(one: Sequence[float], other: Sequence[float]) -> Figures:
    """How often two judges put a pair in the same order (where one sees a tie: half), and how alike their differences
    are."""
    same = [0.5 if (a == 0) != (b == 0) else float((a > 0) == (b > 0)) for a, b in zip(one, other, strict=True)]
    return {**share(same, "agreement"), "correlation": correlation(one, other)}


def detects(values: Sequence[float], wrong: Sequence[bool]) -> float | None:
    """Probability that a wrong pair has the higher value than a right one (area under the ROC curve; ties are half).

    None where all are right or all wrong.
    """
    high = np.asarray([v for v, w in zip(values, wrong, strict=True) if w])
    low = np.sort([v for v, w in zip(values, wrong, strict=True) if not w])
    if not (len(high) and len(low)):
        return None
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).mean() / 2 / len(low))


def gain(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Figures:
    """Mean of after − before over pairs of scores with its 95 % percentile interval from a bootstrap over the pairs.

    `flagged`: the whole interval lies above 0, so the change is paid for.
    """
    change = np.asarray(after, float) - np.asarray(before, float)
    drawn = np.random.default_rng(seed).integers(len(change), size=(RESAMPLES, len(change)))
    low, high = np.quantile(change[drawn].mean(axis=1), [0.025, 0.975])
    return {"gain": float(change.mean()), "gain_low": float(low), "gain_high": float(high), "n": len(change),
            "flagged": bool(low > 0)}  # fmt: skip


def drift(then: Sequence[float], now: Sequence[float], seed: int = 0) -> Figures:
    """How far one quantity has moved between two samples.

    `ks` is the two-sample Kolmogorov–Smirnov statistic, the largest distance of the two distribution functions, with a
    95 % percentile interval from a bootstrap of both samples; `flagged`: it is above what equal distributions give in
    one of twenty cases (asymptotic; with many ties in fewer). `shift`: of the mean, in standard deviations of `then`.
    """
    a, b = np.asarray(then, float), np.asarray(now, float)
    stream = np.random.default_rng(seed)
    drawn = [_ks(stream.choice(a, len(a)), stream.choice(b, len(b))) for _ in range(RESAMPLES // 10)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    std, distance = float(a.std(ddof=1)) if len(a) > 1 else 0.0, _ks(a, b)
    return {
        "then": float(a.mean()), "now": float(b.mean()), "shift": float(b.mean() - a.mean()) / std if std > 0 else None,
        "ks": distance, "ks_low": float(low), "ks_high": float(high), "n_then": len(a), "n_now": len(b),
        "flagged": distance > _KS_5 * math.sqrt((len(a) + len(b)) / (len(a) * len(b))),
    }  # fmt: skip


def _ks(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.sort(a), np.sort(b)
    at = np.concatenate([a, b])
    apart = np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)
    return float(np.abs(apart).max())
