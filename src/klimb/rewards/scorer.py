"""Groups in, scores in place: the one door between a reward and training.

What is not a finite number never becomes a score. A failure is recorded with its row; when too many rows of
the run have failed, the run stops. Samples that were not scored leave their group before anything is
computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from klimb.errors import RewardError
from klimb.rewards.combine import joined
from klimb.rewards.protocol import Columns, Reward, Scores, Values
from klimb.rewards.rules import plain_text
from klimb.types import Group, Prompt, Sample, Text

Event = dict[str, Any]
"""A line of events.jsonl without its step: {"kind", "message", …}."""

RESERVED = ("prompts", "completions", "completion_ids", "completion_tokens", "finish")
"""Names that every reward function can ask for beside the columns of the data."""
FIRST_ROWS = 100
"""The accepted share of failures is taken of at least so many rows, so that one early failure stops no run.
"""
DRY_ROWS = 8
EARLY = 16
"""Groups whose scores are waited for at the same time, while others are generated."""
COMPARED_ROWS = 64
"""Whose reference answers are held against those of others."""
REFERENCES = ("answer", "solution", "reference", "completion", "label")
"""Columns that a dry run takes as plausible completions, the first that is there."""


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """`groups` holds what may be trained on: new groups of the same samples, those without a score left
    out.
    """

    groups: list[Group]
    scored: int
    failed: int
    abstained: int
    dropped_groups: int
    """Groups with fewer scored samples than the advantage needs."""
    dropped_samples: int
    """Samples that are not in `groups`: failed, abstained, or of a dropped group."""
    metrics: dict[str, float] = field(default_factory=dict)


class Scorer:
    """Scores groups with one reward and counts failures over the run.

    `failure_limit` is the share of all rows so far that may fail. `min_scored` is how many scored samples a
    group needs: 2 where its samples are compared with each other, 1 where each stands alone. `on_event`
    gets a record of each failure.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        failure_limit: float = 0.05,
        min_scored: int = 2,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        if not 0.0 <= failure_limit <= 1.0:
            raise RewardError(f"failure_limit is {failure_limit}", fix="give a share between 0 and 1")
        self.reward = reward
        self._failure_limit = failure_limit
        self._min_scored = min_scored
        self._on_event = on_event
        self.counts = {"rows": 0, "failed": 0}
        """Over the run; set it again on resume, so that the run stops where it would have stopped."""
        self.weights: dict[str, float] = {}
        """Of a sum's parts, once it has scored something."""
        self._early = getattr(reward, "independent", False) and getattr(reward, "waits", False)
        self._threads: ThreadPoolExecutor | None = None
        self._begun: dict[int, tuple[Group, Future[Scores]]] = {}
        """By the group's place in memory, where it stays as long as it is listed here."""

    def begin(self, group: Group) -> None:
        """Start to score a finished group while others are generated, where that gains time and changes no score.

        `score` collects what was begun. Everything that adds up is added there, in the order of its groups.
        """
        if self._early and group.samples:
            self._threads = self._threads or ThreadPoolExecutor(EARLY, thread_name_prefix="early scores")
            self._begun[id(group)] = (group, self._threads.submit(self._asked, [group]))

    def score(self, groups: Sequence[Group]) -> ScoreReport:
        """Fill `score` and `rewards` of every sample. Raises RewardError when too many rows of the run have
        failed.
        """
        samples = [sample for group in groups for sample in group.samples]
        scores = self._collected(groups)
        parts = scores.parts or {self.reward.name: scores.values if scores.raw is None else scores.raw}
        self.weights = scores.weights
        for row, sample in enumerate(samples):
            sample.score = scores.values[row]
            sample.rewards = {name: values[row] for name, values in parts.items()}
            sample.step_rewards = [(place, value) for place, value in scores.steps[row]] if scores.steps else []
        self._record(scores, samples)
        return self._report(groups, scores, parts)

    def _collected(self, groups: Sequence[Group]) -> Scores:
        begun, self._begun = self._begun, {}
        if not groups or not all(id(group) in begun for group in groups):
            return self._asked(groups)
        try:
            return joined([begun[id(group)][1].result() for group in groups])
        finally:
            for _, future in begun.values():
                future.cancel()

    def _asked(self, groups: Sequence[Group]) -> Scores:
        pairs = [(group.prompt, sample) for group in groups for sample in group.samples]
        prompts, samples = [prompt for prompt, _ in pairs], [sample for _, sample in pairs]
        columns = columns_of(prompts, samples)
        return audited(self.reward([p.text for p in prompts], [s.text for s in samples], columns), len(pairs))

    def _record(self, scores: Scores, samples: Sequence[Sample]) -> None:
        for note in scores.notes:
            self._on_event({"kind": "reward_retry", "message": note, "reward": self.reward.name})
        for failure in scores.failures:
            sample = samples[failure.row]
            self._on_event({
                "kind": "reward_failure",
                "message": failure.reason,
                "reward": self.reward.name,
                "prompt_id": sample.prompt_id,
                "sample": sample.index,
                "traceback": failure.details,
            })  # fmt: skip
        self.counts["rows"] += len(samples)
        self.counts["failed"] += len(scores.failures)
        rows, failed = self.counts["rows"], self.counts["failed"]
        if scores.failures and failed > self._failure_limit * max(rows, FIRST_ROWS):
            last = scores.failures[-1]
            raise RewardError(
                f"{failed} of {rows} rows failed, more than failure_limit={self._failure_limit:g} accepts",
                where=f"reward {self.reward.name}",
                why=f"the last one, {samples[last.row].id}: {last.reason}",
                fix="correct the function (events.jsonl has the tracebacks) or return None for such rows",
            )

    def _report(self, groups: Sequence[Group], scores: Scores, parts: dict[str, Values]) -> ScoreReport:
        scored = [value for value in scores.values if value is not None]
        reduced = [Group(group.prompt, [s for s in group.samples if s.score is not None]) for group in groups]
        kept = [group for group in reduced if len(group.samples) >= self._min_scored]
        report = ScoreReport(
            groups=kept,
            scored=len(scored),
            failed=len(scores.failures),
            abstained=len(scores.values) - len(scored) - len(scores.failures),
            dropped_groups=len(groups) - len(kept),
            dropped_samples=len(scores.values) - sum(len(group.samples) for group in kept),
        )
        if scored:
            mean = math.fsum(scored) / len(scored)
            variance = math.fsum((value - mean) ** 2 for value in scored) / len(scored)
            report.metrics.update({"reward/mean": mean, "reward/std": math.sqrt(variance)})
        for name, values in parts.items():
            present = [value for value in values if value is not None]
            if present:
                report.metrics[f"reward/{name}"] = math.fsum(present) / len(present)
        counts = scores.counts or scores.endings()
        report.metrics.update({f"verdict/{ending}": float(count) for ending, count in sorted(counts.items())})
        return report

    def close(self) -> None:
        self.reward.close()


def columns_of(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Columns:
    """What reward functions can ask for by name: the columns of the data (None where a row has none), and
    RESERVED.
    """
    columns: Columns = {name: [] for prompt in prompts for name in prompt.columns}
    for name in RESERVED:
        if name in columns:
            raise RewardError(
                f"the data has a column {name!r}, which reward functions know as something else",
                fix="rename it",
            )
    for name in columns:
        columns[name] = [prompt.columns.get(name) for prompt in prompts]
    columns["completion_ids"] = [sample.tokens for sample in samples]
    columns["completion_tokens"] = [sum(sample.mask) for sample in samples]
    columns["finish"] = [sample.finish for sample in samples]
    return columns


def audited(scores: Scores, rows: int) -> Scores:
    """`scores` once it is certain that nothing else than finite floats and None is in them. Raises
    RewardError.

    Functions are checked where they are called; this holds for every Reward, also one that was written by
    hand.
    """
    for name, values in {"scores": scores.values, "raw scores": scores.raw or scores.values, **scores.parts}.items():
        if len(values) != rows:
            raise RewardError(f"{len(values)} {name} for {rows} completions", where="reward", fix="return one per row")
        for row, value in enumerate(values):
            if value is not None and not (isinstance(value, float | int) and math.isfinite(value)):
                raise RewardError(
                    f"{name} of row {row} is {value!r}", where="reward", fix="return finite numbers or None"
                )
    if any(not math.isfinite(value) for row in scores.steps or [] for _, value in row):
        raise RewardError("a step's reward is no finite number", where="reward", fix="return finite numbers")
    for failure in scores.failures:
        if scores.values[failure.row] is not None:
            raise RewardError(f"row {failure.row} has failed and has a score", where="reward", fix="make it None")
    return scores


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a dry run gave, row by row, for a person to look at."""

    prompts: list[str]
    completions: list[str]
    scores: Scores

    def lines(self) -> list[str]:
        """One line a row: what was scored, and the score."""
        shown = zip(self.prompts, self.completions, self.scores.values, strict=True)
        return [f"{_short(prompt)} → {_short(completion)}: {value}" for prompt, completion, value in shown]


def dry_run(reward: Reward, prompts: Sequence[Prompt]) -> DryRun:
    """Score the first rows before any model is loaded, with reference answers (or "test") as completions.

    Raises RewardError where a row fails; None is accepted as long as it is not the score of all rows.
    """
    prompts = list(prompts)[:DRY_ROWS]
    texts = [_as_completion(prompt, _reference(prompt) or "test") for prompt in prompts]
    scores = _scores_of(reward, prompts, texts)
    for failure in scores.failures[:1]:
        raise RewardError(
            f"{failure.reason} in the dry run on {len(prompts)} rows",
            where=f"reward {reward.name}",
            why=f"row {failure.row + 1}, completion {_short(texts[failure.row])!r}",
            fix="correct the function; it has to give a number or None for any text",
        )
    if prompts and all(value is None for value in scores.values):
        raise RewardError(
            f"None for all {len(prompts)} rows of the dry run", where=f"reward {reward.name}",
            why="nothing would be trained on", fix="return a number where a row can be judged",
        )  # fmt: skip
    return DryRun([_short(prompt.text) for prompt in prompts], [plain_text(text) for text in texts], scores)


def distributions(reward: Reward, prompts: Sequence[Prompt]) -> dict[str, Scores]:
    """What the reward gives to reference answers, to those of other prompts, and to nothing; of the prompts that have
    one, the first. Empty where none has."""
    answered = [(prompt, text) for prompt in prompts if (text := _reference(prompt)) is not None][:COMPARED_ROWS]
    asked, texts = [prompt for prompt, _ in answered], [text for _, text in answered]
    if not asked:
        return {}
    others = [next((text for text in texts[row + 1 :] + texts[:row] if text != own), None)
              for row, own in enumerate(texts)]  # fmt: skip
    kinds: dict[str, list[tuple[Prompt, str]]] = {
        "reference answers": answered,
        "shuffled answers": [(prompt, text) for prompt, text in zip(asked, others) if text is not None],
        "empty answers": [(prompt, "") for prompt in asked],
    }
    return {
        kind: _scores_of(reward, [prompt for prompt, _ in pairs], [_as_completion(*pair) for pair in pairs])
        for kind, pairs in kinds.items() if pairs
    }  # fmt: skip


def _scores_of(reward: Reward, prompts: Sequence[Prompt], texts: Sequence[Text]) -> Scores:
    """Of completions that nobody sampled: a word counts as a token."""
    samples = [
        Sample(prompt.id, index=0, segments=[], finish="stop", text=text) for prompt, text in zip(prompts, texts)
    ]
    columns = columns_of(prompts, samples)
    columns["completion_ids"] = [list(range(len(plain_text(text).split()))) for text in texts]
    columns["completion_tokens"] = [len(ids) for ids in columns["completion_ids"]]
    return audited(reward([prompt.text for prompt in prompts], list(texts), columns), len(prompts))


def _reference(prompt: Prompt) -> str | None:
    answers = (prompt.columns[name] for name in REFERENCES if isinstance(prompt.columns.get(name), str | int | float))
    return next((str(answer) for answer in answers), None)


def _as_completion(prompt: Prompt, text: str) -> Text:
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]


def _short(text: Text) -> str:
    flat = " ".join(plain_text(text).split())
    return flat if len(flat) <= 60 else f"{flat[:59]}…"
