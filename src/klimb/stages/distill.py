"""Distillation: the student follows a teacher's whole distribution, on its own samples or on written ones.

On its own samples it learns what to do where it itself gets to, which is what imitation of a teacher's texts never
shows it (Agarwal et al. 2023, "On-Policy Distillation of Language Models", arXiv 2306.13649, called GKD).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, Row, TokenBatch, sample_rows
from klimb.data.load import load_examples, load_prompts
from klimb.data.sampler import Sampler
from klimb.metrics import Metrics
from klimb.models.faces import Policy, divergence
from klimb.objective.supervised import distillation_loss, generalised_jsd
from klimb.rollout.engine import generate
from klimb.rollout.sampling import SamplingParams
from klimb.runtime.memory import give_back
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import Session, TrainConfig, stream_seed
from klimb.stages.evaluate import Judges, Measurement, local_engine
from klimb.stages.experience import requests
from klimb.stages.memory import of_distilling
from klimb.stages.models import check_same_tokens, load_policy, load_reference, load_texts, prompt_room
from klimb.stages.task import WithTask
from klimb.types import Example, Group


class DistillConfig(WithTask, TrainConfig):
    """Both models need the same tokenizer. beta names the divergence, on_policy says whose texts it is taken on."""

    from_task: ClassVar = ("data", "columns", "max_tokens", "measure")

    teacher: str = Field(description="the model to follow: directory or hub name")
    beta: float = Field(
        1.0, ge=0, le=1, description="0: KL(teacher ‖ student), 1: KL(student ‖ teacher), between: generalised JSD"
    )
    on_policy: float = Field(
        1.0, ge=0, le=1, description="share of each step sampled by the student; the rest are completions of `data`"
    )
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(64, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_tokens: int = Field(256, ge=1, description="longest completion")
    temperature: float = Field(1.0, gt=0, description="of sampling, and of both distributions")
    measure: Measurement | None = None

    def work(self, context: int) -> Work:
        return of_distilling(self, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.drawn == 0 and self.given("max_prompt_tokens"):
            yield "max_prompt_tokens: on_policy=0 samples nothing; leave it out"

    @property
    def drawn(self) -> int:
        """Completions of a step that the student samples."""
        return round(self.on_policy * self.prompts_per_step)


def preview(config: DistillConfig) -> list[str]:
    names = {0.0: "KL(teacher ‖ student)", 1.0: "KL(student ‖ teacher)"}
    what = names.get(config.beta, f"generalised JSD at β = {config.beta:g}")
    return [f"{what}, {config.drawn} of {config.prompts_per_step} completions a step sampled by the student"]


def train(config: DistillConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    renderer, context = load_texts(config.model)
    check_same_tokens(renderer.tokenizer, load_texts(config.teacher)[0].tokenizer, f"teacher={config.teacher}")
    room = prompt_room(context, config.max_tokens)
    prompts = session.read(load_prompts, config.data, config, renderer, min(config.max_prompt_tokens or room, room))
    written = None
    if config.drawn < config.prompts_per_step:
        written = session.read(load_examples, config.data, config, renderer, context, "demonstrations").items
    loaded = load_policy(session, config.model, config.lora, config.seed, renderer)
    loaded.conversational = prompts.conversational
    teacher = load_reference(session, loaded, config.teacher)
    learner = session.learner("policy", "distill", loaded.policy.trainable(), config.optimizer, config.steps)
    samplers = {"prompts": Sampler(len(prompts.items), max(config.drawn, 1), config.seed)}
    if written is not None:
        samplers["written"] = Sampler(len(written), config.prompts_per_step - config.drawn, config.seed)
    engine = local_engine(loaded.policy, loaded, prompts.items, on_tokens=session.on_tokens, say=session.say)
    params = SamplingParams(config.max_tokens, loaded.stop_tokens(prompts.items), config.temperature)
    judges = Judges.for_measurement(config.measure, session, loaded, config.seed)
    measure = partial(generalised_jsd, beta=config.beta)
    start = 0
    if found := session.resume():
        start = found.step
        for name, sampler in samplers.items():
            sampler.restore(found.state["stage"][name])

    for step in session.steps(start, config.steps):
        groups: list[Group] = []
        if config.drawn:
            engine.update_weights(step)
            asked = [prompts.items[i] for i in samplers["prompts"].next_batch()]
            with session.timed("rollout"):
                groups = generate(engine, requests(asked, 1, params, stream_seed(config.seed, "rollout", step)))
        examples = [] if written is None else [written[i] for i in samplers["written"].next_batch()]
        batch = batch_of(groups, examples)
        with session.timed("train"):
            measured = learner.step(
                batch, lambda micro, totals: loss(loaded.policy, teacher, micro, totals, measure, config.temperature)
            )
        give_back()
        lengths = batch.mask.sum(dim=1).double()
        measured |= {"tokens": metrics.total(batch.totals.tokens), "length/mean": metrics.mean(lengths)}
        session.end_step(
            step, config.steps, metrics.results(measured), every=config.checkpoint_every,
            state={name: sampler.state() for name, sampler in samplers.items()},
        )  # fmt: skip

    loaded.save(run.model)
    reference = load_reference(session, loaded, config.model) if judges else None
    evaluation = judges.evaluate(loaded.policy, reference, "evaluate") if judges and reference else None
    return {"model": str(run.model), "steps": learner.steps, "algorithm": preview(config)[0], "evaluation": evaluation}


def loss(
    policy: Policy, teacher: Policy, batch: TokenBatch, totals: BatchTotals, measure: Any, temperature: float
) -> tuple[Tensor, Metrics]:
    return distillation_loss(divergence(policy, teacher, batch, measure, temperature), batch.mask, totals)


def batch_of(groups: Sequence[Group], examples: Sequence[Example]) -> TokenBatch:
    """Own samples and written completions, each a prompt of its own."""
    rows = [sample_rows(group.prompt.tokens, sample) for group in groups for sample in group.samples]
    ids = [sample.id for group in groups for sample in group.samples]
    rows += [[Row(e.prompt, e.completion, e.mask)] for e in examples]
    return TokenBatch.from_rows(rows, range(len(rows)), ids + [e.id for e in examples])
