"""How far a judge agrees with people: plain numbers, no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

_Z = 1.959964  # 97.5 % point of the normal distribution


def agreement(people: Sequence[str], judge: Sequence[str]) -> dict[str, Any]:
    """Two labels for each pair, "a" or "b", of the judge also "tie". accuracy: of the pairs that the judge decided,
    the share that it decided as people did, with Wilson's interval; kappa: of all pairs (Cohen 1960), ties being a
    third label, with the normal interval of its large-sample error for a fixed chance agreement. None where undefined.
    """
    pairs = [*zip(people, judge, strict=True)]
    decided = [(a, b) for a, b in pairs if b != "tie"]
    found: dict[str, Any] = {"pairs": len(pairs), "decided": len(decided)}
    if decided:
        right = sum(a == b for a, b in decided)
        low, high = wilson(right, len(decided))
        found |= {"accuracy": right / len(decided), "accuracy_low": low, "accuracy_high": high}
    return found | _kappa(pairs)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), which stays within [0, 1] also at its ends."""
    share, z2 = successes / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _kappa(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    n = len(pairs)
    if not n:
        return {}
    observed = sum(a == b for a, b in pairs) / n
    firsts, seconds = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(firsts[label] * seconds[label] for label in firsts) / n**2
    if chance == 1.0:
        return {}
    kappa = (observed - chance) / (1 - chance)
    half = _Z * math.sqrt(observed * (1 - observed) / n) / (1 - chance)
    return {"kappa": kappa, "kappa_low": kappa - half, "kappa_high": kappa + half}
