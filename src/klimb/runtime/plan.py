"""The memory plan of a stage: what it will hold, line by line, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from klimb import native
from klimb.models.load import HALF, LoRA
from klimb.models.outline import Outline, Shape
from klimb.models.packing import flat_length, split_by_budget

_DRAWING = 3
"""Tensors [rows, V] that drawing holds: the logits, their weights, and those filled up to whole blocks."""
_PREFILL = 4096
"""Prompt tokens that a rollout computes at once."""
_MOMENTS = {"fp32": 8.0, "8bit": 2 * (1 + 4 / 256)}
"""Bytes a trained parameter."""

_HEAP = {(False, False): 1.3, (False, True): 1.1, (True, False): 2.3, (True, True): 1.75}
"""By LoRA, and by sampling between updates: what glibc keeps of freed blocks between those in use, as a share of these,
measured with glibc 2.36 on models of 1 and 11 M parameters (docs/LOG.md). A GPU's allocator hands blocks out again."""


class Sampled(NamedTuple):
    """At most: samples side by side, tokens of a prompt and of a completion. `samples` share a prompt."""

    rows: int
    prompt: int
    completion: int
    samples: int


@dataclass(frozen=True)
class Learning:
    """What a learner moves: the adapters of `lora`, or all weights of `model`."""

    model: str
    lora: LoRA | None = None
    classifier: bool = False
    state: Literal["fp32", "8bit"] = "fp32"


@dataclass(frozen=True)
class Work:
    """What a stage holds and computes. shape: rows of its micro-batches; samples: of an update, 0 where that is not
    known. frozen: further models, by what they are."""

    policy: Learning
    shape: Shape
    trains: bool = True
    critic: Learning | None = None
    """On the policy's base where it has adapters too."""
    frozen: tuple[tuple[str, Learning], ...] = ()
    sampled: tuple[Sampled, ...] = ()
    online: bool = False
    """Does it sample between its updates?"""
    compared_at_the_end: str | None = None
    """A reference that is loaded when training is over."""
    samples: int = 0

    def micro_batch(self, budget: int) -> int:
        """Flat tokens of the largest one."""
        if not self.samples:
            return budget
        update = self.shape.batch(self.samples)
        parts = split_by_budget(update, budget)
        return max(flat_length([row for i in part for row in update.rows[i]]) for part in parts)


@dataclass(frozen=True)
class Plan:
    """Bytes by line: what is held all the time, and what each phase adds while it lasts."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def busiest(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def lines(self) -> dict[str, int]:
        """Those of the peak."""
        return {name: count for name, count in {**self.held, **self.phases[self.busiest]}.items() if count}

    @property
    def peak(self) -> int:
        return sum(self.lines.values())

    @property
    def least(self) -> int:
        """What no token budget makes smaller: what is held, and the gradients."""
        return sum(self.held.values()) + self.phases.get("training", {}).get("gradients", 0)

    def __str__(self) -> str:
        return ", ".join(f"{name} {gigabytes(count)}" for name, count in self.lines.items())


def gigabytes(count: float) -> str:
    """GB = 2^30 bytes, as memory is sold; MB = 2^20."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.{0 if count >= 2**20 else 2}f} MB"


def plan(work: Work, dtype: torch.dtype, budget: int, *, checkpointing: bool, heap: bool = False) -> Plan:
    """heap: is memory taken from glibc, as on a CPU? Raises what `Outline` raises where a config cannot be read."""
    kernels = heap and native.takes(torch.empty(0, dtype=dtype))
    policy = outline(work.policy, dtype, kernels)
    held = {"weights": policy.weights}
    phases = {}
    micro_batch = work.micro_batch(budget)
    if not work.trains:
        phases["scoring"] = {"activations": _scoring(policy, work.shape, budget)}
    else:
        held |= {"adapters": policy.adapters, "masters": policy.masters, "moments": _moments(policy, work.policy)}
        phases["training"] = _training(policy, work.shape, micro_batch, checkpointing, kernels)
    if work.critic is not None:
        critic = outline(work.critic, dtype, kernels)
        held["critic"] = critic.adapters + critic.masters + _moments(critic, work.critic)
        held["critic"] += 0 if work.critic.lora else critic.weights
        phases["critic"] = _training(critic, work.shape, micro_batch, checkpointing, False)
    for name, model in work.frozen:
        held[name] = held.get(name, 0) + outline(model, dtype).weights
    if work.sampled:
        lines = [_sampling(policy, sampled) for sampled in work.sampled]
        phases["sampling"] = max(lines, key=lambda phase: sum(phase.values()))
    if work.compared_at_the_end is not None:
        reference = outline(Learning(work.compared_at_the_end), dtype).weights
        phases["measuring"] = {"reference": reference, **phases["sampling"]}
    if heap:
        share = _HEAP[work.policy.lora is not None, work.online]
        for name in phases.keys() & {"training", "critic"}:
            phases[name] = {**phases[name], "heap": int(share * sum(phases[name].values()))}
    return Plan(held, phases)


def outline(model: Learning, dtype: torch.dtype, kernels: bool = False) -> Outline:
    config = Path(model.model) / "config.json"
    stamp = config.stat().st_mtime_ns if config.is_file() else 0
    lora = model.lora and model.lora.model_dump_json()
    return _outline(model.model, stamp, dtype, lora, model.classifier, kernels)


@lru_cache(maxsize=8)
def _outline(model: str, stamp: int, dtype: torch.dtype, lora: str | None, classifier: bool, kernels: bool) -> Outline:
    adapters = LoRA.model_validate_json(lora) if lora else None
    return Outline(model, dtype, adapters, classifier=classifier, kernels=kernels)


def _moments(model: Outline, learning: Learning) -> int:
    width = 2 if learning.state == "fp32" and model.dtype == torch.float64 else 1
    return int(width * model.trained * _MOMENTS[learning.state])


@lru_cache(maxsize=64)
def _training(model: Outline, shape: Shape, budget: int, checkpointing: bool, waiting: bool) -> dict[str, int]:
    """As in `Learner`: gradients of earlier micro-batches lie in fp32 while one is computed; those of its own are in
    the precision of the weights, and grow while its activations go."""
    again = checkpointing and model.can_compute_again
    kept, besides = model.training(shape, budget, checkpointing=again, waiting=waiting)
    own = model.gradients - model.masters if model.masters else 0
    gradients = model.masters or model.gradients
    return {"gradients": gradients, "activations": kept, "head and backward": max(besides, own - kept)}


@lru_cache(maxsize=64)
def _scoring(model: Outline, shape: Shape, budget: int) -> int:
    return model.scoring(shape, budget)


def _sampling(model: Outline, sampled: Sampled) -> dict[str, int]:
    rows, prompt, completion, samples = sampled
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    stored = config.num_hidden_layers * 2 * (getattr(config, "num_key_value_heads", None) or heads) * width
    tokens = -(-rows // samples) * prompt + rows * completion
    logits = 4 * _DRAWING * rows * config.vocab_size
    prefill = _scoring(model, Shape(prompt, 1), min(_PREFILL, -(-rows // samples) * (prompt + 1)))
    head = 4 * config.vocab_size * config.hidden_size if model.kernels or model.dtype in HALF else 0
    return {
        "KV cache": stored * tokens * model.dtype.itemsize, "logits": max(logits, prefill),
        "weights as decoded": head + (model.panels if model.kernels else 0),
    }  # fmt: skip
