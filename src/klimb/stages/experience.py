"""From prompts to a batch that can be learnt from: sampled, scored, and with what the algorithm compares it to."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from klimb.batch import TokenBatch, pad_tokens
from klimb.errors import RewardError
from klimb.models.faces import critic_values, policy_log_collisions, policy_logps
from klimb.models.load import HALF
from klimb.objective.advantage import Draws
from klimb.rollout.engine import Request, generate
from klimb.rollout.sampling import SamplingParams
from klimb.stages.actors import Actors, RlConfig
from klimb.stages.common import stream_seed
from klimb.stages.evaluate import add_gold, batch_of
from klimb.types import Group, Prompt, Sample


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
    rewards: dict[str, list[tuple[float, int]]] = {}
    for refill in range(config.max_refills + 1):
        prompts = next_prompts(actors, config.prompts_per_step - len(kept), step)
        seed = stream_seed(config.seed, f"rollout {refill}", step)
        with session.timed("rollout"):
            asked = requests(prompts, config.samples_per_prompt, params, seed)
            groups = generate(actors.engine, asked, actors.scorer.begin)
        with session.timed("reward"):
            report = actors.scorer.score(groups)
            if actors.gold is not None:
                add_gold(actors.gold, groups, lambda event: session.run.event(**event))
        drawn += groups
        actors.samples_drawn += sum(len(group.samples) for group in groups)
        counts["samples/dropped"] = counts.get("samples/dropped", 0) + report.dropped_samples
        wanted = actors.algorithm.sampling
        for group in report.groups:
            note_solved(actors, group, step)
            teaches = wanted is None or wanted([float(s.score or 0.0) for s in group.samples])
            (kept if teaches else refused).append(group)
        for key, value in report.metrics.items():
            if key.startswith("verdict/"):
                counts[key] = value + counts.get(key, 0.0)
            elif key not in ("reward/mean", "reward/std"):
                rewards.setdefault(key, []).append((value, max(report.scored, 1)))
        if wanted is None or len(kept) >= config.prompts_per_step:
            break
    if not kept:
        raise RewardError(
            f"step {step}: no group to learn from out of {len(drawn)}", where="reward",
            why="every group was unscored or had equal scores",
            fix="look at samples/ and events.jsonl; use easier or harder prompts, or another sampling",
        )  # fmt: skip
    for key, means in rewards.items():  # over all that was drawn: a refill counts by the samples that it scored
        counts[key] = sum(mean * scored for mean, scored in means) / sum(scored for _, scored in means)
    if actors.algorithm.sampling is not None:
        counts["groups/refused"] = len(refused)
        if len(kept) < config.prompts_per_step:
            session.run.event("too_few_groups", _too_few(config, len(kept), len(refused)))
    return kept, refused, {**counts, **_sample_counts(drawn, kept)}


def next_prompts(actors: Actors, wanted: int, step: int) -> list[Prompt]:
    """The next of the sampler's order, without those that rest; with them once it went round and found too few."""
    if actors.algorithm.curriculum is None:
        return [actors.prompts[i] for i in actors.sampler.next_batch(wanted)]
    found: list[Prompt] = []
    passed = 0
    while len(found) < wanted:
        prompt = actors.prompts[actors.sampler.next_batch(1)[0]]
        rests = actors.resting.get(prompt.id, 0) >= step or prompt in found
        if rests and passed < 2 * len(actors.prompts):
            passed += 1
        else:
            found.append(prompt)
    return found


def note_solved(actors: Actors, group: Group, step: int) -> None:
    curriculum = actors.algorithm.curriculum
    if curriculum is not None and curriculum.rests([float(s.score or 0.0) for s in group.samples]):
        actors.resting[group.prompt.id] = step + curriculum.recheck


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


def experience(actors: Actors, groups: Sequence[Group], step: int) -> TokenBatch:
    """Groups → one batch with what was recorded while sampling: behaviour log-probs and scores."""
    batch = batch_of(groups)
    samples = [s for g in groups for s in g.samples]
    needs = actors.algorithm.needs
    columns = {
        "behavior_logps": pad_tokens([s.logps for s in samples], batch.mask),
        "scores": torch.tensor([s.score for s in samples], dtype=torch.float64),
        "unfinished": torch.tensor([s.finish == "length" for s in samples]),
    }
    if any(s.step_rewards for s in samples):
        columns["step_rewards"] = pad_tokens([by_token(s) for s in samples], batch.mask, torch.float64)
    if needs.parts:
        columns["parts"] = torch.tensor([_parts(s.rewards, s.id, actors.scorer.weights) for s in samples]).double()
    if needs.draws is not None:
        each = baselines(actors, groups, needs.draws, step)
        columns["baseline"] = torch.tensor([b for b, g in zip(each, groups, strict=True) for _ in g.samples]).double()
    return batch.with_columns(**columns)


def by_token(sample: Sample) -> list[float]:
    """What is paid at each of the policy's tokens before the end. What ends in another's turn is paid at the policy's
    last token before it, or at its first."""
    own = [place for place, chosen in enumerate(sample.mask) if chosen]
    paid = [0.0] * len(own)
    for place, value in sample.step_rewards:
        if own:
            paid[max(bisect_right(own, place) - 1, 0)] += value
    return paid


def _parts(rewards: dict[str, float | None], sample: str, weights: dict[str, float]) -> list[float]:
    found = [value for name in weights if (value := rewards[name]) is not None]
    if len(found) < len(weights):
        raise RewardError(
            f"sample {sample} has a score from {len(found)} of {len(weights)} parts", where="reward",
            why="the algorithm compares samples part by part", fix="return a number from each part for each sample",
        )  # fmt: skip
    return found


def baselines(actors: Actors, groups: Sequence[Group], draws: Draws, step: int) -> list[Any]:
    """The baseline of each group's prompt, made of further samples: one number, or as many for each. Those of π_ref are
    drawn once for a prompt.

    Where none of them has a score, the mean of the group's own samples stands in.
    """
    config, session = actors.config, actors.session
    known: dict[str, Any] = actors.known_values if draws.of_reference else {}
    prompts = list({g.prompt.id: g.prompt for g in groups if g.prompt.id not in known}.values())
    temperature = 0.0 if draws.greedy else config.temperature
    params = SamplingParams(config.max_tokens, actors.loaded.stop_tokens(actors.prompts), temperature)
    seed = stream_seed(config.seed, "baseline", 0 if draws.of_reference else step)
    summary: Callable[[torch.Tensor], torch.Tensor] = cast(Any, actors.algorithm.advantage).summary
    engine = actors.draws_engine or actors.engine
    with session.timed("rollout"):
        wanted = [Request(prompt, draws.samples, params, seed) for prompt in prompts]
        drawn = generate(engine, wanted, actors.scorer.begin)
    with session.timed("reward"):
        actors.scorer.score(drawn)
    actors.samples_drawn += sum(len(group.samples) for group in drawn)
    for group in drawn:
        scores = [s.score for s in group.samples if s.score is not None]
        if scores:
            known[group.prompt.id] = summary(torch.tensor(scores, dtype=torch.float64)).tolist()
    own = [statistics.fmean(s.score or 0.0 for s in g.samples) for g in groups]
    shape = summary(torch.zeros(1, dtype=torch.float64))
    return [known.get(g.prompt.id, torch.full_like(shape, mean).tolist()) for g, mean in zip(groups, own, strict=True)]


def is_stale(groups: Sequence[Group], version: int) -> bool:
    """Was a token sampled by other weights than the present ones?"""
    return any(v != version for g in groups for s in g.samples for segment in s.segments for v in segment.versions)


def look_up(actors: Actors, batch: TokenBatch, stale: bool) -> TokenBatch:
    """Add what the algorithm needs from frozen weights or from before the update: references, values, old log-probs.

    The first update on fresh samples needs no old log-probs: the policy is the one that sampled, and its ratio is 1
    to the bit. Further updates compare with the behaviour log-probs, which in fp32 are the trainer's own to 1e-6; in
    16 bits they may be off by more than a clip range would forgive, so a pass before the update takes their place. So
    it does where an importance correction tells the policy of before the update from the one that sampled.
    """
    config, budget = actors.config, actors.session.scoring
    with actors.session.timed("look up"):
        if actors.reference is not None:
            outputs = policy_logps(actors.reference, batch, budget=budget, temperature=config.temperature)
            batch = batch.with_columns(ref_logps=outputs.logps.cpu())
        if actors.algorithm.needs.collisions:
            found = policy_log_collisions(actors.policy, batch, budget=budget, temperature=config.temperature)
            batch = batch.with_columns(collisions=found.exp().cpu())
        if actors.critic is not None:
            batch = batch.with_columns(values=critic_values(actors.critic, batch, budget=budget).cpu())
        several, exact = config.updates_per_step > 1, actors.session.dtype not in HALF
        corrected = actors.algorithm.importance is not None
        if not corrected and (stale or (several and exact)):
            batch = batch.with_columns(old_logps=batch["behavior_logps"])
        elif several and actors.algorithm.needs.old_logps:
            outputs = policy_logps(actors.policy, batch, budget=budget, temperature=config.temperature)
            batch = batch.with_columns(old_logps=outputs.logps.cpu())
    return batch
