"""A service elsewhere: one POST of JSON within a deadline, and what to do while nobody answers.

Who cannot be reached, or says "later" (429, 502, 503, 504), is waited for: 1, 2, 4 … 60 s, or as long as Retry-After
says, with jitter that no random stream of the run feels. After TRIES tries the run says that it waits, and after
`patience` seconds it ends. A service that has never answered gets the tries alone: its address may be wrong. Who
answers is there: an error or nonsense is a verdict on what was asked.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from klimb.errors import RewardError, one_line
from klimb.rewards.calling import CallFailed, printable
from klimb.rewards.post import NoReply, TooLong, post

TRIES = 4
LONGEST_WAIT = 60.0
LATER = (408, 425, 429, 502, 503, 504)
NEVER = (301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 407, 410)
"""Answers that are the same for every request: the address or the key is wrong."""

T = TypeVar("T")
_JITTER = random.SystemRandom()


class Down(Exception):
    """No answer that counts; the same request may have one later. `after`: seconds that the service asked for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(printable(reason))
        self.after = after


class Service:
    """JSON in, JSON out, from several threads at once.

    timeout: seconds of one request, all of its reply included. patience: seconds to wait for a service that stopped
    answering. key: the environment variable with its API key. `tell` gets lines for a person, `leaving` says whether
    somebody wants to end the run.
    """

    def __init__(
        self, url: Any, *, timeout: float, patience: float = 600.0, key: str | None = None, where: str
    ) -> None:
        self.where = where
        self.timeout = timeout
        self.tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
        self.leaving: Callable[[], bool] = lambda: False
        self._url = _checked(url, where)
        self._shown = self._url.partition("?")[0]
        self._patience = patience
        self._key = _key(key, where) if key is not None else ""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._answered = False
        self._waiting_since: float | None = None

    def ask(self, payload: Any, seconds: float) -> Any:
        """One try. Raises Down, CallFailed where the service answers but not as it should, and RewardError where it
        never will."""
        try:
            reply = post(self._url, payload, self._key or None, time.monotonic() + seconds, self._closed.is_set)
        except (TypeError, ValueError) as error:
            raise RewardError("a column cannot be sent as JSON", where=self.where, why=error,
                              fix="name those that can in `columns`") from error  # fmt: skip
        except NoReply as none:
            if none.kind == "timeout":
                raise CallFailed("timeout", f"no answer within {seconds:.3g} s") from None
            if isinstance(none, TooLong):
                raise CallFailed("length", str(none)) from None
            raise Down(self._clean(str(none))) from None
        self._heard(reply.status)
        if reply.status == 200:
            return self._value(reply.data)
        said = self._clean(one_line(reply.data[:200].decode("utf-8", "replace")))
        answer = f"answered {reply.status} {http.client.responses.get(reply.status, '')}".strip()
        reason = answer + (f": {said}" if said else "")
        if reply.status in LATER:
            raise Down(reason, reply.retry_after or 0.0)
        if reply.status in NEVER:
            raise RewardError(reason, where=f"{self.where}: {self._shown}", fix="correct its url or key")
        raise CallFailed("raised", reason)

    def _value(self, data: bytes) -> Any:
        text = self._clean(data.decode("utf-8", "replace"))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise CallFailed("length", f"answered no JSON: {one_line(text[:80])!r}") from None

    def _heard(self, status: int) -> None:
        if status in LATER:
            return
        with self._lock:
            since, self._waiting_since, self._answered = self._waiting_since, None, True
        if since is not None and not self._closed.is_set():
            self.tell(f"{self.where}: it answers again, after {time.monotonic() - since:.0f} s")

    def persist(self, attempt: Callable[[bool], T]) -> T:
        """What `attempt` gives as soon as it does not raise Down; it is told whether its first tries are used up.

        Raises RewardError once patience is at an end, the reward was closed, or the run is to end.
        """
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return attempt(tries >= TRIES)
            except Down as down:
                self._wait(down, tries, began)

    def _wait(self, down: Down, tries: int, began: float) -> None:
        where = f"{self.where}: {self._shown}"
        if tries >= TRIES and not self._answered:
            raise RewardError(
                f"no answer in {tries} tries", where=where, why=down, fix="is it running, is this its url?"
            )
        left = began + self._patience - time.monotonic()
        if left <= 0 and tries >= TRIES:  # not after one try alone, should this process have slept
            raise RewardError(f"no answer for {self._patience:.3g} s", where=where, why=down, fix="start it again")
        if tries >= TRIES:
            with self._lock:
                first, self._waiting_since = self._waiting_since is None, self._waiting_since or began
            if first:
                self.tell(f"{where}: {down}: the run waits for it, {left:.0f} s more at most")
        jitter = _JITTER.uniform(0.5, 1.0)
        self._sleep(min(left, max(down.after, jitter * min(2.0 ** (tries - 1), LONGEST_WAIT))), where)

    def _sleep(self, seconds: float, where: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._closed.wait(min(left, 0.1)) or self.leaving():
                raise RewardError("left while it was waited for", where=where)

    def _clean(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        """Ends all waiting."""
        self._closed.set()


def _checked(url: Any, where: str) -> str:
    fix = "write http://HOST:PORT/PATH or https://…"
    try:
        parts = urlsplit(str(url))
        host, _ = parts.hostname, parts.port  # which raises where it is none
        str(url).encode("ascii")
    except ValueError as error:
        raise RewardError(f"{url!r} is no url", where=where, why=error, fix=fix) from None
    if parts.username or parts.password:
        raise RewardError("a url with a password in it", where=where, why="it would stand in the config",
                          fix="put an API key into an environment variable, and name it in `key_env`")  # fmt: skip
    if parts.scheme not in ("http", "https") or not host or any(c.isspace() for c in str(url)):
        raise RewardError(f"{url!r} is no url", where=where, fix=fix)
    return str(url)


def _key(name: str, where: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise RewardError(f"the environment variable {name} is not set", where=where, fix=f"export {name}=…")
    if not (key.isascii() and key.isprintable()):
        raise RewardError(f"what the environment variable {name} holds is no key", where=where)
    return key
