"""Reinforcement learning: prompt → rollout → reward → advantage → loss → step → weights back → metrics.

Which algorithm is a value from the table; nothing below asks for its name. A critic, where the algorithm has one, is
a second learner stepped on the same batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch, pad_tokens
from klimb.config import StageConfig, find_references
from klimb.data.load import load_prompts
from klimb.data.sampler import Sampler
from klimb.errors import RewardError
from klimb.metrics import Metrics
from klimb.models.faces import Critic, Policy, critic_values, policy_logps
from klimb.objective.algorithms import Algorithm, validate
from klimb.objective.credit import assign_credit
from klimb.objective.critic import critic_loss
from klimb.objective.policy_loss import policy_loss
from klimb.objective.spec import describe, parse_algorithm
from klimb.rewards.normalise import Moments, Normalised
from klimb.rewards.protocol import Reward
from klimb.rewards.scorer import Scorer, dry_run
from klimb.rollout.engine import Request, RolloutEngine, generate
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.learner import Learner, Optimizer
from klimb.runtime.memory import give_back
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.samples import sample_records
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, TrainConfig, stream_seed
from klimb.stages.evaluate import Judges, Measurement, add_gold, batch_of, local_engine, open_reward
from klimb.stages.given import Given
from klimb.stages.memory import of_rl
from klimb.stages.mismatch import Mismatch
from klimb.stages.models import Loaded, load_critic, load_policy, load_reference, load_texts, prompt_room
from klimb.types import Group, Prompt


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

    @property
    def policy(self) -> Policy:
        return self.loaded.policy

    def progress(self) -> dict[str, Any]:
        """What a checkpoint needs besides weights and the algorithm's state."""
        moments = [list(part.moments) for part in self.running if part.moments is not None]
        return {"sampler": self.sampler.state(), "reward_counts": dict(self.scorer.counts), "reward_moments": moments}

    def restore(self, progress: dict[str, Any]) -> None:
        self.sampler.restore(progress["sampler"])
        self.scorer.counts = progress["reward_counts"]
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
        actors.restore(found.state["stage"])

    for step in session.steps(start, config.steps):
        actors.engine.update_weights(step)
        groups, refused, counted = rollout(actors, step)
        batch = look_up(actors, experience(groups), stale=is_stale(groups, step))
        credit = assign_credit(
            actors.algorithm, scores=batch["scores"], mask=batch.mask, group=batch.group,
            logps=batch["behavior_logps"], ref_logps=batch.get("ref_logps"), values=batch.get("values"), state=state,
        )  # fmt: skip
        batch = batch.with_columns(advantages=credit.advantages)
        if credit.returns is not None:
            batch = batch.with_columns(returns=credit.returns)
        measured = learn(actors, batch, step, state)
        state = credit.state
        session.end_step(
            step, config.steps, {**metrics.results(credit.metrics | measured), **counted},
            every=config.checkpoint_every, state=actors.progress(), tensors=state,
            samples=sample_records(groups, refused),
        )  # fmt: skip

    actors.loaded.save(run.model)
    reference = actors.reference or (load_reference(session, actors.loaded, config.model) if judges else None)
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
    reference = load_reference(session, loaded, config.reference) if needs.ref or config.measure_kl else None
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
    return Actors(
        config, session, algorithm, loaded, reference, critic, data.items,
        Sampler(len(data.items), config.prompts_per_step, config.seed),
        local_engine(loaded.policy, loaded, data.items, rows, session.on_tokens, session.say),
        Scorer(reward, failure_limit=config.failure_limit, min_scored=min(2, config.samples_per_prompt),
               on_event=lambda event: session.run.event(**event)),
        running, gold, policy_learner, critic_learner,
    )  # fmt: skip


# One step -----------------------------------------------------------------------------------------------------------


def rollout(actors: Actors, step: int) -> tuple[list[Group], list[Group], dict[str, float]]:
    """Scored groups for one batch, those that the algorithm's sampling refused, and counts.

    Refused groups are replaced by further prompts, `max_refills` times; what is there then is trained on.
    """
    config, session = actors.config, actors.session
    params = SamplingParams(config.max_tokens, actors.loaded.stop_tokens(actors.prompts), config.temperature)
    kept: list[Group] = []
    refused: list[Group] = []
    drawn: list[Group] = []
    counts: dict[str, float] = {}
    for refill in range(config.max_refills + 1):
        prompts = [actors.prompts[i] for i in actors.sampler.next_batch()][: config.prompts_per_step - len(kept)]
        seed = stream_seed(config.seed, f"rollout {refill}", step)
        with session.timed("rollout"):
            groups = generate(actors.engine, requests(prompts, config.samples_per_prompt, params, seed))
        with session.timed("reward"):
            report = actors.scorer.score(groups)
            if actors.gold is not None:
                add_gold(actors.gold, groups, lambda event: session.run.event(**event))
        drawn += groups
        counts["samples/dropped"] = counts.get("samples/dropped", 0) + report.dropped_samples
        wanted = actors.algorithm.sampling
        for group in report.groups:
            teaches = wanted is None or wanted([float(s.score or 0.0) for s in group.samples])
            (kept if teaches else refused).append(group)
        for key, value in report.metrics.items():
            if key not in ("reward/mean", "reward/std"):
                counts[key] = value + (counts.get(key, 0.0) if key.startswith("verdict/") else 0.0)
        if wanted is None or len(kept) >= config.prompts_per_step:
            break
    if not kept:
        raise RewardError(
            f"step {step}: no group to learn from out of {len(drawn)}", where="reward",
            why="every group was unscored or had equal scores",
            fix="look at samples/ and events.jsonl; use easier or harder prompts, or another sampling",
        )  # fmt: skip
    if actors.algorithm.sampling is not None:
        counts["groups/refused"] = len(refused)
        if len(kept) < config.prompts_per_step:
            session.run.event("too_few_groups", _too_few(config, len(kept), len(refused)))
    return kept, refused, {**counts, **_sample_counts(drawn, kept)}


def _too_few(config: RlConfig, kept: int, refused: int) -> str:
    return (
        f"trained on {kept} of {config.prompts_per_step} groups: after max_refills={config.max_refills} further rounds "
        f"of prompts {refused} groups were refused, all samples of each scored the same; use easier or harder prompts, "
        "or raise max_refills"
    )


def requests(prompts: Sequence[Prompt], samples: int, params: SamplingParams, seed: int) -> list[Request]:
    """One request a prompt; a prompt that comes again in the batch goes on counting its samples, for new randomness."""
    seen: Counter[str] = Counter()
    made = []
    for prompt in prompts:
        made.append(Request(prompt, samples, params, seed, first=seen[prompt.id] * samples))
        seen[prompt.id] += 1
    return made


def _sample_counts(drawn: Sequence[Group], kept: Sequence[Group]) -> dict[str, float]:
    samples = [s for g in drawn for s in g.samples]
    lengths = [sum(s.mask) for s in samples]
    golds = [g for g in (s.rewards.get("gold") for s in samples) if g is not None]
    found = {
        "length/mean": sum(lengths) / len(lengths),
        "length/max": float(max(lengths)),
        "finish/length": sum(s.finish == "length" for s in samples) / len(samples),
        "groups/drawn": float(len(drawn)),
        "groups/kept": float(len(kept)),
        "tokens": float(sum(lengths)),
    }
    if golds:
        found["gold/mean"] = sum(golds) / len(golds)
    return found


def experience(groups: Sequence[Group]) -> TokenBatch:
    """Groups → one batch with what was recorded while sampling: behaviour log-probs and scores."""
    batch = batch_of(groups)
    samples = [s for g in groups for s in g.samples]
    return batch.with_columns(
        behavior_logps=pad_tokens([s.logps for s in samples], batch.mask),
        scores=torch.tensor([s.score for s in samples], dtype=torch.float64),
    )


def is_stale(groups: Sequence[Group], version: int) -> bool:
    """Was a token sampled by other weights than the present ones?"""
    return any(v != version for g in groups for s in g.samples for segment in s.segments for v in segment.versions)


def look_up(actors: Actors, batch: TokenBatch, stale: bool) -> TokenBatch:
    """Add what the algorithm needs from frozen weights or from before the update: references, values, old log-probs.

    The first update on fresh samples needs no old log-probs: the policy is the one that sampled, and its ratio is 1
    to the bit. Further updates compare with the behaviour log-probs, which in fp32 are the trainer's own to 1e-6; in
    bfloat16 they are off by more than a clip range would forgive, so there a pass before the update takes their place.
    """
    config, budget = actors.config, actors.session.scoring
    with actors.session.timed("look up"):
        if actors.reference is not None:
            outputs = policy_logps(actors.reference, batch, budget=budget, temperature=config.temperature)
            batch = batch.with_columns(ref_logps=outputs.logps.cpu())
        if actors.critic is not None:
            batch = batch.with_columns(values=critic_values(actors.critic, batch, budget=budget).cpu())
        if stale or (config.updates_per_step > 1 and actors.session.dtype != torch.bfloat16):
            batch = batch.with_columns(old_logps=batch["behavior_logps"])
        elif config.updates_per_step > 1 and actors.algorithm.needs.old_logps:
            outputs = policy_logps(actors.policy, batch, budget=budget, temperature=config.temperature)
            batch = batch.with_columns(old_logps=outputs.logps.cpu())
    return batch


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

            def loss(micro: TokenBatch, totals: BatchTotals, first: bool = first) -> tuple[Tensor, Metrics]:
                return rl_loss(actors, micro, totals, state, check if first else None)

            with session.timed("train"):
                found |= actors.policy_learner.step(part, loss)
        if actors.critic_learner is not None:
            with session.timed("critic"):
                measured = actors.critic_learner.step(part, lambda micro, totals: value_loss(actors, micro, totals))
            found |= {
                f"critic/{k}" if k in ("grad_norm", "lr") else k: v for k, v in measured.items() if k != "objective"
            }
        collected.append(found)
    give_back()
    merged = metrics.merge(collected)
    if not warming_up:
        merged |= check.report(step, batch, fresh=config.reference is None)
    return merged


def rl_loss(
    actors: Actors, micro: TokenBatch, totals: BatchTotals, state: dict[str, Tensor], check: Mismatch | None
) -> tuple[Tensor, Metrics]:
    outputs = actors.policy(micro, temperature=actors.config.temperature, entropy=True)
    if check is not None:
        check.add(outputs.logps, micro)
    return policy_loss(
        actors.algorithm, logps=outputs.logps, old_logps=micro.get("old_logps"),
        behavior_logps=micro["behavior_logps"], ref_logps=micro.get("ref_logps"), advantages=micro["advantages"],
        entropy=outputs.entropy, mask=micro.mask, totals=totals, state=state,
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
