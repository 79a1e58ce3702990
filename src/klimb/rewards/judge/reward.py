"""A judge as a reward source: scores on its scale, or wins against another answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import find_references
from klimb.errors import RewardError, did_you_mean
from klimb.rewards.combine import sources
from klimb.rewards.judge.judge import Judge
from klimb.rewards.judge.question import Question, shown
from klimb.rewards.judge.settings import JudgeConfig, parse_judge
from klimb.rewards.protocol import Columns, Failure, Reward, Scores, Values
from klimb.types import Text


class JudgeReward:
    """A Reward. Of a row whose column is empty it scores nothing; a judge without a usable verdict abstains."""

    name = "judge"

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        self.judge = Judge(config)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        questions = {row: question for row in range(len(completions))
                     if (question := self._question(prompts[row], completions[row], columns, row))}  # fmt: skip
        outcomes = self.judge.answered([*questions.values()])
        values: Values = [None] * len(completions)
        failures: list[Failure] = []
        for row, outcome in zip(questions, outcomes, strict=True):
            values[row] = outcome.value
            if outcome.kind in ("timeout", "error"):
                failures.append(Failure(row, outcome.why, kind="timeout" if outcome.kind == "timeout" else "error"))
        counts = self.judge.counts
        counts["abstain"] += len(completions) - len(questions)
        return Scores(values, failures, notes=self.judge.notes(), counts=dict(counts))

    def _question(self, prompt: Text, completion: Text, columns: Columns, row: int) -> Question | None:
        config = self.config
        column = config.reference or config.against
        if column is not None and column not in columns:
            raise RewardError(f"the data has no column {column!r}", where="reward judge",
                              fix=did_you_mean(column, columns))  # fmt: skip
        other = columns[column][row] if column is not None else None
        if column is not None and other is None:
            return None
        text = shown(other) if isinstance(other, str | list) else str(other)
        answers = (shown(completion), text) if config.against else (shown(completion),)
        return Question(shown(prompt), answers, config.rubric, config.scale, text if config.reference else None)

    def close(self) -> None:
        self.judge.close()


def make_judge(options: Mapping[str, Any]) -> JudgeReward:
    """The reward `judge` with these options. Raises RewardError."""
    return JudgeReward(parse_judge(options))


def keep_beside(reward: Reward, folder: Path) -> None:
    """Judges in `reward`, or in any part of it, keep what they pay for in the run's folder."""
    for source in sources(reward):
        if isinstance(source, JudgeReward):
            source.judge.beside = folder


def judge_files(options: Any) -> list[Path]:
    """The folder of a model on this machine. Raises RewardError where the options are wrong, so that nothing of them (a
    key, say) is written anywhere."""
    if not isinstance(options, Mapping) or find_references(options):
        return []
    config = parse_judge(options)
    return [Path(config.model)] if config.url is None and Path(config.model).is_dir() else []
