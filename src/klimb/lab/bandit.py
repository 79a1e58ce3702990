"""The token bandit: a language of three tokens in which everything can be counted.

One prompt, tokens a, b and END, at most `max_length` of them: 31 completions at length 4. The policy is a
table of logits, one row for each prefix, so that it can be any distribution over completions, and expected
reward, KL, values, gradients and the optimum π* ∝ π_ref e^(r/β) are sums over 31 rows instead of estimates.
float64 throughout.

`expected_gradient` puts every possible group of completions, weighed by its probability, through the same
`assign_credit` and `policy_loss` that train language models: the exact expectation of what they do on
samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.batch import BatchTotals
from klimb.objective import Algorithm, Credit, assign_credit, critic_loss, policy_loss

VOCABULARY = 3
END = 2


@dataclass(frozen=True)
class TokenBandit:
    """S completions of at most T tokens over P prefixes.

    tokens, prefixes [S, T]: what is chosen, and in which row of the logits; mask [S, T]; rewards [S];
    ref_logits [P, 3].
    """

    tokens: Tensor
    prefixes: Tensor
    mask: Tensor
    rewards: Tensor
    ref_logits: Tensor

    @staticmethod
    def make(seed: int = 0, max_length: int = 4, spread: float = 1.0) -> TokenBandit:
        """Rewards are drawn from a standard normal, reference logits from one of the given spread."""
        bodies = [body for n in range(max_length + 1) for body in itertools.product(range(END), repeat=n)]
        finished = [(*body, END) for body in bodies if len(body) < max_length]
        cut = [body for body in bodies if len(body) == max_length]
        prefix_of = {body: i for i, body in enumerate(body for body in bodies if len(body) < max_length)}
        completions = finished + cut
        tokens = torch.zeros(len(completions), max_length, dtype=torch.long)
        prefixes, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for row, completion in enumerate(completions):
            for t, token in enumerate(completion):
                tokens[row, t], prefixes[row, t], mask[row, t] = token, prefix_of[completion[:t]], True
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.randn(len(completions), generator=generator, dtype=torch.float64)
        ref_logits = spread * torch.randn(len(prefix_of), VOCABULARY, generator=generator, dtype=torch.float64)
        return TokenBandit(tokens, prefixes, mask, rewards, ref_logits)

    def __len__(self) -> int:
        return len(self.tokens)

    def logps(self, logits: Tensor) -> Tensor:
        """Log-prob of every token of every completion, [S, T], zero where not masked."""
        logps = logits.log_softmax(dim=-1)[self.prefixes, self.tokens]
        return torch.where(self.mask, logps, 0.0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[S], summing to 1."""
        return self.logps(logits).sum(dim=1).exp()

    def log_ratios(self, logits: Tensor) -> Tensor:
        """log π/π_ref of every completion, [S]."""
        return (self.logps(logits) - self.logps(self.ref_logits)).sum(dim=1)

    def expected_reward(self, logits: Tensor) -> Tensor:
        return (self.probabilities(logits) * self.rewards).sum()

    def kl(self, logits: Tensor) -> Tensor:
        """KL(π ‖ π_ref) over completions, in nats."""
        return (self.probabilities(logits) * self.log_ratios(logits)).sum()

    def objective(self, logits: Tensor, beta: float) -> Tensor:
        """E[r] − β · KL(π ‖ π_ref)."""
        return self.expected_reward(logits) - beta * self.kl(logits)

    def optimum(self, beta: float) -> Tensor:
        """π* ∝ π_ref e^(r/β), [S]: where the objective is highest."""
        return self.tilted(self.rewards / beta)

    def tilted(self, log_weight: Tensor) -> Tensor:
        """π_ref e^(log_weight) normalised, [S]."""
        return (self.logps(self.ref_logits).sum(dim=1) + log_weight).softmax(dim=0)

    def logits_of(self, probabilities: Tensor) -> Tensor:
        """The policy [P, 3] that gives these probabilities (all positive) to the completions."""
        mass = torch.zeros_like(self.ref_logits)
        for t in range(self.tokens.shape[1]):
            rows = self.mask[:, t]
            mass.index_put_((self.prefixes[rows, t], self.tokens[rows, t]), probabilities[rows], accumulate=True)
        return mass.log()

    def values(self, logits: Tensor, token_rewards: Tensor) -> Tensor:
        """Expected reward to go before each token, [S, T], of rewards per token [S, T]."""
        to_go = token_rewards.flip(1).cumsum(dim=1).flip(1)
        weight = self.probabilities(logits).detach()[:, None].expand_as(to_go)
        total, mass = (torch.zeros(len(self.ref_logits), dtype=torch.float64) for _ in range(2))
        total.index_put_((self.prefixes[self.mask],), (weight * to_go)[self.mask], accumulate=True)
        mass.index_put_((self.prefixes[self.mask],), weight[self.mask], accumulate=True)
        return torch.where(self.mask, (total / mass)[self.prefixes], 0.0)


def total_variation(p: Tensor, q: Tensor) -> float:
    """½ Σ |p − q|: the largest difference in the probability of any event."""
    return float((p - q).abs().sum() / 2)


def credit_of(
    bandit: TokenBandit,
    algorithm: Algorithm,
    logits: Tensor,
    completions: Tensor,
    group: Tensor,
    values: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
    baseline: float | None = None,
) -> Credit:
    """`assign_credit` for completions (row numbers, [B]) sampled from `logits`. values [S, T]."""
    collisions = logits.softmax(dim=-1).square().sum(dim=-1)[bandit.prefixes]
    return assign_credit(
        algorithm,
        scores=bandit.rewards[completions],
        mask=bandit.mask[completions],
        group=group,
        logps=bandit.logps(logits).detach()[completions],
        ref_logps=bandit.logps(bandit.ref_logits)[completions],
        values=None if values is None else values[completions],
        baseline=None if baseline is None else torch.full((len(completions),), baseline, dtype=torch.float64),
        collisions=collisions.detach()[completions],
        state=state,
    )


def expected_gradient(
    bandit: TokenBandit,
    algorithm: Algorithm,
    logits: Tensor,
    group_size: int = 1,
    values: Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
    baseline: float | None = None,
    sampler: Tensor | None = None,
) -> Tensor:
    """E[∇ loss] of the first update on groups sampled from `logits`, [P, 3]: exact, over all S^G groups.

    sampler: logits of another policy that sampled them. baseline: of the prompt, made of other samples.
    For algorithms whose samples meet only within their group: no statistics of the batch, aggregate per
    sequence.
    """
    groups = torch.cartesian_prod(*[torch.arange(len(bandit))] * group_size).reshape(-1, group_size)
    completions = groups.flatten()
    group = torch.arange(len(groups)).repeat_interleave(group_size)
    sampler = logits if sampler is None else sampler
    credit = credit_of(bandit, algorithm, sampler, completions, group, values, state, baseline)

    policy = logits.detach().requires_grad_()
    table = bandit.logps(policy)
    logps = table.detach()[completions].requires_grad_()
    mask = bandit.mask[completions]
    loss, _ = policy_loss(
        algorithm,
        logps=logps,
        behavior_logps=bandit.logps(sampler).detach()[completions],
        ref_logps=bandit.logps(bandit.ref_logits)[completions],
        advantages=credit.advantages,
        mask=mask,
        totals=BatchTotals.of(mask, group),
        state=state,
    )
    # The loss averages over the listed groups; what is wanted is each weighed by its probability.
    weight = len(groups) * bandit.probabilities(sampler).detach()[groups].prod(dim=1)
    (per_sample,) = torch.autograd.grad(loss, logps)
    per_completion = torch.zeros_like(table).index_add(0, completions, per_sample * weight[group, None])
    (gradient,) = torch.autograd.grad(table, policy, per_completion)
    return gradient


def train_exactly(
    bandit: TokenBandit,
    algorithm: Algorithm,
    *,
    steps: int = 150,
    lr: float = 0.2,
    group_size: int = 1,
) -> Tensor:
    """Adam on the expected gradient, the learning rate falling to 0 → logits [P, 3]."""
    policy = bandit.ref_logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=lr, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        policy.grad = expected_gradient(bandit, algorithm, policy.detach(), group_size)
        optimizer.step()
        schedule.step()
    return policy.detach()


def train_on_samples(
    bandit: TokenBandit,
    algorithm: Algorithm,
    *,
    steps: int,
    lr: float,
    samples: int = 256,
    group_size: int = 1,
    updates: int = 1,
    critic_lr: float = 0.3,
    seed: int = 0,
) -> Tensor:
    """The whole loop as a stage runs it: sample, score, credit, `updates` steps on parts → logits."""
    generator = torch.Generator().manual_seed(seed)
    policy = bandit.ref_logits.clone().requires_grad_()
    critic = torch.zeros(len(bandit.ref_logits), dtype=torch.float64, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [policy]}, {"params": [critic], "lr": critic_lr}]
    optimizer = torch.optim.Adam(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    group = torch.arange(samples) // group_size
    state: dict[str, Tensor] = {}
    for _ in range(steps):
        logps = bandit.logps(policy).detach()
        completions = torch.multinomial(logps.sum(dim=1).exp(), samples, replacement=True, generator=generator)
        values = critic.detach()[bandit.prefixes] if algorithm.needs.critic else None
        credit = credit_of(bandit, algorithm, policy, completions, group, values, state)
        for part in torch.arange(samples).chunk(updates):
            rows, mask = completions[part], bandit.mask[completions[part]]
            totals = BatchTotals.of(mask, group[part])
            loss, _ = policy_loss(
                algorithm,
                logps=bandit.logps(policy)[rows],
                old_logps=logps[rows],
                ref_logps=bandit.logps(bandit.ref_logits)[rows],
                advantages=credit.advantages[part],
                mask=mask,
                totals=totals,
                state=state,
            )
            if algorithm.critic is not None and credit.returns is not None and values is not None:
                loss = (
                    loss
                    + critic_loss(
                        algorithm.critic,
                        values=critic[bandit.prefixes[rows]],
                        old_values=values[rows],
                        returns=credit.returns[part],
                        mask=mask,
                        totals=totals,
                    )[0]
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        state = credit.state
    return policy.detach()
