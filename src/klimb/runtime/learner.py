"""One learner for every stage: it is given a loss, never an algorithm's name.

``learner.step(batch, loss)`` splits the batch by the token budget, sums the gradients of the parts and takes one AdamW
step. `loss(micro_batch, totals)` returns a part that is already divided by the totals of the *whole* batch, so the
split, and the number of ranks that share it, change nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.config import StageConfig
from klimb.errors import KlimbError, out_of_memory
from klimb.metrics import Metric, Metrics
from klimb.models import gradients
from klimb.models.packing import flat_length, split_by_budget
from klimb.runtime.adam8bit import AdamW8bit
from klimb.runtime.loss_scale import LossScale
from klimb.runtime.ranks import gather, rank, world

Loss = Callable[[TokenBatch, BatchTotals], tuple[Tensor, Metrics]]
Stage = Literal["sft", "reward", "preference", "rl", "critic", "distill"]

LEARNING_RATES: dict[Stage, tuple[float, float]] = {
    "sft": (2e-5, 2e-4),
    "reward": (1e-5, 1e-4),
    "preference": (1e-6, 1e-5),
    "rl": (1e-6, 1e-5),
    "critic": (1e-5, 1e-4),
    "distill": (1e-5, 1e-4),
}
"""Starting points for pretrained models of 0.5–8 B parameters, (all weights, LoRA); LoRA takes about ten times the
rate of full training (Schulman et al. 2025, "LoRA without regret"). A model from scratch wants 10–100 times more."""


_STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")


class Optimizer(StageConfig):
    """AdamW (Loshchilov & Hutter 2019) with warm-up, decay and a bound on the gradient's global norm."""

    lr: float | None = Field(None, gt=0, description="none: by stage, full or LoRA, from the printed table")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0, description="updates in which the rate rises from 0")
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: float = Field(0.0, ge=0, le=1, description="share of lr left at the end of the decay")
    max_grad_norm: float | None = Field(1.0, gt=0, description="a longer gradient is scaled down to it")
    state: Literal["fp32", "8bit"] = Field("fp32", description="AdamW's moments: 8 or 2 bytes a trained parameter")


class NotFinite(KlimbError):
    """A loss or gradient was NaN or infinite; the weights are those before the step."""


class Learner:
    """AdamW over named parameters, in fp32 whatever the weights compute in.

    Weights in 16 bits get an fp32 master each; the working copy, which rollouts use too, is written from it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        *,
        lr: float,
        total_steps: int,
        budget: int,
        say: Callable[[str], None] = lambda line: None,
        scaled: bool = False,
    ) -> None:
        """budget: flat tokens of a micro-batch. lr: peak, after the table was asked. say: gets lines for a person.
        scaled: the model computes in float16, so the loss needs a scale."""
        self.working = dict(parameters)
        self.masters = {
            name: p if p.dtype in (torch.float32, torch.float64) else nn.Parameter(p.detach().float())
            for name, p in parameters.items()
        }
        self.config = optimizer
        self.lr = lr
        self.total_steps = max(total_steps, 1)
        self.budget = budget
        self.say = say
        self.scale = LossScale() if scaled else None
        self._named_longest = False
        self.steps = 0
        adamw = AdamW8bit if optimizer.state == "8bit" else partial(torch.optim.AdamW, fused=True)
        self.adam: AdamW8bit | torch.optim.AdamW = adamw(
            list(self.masters.values()), lr=lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )  # fmt: skip

    def step(self, batch: TokenBatch, loss: Loss, totals: BatchTotals | None = None) -> Metrics:
        """One update; none where a scaled gradient overflowed, which is said and measured as `skipped`.

        Raises NotFinite, with the ids of the rows, before any weight has changed.
        """
        totals = totals or batch.totals
        self._forget_gradients()  # of an update that an exception ended
        parts = self._accumulate(batch, loss, totals)
        self._share_gradients()
        self._unscale()
        norm = self._clip()
        merged = _of_the_update(parts)
        if not math.isfinite(norm) or not math.isfinite(merged["objective"].value):
            self._forget_gradients()
            if self.scale is None or self.scale.factor <= 1 or not math.isfinite(merged["objective"].value):
                raise NotFinite(self._accusation(batch, loss, totals))
            return self._skip(self.scale, merged)
        for group in self.adam.param_groups:
            group["lr"] = self.rate(self.steps)
        merged |= {"grad_norm": metrics.ratio(norm, 1.0), "lr": metrics.ratio(self.rate(self.steps), 1.0)}
        if self.scale is not None:
            merged |= {"loss_scale": metrics.ratio(self.scale.factor, 1.0), "skipped": metrics.total(0.0)}
            self.scale.fits()
        self.adam.step()
        self._forget_gradients()
        self._write_working_copies()
        self.steps += 1
        return merged

    def _unscale(self) -> None:
        if self.scale is not None:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.div_(self.scale.factor)

    def _skip(self, scale: LossScale, merged: Metrics) -> Metrics:
        """The update is left out, and its place in the schedule of the rate with it."""
        merged |= {"loss_scale": metrics.ratio(scale.factor, 1.0), "skipped": metrics.total(1.0)}
        scale.overflows()
        self.steps += 1
        self.say(f"update {self.steps}: a gradient overflowed in float16, the weights stay as they were; from here on "
                 f"the loss scale is {scale.factor:g} (skipped so far: {scale.skipped})")  # fmt: skip
        return merged

    def _accumulate(self, batch: TokenBatch, loss: Loss, totals: BatchTotals) -> list[Metrics]:
        """Where a micro-batch does not fit into the memory, all of them once more, from smaller parts."""
        while True:
            micro_batches = split_by_budget(batch, self.budget, shares=world())
            self._name_the_longest(batch, micro_batches)
            parts, too_large = self._backward(batch, micro_batches[rank() :: world()], loss, totals)
            refused = [index for index in gather(too_large) if index]
            if not refused:
                return parts
            self._forget_gradients()
            self._shrink(batch, max(refused, key=lambda index: _length(batch, index)))

    def _backward(
        self, batch: TokenBatch, micro_batches: Sequence[list[int]], loss: Loss, totals: BatchTotals
    ) -> tuple[list[Metrics], list[int]]:
        """Gradients of these micro-batches, and the samples of the one that did not fit, if one did not."""
        parts: list[Metrics] = []
        for index in micro_batches:
            try:
                value, measured = loss(batch.select(index).to(self.device), totals)
                (value if self.scale is None else value * self.scale.factor).backward()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                return parts, index
            parts.append({**measured, "objective": metrics.total(value)})
            for name, parameter in self.working.items():
                master = self.masters[name]
                if master is not parameter and parameter.grad is not None:
                    master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                    parameter.grad = None
                    gradients.share(parameter, master.grad)
        return parts, []

    def _shrink(self, batch: TokenBatch, index: list[int]) -> None:
        """Halve the budget below the samples `index`. Raises KlimbError when there is nothing to take apart."""
        length, place = _length(batch, index), f"update {self.steps + 1}"
        if len(split_by_budget(batch.select(index), budget=1)) == 1:
            raise KlimbError(
                f"{_names(batch, index)} does not fit into the memory of {self.device}", where=place,
                why=f"{length} tokens at once are the least that it takes",
                fix="use shorter sequences, checkpointing=on, lora, or a device with more memory",
            )  # fmt: skip
        self.budget = length // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the size that failed are of no use to smaller ones
        self.say(f"{place}: {length} tokens do not fit into the memory of {self.device}; from here on token_budget is "
                 f"{self.budget}, the result is the same")  # fmt: skip

    def _name_the_longest(self, batch: TokenBatch, micro_batches: Sequence[list[int]]) -> None:
        """Once, when a sample (or pair) is longer than the budget."""
        if self._named_longest:
            return
        lengths = [_length(batch, index) for index in micro_batches]
        length = max(lengths)
        if length > self.budget:
            self._named_longest = True
            longer = sum(other > self.budget for other in lengths)
            longest = _names(batch, micro_batches[lengths.index(length)])
            self.say(
                f"token_budget={self.budget}: {longer} of {len(lengths)} micro-batches are longer, one sample or pair "
                f"each; the longest, {length} tokens ({longest}), decides how much memory is needed; with "
                f"token_budget={length} shorter ones are computed together"
            )

    def _share_gradients(self) -> None:
        """Sum over the ranks. A parameter that no rank used keeps no gradient, so that AdamW does not decay it."""
        if world() == 1:
            return
        used = torch.tensor([int(m.grad is not None) for m in self.masters.values()], device=self.device)
        dist.all_reduce(used)
        for master, ranks in zip(self.masters.values(), used.tolist(), strict=True):
            if ranks:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                dist.all_reduce(master.grad)

    def _clip(self) -> Tensor:
        """The gradient's norm before clipping, over all parameters, after the ranks were summed."""
        bound = self.config.max_grad_norm
        return nn.utils.clip_grad_norm_(self.masters.values(), bound if bound is not None else math.inf).detach()

    def _write_working_copies(self) -> None:
        with torch.no_grad():
            for name, parameter in self.working.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def _forget_gradients(self) -> None:
        for parameter in [*self.masters.values(), *self.working.values()]:
            parameter.grad = None
            gradients.share(parameter, None)

    def _accusation(self, batch: TokenBatch, loss: Loss, totals: BatchTotals) -> str:
        """Which rows it was: each (of pairs: each pair) on its own, forward and backward."""
        guilty: list[str] = []
        for unit in split_by_budget(batch, budget=1):
            value, _ = loss(batch.select(unit).to(self.device), totals)
            value.backward()
            found = [p.grad for p in self.working.values() if p.grad is not None]
            if not all(bool(x.isfinite().all()) for x in [value, *found]):
                guilty += [batch.ids[i] for i in unit]
            self._forget_gradients()
        rows = f"rows {', '.join(guilty[:8])}" if guilty else "no single row (the gradient overflowed)"
        return (f"update {self.steps + 1}: the loss or its gradient is not finite: {rows}; nothing was changed: "
                "look at these rows, lower lr, or use dtype=float32")  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(iter(self.working.values())).device

    def rate(self, step: int) -> float:
        """Learning rate of update `step` (from 0): linear warm-up, then the decay."""
        c = self.config
        if step < c.warmup_steps:
            return self.lr * (step + 1) / c.warmup_steps
        done = min((step - c.warmup_steps) / max(self.total_steps - c.warmup_steps, 1), 1.0)
        shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[c.decay]
        return self.lr * (c.final_lr + (1 - c.final_lr) * shape if c.decay != "constant" else 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resume needs, by logical name: the masters, AdamW's moments, and the budget that fits."""
        named = {f"weights.{name}": master.detach() for name, master in self.masters.items()}
        named["budget"] = torch.tensor(self.budget)
        if self.scale is not None:
            named["loss_scale"] = self.scale.tensor()
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                named[f"adam.{key}.{name}"] = value
        return named

    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """The inverse of `tensors`."""
        self.steps = steps
        self.budget = int(tensors["budget"])
        if self.scale is not None:
            self.scale.load(tensors["loss_scale"])
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"weights.{name}"])
                if f"adam.step.{name}" in tensors:
                    found = {key: tensors.get(f"adam.{key}.{name}") for key in _STATE}
                    self.adam.state[master] = {k: _beside(master, saved) for k, saved in found.items()
                                               if saved is not None}  # fmt: skip
        self._write_working_copies()


def _beside(master: Tensor, saved: Tensor) -> Tensor:
    """A copy where the master is: the fused AdamW reads "step" there, and the moments in the weights' own strides."""
    if saved.shape == master.shape:
        return torch.empty_like(master, dtype=saved.dtype).copy_(saved)
    return saved.to(master.device, copy=True)


def _length(batch: TokenBatch, index: Sequence[int]) -> int:
    """Flat tokens of these samples."""
    return flat_length([row for i in index for row in batch.rows[i]])


def _names(batch: TokenBatch, index: Sequence[int]) -> str:
    return " and ".join(batch.ids[i] for i in index)


def _of_the_update(parts: Sequence[Metrics]) -> Metrics:
    """What was a sum over micro-batches and ranks is a figure of this update: over several updates it is averaged."""
    merged = _over_ranks(metrics.merge(parts))
    return {name: metrics.ratio(m.value, 1.0) if m.kind == "sum" else m for name, m in merged.items()}


def _over_ranks(measured: Metrics) -> Metrics:
    """The same metrics on every rank. Ranks without a micro-batch contribute nothing."""
    if world() == 1:
        return measured
    mine = {name: (metric.kind, float(metric.value), float(metric.weight)) for name, metric in measured.items()}
    return metrics.merge(
        {name: Metric(kind, _float64(value), _float64(weight)) for name, (kind, value, weight) in theirs.items()}
        for theirs in gather(mine)
    )


def _float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
