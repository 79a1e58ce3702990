"""A reward that a server gives.

::

    reward: {http: {url: "http://scores:8000/score", columns: [answer], key_env: SCORES_KEY}}

It is asked by POST, with JSON of at most `batch` rows::

    {"prompts": ["2 + 2 ?"], "completions": ["4"], "columns": {"answer": ["4"]}}

and answers with a list of one number for each row, or null where it gives no score. Rows have to be scored
independently: they arrive in any portions, `concurrent` requests at a time, while others are still generated. What
becomes of errors and silence stands in service.py; rows that the server cannot score are looked for in halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

from klimb.errors import RewardError, did_you_mean
from klimb.rewards.calling import checked
from klimb.rewards.combine import joined
from klimb.rewards.function import in_halves
from klimb.rewards.protocol import Columns, Scores
from klimb.rewards.service import Down, Service
from klimb.types import Text

RESERVED = ("completion_ids", "completion_tokens", "finish")
"""Columns that are sent where they are asked for by name."""


class Options(NamedTuple):
    """A server's scores: texts and columns are posted as JSON, a list of numbers (or null) comes back.

    Rows arrive in any portions, while others are still generated. A server that stops answering is waited for.
    """

    url: Annotated[str, "of the server: http or https"]
    timeout: Annotated[float, "seconds of a request"] = 30.0
    batch: Annotated[int, "rows of a request"] = 32
    concurrent: Annotated[int, "requests at a time"] = 4
    patience: Annotated[float, "seconds to wait for a server that stopped answering"] = 600.0
    key_env: Annotated[str | None, "environment variable with the API key, sent as a bearer token"] = None
    columns: Annotated[list[str] | None, "columns that are sent; none: all of the data's"] = None


class HttpReward:
    """A Reward; see above."""

    name = "http"
    independent = waits = True

    def __init__(self, options: Options) -> None:
        self._options = options
        self.service = Service(
            options.url, timeout=options.timeout, patience=options.patience, key=options.key_env, where="reward http"
        )
        self._threads = ThreadPoolExecutor(options.concurrent, thread_name_prefix="reward http")

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], columns: Columns) -> Scores:
        wanted = self._options.columns
        if wanted is None:
            wanted = [name for name in columns if name not in RESERVED]
        for name in wanted:
            if name not in columns:
                raise RewardError(
                    f"the data has no column {name!r}", where="reward http", fix=did_you_mean(name, columns)
                )
        batch = {"prompts": list(prompts), "completions": list(completions)}
        beside = {name: columns[name] for name in wanted}
        starts = range(0, len(completions), self._options.batch)
        portions = [list(range(start, min(start + self._options.batch, len(completions)))) for start in starts]
        asked = [self._threads.submit(self._portion, batch, beside, rows) for rows in portions]
        try:
            return joined([future.result() for future in asked])
        finally:
            for future in asked:
                future.cancel()

    def _portion(self, batch: Columns, beside: Columns, rows: list[int]) -> Scores:
        """The scores of these rows, whatever it takes."""

        def attempt(some: list[int], seconds: float) -> Scores:
            mine = {name: [values[rows[i]] for i in some] for name, values in batch.items()}
            further = {name: [values[rows[i]] for i in some] for name, values in beside.items()}
            return checked(self.service.ask({**mine, "columns": further}, seconds), len(some))

        def whole(last: bool) -> Scores:
            scores = in_halves(attempt, len(rows), self.service.timeout)
            wrong = [failure for failure in scores.failures if failure.kind == "error"]
            if len(wrong) == len(rows) and not last:
                raise Down(wrong[0].reason)
            return scores

        scores = self.service.persist(whole)
        return replace(scores, counts=scores.endings())

    def close(self) -> None:
        self.service.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def parse_http(options: dict[str, Any]) -> HttpReward:
    """The reward `http` with these options. Raises RewardError."""
    where = "reward http"
    for name, value in options.items():
        if name not in Options._fields:
            raise RewardError(f"unknown option {name!r}", where=where, fix=did_you_mean(name, Options._fields))
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if name in ("timeout", "patience") and not number:
            raise RewardError(f"{name} is {value!r}", where=where, fix="give seconds, above 0")
        if name in ("batch", "concurrent") and not (number and isinstance(value, int)):
            raise RewardError(f"{name} is {value!r}", where=where, fix="give a whole number above 0")
        if name == "columns" and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise RewardError(f"columns is {value!r}", where=where, fix="give a list of columns of the data")
        if name == "key_env" and not (isinstance(value, str) and value.isidentifier() and value.isupper()):
            raise RewardError(
                "key_env is not the name of an environment variable", where=where, fix="write key_env: MY_API_KEY"
            )
    if "url" not in options:
        raise RewardError("without a url", where=where, fix="write {http: {url: http://HOST:PORT/PATH}}")
    return HttpReward(Options(**options))
