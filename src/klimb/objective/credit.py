"""Credit: scores of a whole update → what each token deserves.

score on the last token, − β·KL on every token where the KL enters the reward → advantage → normalisation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klimb import metrics
from klimb.metrics import Metrics
from klimb.objective.advantage import gae, prompt_value
from klimb.objective.algorithm import Algorithm
from klimb.objective.critic import explained_variance
from klimb.objective.grouped import Rewards, has_variance, last_token
from klimb.objective.kl import State
from klimb.objective.sampling import Weighting


@dataclass(frozen=True)
class Credit:
    """advantages [B, T] float64, zero where not masked; returns [B, T], the critic's targets, if it has one.

    state belongs to the *next* update; `policy_loss` of this one takes the state that `assign_credit` was
    given.
    """

    advantages: Tensor
    returns: Tensor | None
    metrics: Metrics
    state: dict[str, Tensor]


def assign_credit(
    algorithm: Algorithm,
    *,
    scores: Tensor,
    mask: Tensor,
    group: Tensor,
    logps: Tensor,
    ref_logps: Tensor | None = None,
    values: Tensor | None = None,
    interrupted: Tensor | None = None,
    parts: Tensor | None = None,
    part_weights: Tensor | None = None,
    baseline: Tensor | None = None,
    collisions: Tensor | None = None,
    step_rewards: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> Credit:
    """Advantages of one whole update (all ranks), before it is split.

    scores [B]; mask [B, T] left aligned; group [B]; logps (as sampled), ref_logps, values [B, T]; interrupted
    [B] bool marks samples without a score whose end is bootstrapped (with `gae` only); parts [B, K] of a summed
    score with part_weights [K], baseline [B] or [B, N], collisions [B, T]: see `Rewards`. step_rewards [B, T]: what of
    the score is paid at its own token instead of the last one. A sample without a policy token takes
    part in nothing and gets zeros. Raises ValueError: a score is not finite, or an input that the algorithm needs is
    missing.
    """
    state = dict(state or {})
    rows = mask.any(dim=1).nonzero().squeeze(1)
    if len(rows) == 0:
        empty = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        return Credit(empty, None if values is None else empty, {}, state)
    if len(rows) < len(mask):
        optional = {"ref_logps": ref_logps, "values": values, "interrupted": interrupted, "parts": parts,
                    "baseline": baseline, "collisions": collisions, "step_rewards": step_rewards}  # fmt: skip
        present = assign_credit(
            algorithm,
            scores=scores[rows],
            mask=mask[rows],
            group=group[rows],
            logps=logps[rows],
            part_weights=part_weights,
            state=state,
            **{name: column[rows] for name, column in optional.items() if column is not None},
        )
        return _widen(present, rows, len(mask))

    _check(algorithm, scores, ref_logps, interrupted)
    log_ratio = None if ref_logps is None else torch.where(mask, logps.double() - ref_logps.double(), 0.0)
    rewards = Rewards(
        _token_rewards(algorithm, scores, mask, log_ratio, interrupted, step_rewards, state),
        mask,
        group,
        values,
        interrupted,
        state,
        parts=parts,
        part_weights=part_weights,
        baseline=baseline,
        leash=_leash(algorithm, log_ratio, state),
        logps=logps,
        collisions=collisions,
    )
    advantages = _per_token(algorithm.advantage(rewards), mask)
    returns = None if values is None else _targets(algorithm, rewards, advantages, values)
    if algorithm.normalise is not None:
        advantages = algorithm.normalise(advantages, mask)
    if algorithm.weighting is not None:
        advantages = advantages * _weights(algorithm.weighting, scores.double(), interrupted)[:, None]
    return Credit(
        advantages,
        returns,
        _report(algorithm, scores, rewards, log_ratio, advantages, returns),
        state | _next_state(algorithm, rewards, log_ratio),
    )


def _token_rewards(
    algorithm: Algorithm,
    scores: Tensor,
    mask: Tensor,
    log_ratio: Tensor | None,
    interrupted: Tensor | None,
    step_rewards: Tensor | None,
    state: State,
) -> Tensor:
    """[B, T] float64: the score (less what its steps are paid) on the last policy token, less β·KL on each if the KL
    enters the reward."""
    final = scores.double()
    if algorithm.overlong is not None:
        final = final + algorithm.overlong(mask.sum(dim=1))
    if step_rewards is not None:
        step_rewards = torch.where(mask, step_rewards.double(), 0.0)
        final = final - step_rewards.sum(dim=1)
    if interrupted is not None:
        final = torch.where(interrupted, 0.0, final)
    rewards = torch.where(last_token(mask), final[:, None], 0.0)
    if step_rewards is not None:
        rewards = rewards + step_rewards
    if algorithm.kl.in_reward and log_ratio is not None:
        penalty = algorithm.kl.penalty(log_ratio, mask)
        rewards = rewards - torch.where(mask, algorithm.kl.coefficient(state) * penalty, 0.0)
    return rewards


def _per_token(advantages: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, advantages[:, None] if advantages.ndim == 1 else advantages, 0.0)


def _targets(algorithm: Algorithm, rewards: Rewards, advantages: Tensor, values: Tensor) -> Tensor:
    """What the critic learns, [B, T]: advantage + value, at the critic's own λ where it has one."""
    advantage, critic = algorithm.advantage, algorithm.critic
    own: Callable[[Rewards], Tensor] | None = getattr(advantage, "targets", None)
    if own is not None:
        return own(rewards)
    if critic is not None and critic.lam is not None and isinstance(advantage, gae):
        advantages = _per_token(replace(advantage, lam=critic.lam, alpha=None)(rewards), rewards.mask)
    return torch.where(rewards.mask, advantages + values.double(), 0.0)


def _leash(algorithm: Algorithm, log_ratio: Tensor | None, state: State) -> Tensor | None:
    if log_ratio is None or not algorithm.regression:
        return None
    return algorithm.kl.coefficient(state) * log_ratio.sum(dim=1)


def _next_state(algorithm: Algorithm, rewards: Rewards, log_ratio: Tensor | None) -> dict[str, Tensor]:
    following = getattr(algorithm.advantage, "next_state", None)
    state: dict[str, Tensor] = following(rewards) if following is not None else {}
    if log_ratio is not None:
        state |= algorithm.kl.next_state(rewards.state, log_ratio.sum(dim=1).mean())
    return state


def _report(
    algorithm: Algorithm,
    scores: Tensor,
    rewards: Rewards,
    log_ratio: Tensor | None,
    advantages: Tensor,
    returns: Tensor | None,
) -> Metrics:
    mask, group = rewards.mask, rewards.group
    scored = scores if rewards.interrupted is None else scores[~rewards.interrupted]
    found = {
        "reward/mean": metrics.mean(scored),
        "reward/std": metrics.ratio(scored.double().std(correction=0) if len(scored) else 0.0, 1.0),
        "advantage/std": metrics.ratio(advantages[mask].std(correction=0), 1.0),
    }
    groups = len(group.unique())
    if groups < len(group):
        flat = len(group[~has_variance(rewards.returns, group)].unique())
        found["groups/no_variance"] = metrics.ratio(flat, groups)
    if log_ratio is not None:
        found["kl"] = metrics.mean(log_ratio.sum(dim=1))
        found["kl_per_token"] = metrics.mean(log_ratio, mask)
    if algorithm.kl.active:
        found["beta"] = metrics.ratio(algorithm.kl.coefficient(rewards.state), 1.0)
    if returns is not None and rewards.values is not None:
        found["critic/explained_variance"] = explained_variance(rewards.values, returns, mask)
    return found


def _weights(weighting: Weighting, scores: Tensor, interrupted: Tensor | None) -> Tensor:
    """[B], 1 for samples without a score: nothing can be said of them."""
    if interrupted is None:
        return weighting(scores)
    scored = (~interrupted).nonzero().squeeze(1)
    weights = torch.ones_like(scores)
    return weights.index_copy(0, scored, weighting(scores[scored])) if len(scored) else weights


def _check(algorithm: Algorithm, scores: Tensor, ref_logps: Tensor | None, interrupted: Tensor | None) -> None:
    name = algorithm.name
    if algorithm.kl.active and ref_logps is None:
        raise ValueError(f"{name}: its KL needs ref_logps and none were given; compute them, or set kl to none.")
    own = algorithm.advantage
    bootstraps = getattr(own, "needs_values", False) and not isinstance(own, prompt_value)
    if interrupted is not None and bool(interrupted.any()) and not bootstraps:
        raise ValueError(f"{name}: only values can stand in for the score of an interrupted sample; use advantage gae.")
    bad = ~scores.isfinite() if interrupted is None else ~scores.isfinite() & ~interrupted
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}: the score of sample {row} is {float(scores[row])}; leave unscored samples out.")


def _widen(credit: Credit, rows: Tensor, samples: int) -> Credit:
    """Zeros for the samples that took no part."""

    def widen(part: Tensor) -> Tensor:
        return part.new_zeros(samples, part.shape[1]).index_copy(0, rows, part)

    returns = None if credit.returns is None else widen(credit.returns)
    return Credit(widen(credit.advantages), returns, credit.metrics, credit.state)
