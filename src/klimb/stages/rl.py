"""Reinforcement learning: prompt → rollout → reward → advantage → loss → step → weights back → metrics.

Which algorithm is a value from the table; nothing below asks for its name. A critic, where the algorithm has one, is
a second learner stepped on the same batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.config import StageConfig, find_references
from klimb.data.load import load_prompts
from klimb.data.sampler import Sampler
from klimb.errors import RewardError
from klimb.metrics import Metrics
from klimb.models.faces import Critic, Policy, policy_logps
from klimb.models.load import HALF
from klimb.objective.algorithm import Algorithm
from klimb.objective.credit import assign_credit
from klimb.objective.critic import critic_loss
from klimb.objective.entropy import adaptive_entropy
from klimb.objective.policy_loss import policy_loss, update_columns
from klimb.objective.refusals import hints, validate
from klimb.objective.spec import describe, parse_algorithm
from klimb.rewards.normalise import Moments, Normalised
from klimb.rewards.protocol import Reward
from klimb.rewards.scorer import Scorer, dry_run
from klimb.rollout.engine import RolloutEngine
from klimb.runtime.learner import Learner, Optimizer
from klimb.runtime.memory import give_back
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.samples import sample_records
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, TrainConfig, stream_seed
from klimb.stages.evaluate import Judges, Measurement, local_engine, open_reward
from klimb.stages.experience import experience, is_stale, look_up, rollout
from klimb.stages.given import Given
from klimb.stages.memory import of_rl
from klimb.stages.mismatch import Mismatch
from klimb.stages.models import Loaded, load_critic, load_policy, load_reference, load_texts, prompt_room
from klimb.types import Prompt


class CriticConfig(StageConfig):
    """PPO's second learner. It starts from `model` (a reward model or policy), by default as a copy of the policy."""

    model: str | None = None
    optimizer: Optimizer = Optimizer()
    warmup_steps: int = Field(0, ge=0, description="first steps in which only the critic learns (arXiv 2307.04964)")


class RlConfig(TrainConfig):
    """Batch numbers: `prompts_per_step` × `samples_per_prompt` samples, learnt from in `updates_per_step` parts."""

    reward: Given
    gold: Given = Field(None, description="held-out judge of the same completions; training never sees it")
    algorithm: Given = "grpo"
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(64, ge=1)
    samples_per_prompt: int = Field(8, ge=1)
    updates_per_step: int = Field(1, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0)
    reference: str | None = Field(None, description="π_ref; default: where training starts")
    measure_kl: bool = Field(False, description="load the reference to log the KL even where β = 0")
    critic: CriticConfig = CriticConfig()
    failure_limit: float = Field(0.05, ge=0, le=1, description="share of rows whose reward may fail")
    max_refills: int = Field(8, ge=0, description="dynamic sampling: further rounds of prompts for one batch")
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
    reference_engine: RolloutEngine | None = None
    known_values: dict[str, float] = field(default_factory=dict)
    """Baselines by prompt that were made of π_ref's samples."""
    resting: dict[str, int] = field(default_factory=dict)
    """Prompts that are solved, and up to which step they are not drawn."""

    @property
    def policy(self) -> Policy:
        return self.loaded.policy

    @property
    def part_weights(self) -> Tensor:
        return torch.tensor(list(self.scorer.weights.values()), dtype=torch.float64)

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs besides weights and the algorithm's state."""
        moments = [list(part.moments) for part in self.running if part.moments is not None]
        return {"sampler": self.sampler.state(), "reward_counts": dict(self.scorer.counts), "reward_moments": moments,
                "known_values": self.known_values, "resting": self.resting}  # fmt: skip

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
        for part, moments in zip(self.running, progress["reward_moments"], strict=True):
            part.moments = Moments(*moments)


def train(config: RlConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    actors = prepare(config, session)
    judges = Judges.for_measurement(config.measure, session, actors.loaded, config.seed)
    state: dict[str, Tensor] = {}
    start = 0
    if found := session.resume():
        start, state = found.step, found.tensors["state"]
        actors.restore(found.state["stage"], found.tensors.get("reference", {}))

    for step in session.steps(start, config.steps):
        actors.engine.update_weights(step)
        groups, refused, counted = rollout(actors, step)
        batch = look_up(actors, experience(actors, groups, step), stale=is_stale(groups, step))
        credit = assign_credit(
            actors.algorithm, scores=batch["scores"], mask=batch.mask, group=batch.group,
            logps=batch["behavior_logps"], ref_logps=batch.get("ref_logps"), values=batch.get("values"),
            parts=batch.get("parts"), part_weights=actors.part_weights, baseline=batch.get("baseline"),
            collisions=batch.get("collisions"), state=state,
        )  # fmt: skip
        batch = batch.with_columns(advantages=credit.advantages)
        if credit.returns is not None:
            batch = batch.with_columns(returns=credit.returns)
        measured = learn(actors, teaching(actors.algorithm, batch), step, state)
        state = after_step(actors.algorithm, credit.state, measured)
        if (schedule := actors.algorithm.reference) is not None and schedule.due(step):
            schedule.move(actors.moving_weights(), actors.policy.trainable())
        session.end_step(
            step, config.steps, {**metrics.results(credit.metrics | measured), **counted},
            every=config.checkpoint_every, state=actors.progress(), tensors=state,
            reference=actors.moving_weights(), samples=sample_records(groups, refused),
        )  # fmt: skip

    actors.loaded.save(run.model)
    stays = actors.algorithm.reference is None or actors.loaded.backbone.started_from_adapter
    reference = actors.reference if stays else None
    reference = reference or (load_reference(session, actors.loaded, config.model) if judges else None)
    evaluation = judges.evaluate(actors.policy, reference, "evaluate") if judges and reference else None
    return {"model": str(run.model), "steps": config.steps, "algorithm": describe(actors.algorithm),
            "evaluation": evaluation}  # fmt: skip


def resolved(config: RlConfig) -> Algorithm:
    """The algorithm with the constants of this run. Raises ValueError where the batch numbers make no sense of it."""
    algorithm = parse_algorithm(config.algorithm).resolve(max_length=config.max_tokens)
    validate(algorithm, samples_per_prompt=config.samples_per_prompt, updates_per_step=config.updates_per_step)
    return algorithm


def preview(config: RlConfig) -> list[str]:
    """What will run, in two lines: the resolved row of the table and the batch arithmetic."""
    samples = config.prompts_per_step * config.samples_per_prompt
    return [
        describe(resolved(config)),
        f"{config.prompts_per_step} prompts × {config.samples_per_prompt} samples = {samples} samples a step → "
        f"{config.updates_per_step} update(s) of about {samples // config.updates_per_step}, {config.steps} steps",
    ]


def prepare(config: RlConfig, session: Session) -> Actors:
    """Load what the algorithm needs, cheapest first, so that a mistake shows before the time is spent."""
    for line in preview(config):
        session.say(line)
    algorithm = resolved(config)
    for hint in hints(algorithm, updates_per_step=config.updates_per_step):
        session.say(hint)
    renderer, context = load_texts(config.model)
    room = prompt_room(context, config.max_tokens)
    data = session.read(load_prompts, config.data, config, renderer, min(config.max_prompt_tokens or room, room))
    running: list[Normalised] = []
    reward = open_reward(config.reward, session, renderer, running)
    for line in dry_run(reward, data.items).lines()[:2]:
        session.say(f"reward {reward.name}: {line}")
    for part in running:
        part.moments = Moments()  # the dry run's completions were made up
    gold = None if config.gold is None else open_reward(config.gold, session, renderer)
    loaded = load_policy(session, config.model, config.lora, config.seed, renderer)
    loaded.conversational = data.conversational
    needs = algorithm.needs
    reference = None
    if needs.ref or config.measure_kl:
        reference = load_reference(session, loaded, config.reference, moves=algorithm.reference is not None)
    critic = load_critic(session, loaded, config.critic.model) if needs.critic else None
    updates = config.steps * config.updates_per_step
    warmup = config.critic.warmup_steps * config.updates_per_step if critic else 0
    policy_learner = session.learner(
        "policy", "rl", loaded.policy.trainable(), config, config.optimizer, updates - warmup
    )
    critic_learner = None
    if critic is not None:
        critic_learner = session.learner(
            "critic", "critic", critic.trainable(), config, config.critic.optimizer, updates
        )
    samples = config.prompts_per_step * config.samples_per_prompt
    rows = int(session.run.decide("rollout_rows", lambda: min(256, samples)))

    def engine_of(policy: Policy) -> RolloutEngine:
        return local_engine(policy, loaded, data.items, rows, session.on_tokens, session.say)

    by_reference = needs.draws is not None and needs.draws.of_reference
    return Actors(
        config, session, algorithm, loaded, reference, critic, data.items,
        Sampler(len(data.items), config.prompts_per_step, config.seed),
        engine_of(loaded.policy),
        Scorer(reward, failure_limit=config.failure_limit, min_scored=min(2, config.samples_per_prompt),
               on_event=lambda event: session.run.event(**event)),
        running, gold, policy_learner, critic_learner,
        engine_of(reference) if by_reference and reference is not None else None,
    )  # fmt: skip


# One step -----------------------------------------------------------------------------------------------------------


def teaching(algorithm: Algorithm, batch: TokenBatch) -> TokenBatch:
    """The samples that are learnt from. Those that are only compared with are in no denominator."""
    if not getattr(algorithm.overlong, "leaves_out", False):
        return batch
    kept = [i for i, unfinished in enumerate(batch["unfinished"].tolist()) if not unfinished]
    if not kept:
        raise RewardError(
            f"all {len(batch)} completions were cut at max_tokens and left out", where="algorithm.overlong",
            why="nothing is left to learn from", fix="raise max_tokens, or set algorithm.overlong to soft_overlong",
        )  # fmt: skip
    return batch.select(kept)


def after_step(algorithm: Algorithm, state: dict[str, Tensor], measured: Metrics) -> dict[str, Tensor]:
    """The algorithm's state with what was seen while learning."""
    if not isinstance(algorithm.entropy_bonus, adaptive_entropy) or "entropy" not in measured:
        return state
    return state | algorithm.entropy_bonus.next_state(state, measured["entropy"].result())


def learn(actors: Actors, batch: TokenBatch, step: int, state: dict[str, Tensor]) -> Metrics:
    """`updates_per_step` updates of the policy, and of the critic on the same parts."""
    config, session = actors.config, actors.session
    warming_up = actors.critic is not None and step <= config.critic.warmup_steps
    collected: list[Metrics] = []
    check = Mismatch(session.dtype)
    for update, part in enumerate(split_updates(batch, config.updates_per_step, config.seed, step)):
        found: Metrics = {}
        if not warming_up:
            first = update == 0
            part = as_a_whole(actors, part, stream_seed(config.seed, f"tokens {update}", step), first)

            def loss(micro: TokenBatch, totals: BatchTotals, first: bool = first) -> tuple[Tensor, Metrics]:
                return rl_loss(actors, micro, totals, state, check if first else None)

            with session.timed("train"):
                found |= actors.policy_learner.step(part, loss)
        if actors.critic_learner is not None:
            with session.timed("critic"):
                measured = actors.critic_learner.step(part, lambda micro, totals: value_loss(actors, micro, totals))
            found |= {
                f"critic/{k}" if k in ("grad_norm", "lr", "loss_scale", "skipped") else k: v
                for k, v in measured.items()
                if k != "objective"
            }
        collected.append(found)
    give_back()
    merged = metrics.merge(collected)
    if not warming_up:
        merged |= check.report(step, batch, fresh=config.reference is None)
    return merged


def as_a_whole(actors: Actors, part: TokenBatch, seed: int, first: bool) -> TokenBatch:
    """What has to be known of a whole update before it is split into micro-batches.

    The policy is asked what it thinks of the tokens now, unless that is what was stored when they were sampled.
    """
    algorithm, session = actors.algorithm, actors.session
    tokens = algorithm.token_filter
    if tokens is None and algorithm.imitation is None:
        return part
    behavior = part["behavior_logps"]
    logps, old_logps, entropy = behavior, part.get("old_logps"), None
    sure = getattr(tokens, "needs_entropy", False)
    if tokens is not None and (sure or not first or old_logps is not None or session.dtype in HALF):
        with session.timed("look up"):
            outputs = policy_logps(
                actors.policy, part, budget=session.scoring, temperature=actors.config.temperature, entropy=sure
            )
        logps, entropy = outputs.logps.cpu(), None if outputs.entropy is None else outputs.entropy.cpu()
    found = update_columns(
        algorithm, logps=logps, old_logps=logps if old_logps is None else old_logps, behavior_logps=behavior,
        advantages=part["advantages"], scores=part["scores"], mask=part.mask, entropy=entropy, seed=seed,
    )  # fmt: skip
    return part.with_columns(**found)


def rl_loss(
    actors: Actors, micro: TokenBatch, totals: BatchTotals, state: dict[str, Tensor], check: Mismatch | None
) -> tuple[Tensor, Metrics]:
    outputs = actors.policy(micro, temperature=actors.config.temperature, entropy=True)
    if check is not None:
        check.add(outputs.logps, micro)
    return policy_loss(
        actors.algorithm, logps=outputs.logps, old_logps=micro.get("old_logps"),
        behavior_logps=micro["behavior_logps"], ref_logps=micro.get("ref_logps"), advantages=micro["advantages"],
        entropy=outputs.entropy, kept=micro.get("kept"), imitation=micro.get("imitation"), mask=micro.mask,
        totals=totals, state=state,
    )  # fmt: skip


def value_loss(actors: Actors, micro: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    assert actors.critic is not None
    assert actors.algorithm.critic is not None
    return critic_loss(
        actors.algorithm.critic, values=actors.critic(micro), returns=micro["returns"], old_values=micro["values"],
        mask=micro.mask, totals=totals,
    )  # fmt: skip


def split_updates(batch: TokenBatch, updates: int, seed: int, step: int) -> Iterator[TokenBatch]:
    """The batch in `updates` parts of whole groups, drawn at random by (seed, step)."""
    if updates == 1:
        yield batch
        return
    groups = batch.group.unique().tolist()
    random.Random(stream_seed(seed, "updates", step)).shuffle(groups)
    for part in range(updates):
        chosen = set(groups[part::updates])
        index = [i for i, group in enumerate(batch.group.tolist()) if group in chosen]
        if index:
            yield batch.select(index)
