"""Preference losses: the objective solved in closed form and fitted to pairs.

The optimum of E[r] − β·KL is π* ∝ π_ref e^(r/β), so that β log π/π_ref *is* the reward up to a constant of
the prompt. With h = log π/π_ref summed over a completion, Δ = h_w − h_l is the implicit margin, and a loss is
a link on it (margin, divergence), on each side of it (pointwise), on the update's margins together (batchwise),
or on the likelihoods themselves (likelihood). Each is a function of `Pairs`; see there what it may have besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from klimb import metrics
from klimb.metrics import Metrics
from klimb.objective.aggregate import pair_mean
from klimb.objective.preference.batchwise import aot, aot_unpaired, beta_dpo, wpo
from klimb.objective.preference.divergence import fdpo_alpha, fdpo_js, fdpo_kl
from klimb.objective.preference.likelihood import alphapo, chosen_nll, cpo, orpo, rpo, simpo, tpo, tpo_l
from klimb.objective.preference.margin import (
    cdpo,
    discopop,
    dpo,
    dpo_norm,
    dpo_shift,
    dpop,
    exo,
    hinge,
    ipo,
    ipo_average,
    ld_dpo,
    robust,
    step_dpo,
)
from klimb.objective.preference.mixture import Mixed
from klimb.objective.preference.pairs import (
    Completions,
    Needs,
    Page,
    Pairs,
    PreferenceLoss,
    needs_of,
    statistics_of,
)
from klimb.objective.preference.pointwise import apo_down, apo_zero, bco, bco_pair, kto, nca, sppo_hard
from klimb.objective.spec import parse_value

_ROWS = (
    dpo, cdpo, robust, ipo, ipo_average, hinge, exo, nca, sppo_hard, bco_pair, bco, apo_zero, apo_down, aot,
    aot_unpaired, discopop, fdpo_kl, fdpo_js, fdpo_alpha, ld_dpo, wpo, dpo_norm, rpo, kto, orpo, cpo, simpo, alphapo,
    tpo, tpo_l, beta_dpo, dpo_shift, dpop, step_dpo, chosen_nll,
)  # fmt: skip
PREFERENCE_LOSSES: Mapping[str, Any] = {
    **{row.__name__: row for row in _ROWS},
    "mpo": Mixed(((0.8, dpo()), (0.2, bco_pair()), (1.0, chosen_nll()))),
}
"""The losses by name."""


def parse_preference(spec: str | Mapping[str, Any] | PreferenceLoss) -> PreferenceLoss:
    """``dpo``, ``{dpo: 0.05}``, ``{name: cdpo, epsilon: 0.2}``, ``file.py:NAME``, or the loss itself.

    Several with weights: ``{mix: {dpo: 0.8, bco_pair: {weight: 0.2, beta: 0.05}}}``. Errors: ValueError.
    """
    if isinstance(spec, Mapping) and "name" in spec:
        changes = {key: value for key, value in spec.items() if key != "name"}
        spec = {spec["name"]: changes} if changes else spec["name"]
    if isinstance(spec, Mapping) and list(spec) == ["mix"]:
        return Mixed(tuple(_weighted(name, part) for name, part in _parts_of(spec["mix"]).items()))
    loss: PreferenceLoss = parse_value("loss", spec, PREFERENCE_LOSSES)
    return loss


def _parts_of(mix: Any) -> Mapping[str, Any]:
    if not isinstance(mix, Mapping):
        raise ValueError(f"loss.mix: expected names with weights, as {{dpo: 0.8, chosen_nll: 0.2}}, got {mix!r}.")
    return mix


def _weighted(name: str, part: Any) -> tuple[float, PreferenceLoss]:
    arguments = dict(part) if isinstance(part, Mapping) else {"weight": part}
    try:
        weight = float(arguments.pop("weight"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"loss.mix.{name}: it has no weight; write {{{name}: {{weight: 0.5, ...}}}}.") from None
    return weight, parse_preference({name: arguments} if arguments else name)


def known_start(loss: PreferenceLoss) -> float | None:
    """An update's mean loss while π = π_ref: DPO ln 2, IPO 1/(4β²). A run begins there. None: it depends on the data.

    Found on two made-up updates whose log-probs, lengths and shares of labels differ.
    """
    needs = needs_of(loss)
    if not needs.reference:
        return None
    found = []
    for seed, (wins, losses) in enumerate([(2, 4), (4, 2)] if needs.data == "labels" else [(3, 3), (4, 4)]):
        draw = torch.Generator().manual_seed(seed)

        def side(count: int, draw: torch.Generator = draw) -> Completions:
            logps = -torch.rand(count, 5, generator=draw, dtype=torch.float64)
            lengths = torch.randint(1, 6, (count, 1), generator=draw)
            return Completions(logps, logps, torch.arange(5) < lengths, 1.5 * logps)

        pairs = Pairs(side(wins), side(losses), side(wins), torch.zeros(2, dtype=torch.float64))
        given, _ = statistics_of(loss, pairs, {})
        found.append(float(loss(Pairs(pairs.chosen, pairs.rejected, pairs.gold, None, given)).mean()))
    return found[0] if abs(found[0] - found[1]) < 1e-9 * max(abs(found[0]), 1.0) else None


def preference_loss(loss: PreferenceLoss, pairs: Pairs, units: int) -> tuple[Tensor, Metrics]:
    """Loss over a part of an update of `units` pairs (with labels: completions) in all."""
    per_unit = loss(pairs)
    return pair_mean(per_unit, units), {"loss": metrics.mean(per_unit), **_measured(loss, pairs)}


def _measured(loss: PreferenceLoss, pairs: Pairs) -> Metrics:
    """Where both sides stand, and how far they went from the reference where there is one.

    displaced: share of the pairs whose chosen completion fell below the reference while the margin grew (with labels:
    of the desirable completions that fell). Without a reference the margin is one of log-probs per token.
    """
    won, lost = pairs.chosen, pairs.rejected
    found = {
        "chosen_logps": metrics.mean(won.total()),
        "rejected_logps": metrics.mean(lost.total()),
        "chosen_logps_per_token": metrics.mean(won.average()),
    }
    compared = won.ref_logps is not None
    up, down = (won.log_ratio(), lost.log_ratio()) if compared else (won.average(), lost.average())
    if compared:
        found |= {"chosen_log_ratio": metrics.mean(up), "rejected_log_ratio": metrics.mean(down)}
    if needs_of(loss).data == "labels":
        right = torch.cat([up.sign(), -down.sign()])
        fell = up < 0
    else:
        margin = up - down
        found["margin"] = metrics.mean(margin)
        right, fell = margin.sign(), (up < 0) & (margin > 0)
    return {**found, "accuracy": metrics.mean((right + 1) / 2)} | (
        {"displaced": metrics.mean(fell.double())} if compared else {}
    )


__all__ = [
    "PREFERENCE_LOSSES", "Completions", "Mixed", "Needs", "Page", "Pairs", "PreferenceLoss", "known_start", "needs_of",
    "parse_preference", "preference_loss", "statistics_of",
]  # fmt: skip
