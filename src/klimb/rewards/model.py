"""A trained reward model as a reward: centred and scaled once on reference samples, then frozen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from klimb.batch import Row, TokenBatch
from klimb.data.render import Renderer, Tokens
from klimb.models.faces import RewardModel, reward_scores
from klimb.models.packing import Budget
from klimb.rewards.protocol import Columns, Scores
from klimb.rewards.rules import plain_text
from klimb.types import Text


class ModelReward:
    """(raw score − mean) / std of the reference samples, so that β means "standard deviations per nat" for any model.

    same_tokenizer: the policy speaks the model's tokens, so its completions are read as sampled, never encoded anew.
    """

    def __init__(
        self,
        model: RewardModel,
        renderer: Renderer,
        directory: str,
        *,
        same_tokenizer: bool,
        budget: int | Budget = 8192,
    ) -> None:
        self.model = model
        self.renderer = renderer
        self.name = Path(directory).parent.name if Path(directory).name == "model" else Path(directory).name
        self.same_tokenizer = same_tokenizer
        self.budget = budget
        saved = Path(directory) / "reward.json"
        normalisation = json.loads(saved.read_text()) if saved.is_file() else {"mean": 0.0, "std": 1.0}
        self.mean, self.std = float(normalisation["mean"]), float(normalisation["std"])

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        if self.same_tokenizer:
            rendered = [self.renderer.prompt(prompt) for prompt in prompts]
            rows = [Row(p, ids, [False] * len(ids)) for p, ids in zip(rendered, columns["completion_ids"], strict=True)]
        else:
            texts = [self.tokens(p, c) for p, c in zip(prompts, completions, strict=True)]
            rows = [Row(t.prompt, t.completion, [False] * len(t.completion)) for t in texts]
        batch = TokenBatch.from_rows([[row] for row in rows], range(len(rows)), [str(i) for i in range(len(rows))])
        scores = reward_scores(self.model, batch, budget=self.budget).double()
        return Scores([float(value) for value in (scores - self.mean) / self.std])

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
