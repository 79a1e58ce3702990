"""What stages call: a policy that gives log-probs, a critic that gives values, a reward model that gives scores.

Each takes a `TokenBatch` and answers in its [B, T] or [B]; how rows are packed is nobody's business above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from klimb.batch import TokenBatch
from klimb.models.attention import AttentionPlan
from klimb.models.backbone import Backbone
from klimb.models.linears import Ready
from klimb.models.load import score_head
from klimb.models.logprobs import Head, full_divergence, full_kl, log_collisions, precision, token_logps
from klimb.models.packing import Budget, Packed, in_parts
from klimb.objective.judging import Combine, combined


@dataclass(frozen=True)
class PolicyOutputs:
    """logps [B, T] at the sampling temperature; entropy [B, T] in nats where asked for. Zero where not masked."""

    logps: Tensor
    entropy: Tensor | None


class Policy(nn.Module):
    """π over a backbone. `adapter`: which adapter is this policy; None is the base alone."""

    def __init__(self, backbone: Backbone, adapter: str | None = "policy", own_head: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.own_head = own_head or backbone.head() is None

    def forward(self, batch: TokenBatch, *, temperature: float = 1.0, entropy: bool = False) -> PolicyOutputs:
        packed = self.backbone.pack(batch)
        head, states = self.predictions(packed)
        logps, entropies = token_logps(head, states, packed.targets, temperature=temperature, entropy=entropy)
        return PolicyOutputs(_scatter(logps, batch), None if entropies is None else _scatter(entropies, batch))

    def predictions(self, packed: Packed) -> tuple[Head, Tensor]:
        """The head and the states [M, d] that predict the marked tokens."""
        self.backbone.use(self.adapter)
        states = self.backbone.packed_states(packed, packed.predictors, packed.read, logits=self.own_head)
        return self.head(), states

    def states(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, keep: Tensor, read: Tensor | None
    ) -> Tensor:
        """What `head` makes logits of, at the flat places `keep` [K]; see `Backbone.states`."""
        self.backbone.use(self.adapter)
        return self.backbone.states(tokens, positions, plan, keep, read, logits=self.own_head)

    def for_decoding(self) -> Ready:
        """See `Backbone.for_decoding`."""
        return self.backbone.for_decoding()

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def context(self) -> int:
        return self.backbone.context

    def head(self) -> Head:
        """Identity when the model computes its own logits."""
        head = None if self.own_head else self.backbone.head()
        return head if head is not None else Head(None)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.backbone.trainable(self.adapter)


class Critic(nn.Module):
    """V over a backbone: a linear layer on the state before each marked token; starts at 0, or at a reward model's
    head, from whose scores `mean` is taken before they are divided by `std`, as the reward does it."""

    def __init__(
        self, backbone: Backbone, adapter: str | None = "critic", head: nn.Linear | None = None, mean: float = 0.0,
        std: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        dtype = next(backbone.parameters()).dtype
        self.value = nn.Linear(backbone.hidden_size, 1, device=backbone.device, dtype=dtype)
        with torch.no_grad():
            self.value.bias.zero_()
            if head is None:
                self.value.weight.zero_()
            else:
                self.value.weight.copy_(head.weight / std)
                self.value.bias.sub_(mean / std)

    def forward(self, batch: TokenBatch) -> Tensor:
        """values [B, T] in nats of nothing: the units of the reward. Zero where not masked."""
        packed = self.backbone.pack(batch)
        self.backbone.use(self.adapter)
        states = self.backbone.packed_states(packed, packed.predictors, packed.read)
        return _scatter(_exactly(self.value, states).squeeze(-1), batch)

    def trainable(self) -> dict[str, nn.Parameter]:
        own = {f"value.{name}": parameter for name, parameter in self.value.named_parameters()}
        return {**self.backbone.trainable(self.adapter), **own}


class RewardModel(nn.Module):
    """r over a sequence classifier: read at the last token of each sample's last row, or at the end of every step.

    weights [K]: the head gives K ratings, and the score is their weighted sum. combine: the marked tokens are ends of
    steps, each with a logit of being right, and the score is what their probabilities make of the whole.
    """

    def __init__(
        self, backbone: Backbone, *, weights: Sequence[float] | None = None, combine: Combine | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.weights, self.combine = weights, combine
        self.head = score_head(backbone.model, outputs=len(weights or (1,)))
        self.head.requires_grad_(True)  # it is new: an adapter below does not replace it

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores [B]."""
        if self.combine is not None:
            logits = self.steps(batch)
            return combined(logits.sigmoid(), batch.mask.to(logits.device), self.combine)
        outputs = self.outputs(batch)
        return outputs.squeeze(-1) if self.weights is None else outputs @ outputs.new_tensor(self.weights)

    def outputs(self, batch: TokenBatch) -> Tensor:
        """What the head says at the end of each sample: [B, K]."""
        packed = self.backbone.pack(batch)
        outputs = self._read(packed, packed.last, packed.ends)
        final = outputs.new_zeros(len(batch), dtype=torch.long)
        final[packed.last_sample] = torch.arange(len(outputs), device=outputs.device)  # the last of its rows wins
        return outputs[final]

    def steps(self, batch: TokenBatch) -> Tensor:
        """Logits [B, T] of the steps that end at the marked tokens. Zero where not masked."""
        packed = self.backbone.pack(batch)
        return _scatter(self._read(packed, packed.marked, packed.marked).squeeze(-1), batch)

    def _read(self, packed: Packed, places: Tensor, read: Tensor) -> Tensor:
        self.backbone.use("policy")
        return _exactly(self.head, self.backbone.packed_states(packed, places, read))

    def trainable(self) -> dict[str, nn.Parameter]:
        own = {f"score.{name}": parameter for name, parameter in self.head.named_parameters()}
        return {**self.backbone.trainable(), **own}


class Verdicts(nn.Module):
    """r = log p(yes) − log p(no), as the policy's answer at the marked token (GenRM, arXiv 2408.15240)."""

    def __init__(self, policy: Policy, yes: int, no: int) -> None:
        super().__init__()
        self.policy, self.yes, self.no = policy, yes, no

    @property
    def backbone(self) -> Backbone:
        return self.policy.backbone

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores [B] in nats; of each sample one token is marked."""
        logps = self.logps(batch)
        return logps[:, self.yes] - logps[:, self.no]

    def logps(self, batch: TokenBatch) -> Tensor:
        """Log-probs [B, V] of all that could stand at the marked tokens."""
        head, states = self.policy.predictions(self.backbone.pack(batch))
        return head.logits(states).log_softmax(-1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.policy.trainable()


def _exactly(head: nn.Linear, states: Tensor) -> Tensor:
    """In float32 at least: in 16 bits scores around 4 are 1/64 or 1/32 apart, and many would be the same."""
    wide = precision(states)
    if states.dtype == wide:
        scores: Tensor = head(states)
        return scores
    bias = None if head.bias is None else head.bias.to(wide)
    return nn.functional.linear(states.to(wide), head.weight.to(wide), bias)


def _scatter(values: Tensor, batch: TokenBatch) -> Tensor:
    """[M] in the order of the marked tokens → [B, T]."""
    grid = values.new_zeros(batch.mask.shape)
    return grid.masked_scatter(batch.mask.to(values.device), values)


@torch.no_grad()
def policy_logps(
    policy: Policy, batch: TokenBatch, *, budget: int | Budget, temperature: float = 1.0, entropy: bool = False
) -> PolicyOutputs:
    """Log-probs of a whole batch without gradient, split by token budget."""
    forward = partial(policy, temperature=temperature, entropy=entropy)
    parts, outputs = zip(*in_parts(batch, budget, forward), strict=True)
    logps = _join([out.logps for out in outputs], parts, batch)
    entropies = [out.entropy for out in outputs if out.entropy is not None]
    return PolicyOutputs(logps, _join(entropies, parts, batch) if entropy else None)


@torch.no_grad()
def policy_log_collisions(
    policy: Policy, batch: TokenBatch, *, budget: int | Budget, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """log Σ_v π(v)² at each marked token of a whole batch [B, T], split by token budget."""

    def forward(micro: TokenBatch) -> Tensor:
        return _scatter(log_collisions(*policy.predictions(policy.backbone.pack(micro)), temperature), micro)

    parts, found = zip(*in_parts(batch, budget, forward), strict=True)
    return _join(found, parts, batch)


@torch.no_grad()
def critic_values(critic: Critic, batch: TokenBatch, *, budget: int | Budget) -> Tensor:
    """Values [B, T] of a whole batch without gradient, split by token budget."""
    parts, values = zip(*in_parts(batch, budget, critic), strict=True)
    return _join(values, parts, batch)


@torch.no_grad()
def reward_scores(model: Callable[[TokenBatch], Tensor], batch: TokenBatch, *, budget: int | Budget) -> Tensor:
    """Raw scores [B], float64, of a whole batch without gradient, split by token budget."""
    scores = torch.zeros(len(batch), dtype=torch.float64)
    for part, found in in_parts(batch, budget, model):
        scores[part] = found.double().cpu()
    return scores


@torch.no_grad()
def step_logits(model: RewardModel, batch: TokenBatch, *, budget: int | Budget) -> Tensor:
    """Logits [B, T], float64, of the steps that end at the marked tokens, without gradient."""
    parts, found = zip(*in_parts(batch, budget, model.steps), strict=True)
    return _join(found, parts, batch).double().cpu()


@torch.no_grad()
def sequence_kl(
    policy: Policy, reference: Policy, batch: TokenBatch, *, budget: int | Budget, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)) along each sample, nats: [B]."""

    def forward(micro: TokenBatch) -> Tensor:
        packed = policy.backbone.pack(micro)
        # The states are copied out before the other face moves in: both may live on one backbone.
        head, states = policy.predictions(packed)
        reference_head, reference_states = reference.predictions(packed)
        kl = full_kl(head, states, reference_head, reference_states, temperature)
        return _scatter(kl.double(), micro).sum(dim=1)

    kls = torch.zeros(len(batch), dtype=torch.float64)
    for part, found in in_parts(batch, budget, forward):
        kls[part] = found.cpu()
    return kls


def divergence(
    policy: Policy, teacher: Policy, batch: TokenBatch, measure: Callable[[Tensor, Tensor], Tensor],
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """`measure` of the teacher's and the policy's whole distributions before each marked token, [B, T], with the
    policy's gradient.
    """
    packed = policy.backbone.pack(batch)
    with torch.no_grad():
        teacher_head, teacher_states = teacher.predictions(packed)
    head, states = policy.predictions(packed)
    return _scatter(full_divergence(head, states, teacher_head, teacher_states, measure, temperature), batch)


def _join(parts: Sequence[Tensor], indices: Sequence[list[int]], batch: TokenBatch) -> Tensor:
    joined = parts[0].new_zeros(batch.mask.shape)
    for values, index in zip(parts, indices, strict=True):
        joined[torch.tensor(index), : values.shape[1]] = values
    return joined
