"""Before samples are learnt from: which groups are kept, and what too long a completion costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from klimb.objective.advantage import VARIANCE_TOLERANCE

Sampling = Callable[[Sequence[float]], bool]
"""The scores of one group, before any shaping → whether to keep it; a refused one is replaced by another."""


def dynamic(scores: Sequence[float]) -> bool:
    """Keep a group only if its scores differ, else it teaches nothing (DAPO, arXiv 2503.14476, 3.2)."""
    low, high = min(scores), max(scores)
    return high - low > VARIANCE_TOLERANCE * max(1.0, abs(low), abs(high))


SAMPLINGS: Mapping[str, Sampling] = {"dynamic": dynamic}


@dataclass(frozen=True)
class soft_overlong:
    """0 up to (1 − buffer) · max_length tokens, then a line down to −1 at max_length (DAPO, section 3.4).

    buffer: the last share of the length budget; the paper's 4,096 of 20,480 tokens. max_length is filled by
    resolving.
    """

    buffer: float = 0.2
    max_length: int | None = None

    def __call__(self, length: Tensor) -> Tensor:
        """Policy tokens [B] → what is added to the score, [B] float64, in [−1, 0]."""
        if self.max_length is None:
            raise ValueError("overlong: its max_length is open; call algorithm.resolve(max_length=...).")
        width = self.buffer * self.max_length
        return ((self.max_length - width - length.double()) / width).clamp(-1.0, 0.0)


OVERLONG: Mapping[str, type] = {"soft_overlong": soft_overlong}
