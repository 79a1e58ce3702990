"""Preference optimisation on the policy's own samples: draw two, let a reward rank them, learn from the pair.

Online DPO (Guo et al. 2024, arXiv 2402.04792) compares two samples of the policy. XPO (Xie et al. 2024, arXiv
2405.21046, Algorithm 1) compares one of the policy with one of the reference, and makes what the reference says less
likely by `optimism`, so that the policy looks where the reference does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.config import find_references
from klimb.data.load import load_prompts
from klimb.data.sampler import Sampler
from klimb.errors import RewardError
from klimb.metrics import Metrics
from klimb.objective.preference import needs_of, parse_preference, preference_loss
from klimb.rewards.scorer import Scorer
from klimb.rollout.engine import RolloutEngine, generate
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.memory import give_back
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.samples import sample_records
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, TrainConfig, stream_seed
from klimb.stages.evaluate import Judges, Measurement, add_gold, local_engine, open_reward
from klimb.stages.experience import requests
from klimb.stages.given import Given
from klimb.stages.memory import of_online_pairs
from klimb.stages.models import load_policy, load_reference, load_texts, prompt_room
from klimb.stages.preference import Update, pairs_of
from klimb.stages.task import WithTask
from klimb.types import Group, Preference, Prompt


class OnlinePreferenceConfig(WithTask, TrainConfig):
    """Two completions of each prompt a step; a tie teaches nothing and is left out."""

    from_task: ClassVar = ("data", "columns", "reward", "max_tokens", "measure")

    reward: Given
    gold: Given = Field(None, description="held-out judge of the same completions; training never sees it")
    loss: Given = "dpo"
    opponent: Literal["policy", "reference"] = Field("policy", description="who writes the second completion")
    optimism: float = Field(0.0, ge=0, description="XPO's α: how much log π of the reference's completion costs")
    reference: str | None = Field(None, description="π_ref; default: where training starts")
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(64, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0)
    failure_limit: float = Field(0.05, ge=0, le=1, description="share of rows whose reward may fail")
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_online_pairs(self, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.optimism and self.opponent != "reference":
            yield "optimism: it makes the reference's completions less likely; set opponent=reference"
        if find_references(self.loss):
            return
        try:
            needs = needs_of(parse_preference(self.loss))
        except ValueError as error:
            yield str(error)
            return
        if needs.data != "pairs":
            yield f"loss={self.loss}: it learns from {needs.data}, and here are pairs; use dpo, ipo or another of pairs"


def preview(config: OnlinePreferenceConfig) -> list[str]:
    other = "two samples of the policy" if config.opponent == "policy" else "a sample of the policy and one of π_ref"
    return [f"{parse_preference(config.loss)!r} on {other}, {config.prompts_per_step} prompts a step"]


def train(config: OnlinePreferenceConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    renderer, context = load_texts(config.model)
    room = prompt_room(context, config.max_tokens)
    data = session.read(load_prompts, config.data, config, renderer, min(config.max_prompt_tokens or room, room))
    reward = open_reward(config.reward, session, renderer)
    gold = None if config.gold is None else open_reward(config.gold, session, renderer)
    loaded = load_policy(session, config.model, config.lora, config.seed, renderer)
    loaded.conversational = data.conversational
    reference = load_reference(session, loaded, config.reference)
    update = Update(loaded.policy, parse_preference(config.loss), session, reference)
    learner = session.learner("policy", "preference", loaded.policy.trainable(), config.optimizer, config.steps)
    engine = partial(local_engine, loaded=loaded, prompts=data.items, on_tokens=session.on_tokens, say=session.say)
    engines = [engine(loaded.policy), engine(reference)] if config.opponent == "reference" else [engine(loaded.policy)]
    params = SamplingParams(config.max_tokens, loaded.stop_tokens(data.items), config.temperature)
    scorer = Scorer(reward, failure_limit=config.failure_limit, on_event=lambda event: run.event(**event))
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    sampler = Sampler(len(data.items), config.prompts_per_step, config.seed)
    start = 0
    if found := session.resume():
        start, update.state = found.step, found.tensors["state"]
        sampler.restore(found.state["stage"]["sampler"])
        scorer.counts = found.state["stage"]["reward_counts"]

    for step in session.steps(start, config.steps):
        prompts = [data.items[i] for i in sampler.next_batch()]
        with session.timed("rollout"):
            groups = drawn(engines, prompts, params, config.seed, step)
        with session.timed("reward"):
            report = scorer.score(groups)
            if gold is not None:
                add_gold(gold, groups, lambda event: run.event(**event))
        items, theirs = ranked(report.groups)
        measured: Metrics = {}
        if items:
            batch, fixed, state = update.prepare(items, None, (), stream_seed(config.seed, "preference", step))
            batch = batch.with_columns(theirs=torch.tensor([side for pair in theirs for side in pair]))
            with session.timed("train"):
                measured = learner.step(batch, partial(part, update, fixed, config.optimism))
            update.state = state
            give_back()
        elif learner.steps == 0:
            raise RewardError(
                f"step {step}: no pair to learn from out of {len(groups)}", where="reward",
                why="both completions of each prompt scored the same, or had no score",
                fix="use a reward that tells completions apart, or more prompts_per_step",
            )  # fmt: skip
        else:
            run.event(
                "no_pair", f"no update: in all {len(groups)} pairs both completions scored the same, or not at all"
            )
        session.end_step(
            step, config.steps,
            {**metrics.results(measured), **report.metrics, **_counts(groups, items)},
            every=config.checkpoint_every, tensors=update.state,
            state={"sampler": sampler.state(), "reward_counts": dict(scorer.counts)},
            samples=sample_records(groups, []),
        )  # fmt: skip

    loaded.save(run.model)
    evaluation = judges.evaluate(loaded.policy, reference, "evaluate") if judges else None
    return {"model": str(run.model), "steps": learner.steps, "algorithm": preview(config)[0], "evaluation": evaluation}


def drawn(
    engines: Sequence[RolloutEngine], prompts: Sequence[Prompt], params: SamplingParams, seed: int, step: int
) -> list[Group]:
    """Two completions of each prompt: both by the only engine, or one by each."""
    engines[0].update_weights(step)
    each = 2 // len(engines)
    found = [
        generate(engine, requests(prompts, each, params, stream_seed(seed, f"rollout {place}", step)))
        for place, engine in enumerate(engines)
    ]
    groups = []
    for parts in zip(*found, strict=True):
        samples = [sample for group in parts for sample in group.samples]
        for index, sample in enumerate(samples):
            sample.index = index
        groups.append(Group(parts[0].prompt, samples))
    return groups


def ranked(groups: Sequence[Group]) -> tuple[list[Preference], list[tuple[bool, bool]]]:
    """The pairs of which one is better, and which of chosen and rejected is the second completion."""
    items, second = [], []
    for place, group in enumerate(groups):
        first, other = group.samples
        if first.score is None or other.score is None or first.score == other.score or first.tokens == other.tokens:
            continue
        better, worse = (first, other) if first.score > other.score else (other, first)
        items.append(
            Preference(
                f"{group.prompt.id}/{place}", group.prompt.tokens, better.tokens, worse.tokens, better.mask, worse.mask
            )
        )
        second.append((better is other, worse is other))
    return items, second


def part(
    update: Update, fixed: dict[str, Tensor], optimism: float, batch: TokenBatch, totals: BatchTotals
) -> tuple[Tensor, Metrics]:
    """The loss of pairs, and XPO's α · log π of the second completions, a mean over pairs."""
    logps = update.policy(batch).logps
    loss, found = preference_loss(update.loss, pairs_of(batch, logps, fixed), totals.groups)
    if optimism:
        theirs = torch.where(batch.mask & batch["theirs"][:, None], logps, 0.0).sum(dim=1)
        loss = loss + optimism * theirs.sum() / max(totals.groups, 1)
    return loss, found


def _counts(groups: Sequence[Group], items: Sequence[Preference]) -> dict[str, float]:
    lengths = [len(sample.tokens) for group in groups for sample in group.samples]
    golds = [g for group in groups for s in group.samples if (g := s.rewards.get("gold")) is not None]
    told = {"length/mean": sum(lengths) / len(lengths), "tokens": float(sum(lengths)), "pairs": float(len(items)),
            "groups/drawn": float(len(groups))}  # fmt: skip
    return told | ({"gold/mean": sum(golds) / len(golds)} if golds else {})
