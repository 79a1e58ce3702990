"""Drawing tokens, with random numbers that neither the batch's composition nor a resume changes.

That of a token depends on (seed, prompt, sample index, position) and nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from klimb.errors import KlimbError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 64


@dataclass(frozen=True)
class SamplingParams:
    """How to draw. Training uses `temperature` alone: top-k, top-p and the penalty change the distribution whose
    log-probs are trained, so they belong to sampling and evaluation. temperature 0 is greedy."""

    max_tokens: int
    stop: frozenset[int]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def plain(self) -> bool:
        """True when what is drawn is exactly softmax(logits / temperature)."""
        return self.temperature > 0 and not self.top_k and self.top_p == 1.0 and self.repetition_penalty == 1.0


def stream_key(seed: int, prompt_id: str, index: int) -> int:
    """64-bit key of one sample's random numbers."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(keys: list[int], positions: int) -> Tensor:
    """Numbers in [0, 1) for positions 0 … positions−1 of each key: [len(keys), positions], float64.

    SplitMix64 (Steele, Lea & Flood 2014) as a counter-based generator: the finaliser of key + position · golden.
    """
    counters = np.arange(1, positions + 1, dtype=np.uint64) * _GOLDEN
    z = np.array(keys, dtype=np.uint64)[:, None] + counters[None, :]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits: Tensor, u: Tensor, params: SamplingParams, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw. logits [N, V] (fp32), u [N] in [0, 1) → tokens [N], log π(token) at temperature [N].

    seen [N, V] bool: tokens already in the text, for the repetition penalty. Log-probs are those of the plain policy
    also where top-k or top-p restricted the draw (and at temperature 1 for a greedy one).
    """
    z = logits if params.temperature in (0, 1) else logits / params.temperature
    largest = z.amax(-1, keepdim=True)
    weights = (z - largest).exp_()
    normaliser = weights.sum(-1, keepdim=True).log_().add_(largest)
    if logits.device.type == "cpu" and not normaliser.isfinite().all():  # elsewhere to look would be to wait
        raise KlimbError("the model's logits are NaN or infinite: no token can be drawn", where="sampling",
                         why="the weights are broken, or their numbers overflow in the run's dtype",
                         fix="set dtype=float32, or start from an earlier checkpoint")  # fmt: skip
    tokens = _invert(weights, u) if params.plain else _restricted(logits, u, params, seen)
    return tokens, (z.gather(1, tokens[:, None]) - normaliser).squeeze(1)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Smallest token whose cumulative weight exceeds u · total. [N, V], [N] → [N].

    First its block of the vocabulary, then the token in the block: a running sum over all of them would take more time
    than everything else here, and in fp32 lose the small weights that come late.
    """
    rest = -weights.shape[-1] % _BLOCK
    blocks = (pad(weights, (0, rest)) if rest else weights).unflatten(1, (-1, _BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)
    target = _below(ends[:, -1:], u[:, None] * ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).double().cumsum(-1)
    target = _below(within[:, -1:], target - pad(ends, (1, 0)).gather(1, block))
    return (block * _BLOCK + torch.searchsorted(within, target, right=True)).squeeze(1)


def _below(total: Tensor, target: Tensor) -> Tensor:
    """What rounding took to the total, or above, would fall behind the last token that has any weight."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _restricted(logits: Tensor, u: Tensor, params: SamplingParams, seen: Tensor | None) -> Tensor:
    if seen is not None and params.repetition_penalty != 1.0:  # Keskar et al. 2019, CTRL, eq. 7
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if params.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / params.temperature).softmax(-1)
    if params.top_k and params.top_k < logits.shape[-1]:
        smallest = probabilities.topk(params.top_k, dim=-1).values[:, -1:]
        probabilities = torch.where(probabilities >= smallest, probabilities, 0.0)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.where(before < params.top_p * probabilities.sum(-1, keepdim=True), ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    return _invert(probabilities, u)
