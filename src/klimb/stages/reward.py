"""The reward model: fits r to what people or rules say of completions, so that it can stand in for whoever said it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from klimb import metrics
from klimb.data.judged import StepEnds
from klimb.data.render import Renderer
from klimb.data.sampler import Sampler
from klimb.data.split import split_by_prompt
from klimb.errors import RewardError
from klimb.models.faces import Verdicts, reward_scores
from klimb.models.load import check_vocabulary, save_causal, save_classifier, save_facts
from klimb.models.rated import Judge, WrittenRatings
from klimb.objective.judging import Combine
from klimb.rewards.model import rows_of
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
from klimb.stages.models import load_reward_model, load_texts, model_folder
from klimb.stages.reward_kinds import (
    Kind,
    Right,
    attributes,
    attributes_text,
    comparisons,
    generative,
    labels,
    ordinal,
    process,
    rankings,
)

RewardKind = Literal[
    "bradley_terry", "rankings", "labels", "attributes", "attributes_text", "ordinal", "generative", "process"
]
INSTRUCTION = "\nIs this right? Answer Yes or No.\n"
_BELONGS: Mapping[str, tuple[str, ...]] = {
    "centering": ("bradley_terry", "rankings"), "baselines": ("bradley_terry",),
    "attributes": ("attributes", "attributes_text"), "instruction": ("generative", "attributes_text"),
    "rating": ("ordinal",), "separator": ("process",), "combine": ("process",),
    "reference": ("bradley_terry", "rankings", "labels", "attributes", "ordinal", "process"),
}  # fmt: skip
"""Which kinds look at a setting."""
_RIGHT: Mapping[str, str] = {
    "bradley_terry": "held-out pairs in the right order", "rankings": "held-out pairs in the right order",
    "labels": "held-out labels", "generative": "held-out verdicts", "process": "held-out steps",
    "attributes": "held-out completions in the right order", "ordinal": "held-out completions in the right order",
    "attributes_text": "held-out completions in the right order",
}  # fmt: skip


class RewardConfig(SupervisedConfig):
    """One epoch; more make a reward model sure of itself (arXiv 2203.02155, appendix C.2)."""

    kind: RewardKind = Field("bradley_terry", description="what it learns from: pairs, or what else is named")
    batch_size: int = Field(64, ge=1, description="pairs (rows of another kind) in an update")
    centering: float = Field(0.01, ge=0, description="arXiv 2312.09244: keeps scores near zero")
    reference: Given = Field(None, description="prompts with completions: scores are scaled to mean 0, std 1 on them")
    min_accuracy: float = Field(0.0, ge=0, le=1, description="stop here when held-out accuracy is below")

    until_accuracy: float | None = Field(
        None, gt=0.5, le=1, description="training ends when held-out accuracy reaches it, every `eval_every` steps"
    )
    attributes: dict[str, float] = Field(
        {}, description="kinds attributes, attributes_text: columns with ratings, and what each weighs in the reward"
    )
    rating: str = Field("rating", min_length=1, description="kind ordinal: column with whole numbers, the best highest")
    separator: str = Field("\n", min_length=1, description="kind process: what stands between two steps")
    combine: Combine = Field("min", description="kind process: what the steps' P(right) make of a completion")
    instruction: str | None = Field(
        None, min_length=1, description="kinds generative, attributes_text: asks for Yes or No, or for the ratings"
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
        for key, kinds in _BELONGS.items():
            if self.given(key) and self.kind not in kinds:
                yield f"{key}: kind={self.kind} does not look at it; leave it out, or set kind={kinds[0]}"
        if self.kind in ("attributes", "attributes_text") and not self.attributes:
            yield (f"kind={self.kind}: say which columns are ratings and their weights, as in "
                   "attributes={helpfulness: 1}")  # fmt: skip
        if self.lora is not None and self.lora.base == "4bit":
            yield ("lora.base=4bit: a reward model is saved merged, and its weights in 4 bits would be rounded again; "
                   "leave it out, checkpointing=on and a smaller token_budget save memory too")  # fmt: skip


def kind_of(config: RewardConfig) -> Kind:
    if config.kind == "rankings":
        return rankings.kind(config.centering)
    if config.kind == "labels":
        return labels.kind()
    if config.kind == "attributes":
        return attributes.kind(config.attributes)
    if config.kind == "attributes_text":
        return attributes_text.kind(config.attributes, config.instruction)
    if config.kind == "ordinal":
        return ordinal.kind(config.rating)
    if config.kind == "process":
        return process.kind(config.separator, config.combine)
    if config.kind == "generative":
        return generative.kind(config.instruction or INSTRUCTION)
    return comparisons.kind(config.centering)


def train(config: RewardConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    kind = kind_of(config)
    renderer, context = load_texts(config.model)
    tokenizer = renderer.tokenizer
    max_length = min(config.max_tokens or context, context)
    data = session.read(kind.load, config.data, config, renderer, max_length)
    if data.conversational:
        tokenizer.chat_template = renderer.template.source
    training, held_out = split_by_prompt(data.items, config.eval_fraction, config.seed)
    if config.eval_data is not None:
        held_out = session.read(kind.load, config.eval_data, config, renderer, max_length, "eval_data").items
    facts = kind.facts(renderer, data.conversational, training)
    model = load_reward_model(session, config.model, config.lora, config.seed, facts)
    check_vocabulary(model.backbone.model, tokenizer, config.model)
    steps = config.steps or max(1, round(config.epochs * len(training) / config.batch_size))
    learner = session.learner("reward", "reward", model.trainable(), config.optimizer, steps)
    sampler = Sampler(len(training), config.batch_size, config.seed)
    start, reached = 0, None
    if found := session.resume():
        start, reached = found.step, found.state["stage"]["reached"]
        sampler.restore(found.state["stage"]["sampler"])

    for step in session.steps(start, steps):
        if reached is not None:
            break
        batch = kind.batch_of([training[i] for i in sampler.next_batch()])
        with session.timed("train"):
            measured = learner.step(batch, lambda micro, totals: kind.loss(model, micro, totals))
        measured["tokens"] = metrics.total(batch.totals.tokens)
        if held_out and (step % config.eval_every == 0 or step == steps):
            right = kind.rightness(model, held_out, session.scoring)
            measured["eval/accuracy"] = found_accuracy = metrics.ratio(
                sum(each.total for each in right), sum(each.size for each in right)
            )
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
        right = kind.rightness(model, held_out, session.scoring)
        outcome = _compared(right, config, renderer, data.conversational, training, held_out, say)
        outcome |= kind.figures(model, held_out, session.scoring)
        for name, share in outcome.get("exact", {}).items():
            constant = outcome["exact_if_constant"][name]
            say(f"  {name} exactly right: {share:.3f} (always the most frequent: {constant:.3f})")
    if held_out and outcome["accuracy"] < config.min_accuracy:
        raise RewardError(
            f"held-out accuracy is {outcome['accuracy']:.3f}, below min_accuracy={config.min_accuracy}", where=run.path,
            why="what climbs such a reward climbs noise", fix="more pairs, more epochs, or a larger model",
        )  # fmt: skip
    normalisation = _normalisation(session, model, kind, config, renderer, training, max_length)
    facts |= kind.learned(model)
    if model.backbone.peft is not None:
        model.backbone.model = model.backbone.peft.merge_and_unload()
    if rank() == 0:
        with model_folder(run.model) as folder:
            if isinstance(model, Verdicts | WrittenRatings):
                save_causal(model.backbone.model, tokenizer, folder, [*renderer.stop_tokens(data.conversational)])
                save_facts(folder, normalisation | facts)
            else:
                save_classifier(model.backbone.model, tokenizer, folder, normalisation | facts)
    held = "held_out_pairs" if config.kind == "bradley_terry" else "held_out_rows"
    return {"model": str(run.model), "steps": learner.steps, "evaluation": None, **outcome, held: len(held_out),
            **normalisation}  # fmt: skip


def _compared(
    right: Right, config: RewardConfig, renderer: Renderer, conversational: bool,
    training: Sequence[Any], held_out: Sequence[Any], say: Any,
) -> dict[str, Any]:  # fmt: skip
    """The held-out accuracy, and those of the baselines that are asked for."""

    def decode(tokens: list[int]) -> str:
        return plain_text(renderer.decode(tokens, [] if conversational else ""))

    found: dict[str, Any] = baselines.with_interval(right)
    others = baselines.measure(config.baselines, training, held_out, decode)
    for name, of in {_RIGHT[config.kind]: found, **others}.items():
        say(f"  {name}: {of['accuracy']:.3f} [{of['accuracy_low']:.3f}, {of['accuracy_high']:.3f}]")
    return {**found, "baselines": others} if others else found


def _normalisation(
    session: Session, model: Judge, kind: Kind, config: RewardConfig, renderer: Renderer, training: Sequence[Any],
    max_length: int,
) -> dict[str, float]:  # fmt: skip
    """Mean and standard deviation of raw scores on reference samples (by default: the completions of the data)."""
    if config.reference is None:
        batch = kind.batch_of(training)
    else:
        from klimb.data.load import load_examples

        examples = session.read(load_examples, config.reference, config, renderer, max_length, "reference")
        marks = StepEnds(renderer, config.separator) if config.kind == "process" else None
        batch = rows_of([(e.prompt, e.completion) for e in session.at_the_end(examples.items)], marks)
    scores = reward_scores(model, batch, budget=session.scoring).double()
    std = float(scores.std())
    if not std > 0:
        raise RewardError("all reference samples get the same score", where=config.model,
                          why="nothing was learned from the data", fix="raise lr or the number of rows")  # fmt: skip
    return {"mean": float(scores.mean()), "std": std}
