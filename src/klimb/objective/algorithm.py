"""An algorithm is one frozen value, a point on a few independent axes.

score − β·KL (reward) → advantage → normalise → surrogate × importance + β·KL (loss) → aggregate
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from klimb.objective.advantage import Advantage, Draws, Normalise, preferred
from klimb.objective.aggregate import Aggregate, sequence_sum
from klimb.objective.critic import Critic
from klimb.objective.entropy import adaptive_entropy
from klimb.objective.importance import Importance
from klimb.objective.kl import KL, NO_KL, k2
from klimb.objective.reference import moving
from klimb.objective.sampling import Overlong, Sampling, Weighting, length_penalty, skip_solved, soft_overlong
from klimb.objective.surrogate import Surrogate, reinforce
from klimb.objective.tokens import TokenFilter, imitate_correct


class Needs(NamedTuple):
    """What has to be computed for an algorithm besides the policy's log-probs."""

    ref: bool
    critic: bool
    old_logps: bool
    entropy: bool
    draws: Draws | None = None
    parts: bool = False
    collisions: bool = False


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One way to climb E[r] − β · KL(π ‖ π_ref) on the policy's own samples. Call `resolve` before use."""

    name: str
    advantage: Advantage
    surrogate: Surrogate
    aggregate: Aggregate
    kl: KL = NO_KL
    normalise: Normalise | None = None
    critic: Critic | None = None
    sampling: Sampling | None = None
    overlong: Overlong | None = None
    importance: Importance | None = None
    weighting: Weighting | None = None
    token_filter: TokenFilter | None = None
    imitation: imitate_correct | None = None
    reference: moving | None = None
    curriculum: skip_solved | None = None
    entropy_bonus: float | adaptive_entropy = 0.0
    """Coefficient of the policy's entropy in nats per token, added to what is maximised."""
    source: str = ""

    @property
    def needs(self) -> Needs:
        draws: Draws | None = getattr(self.advantage, "draws", None)
        return Needs(
            ref=self.kl.active or (draws is not None and (draws.of_reference or draws.mixture > 0)),
            critic=self.critic is not None,
            old_logps=self.surrogate is not reinforce or self.importance is not None,
            entropy=self.entropy_bonus != 0,
            draws=draws,
            parts=getattr(self.advantage, "needs_parts", False),
            collisions=getattr(self.advantage, "needs_collisions", False),
        )

    @property
    def regression(self) -> bool:
        """Is the loss (β log π/π_ref − A)² of whole completions, up to what has no gradient? Right on all samples,
        where A is a reward less a value: a preference over an opponent is not."""
        kl = self.kl
        if isinstance(self.advantage, preferred):
            return False
        squared = kl.in_loss and kl.level == "sequence" and kl.estimator is k2
        return squared and self.surrogate is reinforce and isinstance(self.aggregate, sequence_sum)

    def resolve(self, *, max_length: int) -> Algorithm:
        """Fill the constants of the run. max_length: the most tokens that a completion may have."""
        aggregate, overlong = self.aggregate, self.overlong
        if isinstance(aggregate, sequence_sum) and aggregate.constant is None:
            aggregate = sequence_sum(float(max_length))
        if isinstance(overlong, soft_overlong | length_penalty) and overlong.max_length is None:
            overlong = replace(overlong, max_length=max_length)
        return replace(self, aggregate=aggregate, overlong=overlong)
