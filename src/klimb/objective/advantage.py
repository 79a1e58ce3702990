"""Advantages: how much better than expected a completion (or a token) turned out.

An advantage is a pure function of the update's `Rewards`, to one number a sample [B] or a token [B, T]. What
it subtracts must not depend on the sample's own tokens, or the gradient points elsewhere; each says whether
that holds. One that remembers something between updates has ``next_state(rewards)`` besides, one whose critic learns
something else than advantage + value has ``targets(rewards)``, one that wants further samples of a prompt has `draws`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from klimb.objective.bounds import Bounded, Count, Positive, Share
from klimb.objective.group_advantage import (
    best_of_group,
    group_mean,
    group_mean_batch_std,
    group_mean_scaled_up,
    group_zscore,
    leave_one_out,
    leave_one_out_zscore,
    length_weighted_mean,
    optimal_token_baseline,
    over_mean,
    parts_zscore,
)
from klimb.objective.grouped import Rewards, discounted_sum, last_token

Advantage = Callable[[Rewards], Tensor]
"""Rewards → [B] or [B, T], float64."""


def no_baseline(rewards: Rewards) -> Tensor:
    """A = R. Unbiased, and as noisy as the score's distance from zero (Williams 1992)."""
    return rewards.returns


def batch_mean(rewards: Rewards) -> Tensor:
    """A = R − mean over the update. (B−1)/B of the true gradient: each sample is in its own baseline."""
    return rewards.returns - rewards.returns.mean()


@dataclass(frozen=True)
class running_mean(Bounded):
    """A = R − b, b ← decay · b + (1 − decay) · mean R: unbiased, since b stems from earlier updates alone.

    The moving-average baseline of arXiv 2402.14740 (its part on REINFORCE) as an exponential one. The first
    update has no past and uses its own mean. Degrades when prompts differ much in difficulty. Fails where the
    level of scores jumps: the baseline lags behind, and all samples are pushed the same way.
    """

    decay: Share = 0.9

    def __call__(self, rewards: Rewards) -> Tensor:
        return rewards.returns - self._baseline(rewards)

    def next_state(self, rewards: Rewards) -> dict[str, Tensor]:
        mean = rewards.returns.mean()
        return {"baseline": self.decay * self._baseline(rewards) + (1 - self.decay) * mean}

    def _baseline(self, rewards: Rewards) -> Tensor:
        return rewards.state.get("baseline", rewards.returns.mean())


@dataclass(frozen=True)
class Draws:
    """Further samples of each prompt, which a baseline is made of and nothing is learnt from.

    greedy: the likeliest token each time, else at the temperature of the run. of_reference: by π_ref instead of π, once
    for a prompt. mixture: π_ref's share in π^(1−share) π_ref^share, token by token, who then draws them.
    """

    samples: int
    greedy: bool = False
    of_reference: bool = False
    mixture: float = 0.0


@dataclass(frozen=True)
class greedy_baseline:
    """A = R − R(greedy completion of the prompt) (ReMax, arXiv 2310.10505). Unbiased; one more sample a prompt.

    Degrades where the greedy completion is not typical: too long, or a loop. Fails where the greedy completion
    scores otherwise than the samples do: all are pushed the same way.
    """

    draws: ClassVar[Draws] = Draws(1, greedy=True)

    def summary(self, scores: Tensor) -> Tensor:
        """Scores [N] of a prompt's draws → its baseline."""
        return scores.mean()

    def __call__(self, rewards: Rewards) -> Tensor:
        return rewards.returns - _given_baseline(rewards, "greedy_baseline")


@dataclass(frozen=True)
class optimal_value(Bounded):
    """A = R − V*, V* = β₁ log mean_j e^(R_j/β₁) over samples of π_ref (A*-PO, arXiv 2505.20686, its first stage).

    V* is that of the optimum at temperature β₁. On the policy's own samples it is a baseline and nothing else, so
    an error in it costs variance alone; learning from others' samples needs it exact, and β₁ = β of the loss. Few
    draws see no success on a hard prompt, then V* = 0. Fails off-policy unless V* is exact. Degrades with few
    draws: a hard prompt without a success has V* = 0.
    """

    beta: Positive = 0.5
    samples: Count = 8

    @property
    def draws(self) -> Draws:
        return Draws(self.samples, of_reference=True)

    def summary(self, scores: Tensor) -> Tensor:
        """Scores [N] of a prompt's draws → V*."""
        scores = scores.double()
        return self.beta * ((scores / self.beta).logsumexp(0) - torch.tensor(len(scores)).double().log())

    def __call__(self, rewards: Rewards) -> Tensor:
        return rewards.returns - _given_baseline(rewards, "optimal_value")


@dataclass(frozen=True)
class preferred(Bounded):
    """A = P(y ≻ y') − ½, P = σ(R − R'), y' ~ π^(1−m) π_ref^m by token (Nash-MD-PG, arXiv 2312.00886, section 7.2).

    Opponents y' are further completions of the prompt, drawn anew each step, and P is the mean over them: one would do,
    and all samples of a group share its luck. Subtracting ½ costs no bias. With −β log π/π_ref of the whole completion
    training rests where π ∝ π_ref e^(P(y ≻ π_mix)/β); were π_mix a mixture of whole completions, it would there be the
    Nash equilibrium of the preference game regularised by β/(1−m). P is of two scores, hence transitive, and σ is flat
    beyond a few units of the reward. Fails where scores are so close that every P is ½. Degrades to self-play at m = 0,
    to the best response to π_ref at m = 1.
    """

    mixture: Share = 0.5
    samples: Count = 8

    @property
    def draws(self) -> Draws:
        return Draws(self.samples, mixture=self.mixture)

    def summary(self, scores: Tensor) -> Tensor:
        """Scores [N] of a prompt's opponents, as many as are drawn: the first once more for one without a score."""
        return scores.repeat(self.samples)[: self.samples]

    def __call__(self, rewards: Rewards) -> Tensor:
        others = _given_baseline(rewards, "preferred").reshape(len(rewards.returns), -1)
        return (rewards.returns[:, None] - others).sigmoid().mean(dim=1) - 0.5


@dataclass(frozen=True)
class discounted_return(Bounded):
    """A_t = Σ_{k≥t} γ^(k−t) r_k: rewards to go, no baseline (REINFORCE++, arXiv 2501.03262), to be whitened.

    γ < 1 forgets a score at the end of a long completion, and shifts where training ends. Fails without
    whitening: nothing is subtracted, the level of the scores is noise. Degrades with γ < 1 on long completions.
    """

    gamma: Share = 1.0

    def __call__(self, rewards: Rewards) -> Tensor:
        return discounted_sum(rewards.per_token, self.gamma)


@dataclass(frozen=True)
class gae(Bounded):
    """δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (arXiv 1506.02438, equation 16) over policy tokens.

    A completion ends where its tokens end, also when it was cut by length: its score is its reward and V beyond
    is 0. An interrupted sample carries no score: it counts as ended just before its last token, whose V stands
    for all that would have come, and that token itself (its outcome is unknown) gets no advantage. Fails while
    the critic is bad: its errors are the policy's gradient (watch critic/explained_variance). Degrades to the
    return itself as λ → 1, to the critic's opinion as λ → 0.
    """

    gamma: Share = 1.0
    lam: Share = 0.95
    alpha: Positive | None = None
    """Where given, λ = 1 − 1/(alpha · |y|) of each sample's own length, at least 0 (VAPO, arXiv 2504.05118)."""
    needs_values: ClassVar[bool] = True

    def __call__(self, rewards: Rewards) -> Tensor:
        if rewards.values is None:
            raise ValueError("advantage gae: no values were given; it needs a critic, or use leave_one_out.")
        values = torch.where(rewards.mask, rewards.values.double(), 0.0)
        following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        delta = rewards.per_token + self.gamma * following - values
        if rewards.interrupted is not None:
            delta = torch.where(rewards.interrupted[:, None] & last_token(rewards.mask), 0.0, delta)
        if self.alpha is None:
            return discounted_sum(delta, self.gamma * self.lam)
        lam = (1 - 1 / (self.alpha * rewards.mask.sum(dim=1).double())).clamp(min=0)
        return discounted_sum(delta, self.gamma * lam)


@dataclass(frozen=True)
class prompt_value:
    """A = R − V(prompt), V before the first token (DRO, arXiv 2405.19107); V learns R − β · log π/π_ref.

    With the KL in the loss as k2 of the sequence this is the regression of β · log π/π_ref on R − V, which is
    right on anybody's samples. V of one state has to carry all: more variance than `gae`. Fails while V is bad:
    its error is a push on every token of the completion.
    """

    needs_values: ClassVar[bool] = True

    def __call__(self, rewards: Rewards) -> Tensor:
        if rewards.values is None:
            raise ValueError("advantage prompt_value: no values were given; it needs a critic, or use leave_one_out.")
        return rewards.returns - rewards.values.double()[:, 0]

    def targets(self, rewards: Rewards) -> Tensor:
        soft = rewards.returns if rewards.leash is None else rewards.returns - rewards.leash
        return torch.where(rewards.mask, soft[:, None], 0.0)


ADVANTAGES: Mapping[str, Advantage | type] = {
    "none": no_baseline,
    "batch_mean": batch_mean,
    "running_mean": running_mean,
    "group_mean": group_mean,
    "group_zscore": group_zscore,
    "group_mean_batch_std": group_mean_batch_std,
    "group_mean_scaled_up": group_mean_scaled_up,
    "length_weighted_mean": length_weighted_mean,
    "best_of_group": best_of_group,
    "over_mean": over_mean,
    "parts_zscore": parts_zscore,
    "leave_one_out": leave_one_out,
    "leave_one_out_zscore": leave_one_out_zscore,
    "optimal_token_baseline": optimal_token_baseline,
    "greedy_baseline": greedy_baseline,
    "optimal_value": optimal_value,
    "preferred": preferred,
    "discounted_return": discounted_return,
    "gae": gae,
    "prompt_value": prompt_value,
}


Normalise = Callable[[Tensor, Tensor], Tensor]
"""advantages, mask [B, T] → advantages [B, T], with statistics of the whole update."""


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the update's tokens (REINFORCE++, arXiv 2501.03262; PPO by custom).

    Takes the advantage of a group without variance away from zero, because it shifts every token alike.
    """
    tokens = advantages[mask]
    std, mean = torch.std_mean(tokens, correction=0)
    return torch.where(mask, (advantages - mean) / (std + 1e-8), 0.0)


NORMALISATIONS: Mapping[str, Normalise] = {"whiten": whiten}


def _given_baseline(rewards: Rewards, name: str) -> Tensor:
    if rewards.baseline is None:
        raise ValueError(f"advantage {name}: no baseline was given; draw its samples of each prompt first.")
    return rewards.baseline.double()
