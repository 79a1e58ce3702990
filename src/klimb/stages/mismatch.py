"""Are the numbers of sampling those of training? A run whose ratios start from anything else learns nothing true."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klimb import metrics
from klimb.batch import TokenBatch
from klimb.errors import KlimbError
from klimb.metrics import Metrics
from klimb.runtime.ranks import gather, world

# Stored in fp32: a log-prob of −30 is off by 1e-6 whatever it was computed in.
_BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest p99 of |log-prob at sampling − log-prob in training| that a run accepts; in fp32 it is about 1e-6."""
_START = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""At the first update π = π_ref: bound of the largest |log π − log π_ref| (bfloat16: of its mean)."""


class Mismatch:
    """How far the log-probs stored at sampling are from the trainer's, watched at every step: p50, p95, p99 and the
    largest |difference|, and the share of tokens whose ratio is outside [0.9, 1.1], over the whole first update."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.differences: list[Tensor] = []

    def add(self, logps: Tensor, micro: TokenBatch) -> None:
        self.differences.append((logps.detach() - micro["behavior_logps"])[micro.mask].float().cpu())

    def report(self, step: int, batch: TokenBatch, fresh: bool) -> Metrics:
        differences = torch.cat([*self.differences, torch.zeros(0)])
        if world() > 1:
            differences = torch.tensor([gap for theirs in gather(differences.tolist()) for gap in theirs])
        sizes = differences.abs()
        p50, p95, p99 = (float(torch.quantile(sizes[: 1 << 24], share)) for share in (0.5, 0.95, 0.99))
        outside = (differences < math.log(0.9)) | (differences > math.log(1.1))
        if p99 > _BOUNDS[self.dtype]:
            raise KlimbError(
                f"step {step}: log-probs at sampling and in training differ by {p99:.2g} (p99)", where="rollout",
                why=f"more than the {_BOUNDS[self.dtype]:g} that {self.dtype} explains", fix="report this as a bug",
            )  # fmt: skip
        if step == 1 and fresh and "ref_logps" in batch.columns:
            gap = (batch["behavior_logps"] - batch["ref_logps"])[batch.mask].abs()
            worst = float(gap.mean() if self.dtype == torch.bfloat16 else gap.max())
            if worst > _START[self.dtype]:
                raise KlimbError(
                    f"before the first update policy and reference differ by {worst:.2g}", where="reference",
                    why="the reference is not the model that training starts from",
                    fix="name the reference that you mean with reference=DIR",
                )  # fmt: skip
        found = {
            "p50": p50,
            "p95": p95,
            "p99": p99,
            "max": float(sizes.max()),
            "outside": float(outside.float().mean()),
        }
        return {f"mismatch/{name}": metrics.ratio(value, 1.0) for name, value in found.items()}
