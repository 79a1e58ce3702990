"""A trained reward model as a reward: centred and scaled once on reference samples, then frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from klimb.batch import Row, TokenBatch
from klimb.data.judged import StepEnds, question, up_to_verdict
from klimb.data.render import Renderer, Tokens
from klimb.errors import KlimbError, RewardError
from klimb.models.faces import RewardModel, Verdicts, reward_scores, step_logits
from klimb.models.load import reward_facts
from klimb.models.packing import Budget
from klimb.models.rated import Judge
from klimb.objective.judging import so_far, step_rewards
from klimb.rewards.protocol import Columns, Scores, Values
from klimb.rewards.rules import plain_text
from klimb.types import Text

_NO_LOG_ODDS = frozenset({"attributes", "attributes_text", "ordinal", "process"})
"""Kinds whose raw scores do not differ by the log-odds that one reply is better. Of verdicts and labels they do: where
one of two is good, σ(a − b) is the probability that it is the first."""


class ModelReward:
    """(raw score − mean) / std of the reference samples, so that β means "standard deviations per nat" for any model.

    same_tokenizer: the policy speaks the model's tokens, so its completions are read as sampled, never encoded anew
    (but by a model that is asked for words, in a text of its own). dense: of a model of steps, each step is paid
    where it ends; together they are the score.
    """

    def __init__(
        self,
        model: Judge,
        renderer: Renderer,
        directory: str,
        *,
        same_tokenizer: bool,
        dense: bool = False,
        budget: int | Budget = 8192,
    ) -> None:
        self.model = model
        self.renderer = renderer
        self.name = Path(directory).parent.name if Path(directory).name == "model" else Path(directory).name
        self.same_tokenizer = same_tokenizer
        self.budget = budget
        facts = reward_facts(directory)
        self.mean, self.std = float(facts.get("mean", 0.0)), float(facts.get("std", 1.0))
        self.instruction: str | None = facts.get("instruction")
        self.log_odds = facts.get("kind") not in _NO_LOG_ODDS
        self.marks = StepEnds(renderer, facts["separator"]) if facts.get("kind") == "process" else None
        self.dense = dense
        if dense and self.marks is None:
            raise RewardError("dense: it scores whole completions, not their steps", where=f"reward {directory}",
                              fix="leave dense out, or train one with kind=process")  # fmt: skip
        if dense and not same_tokenizer:
            raise RewardError("dense: its tokens are not the policy's: no step has a place among those",
                              where=f"reward {directory}", fix="leave it out, or start it from the policy")  # fmt: skip

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        batch = self._read(prompts, completions, columns)
        try:
            if self.dense:
                return self._by_steps(batch)
            scores = reward_scores(self.model, batch, budget=self.budget).double()
        except KlimbError as error:  # a text that it cannot take: what was trained so far is kept
            raise RewardError(str(error), where=f"reward {self.name}") from error
        return Scores([float(value) for value in (scores - self.mean) / self.std])

    def _read(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> TokenBatch:
        if self.instruction is not None:
            return self._asked(prompts, completions, self.instruction)
        if self.same_tokenizer:
            rendered = [self.renderer.prompt(prompt) for prompt in prompts]
            return rows_of(list(zip(rendered, columns["completion_ids"], strict=True)), self.marks)
        texts = [self.tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
        return rows_of([(text.prompt, text.completion) for text in texts], self.marks)

    def _asked(self, prompts: Sequence[Text], completions: Sequence[Text], instruction: str) -> TokenBatch:
        """What each is asked; marked is the place of a verdict."""
        verdict = [self.model.yes] if isinstance(self.model, Verdicts) else []
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = self.renderer.completion(*question(prompt, completion, instruction))
            asked = up_to_verdict(tokens, not isinstance(prompt, str))
            rows.append([Row(tokens.prompt, [*asked, *verdict], [False] * len(asked) + [True] * len(verdict))])
        return TokenBatch.from_rows(rows, range(len(rows)), [str(i) for i in range(len(rows))])

    def _by_steps(self, batch: TokenBatch) -> Scores:
        assert isinstance(self.model, RewardModel)
        assert self.model.combine is not None
        logits = step_logits(self.model, batch, budget=self.budget)
        mask = batch.mask
        prefixes = (so_far(logits.sigmoid(), mask, self.model.combine) - self.mean) / self.std
        paid = step_rewards(prefixes, mask)
        steps: list[list[tuple[int, float]]] = []
        values: Values = []
        for line, present, [row] in zip(paid, mask, batch.rows, strict=True):
            given = line[present].tolist()
            places = [place for place, end in enumerate(row.mask) if end]
            steps.append(list(zip(places[:-1], given[:-1])))  # what is left is paid at the end
            values.append(math.fsum(given) if given else -self.mean / self.std)
        return Scores(values, steps=steps)

    def tokens(self, prompt: Text, completion: Text) -> Tokens:
        """As the model reads a reply. One that says nothing is its end alone, and is worth something, too."""
        ends = self.renderer.stop_tokens(False)
        if isinstance(prompt, list):
            ends = self.renderer.stop_tokens(True) - ends or ends
        if plain_text(completion) or not ends:
            return self.renderer.completion(prompt, completion)
        return Tokens(self.renderer.prompt(prompt), [min(ends)], [False])

    def close(self) -> None:
        """Nothing to give back."""


def rows_of(texts: Sequence[tuple[Sequence[int], Sequence[int]]], marks: StepEnds | None = None) -> TokenBatch:
    """Prompts and completions to be scored; of a model of steps, the ends of these are marked."""
    rows = [[Row(prompt, ids, marks(ids) if marks else [False] * len(ids))] for prompt, ids in texts]
    return TokenBatch.from_rows(rows, range(len(rows)), [str(i) for i in range(len(rows))])
