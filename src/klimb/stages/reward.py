"""The reward model: fits r to comparisons by Bradley–Terry, so that it can stand in for whoever compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, Row, TokenBatch
from klimb.data.load import load_preferences, split_by_prompt
from klimb.data.render import Renderer
from klimb.data.sampler import Sampler
from klimb.errors import RewardError
from klimb.metrics import Metrics
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.load import check_vocabulary, save_classifier
from klimb.models.packing import Budget
from klimb.models.place import load_tokenizer
from klimb.objective.critic import reward_loss
from klimb.rewards.rules import plain_text
from klimb.runtime.plan import Work
from klimb.runtime.ranks import rank
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages import baselines
from klimb.stages.baselines import Baseline
from klimb.stages.common import Session, SupervisedConfig
from klimb.stages.given import Given
from klimb.stages.memory import of_pairs
from klimb.stages.models import load_reward_model, model_folder
from klimb.types import Preference


class RewardConfig(SupervisedConfig):
    """One epoch; more make a reward model sure of itself (arXiv 2203.02155, appendix C.2)."""

    batch_size: int = Field(64, ge=1, description="pairs in an update")
    centering: float = Field(0.01, ge=0, description="arXiv 2312.09244: keeps scores near zero")
    reference: Given = Field(None, description="prompts with completions: scores are scaled to mean 0, std 1 on them")
    min_accuracy: float = Field(0.0, ge=0, le=1, description="stop here when held-out accuracy is below")

    until_accuracy: float | None = Field(
        None, gt=0.5, le=1, description="training ends when held-out accuracy reaches it, every `eval_every` steps"
    )
    baselines: list[Baseline] = Field(
        [], description="what to measure beside it, fitted and held out on the same pairs: length, bag_of_words"
    )

    def work(self, context: int) -> Work:
        return of_pairs(self, context, classifier=True)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        for key in ("min_accuracy", "until_accuracy", "baselines"):
            if self.given(key) and not (self.given("eval_data") or self.given("eval_fraction")):
                yield f"{key}: nothing is held out to measure it on; give eval_data or eval_fraction"
        if self.lora is not None and self.lora.base == "4bit":
            yield ("lora.base=4bit: a reward model is saved merged, and its weights in 4 bits would be rounded again; "
                   "leave it out, checkpointing=on and a smaller token_budget save memory too")  # fmt: skip


def batch_of(pairs: Sequence[Preference]) -> TokenBatch:
    """2P samples, chosen before rejected; a pair is a group and stays together."""
    rows, groups, ids = [], [], []
    for place, pair in enumerate(pairs):
        rows += [
            [Row(pair.prompt, pair.chosen, pair.chosen_mask)],
            [Row(pair.prompt, pair.rejected, pair.rejected_mask)],
        ]
        groups += [place, place]
        ids += [f"{pair.id}/chosen", f"{pair.id}/rejected"]
    batch = TokenBatch.from_rows(rows, groups, ids, whole_groups=True)
    return batch.with_columns(margin=torch.tensor([pair.margin for pair in pairs for _ in range(2)]))


def pair_loss(model: RewardModel, batch: TokenBatch, totals: BatchTotals, centering: float) -> tuple[Tensor, Metrics]:
    scores = model(batch)
    return reward_loss(
        scores[0::2], scores[1::2], margin=batch["margin"][0::2], centering=centering, pairs=totals.groups
    )


def train(config: RewardConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    tokenizer = load_tokenizer(config.model)
    renderer = Renderer(tokenizer)
    model = load_reward_model(session, config.model, config.lora, config.seed)
    check_vocabulary(model.backbone.model, tokenizer, config.model)
    max_length = min(config.max_tokens or model.backbone.context, model.backbone.context)
    data = session.read(load_preferences, config.data, config, renderer, max_length)
    if data.conversational:
        tokenizer.chat_template = renderer.template.source
    training, held_out = split_by_prompt(data.items, config.eval_fraction, config.seed)
    if config.eval_data is not None:
        held_out = session.read(load_preferences, config.eval_data, config, renderer, max_length, "eval_data").items
    steps = config.steps or max(1, round(config.epochs * len(training) / config.batch_size))
    learner = session.learner("reward", "reward", model.trainable(), config, config.optimizer, steps)
    sampler = Sampler(len(training), config.batch_size, config.seed)
    start, reached = 0, None
    if found := session.resume():
        start, reached = found.step, found.state["stage"]["reached"]
        sampler.restore(found.state["stage"]["sampler"])

    for step in session.steps(start, steps):
        if reached is not None:
            break
        batch = batch_of([training[i] for i in sampler.next_batch()])
        with session.timed("train"):
            measured = learner.step(batch, lambda micro, totals: pair_loss(model, micro, totals, config.centering))
        measured["tokens"] = metrics.total(batch.totals.tokens)
        if held_out and (step % config.eval_every == 0 or step == steps):
            measured["eval/accuracy"] = found_accuracy = _accuracy(model, held_out, session.scoring)
            if config.until_accuracy is not None and found_accuracy.result() >= config.until_accuracy:
                reached = step
        session.end_step(
            step, steps, metrics.results(measured), every=config.checkpoint_every,
            state={"sampler": sampler.state(), "reached": reached},
        )  # fmt: skip
    if reached is not None:
        say(f"stopped at step {reached}: the wanted accuracy is reached")

    held_out, training = session.at_the_end(held_out), session.at_the_end(training)
    outcome: dict[str, Any] = {"accuracy": None}
    if held_out:
        differences = _differences(model, held_out, session.scoring)
        outcome = _compared(differences, config, renderer, data.conversational, training, held_out, say)
    if held_out and outcome["accuracy"] < config.min_accuracy:
        raise RewardError(
            f"held-out accuracy is {outcome['accuracy']:.3f}, below min_accuracy={config.min_accuracy}", where=run.path,
            why="what climbs such a reward climbs noise", fix="more pairs, more epochs, or a larger model",
        )  # fmt: skip
    normalisation = _normalisation(session, model, config, renderer, training, max_length)
    if model.backbone.peft is not None:
        model.backbone.model = model.backbone.peft.merge_and_unload()
    if rank() == 0:
        with model_folder(run.model) as folder:
            save_classifier(model.backbone.model, tokenizer, folder, normalisation)
    return {"model": str(run.model), "steps": learner.steps, "evaluation": None, **outcome,
            "held_out_pairs": len(held_out), **normalisation}  # fmt: skip


@torch.no_grad()
def _differences(model: RewardModel, pairs: Sequence[Preference], budget: Budget) -> Tensor:
    """[P]: the chosen one's score minus the rejected one's."""
    scores = reward_scores(model, batch_of(pairs), budget=budget)
    return scores[0::2] - scores[1::2]


def _accuracy(model: RewardModel, pairs: Sequence[Preference], budget: Budget) -> metrics.Metric:
    return metrics.mean((_differences(model, pairs, budget).sign() + 1) / 2)


def _compared(
    differences: Tensor, config: RewardConfig, renderer: Renderer, conversational: bool,
    training: Sequence[Preference], held_out: Sequence[Preference], say: Any,
) -> dict[str, Any]:  # fmt: skip
    """The held-out accuracy, and those of the baselines that are asked for."""

    def decode(tokens: list[int]) -> str:
        return plain_text(renderer.decode(tokens, [] if conversational else ""))

    found: dict[str, Any] = baselines.accuracy_of(differences)
    others = baselines.measure(config.baselines, training, held_out, decode)
    for name, of in {"held-out pairs in the right order": found, **others}.items():
        say(f"  {name}: {of['accuracy']:.3f} [{of['accuracy_low']:.3f}, {of['accuracy_high']:.3f}]")
    return {**found, "baselines": others} if others else found


def _normalisation(
    session: Session,
    model: RewardModel,
    config: RewardConfig,
    renderer: Renderer,
    training: Sequence[Preference],
    max_length: int,
) -> dict[str, float]:
    """Mean and standard deviation of raw scores on reference samples (by default: the compared completions)."""
    if config.reference is None:
        batch = batch_of(training)
    else:
        from klimb.data.load import load_examples
        from klimb.stages.sft import batch_of as examples_batch

        examples = session.read(load_examples, config.reference, config, renderer, max_length, "reference")
        batch = examples_batch(session.at_the_end(examples.items))
    scores = reward_scores(model, batch, budget=session.scoring).double()
    std = float(scores.std())
    if not std > 0:
        raise RewardError("all reference samples get the same score", where=config.model,
                          why="nothing was learned from the pairs", fix="raise lr or the number of pairs")  # fmt: skip
    return {"mean": float(scores.mean()), "std": std}
