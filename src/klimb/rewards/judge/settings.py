"""What can be set of a judge. ::

    reward: {judge: {url: "https://host/v1", model: NAME, key_env: MY_API_KEY, rubric: "Is the answer kind?"}}
    reward: {judge: {model: DIR, rubric: …}}                         a model on this machine
    reward: {judge: {url: …, model: NAME, reference: solution}}      0 or 1: does it say what the column says?
    reward: {judge: {url: …, model: NAME, against: baseline}}        win 1, tie 0.5, loss 0, in both orders

A key is named, never given: `key_env` is the name of a variable of the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from klimb.config import StageConfig
from klimb.errors import RewardError, did_you_mean

HELPFUL = "How well does the answer help with what was asked: is it right, complete, clear, and no longer than needed?"
EQUAL = "1 if the answer comes to the same as the reference answer, 0 if it does not or gives no answer."


class Budget(StageConfig):
    """What may be spent in one run, all of its continuations together; then the run stops, and can go on with more."""

    requests: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1, description="of prompts and replies; without a count from the server, "
                               "characters / 4")  # fmt: skip
    money: float | None = Field(None, gt=0, description="in the currency of `prices`")


class Prices(StageConfig):
    """Of a million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class JudgeSettings(StageConfig):
    """All but which model it is."""

    url: str | None = Field(None, description="up to /v1, of a server; default: the model is on this machine")
    key_env: str | None = Field(None, description="variable of the environment that holds the key")
    rubric: str = Field(HELPFUL, min_length=1, description="what an answer is judged by")
    scale: tuple[int, int] = Field((1, 10), description="lowest and highest score; with a reference 0 and 1")
    reference: str | None = Field(None, description="column with a reference answer that the judge is shown")
    against: str | None = Field(None, description="column with another answer: which of the two is better?")
    reason: bool = Field(False, description="let a server's model write its reason before its verdict")
    request: dict[str, Any] = Field(
        {}, description="further fields of the request, as {seed: 1}; null leaves one out, as {max_tokens: null}"
    )
    max_tokens: int = Field(512, ge=1, description="of a reply")
    timeout: float = Field(120.0, gt=0, le=3600, description="seconds for one verdict, with all its tries")
    concurrency: int = Field(8, ge=1, le=256, description="requests at a time")
    requests_per_minute: float | None = Field(None, gt=0, description="at most; default: as many as come")
    budget: Budget = Field(
        Budget(), description="{requests, tokens, money}: what a run may spend; then it stops, and can go on with more"
    )
    prices: Prices | None = Field(None, description="{prompt, completion}: of a million tokens")
    cache: str | None = Field(None, description="file of verdicts that were paid for; default: in the run directory")
    canary_limit: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the scale above which an answer that is none stops the run; 1: none is tried",
    )
    device: str = Field("auto", description="of a model on this machine")

    @model_validator(mode="before")
    @classmethod
    def _scale_of_a_reference(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("reference") is not None:
            return {"scale": (0, 1), "rubric": EQUAL, **values}
        return values

    @model_validator(mode="after")
    def _without_contradiction(self) -> Self:
        if found := self._contradiction():
            raise ValueError(found)
        return self

    def _contradiction(self) -> str | None:
        low, high = self.scale
        if not low < high <= low + 100:
            return f"scale={list(self.scale)}: give the lowest and a higher score, at most 100 above it"
        if self.url is not None:
            if not _is_http(self.url):
                return "url: give one that begins with http:// or https:// and names a host"
            if "@" in urlsplit(self.url).netloc or urlsplit(self.url).query:
                return "url: no name, password or query in it: a key is read from the variable that key_env names"
        # A key in the place of its name must not be shown.
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):
            return "key_env: give the name of a variable in capitals, as OPENAI_API_KEY, not the key itself"
        if self.against is not None and self.reference is not None:
            return "against and reference: one compares two answers, the other holds one against the truth"
        if self.budget.money is not None and self.prices is None:
            return "budget.money: give prices"
        if self.url is None:
            return self._local_contradiction()
        return None

    def _local_contradiction(self) -> str | None:
        """A model here is not written to: what belongs to a server would be ignored."""
        fields = type(self).model_fields
        for name in ("key_env", "reason", "request", "max_tokens", "timeout", "concurrency", "requests_per_minute",
                     "budget", "prices", "cache"):  # fmt: skip
            if getattr(self, name) != fields[name].default:
                return f"{name}: it belongs to a server; give url, or leave it out"
        return None

    def key(self) -> str | None:
        """The key itself, out of the environment. Raises RewardError where it is not there."""
        if self.key_env is None:
            return None
        value = os.environ.get(self.key_env, "").strip()
        if not value or not (value.isascii() and value.isprintable()):
            what = "is not set" if not value else "holds characters that no key has"
            raise RewardError(f"the variable {self.key_env} {what}", where="judge", fix=f"export {self.key_env}=…")
        return value


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is none, or half a bracket
        return False


class JudgeConfig(JudgeSettings):
    """A language model's verdict: a score by a rubric, agreement with a reference answer, or a win against another.

    Any server that speaks OpenAI's chat completions, or a model on this machine. A reply without a usable verdict is
    asked about once more, then abstains; answers that are none are slipped in, and stop the run where they score.
    """

    model: str = Field(description="as the server calls it, or a directory or hub name")


def parse_judge(options: Mapping[str, Any]) -> JudgeConfig:
    """Raises RewardError; what was given is not repeated in it, since it may be a key."""
    known = JudgeConfig.model_fields
    for name in options:
        if name not in known:
            raise RewardError(f"unknown option {name!r}", where="reward judge", fix=did_you_mean(str(name), known))
    try:
        return JudgeConfig.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = "is missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
        raise RewardError(f"{place}: {what}" if place else what, where="reward judge") from None


Settings = Annotated[JudgeSettings, Field(description="how the judge is asked")]
