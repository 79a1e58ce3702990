"""Measuring a reward on comparisons: is it right, where, how sure of itself, and what else does it pay for?

::

    klimb evaluate reward=runs/rm/model data=held_out.jsonl
    klimb evaluate reward='{ensemble: {models: [runs/rm-1/model, runs/rm-2/model]}}' data=rewardbench.jsonl

Each reply is scored by itself, so the order in which a pair is shown cannot matter: there is no swapped order to test.
Rows with a `margin` are counted by it, rows with a `subset` (the RewardBench format) by that. With `reference`, the
pairs that the reward was trained on, it is said how far the inputs have drifted since.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pydantic import Field, model_validator

from klimb.config import find_references, map_text
from klimb.data.formats import Problem
from klimb.data.kinds import read_table, refuse_bad
from klimb.data.template import RenderError
from klimb.errors import RewardError
from klimb.rewards.combine import WeightedSum
from klimb.rewards.ensemble import Ensemble, combined, spread
from klimb.rewards.model import ModelReward
from klimb.rewards.normalise import Normalised
from klimb.rewards.protocol import Reward
from klimb.rewards.ranks import OnRankZero
from klimb.rewards.rules import plain_text
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import reward_files
from klimb.runtime.plan import Work
from klimb.runtime.run import Run
from klimb.runtime.signals import Interrupt
from klimb.stages.common import RunConfig, Session, stream_seed
from klimb.stages.evaluate import open_reward
from klimb.stages.given import Data, Given
from klimb.stages.memory import of_judging
from klimb.types import Group, Prompt, Sample, Segment, Text
from klimb.watch import trust
from klimb.watch.probes import ENOUGH, PROBES
from klimb.watch.trust import Figures


class EvaluateRewardConfig(RunConfig):
    """Measure a reward model, an ensemble or a sum with one in it; `model` is the first of them, and need not be said.

    `gold` and `other` are rewards, too: what the reward stands for, and what it is compared with.
    """

    model: str = Field("", description="default: the first reward model of reward")
    data: Data = Field(description="comparisons that it was not trained on")
    reward: Given = Field(description="what is measured")
    gold: Given = Field(None, description="the truth, where a program knows it: length is held against it")
    other: Given = Field(None, description="a second reward: how often do they agree?")
    reference: str | None = Field(None, description="the comparisons that it was trained on: how far have they drifted")
    by: str | None = Field(None, description="a column of the pairs to count by; default: subset, where there is one")
    probes: int = Field(200, ge=0, description="chosen replies to change in ways that make them no better; 0: none")

    @model_validator(mode="before")
    @classmethod
    def _first_model(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "model" in values or "reward" not in values:
            return values
        if (found := first_model(values["reward"])) is None:
            raise ValueError(f"reward: no reward model in {values['reward']!r:.60}; give the directory of one")
        return {**values, "model": found}

    def work(self, context: int) -> Work:
        return of_judging(self, context)

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.given("transcripts"):
            yield "transcripts: comparisons are read as they are written here; leave it out"
        if 0 < self.probes < ENOUGH:
            yield f"probes={self.probes}: fewer than {ENOUGH} replies say nothing; give more, or 0"


def first_model(spec: Any) -> str | None:
    """The first reward model that a spec names; in a recipe that is a reference to it still."""
    folders = [str(path) for path in reward_files(spec) if path.is_dir()]
    texts: list[str] = []
    map_text(spec, texts.append)
    hub = [spec] if isinstance(spec, str) and spec.count("/") == 1 and ".py:" not in spec else []
    return next(iter([*folders, *(text for text in texts if find_references(text)), *hub]), None)


@dataclass(frozen=True)
class Pair:
    """A comparison as its row holds it."""

    where: str
    prompt: Text
    chosen: Text
    rejected: Text
    columns: Mapping[str, Any]


@dataclass
class Judged:
    """The pairs that have a score on both sides. differences [P], scores and lengths [2P], chosen before rejected."""

    pairs: list[Pair]
    scores: list[float]
    members: list[list[float]] = field(default_factory=list)
    """Of an ensemble, by member."""

    @property
    def differences(self) -> list[float]:
        return differences(self.scores)

    @property
    def lengths(self) -> list[int]:
        """Characters."""
        return [len(plain_text(text)) for pair in self.pairs for text in (pair.chosen, pair.rejected)]


def differences(scores: Sequence[float]) -> list[float]:
    return [chosen - rejected for chosen, rejected in zip(scores[0::2], scores[1::2], strict=True)]


def train(config: EvaluateRewardConfig, run: Run, interrupt: Interrupt, say: Any) -> dict[str, Any]:
    """Named as in the other stages: it is what the stage does. Nothing is trained."""
    session = Session.begin(config, run, interrupt, say)
    reward = opened(config.reward, session)
    judged = judge(reward, read(config.data, reward, config, session), run)
    length = length_figures(judged, config, session)
    found: Figures = {
        "pairs": len(judged.pairs), "by_length": by_length(judged), "length": length,
        "calibration": calibration(reward, judged), **by_columns(judged, config), **of_members(reward, judged),
    }  # fmt: skip
    if config.other is not None:
        other = judge(opened(config.other, session), judged.pairs, run)
        same = {id(pair) for pair in other.pairs}
        mine = [d for pair, d in zip(judged.pairs, judged.differences, strict=True) if id(pair) in same]
        found["agreement"] = trust.agreement(mine, other.differences)
    if config.probes:
        found["probes"] = probe(reward, judged.pairs, config, run, say)
    if config.reference is not None:
        then = judge(reward, read(config.reference, reward, config, session), run)
        found["drift"] = drifted(then, judged, config.seed)
    right = trust.accuracy(judged.differences)
    say(f"{right['n']:,} pairs, in the right order: {right['accuracy']:.3f} "
        f"[{right['accuracy_low']:.3f}, {right['accuracy_high']:.3f}]")  # fmt: skip
    return {"model": config.model, "evaluation": None, "held_out_pairs": right.pop("n"), **right, "trust": found}


def opened(spec: Any, session: Session) -> Reward:
    """A reward with its members to be seen: every rank asks for itself, and finds the same."""
    reward = open_reward(spec, session)
    return reward.reward if isinstance(reward, OnRankZero) else reward


def read(source: Any, reward: Reward, config: EvaluateRewardConfig, session: Session) -> list[Pair]:
    """The comparisons of a source that the models can take."""
    table = read_table(source, wanted=("preference",), columns=config.columns, on_bad=config.on_bad)
    pairs, problems = [], list(table.problems)
    for record in table.records:
        values = record.values
        pair = Pair(record.where, values["prompt"], values["chosen"], values["rejected"], record.columns)
        reasons = [reason for text in (pair.chosen, pair.rejected) if (reason := unfit(reward, pair.prompt, text))]
        if reasons:
            problems.append(Problem(pair.where, reasons[0]))
        else:
            pairs.append(pair)
    refuse_bad(table.source, problems, len(pairs), config.on_bad)
    if problems:
        session.say(f"{table.source}: {len(problems)} rows left out, the first: {problems[0]}")
    if session.interrupt.rehearsal is not None:
        pairs = pairs[: 2 * ENOUGH]
    return pairs


def unfit(reward: Reward, prompt: Text, text: Text) -> str | None:
    """Why a model of the reward cannot read a reply, if it cannot."""
    for model in models_of(reward):
        try:
            tokens = model.tokens(prompt, text)
        except RenderError as error:
            return str(error)
        length, most = len(tokens.prompt) + len(tokens.completion), model.model.backbone.context
        if length > most:
            return f"has {length} tokens, {model.name} takes {most}"
    return None


def models_of(reward: Reward) -> list[ModelReward]:
    """The reward models that a reward is made of."""
    if isinstance(reward, ModelReward):
        return [reward]
    inner: tuple[Reward, ...] = ()
    if isinstance(reward, Ensemble):
        inner = reward.members
    elif isinstance(reward, WeightedSum):
        inner = tuple(part.reward for part in reward.parts)
    elif isinstance(reward, Normalised):
        inner = (reward.reward,)
    return [model for each in inner for model in models_of(each)]


def judge(reward: Reward, pairs: Sequence[Pair], run: Run) -> Judged:
    """Both replies of every pair, scored; a pair without two scores is left out, and said."""
    texts = [(pair, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    each = [scores(member, texts, run) for member in (reward.members if isinstance(reward, Ensemble) else [reward])]
    whole = [all(column[2 * i + side] is not None for column in each for side in (0, 1)) for i in range(len(pairs))]
    kept = [pair for pair, known in zip(pairs, whole, strict=True) if known]
    if not kept:
        raise RewardError("no pair has a score on both sides", where=f"reward {reward.name}",
                          fix="look at events.jsonl")  # fmt: skip
    if len(kept) < len(pairs):
        run.event("pairs_left_out", f"{len(pairs) - len(kept)} of {len(pairs)} pairs have no score on both sides")
    members = [[float(v) for i, v in enumerate(column) if whole[i // 2] and v is not None] for column in each]
    if not isinstance(reward, Ensemble):
        return Judged(kept, members[0])
    together = [combined(row, reward.combine, reward.penalty) for row in zip(*members, strict=True)]
    return Judged(kept, together, members)


def scores(reward: Reward, texts: Sequence[tuple[Pair, Text]], run: Run) -> list[float | None]:
    """Of completions that nobody sampled: a word counts as a token."""
    groups = []
    for i, (pair, text) in enumerate(texts):
        words = Segment(list(range(len(plain_text(text).split()))))
        prompt = Prompt(f"{pair.where}/{i}", [], pair.prompt, dict(pair.columns))
        groups.append(Group(prompt, [Sample(prompt.id, 0, [words], "stop", text)]))
    Scorer(reward, min_scored=1, on_event=lambda event: run.event(**event)).score(groups)
    return [group.samples[0].score for group in groups]


# What is found of them ------------------------------------------------------------------------------------------------


def by_length(judged: Judged) -> list[Figures]:
    """Accuracy by how much longer the chosen reply is."""
    return trust.by_quantile(differences(judged.lengths), judged.differences)


def length_figures(judged: Judged, config: EvaluateRewardConfig, session: Session) -> Figures:
    """Does the score follow the length, and does it beyond what the label (or gold) explains?"""
    labels, given = [1.0, 0.0] * len(judged.pairs), "label"
    kept = judged
    if config.gold is not None:
        gold = judge(opened(config.gold, session), judged.pairs, session.run)
        same = {id(pair) for pair in gold.pairs}
        flat = [i for i, pair in enumerate(judged.pairs) if id(pair) in same]
        kept = Judged(gold.pairs, [judged.scores[2 * i + side] for i in flat for side in (0, 1)])
        labels, given = gold.scores, "gold"
    return {
        "correlation": trust.correlation(kept.scores, kept.lengths),
        "partial": trust.partial_correlation(kept.scores, kept.lengths, labels), "given": given,
        "of_labels": trust.correlation(labels, kept.lengths),
    }  # fmt: skip


def by_columns(judged: Judged, config: EvaluateRewardConfig) -> Figures:
    """Accuracy by the labellers' margin and by a column of the pairs, where there are such."""
    found: Figures = {}
    margins = [pair.columns.get("margin") for pair in judged.pairs]
    if all(isinstance(margin, int | float) for margin in margins):
        found["by_margin"] = trust.by_quantile([abs(float(m)) for m in margins], judged.differences)  # type: ignore[arg-type]
    column = config.by or "subset"
    if config.by is not None or all(column in pair.columns for pair in judged.pairs):
        values = [pair.columns.get(column) for pair in judged.pairs]
        if all(value is None for value in values):
            raise RewardError(f"by: no pair has a column {column!r}", where="data", fix="name one that there is")
        found |= {"by": trust.by_value(values, judged.differences), "column": column}
        found["mean_of_parts"] = sum(part["accuracy"] for part in found["by"].values()) / len(found["by"])
    return found


def calibration(reward: Reward, judged: Judged) -> Figures | None:
    """On the scale of the raw scores, of which σ speaks: a normalised score times the std (of an ensemble's members the
    mean one). None for what is no reward model, and for ratings and steps: their differences are no log-odds."""
    models = models_of(reward)
    if not models or isinstance(reward, WeightedSum) or not all(model.log_odds for model in models):
        return None
    scale = sum(model.std for model in models) / len(models)
    return trust.calibration([scale * difference for difference in judged.differences])


def of_members(reward: Reward, judged: Judged) -> Figures:
    """How right each member of an ensemble is, how alike they are, and whether they disagree where they err."""
    if not isinstance(reward, Ensemble):
        return {}
    each = [differences(member) for member in judged.members]
    apart = [spread(row) for row in zip(*each, strict=True)]
    alike = [trust.agreement(a, b)["agreement"] for a, b in combinations(each, 2)]
    return {"members": {
        "accuracies": [trust.accuracy(member) for member in each],
        "agreement": sum(alike) / len(alike),
        "by_disagreement": trust.by_quantile(apart, judged.differences),
        "detects_errors": trust.detects(apart, [difference <= 0 for difference in judged.differences]),
    }}  # fmt: skip


def probe(reward: Reward, pairs: Sequence[Pair], config: EvaluateRewardConfig, run: Run, say: Any) -> Figures:
    """What each probe adds to the score of a chosen reply. One reply a prompt where there are prompts enough."""
    order = random.Random(stream_seed(config.seed, "probes")).sample(range(len(pairs)), len(pairs))
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(str(pairs[i].prompt), i)
    asked = [*first.values()] if len(first) >= ENOUGH else order
    found: Figures = {}
    for name, change in PROBES.items():
        changed = [(pairs[i], with_text(pairs[i].chosen, change)) for i in asked[: config.probes]]
        changed = [(pair, text) for pair, text in changed if unfit(reward, pair.prompt, text) is None]
        if len(changed) < ENOUGH:
            say(f"probe {name}: {len(changed)} replies can be changed so, fewer than {ENOUGH}: not measured")
            continue
        before, after = (scores(reward, texts, run) for texts in ([(p, p.chosen) for p, _ in changed], changed))
        known = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        prompts = len({str(pair.prompt) for pair, _ in changed})
        gains = trust.gain([a for a, _ in known], [b for _, b in known], config.seed)
        found[name] = {**gains, "prompts": prompts}
    return found


def with_text(reply: Text, change: Any) -> Text:
    """Of messages the last one is changed."""
    if isinstance(reply, str):
        return str(change(reply))
    return [*reply[:-1], {**reply[-1], "content": change(reply[-1]["content"])}]


def drifted(then: Judged, now: Judged, seed: int) -> Figures:
    """The replies then and now: their lengths, their scores, and how many pairs of each are in order."""
    return {
        "length": trust.drift(then.lengths, now.lengths, seed),
        "score": trust.drift(then.scores, now.scores, seed),
        "accuracy_then": trust.accuracy(then.differences),
    }  # fmt: skip
