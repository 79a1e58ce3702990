"""Direct preference optimisation: the same objective in closed form, fitted to pairs without sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.config import find_references
from klimb.data.load import load_preferences, split_by_prompt
from klimb.data.sampler import Sampler
from klimb.errors import KlimbError
from klimb.metrics import Metrics
from klimb.models.faces import Policy, policy_logps
from klimb.models.packing import Budget
from klimb.objective.preference import PreferenceLoss, known_start, parse_preference, preference_loss
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, SupervisedConfig
from klimb.stages.evaluate import Judges, Measurement
from klimb.stages.given import Given
from klimb.stages.memory import of_pairs
from klimb.stages.models import load_policy, load_reference
from klimb.stages.reward import batch_of
from klimb.types import Preference

_START_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative: how far the first loss may be from the value that π = π_ref has. 16 bits round sums of log-probs."""


class PreferenceConfig(SupervisedConfig):
    """β, and one epoch at a low rate, as in the paper (arXiv 2305.18290, appendix B)."""

    loss: Given = "dpo"
    reference: str | None = Field(None, description="model to stay near; default: where training starts")
    batch_size: int = Field(64, ge=1, description="pairs in an update")
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_pairs(self, context, reference=True)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not find_references(self.loss):
            try:
                parse_preference(self.loss)
            except ValueError as error:
                yield str(error)


def pair_loss(policy: Policy, loss: PreferenceLoss, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    return _loss_of(policy(batch).logps, loss, batch, totals)


def _loss_of(logps: Tensor, loss: PreferenceLoss, batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
    log_ratio = torch.where(batch.mask, logps - batch["ref_logps"], 0.0).sum(dim=1)
    tokens = batch.mask.sum(dim=1)
    return preference_loss(
        loss,
        chosen_log_ratio=log_ratio[0::2],
        rejected_log_ratio=log_ratio[1::2],
        chosen_tokens=tokens[0::2],
        rejected_tokens=tokens[1::2],
        pairs=totals.groups,
    )


def preview(config: PreferenceConfig) -> list[str]:
    return [f"{parse_preference(config.loss)!r}, {config.batch_size} pairs in an update"]


def train(config: PreferenceConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    loss = parse_preference(config.loss)
    session = Session.begin(config, run, interrupt, say)
    loaded = load_policy(session, config.model, config.lora, config.seed)
    reference = load_reference(session, loaded, config.reference)
    max_length = min(config.max_tokens or loaded.backbone.context, loaded.backbone.context)
    data = session.read(load_preferences, config.data, config, loaded.renderer, max_length)
    loaded.conversational = data.conversational
    training, held_out = split_by_prompt(data.items, config.eval_fraction, config.seed)
    if config.eval_data is not None:
        held_out = session.read(
            load_preferences, config.eval_data, config, loaded.renderer, max_length, "eval_data"
        ).items
    steps = config.steps or max(1, round(config.epochs * len(training) / config.batch_size))
    learner = session.learner("policy", "preference", loaded.policy.trainable(), config, config.optimizer, steps)
    sampler = Sampler(len(training), config.batch_size, config.seed)
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    start = 0
    if found := session.resume():
        start = found.step
        sampler.restore(found.state["stage"]["sampler"])

    for step in session.steps(start, steps):
        batch = batch_of([training[i] for i in sampler.next_batch()])
        with session.timed("reference"):
            batch = with_reference(reference, batch, session.scoring)
        with session.timed("train"):
            measured = learner.step(batch, lambda micro, totals: pair_loss(loaded.policy, loss, micro, totals))
        measured["tokens"] = metrics.total(batch.totals.tokens)
        if step == 1 and config.reference is None:
            _check_start(loss, measured["loss"].result(), session.dtype)
        if held_out and (step % config.eval_every == 0 or step == steps):
            measured |= _held_out(loaded.policy, reference, loss, held_out, session.scoring)
        session.end_step(
            step, steps, metrics.results(measured), every=config.checkpoint_every, state={"sampler": sampler.state()}
        )

    loaded.save(run.model)
    evaluation = judges.evaluate(loaded.policy, reference, "evaluate") if judges else None
    return {"model": str(run.model), "steps": learner.steps, "algorithm": repr(loss), "evaluation": evaluation}


def with_reference(reference: Policy, batch: TokenBatch, budget: Budget) -> TokenBatch:
    return batch.with_columns(ref_logps=policy_logps(reference, batch, budget=budget).logps)


def _held_out(
    policy: Policy, reference: Policy, loss: PreferenceLoss, pairs: Sequence[Preference], budget: Budget
) -> Metrics:
    batch = with_reference(reference, batch_of(pairs), budget).to(policy.backbone.device)
    _, measured = _loss_of(policy_logps(policy, batch, budget=budget).logps, loss, batch, batch.totals)
    return {f"eval/{name}": measured[name] for name in ("loss", "accuracy")}


def _check_start(loss: PreferenceLoss, first: float, dtype: torch.dtype) -> None:
    """At the first update policy and reference are the same: the loss is known, so a wrong reference shows."""
    known = known_start(loss)
    if abs(first - known) > _START_TOLERANCE[dtype] * max(known, 1.0):
        raise KlimbError(
            f"the first loss is {first:.6g} where π = π_ref gives {known:.6g}", where="preference",
            why="the reference is not the model that training starts from",
            fix="name the reference that you mean with reference=DIR",
        )  # fmt: skip
