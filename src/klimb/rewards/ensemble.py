"""Several reward models as one: what only some of them believe earns little, where they disagree is logged.

::

    reward: {ensemble: {models: [runs/rm-1/model, runs/rm-2/model]}}                               their mean
    reward: {ensemble: {models: [runs/rm-1/model, runs/rm-2/model], combine: min}}                 the worst of them
    reward: {ensemble: {models: [runs/rm-1/model, runs/rm-2/model], combine: uncertainty, lambda: 0.5}}
                                                                                  mean − λ · variance over the members

The three of Coste et al. (2023), "Reward Model Ensembles Help Mitigate Overoptimization", arXiv 2310.02743. Members
differ by seed or by pretraining. Each is centred and scaled by the numbers saved with it, so that none is louder than
the others; the variance is that of these scores, divided by the number of members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.protocol import Columns, Failure, Reward, Scores, Values
from klimb.types import Text

Combine = Literal["mean", "min", "uncertainty"]
_WHERE = "reward ensemble"


def spread(scores: Sequence[float]) -> float:
    """Standard deviation over the members, divided by their number (not one less): the disagreement on a row."""
    mean = math.fsum(scores) / len(scores)
    return math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / len(scores))


def combined(scores: Sequence[float], combine: Combine, penalty: float = 0.0) -> float:
    """One row's score out of those of its members. penalty: λ of mean − λ · variance."""
    if combine == "min":
        return min(scores)
    mean = math.fsum(scores) / len(scores)
    return mean - penalty * spread(scores) ** 2 if combine == "uncertainty" else mean


class Ensemble:
    """Its parts are the combined score and `disagreement`. A row that a member does not score has no score."""

    name = "ensemble"

    def __init__(self, members: Sequence[Reward], combine: Combine = "mean", penalty: float = 0.0) -> None:
        self.members = tuple(members)
        self.combine: Combine = combine
        self.penalty = penalty

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        found = [member(prompts, completions, columns) for member in self.members]
        failures: dict[int, Failure] = {}
        for member, scores in zip(self.members, found, strict=True):
            for failure in scores.failures:
                reason = f"{member.name}: {failure.reason}"
                failures.setdefault(failure.row, Failure(failure.row, reason, failure.details))
        values: Values = []
        spreads: Values = []
        for each in zip(*(scores.values for scores in found), strict=True):
            known = [score for score in each if score is not None]
            whole = len(known) == len(self.members)
            values.append(combined(known, self.combine, self.penalty) if whole else None)
            spreads.append(spread(known) if whole else None)
        notes = [note for scores in found for note in scores.notes]
        parts = {self.name: values, "disagreement": spreads}
        return Scores(values, [failures[row] for row in sorted(failures)], parts, notes)

    def close(self) -> None:
        for member in self.members:
            member.close()


def parse_ensemble(options: dict[str, Any], load: Callable[[str], Reward] | None) -> Ensemble:
    """load: makes a Reward of a reward model's directory. Raises RewardError."""
    known = ("models", "combine", "lambda")
    for key in options:
        if key not in known:
            raise RewardError(f"unknown option {key!r}", where=_WHERE, fix=did_you_mean(str(key), known))
    models, combine, penalty = options.get("models"), options.get("combine", "mean"), options.get("lambda")
    if not isinstance(models, list | tuple) or len(models) < 2 or not all(isinstance(each, str) for each in models):
        raise RewardError(f"models is {models!r}", where=_WHERE, why="it takes two members or more to disagree",
                          fix="write models: [runs/rm-1/model, runs/rm-2/model]")  # fmt: skip
    if len(set(models)) < len(models):
        raise RewardError("a model is named twice", where=_WHERE, why="it agrees with itself", fix="name each once")
    if combine not in get_args(Combine):
        raise RewardError(f"combine is {combine!r}", where=_WHERE, fix=did_you_mean(str(combine), get_args(Combine)))
    if (penalty is not None) is not (combine == "uncertainty"):
        raise RewardError(f"combine: {combine} with lambda {penalty!r}", where=_WHERE,
                          why="lambda is what the variance is multiplied with in mean − lambda · variance",
                          fix="give it with combine: uncertainty, and nowhere else")  # fmt: skip
    number = isinstance(penalty, int | float) and not isinstance(penalty, bool) and math.isfinite(penalty)
    if penalty is not None and not (number and penalty > 0):
        raise RewardError(f"lambda is {penalty!r}", where=_WHERE, fix="give a finite number above 0")
    if load is None:
        raise RewardError("reward models cannot be used here", where=_WHERE, fix="use a function or a rule")
    members: list[Reward] = []
    try:
        members.extend(map(load, models))
    except BaseException:
        for member in members:
            member.close()
        raise
    return Ensemble(members, cast(Combine, combine), float(penalty or 0.0))
