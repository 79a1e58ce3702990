"""Loss scaling: in float16 a gradient below 6e-8 is zero, and training would stop where it becomes slow.

The loss is multiplied before the backward pass and the gradients divided after it, in fp32 (Micikevicius et al. 2018,
arXiv 1710.03740). The factor is found by trying: halved where a gradient overflows, doubled after a long time without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROW_AFTER = 2000
"""Updates without overflow, as in torch.amp.GradScaler."""


@dataclass
class LossScale:
    """A power of two, so that to multiply and to divide by it rounds nothing."""

    factor: float = 2.0**16
    fitted: int = 0
    """Updates since it last changed."""
    skipped: int = 0

    def fits(self) -> None:
        """An update was made."""
        self.fitted += 1
        if self.fitted == GROW_AFTER:
            self.factor, self.fitted = 2 * self.factor, 0

    def overflows(self) -> None:
        """An update could not be made."""
        self.factor, self.fitted, self.skipped = self.factor / 2, 0, self.skipped + 1

    def tensor(self) -> Tensor:
        """[3], for a checkpoint."""
        return torch.tensor([self.factor, self.fitted, self.skipped], dtype=torch.float64)

    def load(self, saved: Tensor) -> None:
        """The inverse of `tensor`."""
        factor, fitted, skipped = saved.tolist()
        self.factor, self.fitted, self.skipped = factor, int(fitted), int(skipped)
