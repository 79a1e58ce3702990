"""Questions to a model on this machine. It is not asked to write: of all verdicts that there can be, the one that it
finds most likely is taken, so that there is always exactly one, and nothing that an answer says can take its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from klimb.batch import Row, TokenBatch
from klimb.data.render import Renderer
from klimb.data.template import RenderError
from klimb.errors import one_line
from klimb.models.backbone import Backbone
from klimb.models.faces import Policy, policy_logps
from klimb.models.load import load_causal, resolve_device, resolve_dtype
from klimb.models.packing import Budget
from klimb.models.place import load_tokenizer
from klimb.rewards.judge.question import FIRST_WINS, Question, Verdict, messages_of, new_tag
from klimb.rewards.judge.settings import JudgeConfig
from klimb.types import Text

FIXED_TAG = "5f0c9a6e"
"""A model that writes nothing repeats nothing, and the same question has the same verdict to the bit."""


class LocalModel:
    """`ask` as of a server. A score is the mean of the scale under the model's probabilities (G-Eval, arXiv
    2303.16634); of two answers the likelier verdict counts."""

    repaired = 0

    def __init__(self, config: JudgeConfig) -> None:
        device = resolve_device(config.device, samples=True)
        network, adapter = load_causal(config.model, device, resolve_dtype("auto", device))
        self._policy = Policy(Backbone(network, adapter), "policy" if adapter else None)
        self._policy.requires_grad_(False)
        self._renderer = Renderer(load_tokenizer(config.model))
        self._budget = Budget(8192)
        self.notes: list[str] = []

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        for place, question in enumerate(questions):
            yield place, self._verdict(question)

    def _verdict(self, question: Question) -> Verdict:
        try:
            rows = [self._row(question, verdict) for verdict in question.verdicts]
        except RenderError as error:
            return Verdict("error", why=one_line(error)[:200])
        longest, context = max(map(len, rows)), self._policy.backbone.context
        if longest > context:
            return Verdict("error", why=f"the question has {longest} tokens, where {context} fit")
        batch = TokenBatch.from_rows([[row] for row in rows], [0] * len(rows), [str(i) for i in range(len(rows))])
        logps = policy_logps(self._policy, batch, budget=self._budget).logps.double()
        shares = torch.where(batch.mask, logps.cpu(), 0.0).sum(dim=1).softmax(dim=0).tolist()
        if not all(map(math.isfinite, shares)):
            return Verdict("error", why="the model's log-probs are not finite")
        if question.compares:
            return Verdict("ok", FIRST_WINS[max(zip(shares, question.verdicts))[1]])
        return Verdict("ok", math.fsum(share * float(score) for share, score in zip(shares, question.verdicts)))

    def _row(self, question: Question, verdict: str) -> Row:
        prompt, completion = self._texts(question, verdict)
        tokens = self._renderer.completion(prompt, completion)
        return Row(tokens.prompt, tokens.completion, tokens.mask)

    def _texts(self, question: Question, verdict: str) -> tuple[Text, Text]:
        tag = FIXED_TAG if FIXED_TAG not in "".join(question.answers) else new_tag(question)
        system, user = (str(message["content"]) for message in messages_of(question, tag, answer_alone=True))
        if self._renderer.tokenizer.chat_template is None:
            return f"{system}\n\n{user}\n\nVerdict:", f" {verdict}"
        # Not every template knows system messages.
        return [{"role": "user", "content": f"{system}\n\n{user}"}], [{"role": "assistant", "content": verdict}]

    def close(self) -> None:
        """Nothing to give back."""
