"""What reinforcement learning is told, and what it holds: its settings, and everything that a step needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from klimb.config import StageConfig, find_references
from klimb.data.sampler import Sampler
from klimb.models.faces import Critic, Policy
from klimb.objective.algorithm import Algorithm
from klimb.objective.refusals import adds_up, validate
from klimb.objective.spec import parse_algorithm
from klimb.rewards.normalise import Moments, Normalised
from klimb.rewards.protocol import Reward
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import asks_for_steps
from klimb.rollout.engine import RolloutEngine
from klimb.runtime.learner import Learner, Optimizer
from klimb.runtime.plan import Work
from klimb.stages.common import Session, TrainConfig
from klimb.stages.evaluate import Measurement
from klimb.stages.given import Given
from klimb.stages.memory import of_rl
from klimb.stages.models import Loaded
from klimb.stages.task import WithTask
from klimb.types import Prompt


class CriticConfig(StageConfig):
    """PPO's second learner. It starts from `model` (a reward model or policy), by default as a copy of the policy."""

    model: str | None = None
    optimizer: Optimizer = Optimizer()
    warmup_steps: int = Field(0, ge=0, description="first steps in which only the critic learns (arXiv 2307.04964)")


class RlConfig(WithTask, TrainConfig):
    """Batch numbers: `prompts_per_step` × `samples_per_prompt` samples, learnt from in `updates_per_step` parts."""

    from_task: ClassVar = ("data", "columns", "reward", "max_tokens", "measure")

    reward: Given = Field(description="a name, one with options, my_file.py:function, a model's directory, or a sum")
    gold: Given = Field(None, description="held-out judge of the same completions; training never sees it")
    algorithm: Given = Field("grpo", description="a name, or {name: grpo, kl: {beta: 0.05}}; see klimb algorithms")
    steps: int = Field(100, ge=1, description="batches of samples")
    prompts_per_step: int = Field(64, ge=1, description="prompts of a batch")
    samples_per_prompt: int = Field(8, ge=1, description="the size of a group")
    updates_per_step: int = Field(1, ge=1, description="parts of a batch, an update each")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longer prompts are reported, see on_bad")
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0)
    reference: str | None = Field(None, description="π_ref; default: where training starts")
    measure_kl: bool = Field(False, description="load the reference to log the KL even where β = 0")
    critic: CriticConfig = CriticConfig()
    failure_limit: float = Field(0.05, ge=0, le=1, description="share of rows whose reward may fail")
    max_refills: int = Field(8, ge=0, description="dynamic sampling: further rounds of prompts for one batch")
    max_samples: int | None = Field(None, ge=1, description="training ends after the step that drew so many in all")
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_rl(self, resolved(self).needs, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if find_references(self.algorithm):
            return  # of a recipe: known when the stage begins
        try:
            algorithm = resolved(self)
        except ValueError as error:
            yield str(error)
            return
        if algorithm.critic is None and self.critic != CriticConfig():
            yield f"critic: {algorithm.name} has none; leave it out, or use ppo"
        if algorithm.critic is not None and self.critic.warmup_steps >= self.steps:
            yield f"critic.warmup_steps={self.critic.warmup_steps}: of {self.steps} steps none is left for the policy"
        if algorithm.sampling is None and self.given("max_refills"):
            yield f"max_refills: {algorithm.name} keeps every group; leave it out, or set algorithm.sampling=dynamic"
        if self.reference is not None and not (algorithm.needs.ref or self.measure_kl):
            yield f"reference: {algorithm.name} has no KL to it; leave it out, or set measure_kl=true"
        if algorithm.needs.parts and not (isinstance(self.reward, list) and len(self.reward) > 1):
            yield f"reward: {algorithm.name} compares the parts of a sum, and this is one; give a list, or use grpo"
        if asks_for_steps(self.reward) and adds_up(algorithm):
            yield (f"reward: dense step rewards, and {algorithm.name} adds them up to the score again; leave dense "
                   "out, or use ppo or reinforce++, which look at tokens")  # fmt: skip
        if algorithm.reference is not None and self.lora is not None and self.reference is not None:
            yield "algorithm.reference: adapters cannot move into another model's weights; leave reference out"
        if self.updates_per_step > self.prompts_per_step:
            yield f"updates_per_step={self.updates_per_step}: more than the {self.prompts_per_step} groups of a step"


@dataclass
class Actors:
    """Everything that a step needs, made once."""

    config: RlConfig
    session: Session
    algorithm: Algorithm
    loaded: Loaded
    reference: Policy | None
    critic: Critic | None
    prompts: Sequence[Prompt]
    sampler: Sampler
    engine: RolloutEngine
    scorer: Scorer
    running: list[Normalised]
    """Parts of the reward whose scale follows the training."""
    gold: Reward | None
    policy_learner: Learner
    critic_learner: Learner | None
    draws_engine: RolloutEngine | None = None
    """Who draws an advantage's further samples, where that is not the policy."""
    known_values: dict[str, float] = field(default_factory=dict)
    """Baselines by prompt that were made of π_ref's samples."""
    resting: dict[str, int] = field(default_factory=dict)
    """Prompts that are solved, and up to which step they are not drawn."""
    samples_drawn: int = 0
    """Completions of the policy since the run began, refused ones among them."""

    @property
    def policy(self) -> Policy:
        return self.loaded.policy

    @property
    def part_weights(self) -> Tensor:
        return torch.tensor(list(self.scorer.weights.values()), dtype=torch.float64)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs besides weights and the algorithm's state."""
        moments = [list(part.moments) for part in self.running if part.moments is not None]
        return {
            "sampler": self.sampler.state(), "reward_counts": dict(self.scorer.counts), "reward_moments": moments,
            "known_values": self.known_values, "resting": self.resting, "samples_drawn": self.samples_drawn,
        }  # fmt: skip

    @property
    def finished(self) -> bool:
        """Have as many completions been drawn as may be?"""
        return self.config.max_samples is not None and self.samples_drawn >= self.config.max_samples

    def moving_weights(self) -> dict[str, Tensor]:
        """Of a reference that follows the policy, by the names that the policy's weights have; else none."""
        if self.algorithm.reference is None or self.reference is None:
            return {}
        own, followed = self.reference.adapter, self.policy.trainable()
        weights = self.reference.backbone.named_weights(own)
        renamed = {name.replace(f".{own}.", ".policy."): weight for name, weight in weights.items()}
        return {name: renamed[name] for name in followed}

    def restore(self, progress: dict[str, Any], reference: Mapping[str, Tensor]) -> None:
        for name, weight in self.moving_weights().items():
            weight.copy_(reference[name])
        self.sampler.restore(progress["sampler"])
        self.scorer.counts = progress["reward_counts"]
        self.known_values = progress.get("known_values", {})
        self.resting = progress.get("resting", {})
        self.samples_drawn = progress.get("samples_drawn", 0)
        for part, moments in zip(self.running, progress["reward_moments"], strict=True):
            part.moments = Moments(*moments)


def resolved(config: RlConfig) -> Algorithm:
    """The algorithm with the constants of this run. Raises ValueError where the batch numbers make no sense of it."""
    algorithm = parse_algorithm(config.algorithm).resolve(max_length=config.max_tokens)
    validate(algorithm, samples_per_prompt=config.samples_per_prompt, updates_per_step=config.updates_per_step)
    return algorithm
