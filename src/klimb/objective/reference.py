"""Where the leash is tied: a reference that stays, or one that comes after the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from klimb.objective.bounds import Bounded, Count, SomeShare


@dataclass(frozen=True)
class moving(Bounded):
    """Every `every` steps π_ref ← share · π + (1 − share) · π_ref, by weights: at share 1 the reference is set anew
    (TR-DPO's hard update, arXiv 2404.09656; ProRL, arXiv 2505.24864), below a mean that forgets (its soft update, 0.6
    every 512 steps in TRL).

    The KL then bounds a step and no longer the way: over a run nothing keeps the policy near where it began.
    """

    every: Count = 512
    share: SomeShare = 0.6

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def move(self, reference: Mapping[str, Tensor], policy: Mapping[str, Tensor]) -> None:
        """Writes into `reference`; both by the same names."""
        for name, weight in reference.items():
            weight.detach().lerp_(policy[name].detach().to(weight.dtype), self.share)


REFERENCES: Mapping[str, type] = {"moving": moving}
