"""Does a stage fit into the memory? Asked before its models are loaded; where it does not, what would is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from klimb.errors import KlimbError, one_line
from klimb.models.load import LoRA
from klimb.models.outline import Shape
from klimb.models.place import declared_context
from klimb.rewards.spec import reward_files
from klimb.runtime.plan import Learning, Plan, Sampled, Work, gigabytes, plan
from klimb.stages.trust import permitted

TYPICAL = 1024
"""Tokens of a sample that nothing bounds: no data is read for a plan."""
_SMALL = 1024
"""A token budget that costs little speed."""
_ENGINE_ROWS = 128
"""Samples side by side when a policy is measured."""
_SHOWN = 3
_SPARE = 0.8
"""Share of the free memory that a larger micro-batch, which only saves time, may take."""


# What the stages hold, from their configs -----------------------------------------------------------------------------


def of_supervised(config: Any, context: int) -> Work:
    row = min(config.max_tokens or TYPICAL, context, TYPICAL)
    shape = Shape(max(row // 2, 1), max(row - row // 2, 1))
    return Work(
        _learning(config), shape, frozen=_judges(config), sampled=_measured(config, context), samples=config.batch_size
    )


def of_pairs(config: Any, context: int, *, classifier: bool = False, reference: bool = False) -> Work:
    work = of_supervised(config, context)
    policy = _learning(config, classifier=classifier)
    frozen = _reference(config, reference) + work.frozen
    shape = work.shape._replace(samples=2)
    return replace(work, policy=policy, shape=shape, frozen=frozen, samples=2 * work.samples)


def of_rl(config: Any, needs: Any, context: int) -> Work:
    room = max(context - config.max_tokens, 1)
    prompt = min(config.max_prompt_tokens or TYPICAL // 2, room)
    rows = min(256, config.prompts_per_step * config.samples_per_prompt)
    sampled = (Sampled(rows, prompt, config.max_tokens, config.samples_per_prompt), *_measured(config, context))
    compared = needs.ref or config.measure_kl
    critic = None
    if needs.critic:
        state = config.critic.optimizer.state
        critic = Learning(
            config.critic.model or config.model, None if config.critic.model else config.lora, state=state
        )
    return Work(
        _learning(config), Shape(prompt, config.max_tokens, config.samples_per_prompt), critic=critic,
        frozen=_reference(config, compared) + _judges(config), sampled=sampled, online=True,
        compared_at_the_end=config.model if config.measure is not None and not compared else None,
        samples=-(-config.prompts_per_step // config.updates_per_step) * config.samples_per_prompt,
    )  # fmt: skip


def of_online_pairs(config: Any, context: int) -> Work:
    prompt = min(config.max_prompt_tokens or TYPICAL // 2, max(context - config.max_tokens, 1))
    sampled = (Sampled(min(_ENGINE_ROWS, 2 * config.prompts_per_step), prompt, config.max_tokens, 2),)
    return Work(
        _learning(config), Shape(prompt, config.max_tokens, 2), frozen=_reference(config, True) + _judges(config),
        sampled=(*sampled, *_measured(config, context)), online=True,
    )  # fmt: skip


def of_distilling(config: Any, context: int) -> Work:
    prompt = min(config.max_prompt_tokens or TYPICAL // 2, max(context - config.max_tokens, 1))
    sampled = (Sampled(min(_ENGINE_ROWS, config.prompts_per_step), prompt, config.max_tokens, 1),)
    frozen = (("teacher", Learning(config.teacher)), *_judges(config))
    return Work(
        _learning(config), Shape(prompt, config.max_tokens), frozen=frozen,
        sampled=(*sampled, *_measured(config, context)), online=True,
        compared_at_the_end=config.model if config.measure is not None else None,
    )  # fmt: skip


def of_measuring(config: Any, context: int) -> Work:
    """Stages that train nothing."""
    sampled = _measured(config, context)
    if not sampled:
        sampled = (_sampled(config, context),)
    shape = Shape(sampled[0].prompt, sampled[0].completion, sampled[0].samples)
    frozen = _judges(config)
    if getattr(config, "reference", None):
        frozen = (("reference", Learning(config.reference)), *frozen)
    return Work(Learning(config.model), shape, trains=False, frozen=frozen, sampled=sampled)


def of_judging(config: Any, context: int) -> Work:
    """`model` is one of the rewards that are held."""
    row = min(context, TYPICAL)
    shape = Shape(max(row // 2, 1), max(row - row // 2, 1))
    return Work(Learning(config.model, classifier=True), shape, trains=False, frozen=_judges(config)[1:])


def _learning(config: Any, classifier: bool = False) -> Learning:
    return Learning(config.model, config.lora, classifier, config.optimizer.state)


def _reference(config: Any, wanted: bool) -> tuple[tuple[str, Learning], ...]:
    """On LoRA the base is the reference, and held already."""
    if not wanted or (config.reference is None and config.lora is not None):
        return ()
    return (("reference", Learning(config.reference or config.model)),)


def _judges(config: Any) -> tuple[tuple[str, Learning], ...]:
    specs = [getattr(holder, key, None) for holder in (config, getattr(config, "measure", None))
             for key in ("reward", "gold", "other")]  # fmt: skip
    return tuple(
        ("reward model", Learning(str(path), classifier=True))
        for spec in specs for path in reward_files(spec) if path.is_dir()
    )  # fmt: skip


def _measured(config: Any, context: int) -> tuple[Sampled, ...]:
    holders = [getattr(config, key, None) for key in ("measure", "until")]
    return tuple(_sampled(holder, context) for holder in holders if holder is not None)


def _sampled(holder: Any, context: int) -> Sampled:
    prompt = min(TYPICAL // 2, max(context - holder.max_tokens, 1))
    return Sampled(_ENGINE_ROWS, prompt, holder.max_tokens, getattr(holder, "samples_per_prompt", 1))


# The plan of a config, and its neighbours -----------------------------------------------------------------------------


class Target(NamedTuple):
    """What a plan is made for. budget: flat tokens of a micro-batch; free: bytes; place: whose they are."""

    dtype: torch.dtype
    budget: int
    free: int
    place: str


class Fit(NamedTuple):
    """The plan of a stage, and whether its activations are computed again."""

    plan: Plan
    checkpointing: bool


def fit(config: Any, target: Target) -> Fit:
    """`checkpointing: auto` is on where the activations would not fit otherwise.

    Raises what `Outline` raises where a config cannot be read.
    """
    with permitted(config):
        return _fit(config, target)


def _fit(config: Any, target: Target) -> Fit:
    work = config.work(declared_context(config.model))
    wanted = getattr(config, "checkpointing", "off")
    heap = target.place == "cpu"
    found = plan(work, target.dtype, target.budget, checkpointing=wanted == "on", heap=heap)
    if wanted == "auto" and found.peak > target.free:
        smaller = plan(work, target.dtype, target.budget, checkpointing=True, heap=heap)
        if smaller.peak < found.peak:
            return Fit(smaller, True)
    return Fit(found, wanted == "on")


def for_groups(config: Any, target: Target, checkpointing: bool, typical: int, longest: int) -> dict[str, int]:
    """The budget of micro-batches whose samples share prompts of `typical` tokens: four of these, or what of that fits
    with room to spare; and the peak that goes with it, none where the budget stays what it is.

    A group torn into parts computes its prompt in each of them: so it is a quarter of the work at most.
    """
    chosen, samples = {"tokens": target.budget}, config.samples_per_prompt
    whole = typical + samples * config.max_tokens
    if samples == 1 or min(whole, 4 * typical) <= target.budget:
        return chosen
    with permitted(config):
        work = config.work(declared_context(config.model))
        drawn, *others = work.sampled
        shape, sampled = Shape(longest, config.max_tokens, samples), (drawn._replace(prompt=longest), *others)
        work = replace(work, shape=shape, sampled=sampled)
        for tokens in (min(whole, times * typical) for times in (2, 3, 4)):
            peak = plan(work, target.dtype, tokens, checkpointing=checkpointing, heap=target.place == "cpu").peak
            if tokens > chosen["tokens"] and peak <= _SPARE * target.free:
                chosen = {"tokens": tokens, "peak": peak}
    return chosen


def admitted(config: Any, target: Target, say: Callable[[str], None]) -> Fit | None:
    """The plan, said in a line; None where none can be made. Raises KlimbError, with what would fit, where not even
    what the stage holds between its micro-batches does."""
    if getattr(getattr(config, "judge", None), "url", None) is not None:
        return None  # the model is on a server
    try:
        found = fit(config, target)
    except Exception as error:  # a run that could be must not end because its plan cannot be
        if not isinstance(error, KlimbError | OSError | ValueError | KeyError):  # of those the loader tells
            say(f"memory: no plan for {config.model} ({type(error).__name__}: {one_line(error)})")
        return None
    peak, free, what = gigabytes(found.plan.peak), gigabytes(target.free), f"model={config.model}"
    if found.plan.least > target.free:
        raise KlimbError(
            f"does not fit into the memory: it takes {gigabytes(found.plan.least)} between micro-batches alone",
            where=what, why=f"{free} are free on {target.place}; {found.plan}",
            fix=" or ".join(proposals(config, target)),
        )  # fmt: skip
    again = " with checkpointing" if found.checkpointing else ""
    say(f"memory: about {peak} of {free}{again}: {found.plan}")
    if found.plan.peak > target.free:
        say(f"memory: this may not fit with token_budget={target.budget}; {' or '.join(proposals(config, target))}")
    return found


def proposals(config: Any, target: Target) -> list[str]:
    """The nearest settings that fit, with what they take; else the furthest one and what is missing."""
    found: list[tuple[set[str], str]] = []
    told = ""
    for changes in neighbours(config, target):
        settings = {setting for setting, _, _ in changes}
        if any(less <= settings for less, _ in found):
            continue
        changed, budget = config, target.budget
        for _, update, tokens in changes:
            changed, budget = changed.model_copy(update=update(changed)), tokens or budget
        needed = fit(changed, target._replace(budget=budget)).plan.peak
        told = f"{' '.join(setting for setting, _, _ in changes)} ({gigabytes(needed)})"
        if needed <= target.free:
            found.append((settings, told))
        if len(found) == _SHOWN:
            break
    return [told for _, told in found] or [f"use a smaller model or more memory: even {told} is too much"]


Change = tuple[str, Callable[[Any], dict[str, Any]], int]
"""A setting as it is typed, what it changes in a config, and the token budget if it is one, else 0."""


def neighbours(config: Any, target: Target) -> Iterator[list[Change]]:
    """Settings that take less memory, those first that change least of what is learnt."""

    def settings(wanted: bool, setting: str, update: Callable[[Any], dict[str, Any]], budget: int = 0) -> list[Change]:
        return [(setting, update, budget)] if wanted else []

    trains, samples = hasattr(config, "optimizer"), hasattr(config, "prompts_per_step")
    again = settings(trains and config.checkpointing == "off", "checkpointing=on", lambda c: {"checkpointing": "on"})
    budget = settings(target.budget > _SMALL, f"token_budget={_SMALL}", lambda c: {}, _SMALL)
    state = settings(
        trains and config.optimizer.state != "8bit", "optimizer.state=8bit",
        lambda c: {"optimizer": c.optimizer.model_copy(update={"state": "8bit"})},
    )  # fmt: skip
    lora = settings(trains and config.lora is None, "lora.rank=16", lambda c: {"lora": LoRA()})
    shorter = max(config.max_tokens // 2, 1) if samples else 0
    half = settings(samples, f"max_tokens={shorter}", lambda c: {"max_tokens": shorter})
    small = [*again, *budget]
    for changes in (again, budget, small, state, [*state, *small], half, [*small, *half], lora, [*lora, *small],
                    [*lora, *small, *half]):  # fmt: skip
        if changes:
            yield changes
