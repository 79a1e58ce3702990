"""Every preference loss once more, in plain numbers: lists of log-probs in, a mean loss out. No tensor, no import of
klimb: written from the formulas, to hold the library against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Said(NamedTuple):
    """A completion: log-probs of its tokens under the policy and the reference, and log Σ π² there."""

    logps: list[float]
    refs: list[float]
    collisions: list[float]

    @property
    def h(self) -> float:
        return sum(self.logps) - sum(self.refs)

    @property
    def total(self) -> float:
        return sum(self.logps)

    @property
    def length(self) -> int:
        return len(self.logps)

    @property
    def average(self) -> float:
        return self.total / self.length


class World(NamedTuple):
    """won[i] was preferred to lost[i]; for losses of labels they are just two heaps. `fixed` is not differentiated."""

    won: list[Said]
    lost: list[Said]
    gold: list[Said]
    mismatched: list[float]
    fixed: dict[str, Any]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    """−log σ(−x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def pairwise(link: Callable[[Said, Said], float]) -> Callable[[World], float]:
    return lambda world: sum(link(w, r) for w, r in zip(world.won, world.lost)) / len(world.won)


def delta(w: Said, r: Said) -> float:
    return w.h - r.h


def entropic(q: float, epsilon: float) -> float:
    """KL of (q, 1 − q) to (1 − ε, ε)."""
    return q * math.log(q / (1 - epsilon)) + (1 - q) * math.log((1 - q) / epsilon)


def discopop(x: float, tau: float) -> float:
    m = sigmoid(x / tau)
    return (1 - m) * softplus(-x) + m * math.exp(-x)


def shared(side: Said, other: Said, alpha: float) -> float:
    n = min(side.length, other.length)
    each = [a - b for a, b in zip(side.logps, side.refs)]
    return sum(each[:n]) + alpha * sum(each[n:])


def aot(world: World, beta: float) -> float:
    own = sorted(w.total - r.total for w, r in zip(world.won, world.lost))
    reference = sorted(sum(w.refs) - sum(r.refs) for w, r in zip(world.won, world.lost))
    return sum(softplus(-beta * (a - b)) for a, b in zip(own, reference)) / len(own)


def aot_unpaired(world: World, beta: float) -> float:
    couples = zip(sorted(w.h for w in world.won), sorted(r.h for r in world.lost))
    return sum(softplus(-beta * (a - b)) for a, b in couples) / len(world.won)


def weight(side: Said) -> float:
    return math.exp(sum(a - c for a, c in zip(side.logps, side.collisions)) / side.length)


def labelled(good: Callable[[float], float], bad: Callable[[float], float], world: World) -> float:
    terms = [good(w.h) for w in world.won] + [bad(r.h) for r in world.lost]
    return sum(terms) / len(terms)


def log_odds(average: float) -> float:
    p = math.exp(average)
    return math.log(p / (1 - p))


def power(average: float, alpha: float) -> float:
    return (1 - math.exp(average) ** -alpha) / alpha


def beta_dpo(world: World, gain: float) -> float:
    """`fixed`: kept, the places that were drawn; mean, the running mean of Δ."""
    kept = [delta(world.won[i], world.lost[i]) for i in world.fixed["kept"]]
    return sum(softplus(-world.fixed["beta"] * d) for d in kept) / len(kept)


LOSSES: dict[str, Callable[[World], float]] = {
    "dpo": pairwise(lambda w, r: softplus(-0.1 * delta(w, r))),
    "step_dpo": pairwise(lambda w, r: softplus(-0.5 * delta(w, r))),
    "cdpo": pairwise(lambda w, r: 0.9 * softplus(-0.1 * delta(w, r)) + 0.1 * softplus(0.1 * delta(w, r))),
    "robust": pairwise(lambda w, r: (0.9 * softplus(-0.1 * delta(w, r)) - 0.1 * softplus(0.1 * delta(w, r))) / 0.8),
    "ipo": pairwise(lambda w, r: (delta(w, r) - 5) ** 2),
    "ipo_average": pairwise(lambda w, r: (w.h / w.length - r.h / r.length - 5) ** 2),
    "dpo_norm": pairwise(lambda w, r: softplus(-5 * (w.h / w.length - r.h / r.length))),
    "hinge": pairwise(lambda w, r: max(0.0, 1 - 0.1 * delta(w, r))),
    "exo": pairwise(lambda w, r: entropic(sigmoid(0.1 * delta(w, r)), 1e-3)),
    "discopop": pairwise(lambda w, r: discopop(0.1 * delta(w, r), 0.05)),
    "dpo_shift": pairwise(lambda w, r: softplus(-0.1 * (w.h - 0.95 * r.h))),
    "dpop": pairwise(lambda w, r: softplus(-0.3 * (delta(w, r) - 50 * max(0.0, -w.h)))),
    "ld_dpo": pairwise(lambda w, r: softplus(-0.1 * (shared(w, r, 0.5) - shared(r, w, 0.5)))),
    "fdpo_kl": pairwise(lambda w, r: softplus(-0.1 * (math.exp(-r.h) - math.exp(-w.h)))),
    "fdpo_js": pairwise(
        lambda w, r: softplus(-0.1 * (math.log(2 / (1 + math.exp(-w.h))) - math.log(2 / (1 + math.exp(-r.h)))))
    ),
    "fdpo_alpha": pairwise(lambda w, r: softplus(-0.1 * -2 * (math.exp(-w.h / 2) - math.exp(-r.h / 2)))),
    "nca": pairwise(lambda w, r: softplus(-0.1 * w.h) + 0.5 * softplus(0.1 * w.h) + 0.5 * softplus(0.1 * r.h)),
    "sppo_hard": pairwise(lambda w, r: (w.h - 5) ** 2 + (r.h + 5) ** 2),
    "bco_pair": pairwise(lambda w, r: softplus(-0.1 * w.h) + softplus(0.1 * r.h)),
    "apo_zero": pairwise(lambda w, r: 1 - sigmoid(0.1 * w.h) + sigmoid(0.1 * r.h)),
    "apo_down": pairwise(lambda w, r: sigmoid(0.1 * w.h) + 1 - sigmoid(0.1 * delta(w, r))),
    "aot": lambda world: aot(world, 0.1),
    "aot_unpaired": lambda world: aot_unpaired(world, 0.1),
    "wpo": lambda world: sum(
        u * softplus(-0.1 * delta(w, r)) for u, w, r in zip(world.fixed["weights"], world.won, world.lost)
    ) / len(world.won),
    "beta_dpo": lambda world: beta_dpo(world, 0.6),
    "bco": lambda world: labelled(
        lambda h: softplus(-(0.1 * h - world.fixed["shift"])), lambda h: softplus(0.1 * h - world.fixed["shift"]), world
    ),
    "kto": lambda world: labelled(
        lambda h: 1 - sigmoid(0.1 * (h - world.fixed["z"])), lambda h: 1 - sigmoid(0.1 * (world.fixed["z"] - h)), world
    ),
    "chosen_nll": pairwise(lambda w, r: -w.average),
    "rpo": pairwise(lambda w, r: softplus(-0.1 * delta(w, r)) - w.average),
    "orpo": pairwise(lambda w, r: -w.average + 0.1 * softplus(-(log_odds(w.average) - log_odds(r.average)))),
    "cpo": pairwise(lambda w, r: softplus(-0.1 * (w.total - r.total)) - w.average),
    "simpo": pairwise(lambda w, r: softplus(1.0 - 2 * (w.average - r.average))),
    "alphapo": pairwise(lambda w, r: softplus(0.1 - 2.5 * (power(w.average, 0.25) - power(r.average, 0.25)))),
    "tpo": lambda world: sum(
        softplus(-0.01 * (w.total - r.total)) - g.average for w, r, g in zip(world.won, world.lost, world.gold)
    ) / len(world.won),
    "tpo_l": lambda world: sum(
        softplus(0.5 - 0.01 * (w.average - r.average)) - g.average
        for w, r, g in zip(world.won, world.lost, world.gold)
    ) / len(world.won),
    "mpo": pairwise(
        lambda w, r: 0.8 * softplus(-0.1 * delta(w, r)) + 0.2 * (softplus(-0.1 * w.h) + softplus(0.1 * r.h)) - w.average
    ),
}  # fmt: skip
"""At the defaults."""


def fixed(name: str, world: World) -> dict[str, Any]:
    """What is taken over the whole update and not differentiated, at these numbers."""
    if name == "wpo":
        return {"weights": [weight(w) * weight(r) for w, r in zip(world.won, world.lost)]}
    if name == "kto":
        return {"z": max(0.0, sum(world.mismatched) / len(world.mismatched))}
    if name == "bco":
        means = [sum(0.1 * side.h for side in heap) / len(heap) for heap in (world.won, world.lost)]
        return {"shift": sum(means) / 2}
    return {}
