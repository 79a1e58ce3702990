"""Several preference losses in one, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.kl import State
from klimb.objective.preference.pairs import Needs, Page, Pairs, PreferenceLoss, Statistics, needs_of, statistics_of


@dataclass(frozen=True)
class Mixed:
    """Σ weight · loss. All of them have to take the same data."""

    parts: tuple[tuple[float, PreferenceLoss], ...]
    page: ClassVar[Page] = Page(
        "Σ_k weight_k · loss_k",
        "mpo: arXiv 2411.10442 (0.8 dpo, 0.2 bco_pair, 1.0 chosen_nll; its BCO has a running shift)",
        "terms of different scale: look at each one's size before its weight",
        "a single part: that loss",
    )

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("loss.mix: nothing to mix; write {mix: {dpo: 0.8, chosen_nll: 0.2}}.")
        if bad := [f"{weight:g}" for weight, _ in self.parts if not 0 <= weight < math.inf]:
            raise ValueError(f"loss.mix: {', '.join(bad)}: a weight is a finite number of at least 0.")
        kinds = sorted({needs_of(loss).data for _, loss in self.parts})
        if len(kinds) > 1:
            raise ValueError(f"loss.mix: its parts take different data ({', '.join(kinds)}); mix losses of one kind.")

    @property
    def needs(self) -> Needs:
        each = [needs_of(loss) for _, loss in self.parts]
        return Needs(
            any(n.reference for n in each), each[0].data, any(n.mismatched for n in each),
            any(n.collisions for n in each),
        )  # fmt: skip

    def statistics(self, whole: Pairs, state: State, seed: int) -> Statistics:
        given: dict[str, Tensor] = {}
        after: dict[str, Tensor] = {}
        for number, (_, loss) in enumerate(self.parts):
            found, kept = statistics_of(loss, whole, _of_part(state, number), seed)
            given |= {f"{number}.{name}": value for name, value in found.items()}
            after |= {f"{number}.{name}": value for name, value in kept.items()}
        return given, after

    def __call__(self, pairs: Pairs) -> Tensor:
        return torch.stack(
            [
                weight * loss(replace(pairs, given=_of_part(pairs.given, number)))
                for number, (weight, loss) in enumerate(self.parts)
            ]
        ).sum(dim=0)


def _of_part(named: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
