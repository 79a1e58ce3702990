"""Direct preference optimisation: the same objective in closed form, fitted to pairs without sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.config import find_references
from klimb.data.feedback import load_feedback
from klimb.data.sampler import Sampler
from klimb.data.split import split_by_prompt
from klimb.errors import DataError, KlimbError
from klimb.metrics import Metrics
from klimb.models.faces import Policy, policy_log_collisions, policy_logps
from klimb.objective.preference import (
    Completions,
    Needs,
    Pairs,
    PreferenceLoss,
    known_start,
    needs_of,
    parse_preference,
    preference_loss,
    statistics_of,
)
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, SupervisedConfig, stream_seed
from klimb.stages.evaluate import Judges, Measurement
from klimb.stages.feedback import CHOSEN, GOLD, REJECTED, batch_of, mismatched
from klimb.stages.given import Given
from klimb.stages.memory import of_pairs
from klimb.stages.models import Loaded, load_policy, load_reference
from klimb.stages.reference import ReferenceLogps, reference_facts, reference_logps
from klimb.stages.task import WithTask
from klimb.types import Labelled
from klimb.watch.displacement import Displacement

_START_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative: how far the first loss may be from the value that π = π_ref has. 16 bits round sums of log-probs."""


class PreferenceConfig(WithTask, SupervisedConfig):
    """β, and one epoch at a low rate, as in the paper (arXiv 2305.18290, appendix B)."""

    loss: Given = "dpo"
    reference: str | None = Field(None, description="model to stay near; default: where training starts")
    measure_drift: bool = Field(False, description="log the drift from the reference even where the loss has none")
    batch_size: int = Field(64, ge=1, description="pairs (kto, bco: completions) in an update")
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_pairs(self, context, reference=find_references(self.loss) != [] or self.compares)

    @property
    def compares(self) -> bool:
        """Is a reference needed?"""
        return self.measure_drift or needs_of(parse_preference(self.loss)).reference

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if find_references(self.loss):
            return  # of a recipe: known when the stage begins
        try:
            needs = needs_of(parse_preference(self.loss))
        except ValueError as error:
            yield str(error)
            return
        if self.reference is not None and not (needs.reference or self.measure_drift):
            yield f"reference: loss={self.loss} has none; leave it out, or set measure_drift=true to log the drift"
        if self.measure_drift and needs.reference:
            yield f"measure_drift: loss={self.loss} has a reference and logs the drift anyway; leave it out"


@dataclass
class Update:
    """What turns a batch of items into a loss: once over the whole update, then part by part."""

    policy: Policy
    loss: PreferenceLoss
    session: Session
    reference: Policy | None = None
    """Only where log-probs of it are computed update by update."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """What the loss remembers between updates."""

    @property
    def needs(self) -> Needs:
        return needs_of(self.loss)

    def prepare(
        self, items: Sequence[Any], known: ReferenceLogps | None, places: Sequence[int], seed: int
    ) -> tuple[TokenBatch, dict[str, Tensor], dict[str, Tensor]]:
        """The batch with all its columns, the statistics that are scalars, and the loss's state after this update.

        known: the reference's log-probs, those of `items` at `places`; None: to be computed here, or not needed.
        """
        batch = batch_of(items)
        if known is not None:
            batch = batch.with_columns(ref_logps=known.of(places, batch.mask))
        elif self.reference is not None:
            with self.session.timed("reference"):
                logps = policy_logps(self.reference, batch, budget=self.session.scoring).logps
            batch = batch.with_columns(ref_logps=logps)
        if not hasattr(self.loss, "statistics"):
            return batch, {}, {}
        with self.session.timed("statistics"):
            return with_statistics(self, batch, seed)

    def part(self, fixed: dict[str, Tensor], batch: TokenBatch, totals: BatchTotals) -> tuple[Tensor, Metrics]:
        return pair_loss(self.policy, self.loss, batch, totals, fixed)


def pair_loss(
    policy: Policy, loss: PreferenceLoss, batch: TokenBatch, totals: BatchTotals, fixed: dict[str, Tensor] | None = None
) -> tuple[Tensor, Metrics]:
    return preference_loss(loss, pairs_of(batch, policy(batch).logps, fixed or {}), totals.groups)


def pairs_of(batch: TokenBatch, logps: Tensor, fixed: dict[str, Tensor], more: Tensor | None = None) -> Pairs:
    """fixed: statistics that are scalars; those of pairs are columns `given.NAME` of the batch. more: collisions."""

    def side(which: int) -> Completions:
        here = batch["side"] == which
        of = [None if column is None else column[here] for column in (batch.get("ref_logps"), more)]
        return Completions(logps[here], of[0], batch.mask[here], of[1])

    chosen = batch["side"] == CHOSEN
    given = {name.removeprefix("given."): column[chosen] for name, column in batch.columns.items() if
             name.startswith("given.")}  # fmt: skip
    return Pairs(side(CHOSEN), side(REJECTED), side(GOLD), None, {**fixed, **given})


def with_statistics(
    update: Update, batch: TokenBatch, seed: int
) -> tuple[TokenBatch, dict[str, Tensor], dict[str, Tensor]]:
    """The loss's statistics over the whole update, from passes without gradient."""
    needs, budget = update.needs, update.session.scoring
    batch = batch.to(update.policy.backbone.device)
    logps = policy_logps(update.policy, batch, budget=budget).logps
    more = policy_log_collisions(update.policy, batch, budget=budget) if needs.collisions else None
    whole = pairs_of(batch, logps, {}, more)
    if needs.mismatched:
        assert update.reference is not None
        others = mismatched(batch, update.policy.backbone.context)
        if len(others):
            own, theirs = (
                policy_logps(each, others, budget=budget).logps for each in (update.policy, update.reference)
            )
            marked = others.mask.to(own.device)
            whole = Pairs(whole.chosen, whole.rejected, whole.gold, torch.where(marked, own - theirs, 0.0).sum(dim=1))
    given, state = statistics_of(update.loss, whole, update.state, seed)
    columns = {f"given.{name}": value.to(logps)[batch.group] for name, value in given.items() if value.ndim}
    fixed = {name: value.to(logps.device) for name, value in given.items() if not value.ndim}
    return batch.with_columns(**columns), fixed, state


def preview(config: PreferenceConfig) -> list[str]:
    loss = parse_preference(config.loss)
    units = "completions" if needs_of(loss).data == "labels" else "pairs"
    return [f"{loss!r}, {config.batch_size} {units} in an update"]


def train(config: PreferenceConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    loss = parse_preference(config.loss)
    session = Session.begin(config, run, interrupt, say)
    loaded = load_policy(session, config.model, config.lora, config.seed)
    training, held_out = _read(config, session, loaded, needs_of(loss))
    steps = config.steps or max(1, round(config.epochs * len(training) / config.batch_size))
    update = Update(loaded.policy, loss, session)
    known, known_held_out = _compare(config, update, loaded, training, held_out, steps)
    learner = session.learner("policy", "preference", loaded.policy.trainable(), config.optimizer, steps)
    sampler = Sampler(len(training), config.batch_size, config.seed)
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    displacement = Displacement()
    start = 0
    if found := session.resume():
        start, update.state = found.step, found.tensors["state"]
        sampler.restore(found.state["stage"]["sampler"])
        displacement = Displacement(**found.state["stage"].get("displacement", {}))

    for step in session.steps(start, steps):
        places = sampler.next_batch()
        seed = stream_seed(config.seed, "preference", step)
        batch, fixed, state = update.prepare([training[i] for i in places], known, places, seed)
        with session.timed("train"):
            measured = learner.step(batch, partial(update.part, fixed))
        update.state = state
        measured["tokens"] = metrics.total(batch.totals.tokens)
        if step == 1 and config.reference is None:
            _check_start(loss, measured["loss"].result(), session.dtype)
        if held_out and (step % config.eval_every == 0 or step == steps):
            measured |= _held_out(update, held_out, known_held_out)
        plain = metrics.results(measured)
        if alarm := displacement.look(plain["chosen_logps"], plain.get("chosen_log_ratio")):
            session.say(alarm)
            run.event("displacement", alarm)
        session.end_step(
            step, steps, plain, every=config.checkpoint_every, tensors=update.state,
            state={"sampler": sampler.state(), "displacement": displacement.state()},
        )  # fmt: skip

    loaded.save(run.model)
    evaluation = None
    if judges:
        reference = update.reference or load_reference(session, loaded, config.reference or config.model)
        evaluation = judges.evaluate(loaded.policy, reference, "evaluate")
    return {"model": str(run.model), "steps": learner.steps, "algorithm": repr(loss), "evaluation": evaluation}


def _read(
    config: PreferenceConfig, session: Session, loaded: Loaded, needs: Needs
) -> tuple[Sequence[Any], Sequence[Any]]:
    """What is trained on, and what is held out."""
    max_length = min(config.max_tokens or loaded.backbone.context, loaded.backbone.context)
    load = partial(load_feedback, needs.data)
    data = session.read(load, config.data, config, loaded.renderer, max_length)
    loaded.conversational = data.conversational
    training, held_out = split_by_prompt(data.items, config.eval_fraction, config.seed)
    if config.eval_data is not None:
        held_out = session.read(load, config.eval_data, config, loaded.renderer, max_length, "eval_data").items
    if needs.data == "labels":
        _check_labels(training, str(config.loss), data.report.source)
    return training, held_out


def _check_labels(items: Sequence[Labelled], loss: str, source: str) -> None:
    first = items[0].label
    if all(item.label == first for item in items):
        raise DataError(
            f"every completion is labelled {str(first).lower()}", where=source,
            why=f"loss={loss} tells desirable completions from undesirable ones",
            fix="add completions of the other label" + (", or use sft on these" if first else ""),
        )  # fmt: skip


def _compare(
    config: PreferenceConfig,
    update: Update,
    loaded: Loaded,
    training: Sequence[Any],
    held_out: Sequence[Any],
    steps: int,
) -> tuple[ReferenceLogps | None, ReferenceLogps | None]:
    """The reference's log-probs on both parts of the data, where each is looked at more than once: at least an epoch.

    Else they are computed update by update, by the reference in `update`. A loss of mismatched completions needs it
    in any case.
    """
    if not config.compares:
        return None, None
    session = update.session
    once = session.run.decide("reference_logps", lambda: _once(steps, config, len(training)))
    held: list[Policy] = []

    def reference() -> Policy:
        if not held:
            held.append(load_reference(session, loaded, config.reference))
        return held[0]

    if once == "each update":
        update.reference = reference()
        return None, None
    if update.needs.mismatched:
        update.reference = reference()
    backbone = loaded.backbone
    how = [loaded.base_in_4bit, backbone.peft is not None, backbone.started_from_adapter, loaded.policy.own_head]
    facts = reference_facts(session, config.model, config.reference or config.model, how)

    def of(items: Sequence[Any]) -> ReferenceLogps | None:
        return reference_logps(session, items, batch_of, facts, reference) if len(items) else None

    return of(training), of(held_out)


def _once(steps: int, config: PreferenceConfig, items: int) -> str:
    return "once" if steps * config.batch_size >= items else "each update"


def _held_out(update: Update, items: Sequence[Any], known: ReferenceLogps | None) -> Metrics:
    batch, fixed, _ = update.prepare(items, known, range(len(items)), 0)
    batch = batch.to(update.policy.backbone.device)
    found = policy_logps(update.policy, batch, budget=update.session.scoring).logps
    _, measured = preference_loss(update.loss, pairs_of(batch, found, fixed), batch.totals.groups)
    return {f"eval/{name}": measured[name] for name in ("loss", "accuracy")}


def _check_start(loss: PreferenceLoss, first: float, dtype: torch.dtype) -> None:
    """At the first update policy and reference are the same: the loss is known, so a wrong reference shows."""
    known = known_start(loss)
    if known is not None and abs(first - known) > _START_TOLERANCE[dtype] * max(known, 1.0):
        raise KlimbError(
            f"the first loss is {first:.6g} where π = π_ref gives {known:.6g}", where="preference",
            why="the reference is not the model that training starts from",
            fix="name the reference that you mean with reference=DIR",
        )  # fmt: skip
