"""Reinforcement learning: prompt → rollout → reward → advantage → loss → step → weights back → metrics.

Which algorithm is a value from the table; nothing below asks for its name. A critic, where the algorithm has one, is
a second learner stepped on the same batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from klimb import metrics
from klimb.batch import BatchTotals, TokenBatch
from klimb.data.load import load_prompts
from klimb.data.sampler import Sampler
from klimb.errors import KlimbError, RewardError
from klimb.metrics import Metrics
from klimb.models.faces import Policy, policy_logps
from klimb.models.load import HALF
from klimb.objective.advantage import Draws
from klimb.objective.algorithm import Algorithm
from klimb.objective.credit import assign_credit
from klimb.objective.critic import critic_loss
from klimb.objective.entropy import adaptive_entropy
from klimb.objective.policy_loss import policy_loss, update_columns
from klimb.objective.refusals import hints
from klimb.objective.spec import describe
from klimb.rewards.normalise import Moments, Normalised
from klimb.rewards.scorer import Scorer, dry_run
from klimb.rollout.engine import RolloutEngine
from klimb.rollout.mixture import Mixture
from klimb.runtime.memory import give_back
from klimb.runtime.plan import gigabytes
from klimb.runtime.ranks import share, world
from klimb.runtime.run import Run
from klimb.runtime.samples import sample_records
from klimb.runtime.signals import Interrupt
from klimb.stages.actors import Actors, RlConfig, resolved
from klimb.stages.common import Session, stream_seed
from klimb.stages.evaluate import Judges, local_engine, open_reward
from klimb.stages.experience import experience, is_stale, look_up, rollout
from klimb.stages.memory import Target, for_groups
from klimb.stages.mismatch import Mismatch
from klimb.stages.models import load_critic, load_policy, load_reference, load_texts, prompt_room


def train(config: RlConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    session = Session.begin(config, run, interrupt, say)
    actors = prepare(config, session)
    judges = Judges.for_measurement(config.measure, session, actors.loaded, config.seed)
    state: dict[str, Tensor] = {}
    taken = 0
    if found := session.resume():
        taken, state = found.step, found.tensors["state"]
        actors.restore(found.state["stage"], found.tensors.get("reference", {}))

    for step in session.steps(taken, config.steps):
        if actors.finished:
            say(f"stopped after step {taken}: {actors.samples_drawn} completions are drawn")
            break
        actors.engine.update_weights(step)
        groups, refused, counted = rollout(actors, step)
        batch = look_up(actors, experience(actors, groups, step), stale=is_stale(groups, step))
        credit = assign_credit(
            actors.algorithm, scores=batch["scores"], mask=batch.mask, group=batch.group,
            logps=batch["behavior_logps"], ref_logps=batch.get("ref_logps"), values=batch.get("values"),
            parts=batch.get("parts"), part_weights=actors.part_weights, baseline=batch.get("baseline"),
            collisions=batch.get("collisions"), step_rewards=batch.get("step_rewards"), state=state,
        )  # fmt: skip
        batch = batch.with_columns(advantages=credit.advantages)
        if credit.returns is not None:
            batch = batch.with_columns(returns=credit.returns)
        measured = learn(actors, teaching(actors.algorithm, batch), step, state)
        state = after_step(actors.algorithm, credit.state, measured)
        if (schedule := actors.algorithm.reference) is not None and schedule.due(step):
            schedule.move(actors.moving_weights(), actors.policy.trainable())
        taken, counted["samples/drawn"] = step, float(actors.samples_drawn)
        session.end_step(
            step, config.steps, {**metrics.results(credit.metrics | measured), **counted},
            every=config.checkpoint_every, state=actors.progress(), tensors=state,
            reference=actors.moving_weights(), samples=sample_records(groups, refused),
        )  # fmt: skip

    actors.loaded.save(run.model)
    reference = actors.reference if actors.algorithm.reference is None else None  # one that moved is no start any more
    if judges and reference is None:
        reference = load_reference(session, actors.loaded, config.reference or config.model)
    evaluation = judges.evaluate(actors.policy, reference, "evaluate") if judges and reference else None
    return {"model": str(run.model), "steps": taken, "algorithm": describe(actors.algorithm),
            "evaluation": evaluation}  # fmt: skip


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
    share_prompts(config, session, data.report.lengths["prompt"])
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
    policy_learner = session.learner("policy", "rl", loaded.policy.trainable(), config.optimizer, updates - warmup)
    critic_learner = None
    if critic is not None:
        critic_learner = session.learner("critic", "critic", critic.trainable(), config.critic.optimizer, updates)
    samples = config.prompts_per_step * config.samples_per_prompt
    rows = int(session.run.decide("rollout_rows", lambda: min(256, samples)))

    def engine_of(policy: Policy | Mixture) -> RolloutEngine:
        return local_engine(policy, loaded, data.items, rows, session.on_tokens, session.say)

    others = who_draws(needs.draws, loaded.policy, reference)
    return Actors(
        config, session, algorithm, loaded, reference, critic, data.items,
        Sampler(len(data.items), config.prompts_per_step, config.seed),
        engine_of(loaded.policy),
        Scorer(reward, failure_limit=config.failure_limit, min_scored=min(2, config.samples_per_prompt),
               on_event=lambda event: session.run.event(**event)),
        running, gold, policy_learner, critic_learner,
        None if others is None else engine_of(others),
    )  # fmt: skip


def share_prompts(config: RlConfig, session: Session, prompts: np.ndarray) -> None:
    """Where nobody set a token budget, one for prompts as long as these [rows] and the samples that share them."""
    run = session.run
    planned = run.manifest["decisions"].get("memory")
    if config.token_budget != "auto" or planned is None:
        return
    free = planned["free"] // (world() if session.device.type == "cpu" else 1)  # ranks share the memory of a machine
    target = Target(session.dtype, session.token_budget, free, str(session.device))
    typical = int(np.quantile(prompts, 0.9, method="higher"))

    def grown() -> dict[str, int]:
        try:
            found = for_groups(config, target, session.checkpointing, typical, int(prompts.max()))
        except (KlimbError, OSError, ValueError, KeyError):  # as of any plan: whoever loads the model says it
            return {"tokens": target.budget}
        if "peak" in found:
            session.say(
                f"token_budget={found['tokens']}, not {target.budget}, so that samples of a group share prompts "
                f"of {typical} tokens; memory: about {gigabytes(found['peak'])}"
            )
        return found

    session.token_budget = session.scoring.tokens = share(run.decide("groups", grown))["tokens"]


def who_draws(draws: Draws | None, policy: Policy, reference: Policy | None) -> Policy | Mixture | None:
    """Who makes an advantage's further samples, where that is not the policy."""
    if draws is None or reference is None:
        return None
    mixed = Mixture(policy, reference, draws.mixture) if draws.mixture else None
    return reference if draws.of_reference else mixed


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
