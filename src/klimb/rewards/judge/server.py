"""Questions to a server that speaks OpenAI's chat completions: retries, pace, budget, and one repair a question."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

from klimb.errors import RewardError, one_line
from klimb.rewards.calling import printable
from klimb.rewards.judge.ledger import Ledger
from klimb.rewards.judge.question import Question, Unusable, Verdict, messages_of, new_tag, read, repair, schema_of
from klimb.rewards.judge.settings import JudgeConfig
from klimb.rewards.post import NoReply, Reply, post
from klimb.types import Message

HOPELESS = (401, 402, 403, 404)
"""Nothing that is asked will be answered: the run stops."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
UNKNOWN_FORMAT = (400, 422, 501)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between tries: they double."""
QUOTED = 2000
"""Characters of an unusable reply that are shown to the judge again."""


class Server:
    """`ask` yields verdicts as they arrive. A verdict takes at most `timeout` seconds with all its tries; where as many
    in a row as are asked at a time got no reply (at least 3), the others of the batch are not asked."""

    def __init__(self, config: JudgeConfig, ledger: Ledger) -> None:
        assert config.url is not None
        self.config, self.ledger = config, ledger
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._key = config.key()
        self._lock = threading.Lock()
        self._formats = True
        self._next = self._not_before = 0.0
        self._silent = 0
        self._random = random.Random()  # for pauses alone; the run's streams are left as they are
        self.repaired = 0
        self.notes: list[str] = []

    @property
    def identity(self) -> dict[str, Any]:
        """What of the request, beside the question, decides the verdict."""
        return {"reason": self.config.reason, "max_tokens": self.config.max_tokens, **self.config.request}

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Verdict]]:
        """(place, verdict) in the order of their arrival. Raises RewardError where nothing can be asked any more."""
        self._silent = 0
        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="judge") as threads:
            running = {threads.submit(self._verdict, question): place for place, question in enumerate(questions)}
            ending: BaseException | None = None
            try:
                for done in as_completed(running):
                    if done.cancelled():
                        continue
                    if (error := done.exception()) is None:
                        yield running[done], done.result()
                        continue
                    ending = ending or error
                    for other in running:  # what is under way is paid for, and comes in
                        other.cancel()
            finally:
                for other in running:
                    other.cancel()
        if ending is not None:
            raise ending

    def _verdict(self, question: Question) -> Verdict:
        patience = max(3, self.config.concurrency)
        if self._silent >= patience:
            return Verdict("error", why=f"not asked: the last {patience} questions got no reply")
        deadline = time.monotonic() + self.config.timeout
        tag, reason = new_tag(question), self.config.reason
        messages = messages_of(question, tag, reason)
        try:
            for attempt in range(2):
                text = ""
                try:
                    text = self._reply(question, messages, deadline)
                    value = read(text, question, tag, reason)
                    self.repaired += attempt
                    return Verdict("ok", value)
                except Unusable as error:
                    self._silent = 0
                    why = self._without_key(str(error))
                said = {"role": "assistant", "content": text[:QUOTED]}
                messages = [*messages, said, {"role": "user", "content": repair(question, why, tag, reason)}]
            return Verdict("abstain", why=why)
        except NoReply as error:
            return Verdict(error.kind, why=self._without_key(str(error)))

    def _reply(self, question: Question, messages: list[Message], deadline: float) -> str:
        """What the model wrote. Raises NoReply, Unusable, RewardError."""
        pause, formatted = FIRST_PAUSE, self._formats
        while True:
            self._wait_for_turn(deadline)
            kind: Literal["timeout", "error"] = "error"
            wait: float | None = None
            try:
                reply = self._post(question, messages, formatted, deadline)
            except NoReply as error:
                kind, why = error.kind, str(error)
            else:
                text = self._text(reply) if reply.status == 200 else None
                if text is not None:
                    self._silent = 0
                    self._with_format(formatted)
                    return text
                why, wait = f"status {reply.status}: {self._said(reply)}", reply.retry_after
                if formatted and reply.status in UNKNOWN_FORMAT:
                    formatted = False
                    continue
                self._look_at(reply, why)
            wait = max(self._random.uniform(pause / 2, pause), wait or 0.0)
            pause = min(2 * pause, LONGEST_PAUSE)
            if time.monotonic() + wait >= deadline:
                self._silent += 1
                raise NoReply(kind, f"{why}; nothing else within {self.config.timeout:g} s")
            time.sleep(wait)

    def _look_at(self, reply: Reply, why: str) -> None:
        """Raises where asking again gives the same; a server that asks to wait is left alone by all threads."""
        if reply.status in HOPELESS:
            raise RewardError("the server refuses", where=f"judge {self._url}", why=self._without_key(why),
                              fix="correct url, model or the key in key_env")  # fmt: skip
        if reply.status != 200 and reply.status not in PASSING:
            self._silent = 0  # it answers; this one it does not want
            raise NoReply("error", why)
        if reply.retry_after is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + reply.retry_after)

    def _post(self, question: Question, messages: list[Message], formatted: bool, deadline: float) -> Reply:
        config = self.config
        body: dict[str, Any] = {"model": config.model, "messages": messages, "temperature": 0,
                                "max_tokens": config.max_tokens}  # fmt: skip
        if formatted:
            body["response_format"] = schema_of(question, config.reason)
        body = {name: value for name, value in {**body, **config.request}.items() if value is not None}
        # Half, so that a server that was silent once can be asked again.
        reply = post(self._url, body, self._key, min(deadline, time.monotonic() + config.timeout / 2))
        if reply.status == 200:
            self._count(messages, reply)
        return reply

    def _wait_for_turn(self, deadline: float) -> None:
        """Budget and pace. Raises RewardError where the budget is spent, NoReply where the turn comes too late."""
        with self._lock:
            self._check_budget()
            turn = max(time.monotonic(), self._not_before, self._next)
            if turn >= deadline:
                raise NoReply("timeout", "its turn did not come in time (requests_per_minute, or the server's wish)")
            if self.config.requests_per_minute is not None:
                self._next = turn + 60.0 / self.config.requests_per_minute
            self.ledger.spend(requests=1)
        time.sleep(max(0.0, turn - time.monotonic()))

    def _check_budget(self) -> None:
        """Requests exactly; tokens and money as far as is known, which what is under way may exceed."""
        spent, budget, prices = self.ledger.spent, self.config.budget, self.config.prices
        sums = {"requests": float(spent.requests), "tokens": float(spent.prompt + spent.completion)}
        if prices is not None:
            sums["money"] = (spent.prompt * prices.prompt + spent.completion * prices.completion) / 1e6
        for name, used in sums.items():
            limit = getattr(budget, name)
            if limit is not None and used >= limit:
                raise RewardError(
                    f"the judge's budget is spent: {used:g} of {limit:g} {name}", where=f"judge {self.config.model}",
                    fix=f"raise budget.{name} and start with --fresh in the same out: what was paid for is kept there",
                )  # fmt: skip

    def _count(self, messages: list[Message], reply: Reply) -> None:
        usage = _json(reply).get("usage")
        usage = usage if isinstance(usage, dict) else {}
        asked = sum(len(str(message["content"])) for message in messages) // 4
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        known = [count if isinstance(count, int) and 0 <= count < 1 << 40 else guess
                 for count, guess in zip(counts, (asked, len(reply.data) // 4))]  # fmt: skip
        self.ledger.spend(prompt=known[0], completion=known[1])

    def _text(self, reply: Reply) -> str | None:
        """None: what came is no chat completion, and may be one the next time. Raises Unusable."""
        choices = _json(reply).get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            return None
        if choice and choice.get("finish_reason") == "length":
            raise Unusable("it was cut off at max_tokens")
        content = message.get("content")
        if not isinstance(content, str):
            raise Unusable("it holds no text")
        return content

    def _with_format(self, formatted: bool) -> None:
        """Remembers a server that answers only where no `response_format` is asked for."""
        with self._lock:
            if self._formats and not formatted:
                self._formats = False
                self.notes.append("the server refused response_format json_schema: asked without it from here on")

    def _said(self, reply: Reply) -> str:
        error = _json(reply).get("error")
        said = error.get("message") if isinstance(error, dict) else error
        text = said if isinstance(said, str) else reply.data[:400].decode("utf-8", "replace")
        return self._without_key("".join(c if c.isprintable() else " " for c in one_line(printable(text))[:200]))

    def _without_key(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        self.ledger.close()


def _json(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
