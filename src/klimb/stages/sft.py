"""Supervised fine-tuning: the cold start. Demonstrations → the policy that everything later is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.config import StageConfig
from klimb.data.load import load_examples, load_prompts
from klimb.data.sampler import Sampler
from klimb.data.split import split_by_prompt
from klimb.metrics import Metrics
from klimb.models.faces import Policy, policy_logps
from klimb.models.packing import Budget
from klimb.objective import supervised
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, SupervisedConfig
from klimb.stages.evaluate import Judges, Measurement, answer_score
from klimb.stages.given import Data, Given
from klimb.stages.memory import of_supervised
from klimb.stages.models import Loaded, load_policy, prompt_room
from klimb.stages.task import WithTask
from klimb.types import Example


class Until(StageConfig):
    """Stop early, when sampled answers to the prompts of `data` score at least `at_least` on average."""

    data: Data
    reward: Given = "exact"
    at_least: float
    every: int = Field(25, ge=1)
    prompts: int = Field(500, ge=1)
    max_tokens: int = Field(64, ge=1)


class SftConfig(WithTask, SupervisedConfig):
    """One pass over 10,000–100,000 demonstrations at the table's rate is usual (arXiv 2411.15124, section 4)."""

    loss: Literal["nll", "dft"] = Field("nll", description="dft: tokens weigh what the policy gives them")
    batch_size: int = Field(64, ge=1, description="examples in an update")
    until: Until | None = None
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_supervised(self, context)


def batch_of(examples: Sequence[Example]) -> TokenBatch:
    rows = [[Row(e.prompt, e.completion, e.mask)] for e in examples]
    return TokenBatch.from_rows(rows, range(len(rows)), [e.id for e in examples])


def sft_loss(policy: Policy, batch: TokenBatch, totals: BatchTotals, loss: str = "nll") -> tuple[Tensor, Metrics]:
    """Mean loss of the trained tokens, nats per token: by default their negative log-likelihood."""
    return supervised.sft_loss(policy(batch).logps, batch.mask, totals, supervised.TOKEN_LOSSES[loss])


def train(config: SftConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    loaded = load_policy(session, config.model, config.lora, config.seed)
    max_length = min(config.max_tokens or loaded.backbone.context, loaded.backbone.context)
    data = session.read(load_examples, config.data, config, loaded.renderer, max_length)
    loaded.conversational = data.conversational
    training, held_out = split_by_prompt(data.items, config.eval_fraction, config.seed)
    if config.eval_data is not None:
        held_out = session.read(load_examples, config.eval_data, config, loaded.renderer, max_length, "eval_data").items
    steps = config.steps or max(1, round(config.epochs * len(training) / config.batch_size))

    learner = session.learner("policy", "sft", loaded.policy.trainable(), config.optimizer, steps)
    sampler = Sampler(len(training), config.batch_size, config.seed)
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    until = _early_stop(config, loaded)
    start, reached = 0, None
    if found := session.resume():
        start, reached = found.step, found.state["stage"]["reached"]
        sampler.restore(found.state["stage"]["sampler"])

    for step in session.steps(start, steps):
        if reached is not None:
            break
        batch = batch_of([training[i] for i in sampler.next_batch()])
        with session.timed("train"):
            measured = learner.step(batch, lambda micro, totals: sft_loss(loaded.policy, micro, totals, config.loss))
        measured["tokens"] = metrics.total(batch.totals.tokens)
        if held_out and (step % config.eval_every == 0 or step == steps):
            measured["eval/loss"] = _held_out_loss(loaded.policy, held_out, session.scoring)
        if until is not None and config.until and step % config.until.every == 0:
            score = until(step)
            measured["eval/score"] = metrics.ratio(score, 1.0)
            reached = step if score >= config.until.at_least else None
        session.end_step(
            step, steps, metrics.results(measured), every=config.checkpoint_every,
            state={"sampler": sampler.state(), "reached": reached},
        )  # fmt: skip
    if reached is not None:
        say(f"stopped at step {reached}: the wanted score is reached")

    loaded.save(run.model)
    evaluation = judges.evaluate(loaded.policy, loaded.policy, "evaluate") if judges else None
    return {"model": str(run.model), "steps": learner.steps, "evaluation": evaluation}


def _early_stop(config: SftConfig, loaded: Loaded) -> Any:
    if config.until is None:
        return None
    until, room = config.until, prompt_room(loaded.backbone.context, config.until.max_tokens)
    prompts = load_prompts(until.data, loaded.renderer, max_length=room, transcripts=config.transcripts).items
    chosen = prompts[: until.prompts]
    return lambda step: answer_score(loaded, chosen, until, config.seed, step)


@torch.no_grad()
def _held_out_loss(policy: Policy, examples: Sequence[Example], budget: Budget) -> metrics.Metric:
    batch = batch_of(examples)
    return metrics.mean(-policy_logps(policy, batch, budget=budget).logps, batch.mask.to(policy.backbone.device))
