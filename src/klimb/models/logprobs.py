"""Log-probabilities and entropies of chosen tokens without holding the `[tokens, V]` logits of many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from klimb import native
from klimb.models.gradients import sum_so_far

_CHUNK_ELEMENTS = 1 << 20  # logits computed at once: 4 MB in fp32 stay in a core's cache
_CHUNK_ROWS = 128  # but never fewer rows: each chunk reads the whole weight
_KEPT_ELEMENTS = 1 << 23  # so few logits (32 MB) wait for the backward pass instead of being computed twice


@dataclass(frozen=True)
class Head:
    """The last linear layer and what the family does to its output, computed in fp32 (float64 for float64 models).

    logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), the softcap where there is one. weight [V, d], bias [V].
    Without a weight the states *are* the logits: those of a model that computes its own.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    panels: native.Panels | None = None

    def in_precision(self) -> Head:
        """The same head with its weight as it is computed with: for many calls, each of which would convert it."""
        return self if self.weight is None else replace(self, weight=self.weight.to(precision(self.weight)))

    def for_decoding(self) -> Head:
        """The same head for the many calls of a rollout."""
        ready = self.in_precision()
        if ready.weight is None or not native.takes(ready.weight) or native.too_large([ready.weight]):
            return ready
        return replace(self, panels=native.panels(ready.weight))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, d] → [M, V]."""
        dtype = precision(hidden)
        if self.weight is None:
            return hidden.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.panels is not None:
            logits = native.product(hidden.to(dtype), self.panels, bias)
        else:
            logits = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def token_logps(
    head: Head, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log π(target | state) at temperature, and the entropy of π(· | state) in nats.

    hidden [M, d], targets [M] → logps [M], entropies [M] or None; both carry gradients. The backward pass computes
    the logits anew, chunk by chunk, so memory does not grow with M · V; those of few are kept where the kernels turn
    them into their gradient.
    """
    if head.weight is None:
        log_p = (head.logits(hidden) / temperature).log_softmax(-1)
        chosen = log_p.gather(1, targets[:, None]).squeeze(1)
        return chosen, -(log_p.exp() * log_p).sum(-1) if entropy else None
    bias = head.bias if head.bias is not None else torch.empty(0)
    few = not hidden.is_meta and kept_logits(len(hidden), len(head.weight)) > 0  # a plan counts them by itself
    keep = few and torch.is_grad_enabled()
    logps, entropies = _TokenLogps.apply(hidden, head.weight, bias, targets, head, temperature, entropy, keep)
    return logps, entropies if entropy else None


def full_kl(
    head: Head, hidden: Tensor, reference_head: Head, reference_hidden: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(π ‖ π_ref) over the whole vocabulary at each of M states, in nats, without gradient: [M].

    Summed over the states of a trajectory it has the expectation of the sequence KL and less variance than any
    estimator that looks at the chosen token alone (Rao-Blackwell). Rows for tokens that one head alone has (padding of
    the vocabulary) are left out.
    """
    kls = []
    with torch.no_grad():
        vocabulary = hidden.shape[1] if head.weight is None else head.weight.shape[0]
        head, reference_head = head.in_precision(), reference_head.in_precision()
        for part in _chunks(len(hidden), vocabulary):
            logits, reference_logits = head.logits(hidden[part]), reference_head.logits(reference_hidden[part])
            known = min(logits.shape[1], reference_logits.shape[1])
            logps = (logits[:, :known] / temperature).log_softmax(-1)
            reference = (reference_logits[:, :known] / temperature).log_softmax(-1)
            kls.append((logps.exp() * (logps - reference)).sum(-1))
    return torch.cat(kls) if kls else hidden.new_zeros(0)


def full_divergence(
    head: Head, hidden: Tensor, teacher_head: Head, teacher_hidden: Tensor,
    divergence: Callable[[Tensor, Tensor], Tensor], temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """`divergence` of the teacher's and the student's log-probs [m, V] at each of M states: [M], with the student's
    gradient. The backward pass computes the logits anew, chunk by chunk. Where one head has rows for tokens that the
    other does not know (padding of the vocabulary), both leave them out.
    """

    def of(states: Tensor, teacher_states: Tensor) -> Tensor:
        logits, teacher_logits = head.logits(states), teacher_head.logits(teacher_states)
        known = min(logits.shape[1], teacher_logits.shape[1])
        teacher_logps = (teacher_logits[:, :known].to(logits.dtype) / temperature).log_softmax(-1)
        return divergence(teacher_logps.detach(), (logits[:, :known] / temperature).log_softmax(-1))

    vocabulary = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    parts = [
        checkpoint(of, hidden[part], teacher_hidden[part], use_reentrant=False)
        for part in _chunks(len(hidden), vocabulary)
    ]
    return torch.cat(parts) if parts else hidden.sum(-1)


@torch.no_grad()
def log_collisions(head: Head, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """log Σ_v π(v | state)², without gradient: [M]. How likely two draws are to be the same token, and with it the
    squared length 1 − 2 π(token) + Σ_v π(v)² of ∇ log π(token) in the logits.
    """
    vocabulary = hidden.shape[1] if head.weight is None else head.weight.shape[0]
    head = head.in_precision()
    parts = [
        (2 * (head.logits(hidden[part]) / temperature).log_softmax(-1)).logsumexp(-1)
        for part in _chunks(len(hidden), vocabulary)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def kept_logits(rows: int, vocabulary: int) -> int:
    """Bytes of the logits that `token_logps` keeps for its backward pass where the kernels compute."""
    return 4 * rows * vocabulary if rows * vocabulary <= _KEPT_ELEMENTS else 0


def precision(states: Tensor) -> torch.dtype:
    """What is computed off hidden states is in fp32, or in float64 where they are."""
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    size = max(_CHUNK_ELEMENTS // vocabulary, _CHUNK_ROWS)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _TokenLogps(torch.autograd.Function):
    """With z = logits / temperature and p = softmax(z): ∂logp/∂z = 1[target] − p, ∂H/∂z = −p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, head: Head, temperature: float,
        with_entropy: bool, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logps = torch.empty(len(hidden), dtype=precision(hidden), device=hidden.device)
        normalisers = torch.empty_like(logps)
        entropies = torch.zeros_like(logps)
        ready = head.in_precision()
        ctx.kept = []
        for part in _chunks(len(hidden), weight.shape[0]):
            logits = ready.logits(hidden[part])
            if keep and native.takes(logits):  # torch's own way writes over them
                ctx.kept.append(logits)
            logps[part], normalisers[part], found = _from_logits(logits, targets[part], temperature, with_entropy)
            if found is not None:
                entropies[part] = found
        # The weight as it is computed with is kept where autograd lets it go as soon as the gradient is there.
        ctx.save_for_backward(hidden, weight, ready.weight, bias, targets, normalisers, entropies)
        ctx.head, ctx.temperature = head, temperature
        ctx.set_materialize_grads(False)  # entropies that are only looked at cost the backward pass nothing
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropies = grads
        hidden, weight, ready, bias, targets, normalisers, entropies = ctx.saved_tensors
        grad_logps = torch.zeros_like(normalisers) if grad_logps is None else grad_logps
        head: Head = replace(ctx.head, weight=ready)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = normalisers.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        total = sum_so_far(weight) if need_weight else None
        grad_weight = total if total is not None and total.dtype == dtype else None
        grad_bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if need_bias else None
        kept, ctx.kept = ctx.kept[::-1], []  # once: the gradient takes their place
        for part in _chunks(len(hidden), weight.shape[0]):
            logits = kept.pop() if kept else head.logits(hidden[part])
            slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
            dz = _to_logits(
                logits, targets[part], ctx.temperature, normalisers[part], entropies[part], grad_logps[part],
                None if grad_entropies is None else grad_entropies[part],
            )  # fmt: skip
            if slope is not None:
                dz *= slope
            if head.scale != 1.0:
                dz *= head.scale
            if grad_hidden is not None:
                grad_hidden[part] = (dz @ ready).to(hidden.dtype)
            if need_weight:
                states = hidden[part].to(dtype)
                grad_weight = dz.T @ states if grad_weight is None else grad_weight.addmm_(dz.T, states)
            if grad_bias is not None:
                grad_bias += dz.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None or grad_weight is total else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _from_logits(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of the targets, logs of the normalising sums, entropies. Takes the logits [m, V] for itself."""
    if native.takes(logits):
        return native.token_logps_forward(logits, targets, temperature, with_entropy)
    z = logits.div_(temperature)
    normalisers = z.logsumexp(-1)
    logps = z.gather(1, targets[:, None]).squeeze(1) - normalisers
    if not with_entropy:
        return logps, normalisers, None
    p = (z - normalisers[:, None]).exp_()
    return logps, normalisers, normalisers - torch.einsum("mv,mv->m", p, z)


def _to_logits(
    logits: Tensor, targets: Tensor, temperature: float, normalisers: Tensor, entropies: Tensor, grad_logps: Tensor,
    grad_entropies: Tensor | None,
) -> Tensor:  # fmt: skip
    """Gradients of log-probs and entropies → the gradient of the logits [m, V], which it takes for itself."""
    if native.takes(logits):
        return native.token_logps_backward_(
            logits, targets, temperature, normalisers, entropies, grad_logps, grad_entropies
        )
    log_p = logits.div_(temperature).sub_(normalisers[:, None])
    p = log_p.exp()
    dz = p * -grad_logps[:, None]
    dz.scatter_add_(1, targets[:, None], grad_logps[:, None])
    if grad_entropies is not None:
        dz -= p * (log_p + entropies[:, None]) * grad_entropies[:, None]
    return dz.div_(temperature)
