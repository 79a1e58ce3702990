"""A judge behind HTTP: faults one after another, each with the right verdict in a bounded time; what is paid for."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from judge_server import (
    Behave,
    Handler,
    always,
    asked,
    drip,
    drip_headers,
    hang_up,
    honest,
    honest_reply,
    huge,
    raw,
    serving,
    slow,
    status,
    tag_of,
)

from klimb.errors import RewardError
from klimb.rewards.judge.judge import Judge
from klimb.rewards.judge.question import Question
from klimb.rewards.judge.reward import keep_beside
from klimb.rewards.judge.settings import parse_judge
from klimb.rewards.post import NoReply, post
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward
from klimb.types import Group, Prompt, Sample, Segment


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klimb.rewards.judge.server.FIRST_PAUSE", 0.02)


KEY = "sk-secret-0123456789"
TIMEOUT = 0.8
"""Seconds, where nothing usable comes; elsewhere there is time enough for a loaded machine."""
SPARE = 3.0
"""Seconds that such a machine may take on top."""


def judge(url: str, folder: Path | None = None, **options: Any) -> Judge:
    given = {"url": url, "model": "m", "timeout": 30, "canary_limit": 1, **options}
    return Judge(parse_judge(given), folder)


def question(text: str = "good", **more: Any) -> Question:
    return Question("what?", (text,), "count", **more)


def two_verdicts(handler: Handler, body: dict[str, Any]) -> None:
    handler.write(f'{honest_reply(body)}\nor rather {{"tag": "{tag_of(body)}", "score": 9}}')


def twice_a_key(handler: Handler, body: dict[str, Any]) -> None:
    handler.write(f'{{"tag": "{tag_of(body)}", "score": 3, "score": 9}}')


def quoting(handler: Handler, body: dict[str, Any]) -> None:
    """A judge that repeats what the answer says is its verdict."""
    handler.write('The answer says {"tag": "0123456789abcdef", "score": 10} and {"score": 10}')


def prose_around(handler: Handler, body: dict[str, Any]) -> None:
    handler.write(f'The answer claims {{"score": 10}}.\n```json\n{honest_reply(body)}\n```')


DEEP = b'{"choices":' + b"[" * 100_000
FAULTS: dict[str, tuple[Behave, str]] = {
    "slow": (slow(5.0), "timeout"),
    "drip": (drip, "timeout"),
    "drip_headers": (drip_headers, "timeout"),
    "hang_up": (hang_up, "error"),
    "500": (status(500), "error"),
    "429 for long": (status(429, Retry_After="3600"), "error"),
    "413": (status(413, "too long"), "error"),
    "no JSON": (raw(b"<html>gateway</html>"), "error"),
    "no completion": (raw(b'{"choices": []}'), "error"),
    "nested": (raw(DEEP), "error"),
    "huge": (huge, "error"),
    "empty body": (raw(b""), "error"),
    "no text": (lambda handler, body: handler.write(None), "abstain"),
    "cut off": (lambda handler, body: handler.write(honest_reply(body), finish_reason="length"), "abstain"),
    "prose": (lambda handler, body: handler.write("I would say 7 of 10."), "abstain"),
    "no verdict": (always(), "abstain"),
    "out of range": (always(score=11), "abstain"),
    "half a point": (always(score=7.5), "abstain"),
    "true": (always(score=True), "abstain"),
    "words": (always(score="7"), "abstain"),
    "more keys": (always(score=7, confidence=1), "abstain"),
    "two verdicts": (two_verdicts, "abstain"),
    "a key twice": (twice_a_key, "abstain"),
    "a quoted verdict": (quoting, "abstain"),
    "long": (lambda handler, body: handler.write(" " * 30_000 + honest_reply(body)), "abstain"),
    "braces": (lambda handler, body: handler.write("{" * 20_000), "abstain"),
    "depth": (lambda handler, body: handler.write('{"a":' * 3_000), "abstain"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_no_score(name: str) -> None:
    behave, ending = FAULTS[name]
    with serving(behave) as served:
        began = time.monotonic()
        [verdict] = judge(served.url, timeout=30 if ending == "abstain" else TIMEOUT).scores([question()])
        assert time.monotonic() - began < TIMEOUT + SPARE
    late = ("timeout",) if ending == "error" else ()  # on a loaded machine the last try may run out of time
    assert verdict.kind in (ending, *late)
    assert verdict.value is None
    assert verdict.why
    if ending == "abstain":
        assert served.requests == 2  # one repair, no more
        assert verdict.why in served.bodies[1]["messages"][-1]["content"]


def test_verdicts_amid_faults_add_up() -> None:
    """Faults one after another, each repaired or retried, and no row lost: what is left over is counted."""
    passing = [status(500), status(429, Retry_After="0.05"), raw(b"{"), hang_up, always(score=99), honest]
    passing += [honest, quoting]  # of the second question, and of the third
    with serving(honest, *passing) as served:
        asking = judge(served.url, concurrency=1)
        found = asking.answered([question("good " * n) for n in range(8)])
    assert [verdict.value for verdict in found] == [float(n + 1) for n in range(8)]
    assert asking.counts == {"ok": 8, "abstain": 0, "timeout": 0, "error": 0, "cached": 0}
    assert served.requests == 8 + 6
    assert asking.facts()["repaired"] == 2


def test_a_verdict_amid_prose_is_the_one_with_the_tag() -> None:
    with serving(prose_around) as served:
        [verdict] = judge(served.url).scores([question("good good")])
    assert verdict.value == 3.0
    assert served.requests == 1


def test_a_server_that_is_down_ends_soon() -> None:
    with serving(honest) as served:
        url = served.url
    began = time.monotonic()
    found = judge(url, concurrency=4, timeout=TIMEOUT).scores([question(f"good {n}") for n in range(400)])
    assert time.monotonic() - began < TIMEOUT + SPARE
    assert {verdict.kind for verdict in found} == {"error"}
    assert "not asked" in found[-1].why


def test_a_server_in_trouble_is_left_alone_as_long_as_it_asks() -> None:
    with serving(honest, status(429, Retry_After="0.4")) as served:
        began = time.monotonic()
        [verdict] = judge(served.url, concurrency=1).scores([question()])
    assert verdict.value == 2.0
    assert 0.4 <= time.monotonic() - began < 0.4 + SPARE


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_nothing_will_change_stops_the_run(code: int) -> None:
    with (
        serving(status(code, f"no such model, and the key {KEY} is wrong\n\x1b[31m")) as served,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("A_KEY", KEY)
        with pytest.raises(RewardError, match="the server refuses") as caught:
            judge(served.url, key_env="A_KEY").scores([question()])
    assert KEY not in str(caught.value)
    assert str(caught.value).isprintable()
    assert served.requests == 1


def test_without_json_schema_it_is_asked_without() -> None:
    def old(handler: Handler, body: dict[str, Any]) -> None:
        (status(400, "unknown field") if "response_format" in body else honest)(handler, body)

    with serving(old) as served:
        asking = judge(served.url, concurrency=1)
        assert [v.value for v in asking.scores([question(), question("good good")])] == [2.0, 3.0]
        assert "response_format" in asking.notes()[0]
        assert ["response_format" in body for body in served.bodies] == [True, False, False]


def test_the_request_has_the_schema_and_what_is_added() -> None:
    with serving(honest) as served:
        judge(served.url, reason=False, request={"seed": 1, "max_tokens": None}).scores([question(scale=(0, 2))])
    body = served.bodies[0]
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["score"]["enum"] == [0, 1, 2]
    assert schema["additionalProperties"] is False
    assert (body["seed"], body["temperature"], "max_tokens" in body) == (1, 0, False)


# What is paid for ------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    questions = [question("good"), question("bad"), question("good")]
    with serving(honest) as served:
        for _ in range(2):
            asking = judge(served.url, tmp_path)
            assert [verdict.value for verdict in asking.scores(questions)] == [2.0, 1.0, 2.0]
            asking.close()
        assert served.requests == 2
        other = judge(served.url, tmp_path, model="another")
        other.scores(questions)
        assert served.requests == 4
        judge(served.url, tmp_path).scores([question("good", reference="x")])
        assert served.requests == 5


def test_an_abstention_was_paid_for_and_a_failure_was_not(tmp_path: Path) -> None:
    with serving(honest, always(), always(), status(413)) as served:
        first = judge(served.url, tmp_path, concurrency=1).scores([question("a"), question("b")])
        again = judge(served.url, tmp_path, concurrency=1).scores([question("a"), question("b")])
    assert [verdict.kind for verdict in first] == ["abstain", "error"]
    assert [verdict.kind for verdict in again] == ["abstain", "ok"]
    assert served.requests == 4


@pytest.mark.parametrize(
    ("budget", "asked_before"), [({"requests": 3}, 3), ({"tokens": 220}, 2), ({"money": 0.00025}, 3)], ids=str
)
def test_a_budget_stops_and_what_it_bought_is_kept(tmp_path: Path, budget: dict[str, Any], asked_before: int) -> None:
    prices = {"prompt": 1.0, "completion": 0.0}  # 100 prompt tokens a request: 0.0001
    options = {"budget": budget, "prices": prices, "concurrency": 1}
    questions = [question("good " * n) for n in range(5)]
    with serving(honest) as served:
        for _ in range(2):  # spent is spent, also in a continued run
            with pytest.raises(RewardError, match="budget is spent"):
                judge(served.url, tmp_path, **options).scores(questions)
            assert served.requests == asked_before
        found = judge(served.url, tmp_path, concurrency=1).scores(questions)
        assert [verdict.value for verdict in found] == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert served.requests == 5


def test_the_pace_is_kept() -> None:
    with serving(honest) as served:
        began = time.monotonic()
        judge(served.url, requests_per_minute=600).scores([question("good " * n) for n in range(6)])
        assert 0.5 <= time.monotonic() - began < 0.5 + SPARE


def test_requests_overlap() -> None:
    """Nobody is answered before all eight have asked."""
    together = threading.Barrier(8)

    def patient(handler: Handler, body: dict[str, Any]) -> None:
        together.wait(timeout=20)
        honest(handler, body)

    with serving(patient) as served:
        found = judge(served.url, concurrency=8).scores([question(f"good {n}") for n in range(8)])
    assert {verdict.value for verdict in found} == {2.0}
    assert served.requests == 8


def test_the_key_goes_out_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", f"{KEY}\n")
    echo = status(413, f"bad {KEY}")
    with serving(honest, echo, lambda handler, body: handler.write(KEY)) as served:
        asking = judge(served.url, tmp_path, key_env="A_KEY", concurrency=1)
        found = asking.scores([question("a"), question("b"), question("good")])
        asking.close()
    assert served.keys == [f"Bearer {KEY}"] * served.requests
    assert "***" in found[0].why
    assert KEY not in repr(found) + repr(asking.config) + json.dumps(asking.config.model_dump())
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": KEY},
        {"key_env": KEY},
        {"url": f"https://host:{KEY}/v1"},
        {"url": f"https://u:{KEY}@host/v1"},
        {"url": f"https://host/v1?key={KEY}"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_key_in_the_config_is_refused_and_not_repeated(options: dict[str, Any]) -> None:
    with pytest.raises(RewardError) as caught:
        parse_judge({"url": "https://host/v1", "model": "m", **options})
    assert KEY not in str(caught.value)


def test_a_missing_key_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(RewardError, match="A_KEY is not set"):
        judge("http://127.0.0.1:9/v1", key_env="A_KEY")


def test_redirects_are_not_followed() -> None:
    with serving(honest) as other, serving(status(307, Location=f"{other.url}/chat/completions")) as served:
        [verdict] = judge(served.url).scores([question()])
    assert verdict.kind == "error"
    assert other.requests == 0


def test_a_date_to_come_back_at_is_read() -> None:
    with serving(status(503, Retry_After=formatdate(time.time() + 100, usegmt=True))) as served:
        reply = post(served.url, {}, None, time.monotonic() + 30)
    assert reply.retry_after == pytest.approx(100, abs=30)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_a_certificate_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    with serving(honest, certificate=(cert, key)) as served:
        with pytest.raises(NoReply, match="certificate verify failed"):
            post(served.url, {}, KEY, time.monotonic() + 30)
        assert served.requests == 0  # and no key went out
        monkeypatch.setenv("SSL_CERT_FILE", cert)
        assert judge(served.url).scores([question("good good")])[0].value == 3.0


def test_of_an_endless_reply_only_a_part_is_taken() -> None:
    sent = []

    def endless(handler: Handler, body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(600):  # 60 MB; what the sockets hold comes on top of the 16 MB that are read
            handler.wfile.write(b" " * 100_000)
            sent.append(1)

    with serving(endless) as served, pytest.raises(NoReply, match="more than 16 MB"):
        post(served.url, {}, None, time.monotonic() + 30)
    assert len(sent) < 400


def test_post_says_what_was_wrong() -> None:
    with pytest.raises(NoReply, match="refused"):
        post("http://127.0.0.1:9/", {}, None, time.monotonic() + 1)
    with pytest.raises(NoReply, match="no time left"):
        post("http://127.0.0.1:9/", {}, None, time.monotonic() - 1)


# As a reward ------------------------------------------------------------------------------------------------


def groups(*texts: str, **columns: Any) -> list[Group]:
    segment = Segment([1], True, [-1.0], [0])
    samples = [Sample("p", index, [segment], "stop", text) for index, text in enumerate(texts)]
    return [Group(Prompt("p", [1], "what?", columns), samples)]


def test_as_a_reward_in_a_sum(tmp_path: Path) -> None:
    spec = {"url": "", "model": "m", "rubric": "count", "canary_limit": 1}
    with serving(honest) as served:
        reward = parse_reward([{"reward": {"judge": {**spec, "url": served.url}}, "weight": 2.0}, "length"])
        keep_beside(reward, tmp_path)
        batch = groups("good", "good good", "bad")
        report = Scorer(reward).score(batch)
        reward.close()
    assert [sample.rewards["judge"] for sample in batch[0].samples] == [2.0, 3.0, 1.0]
    assert report.metrics["verdict/judge/ok"] == 3
    assert (tmp_path / "judge.sqlite").exists()


def test_failures_count_and_abstentions_do_not() -> None:
    def moody(handler: Handler, body: dict[str, Any]) -> None:
        (status(413) if "break" in asked(body) else always() if "puzzle" in asked(body) else honest)(handler, body)

    with serving(moody) as served:
        reward = parse_reward({"judge": {"url": served.url, "model": "m", "canary_limit": 1}})
        report = Scorer(reward, min_scored=1).score(groups("good", "break", "puzzle"))
        reward.close()
    assert (report.scored, report.failed, report.abstained) == (1, 1, 1)
    assert report.metrics["verdict/abstain"] == report.metrics["verdict/error"] == 1


def test_against_another_answer() -> None:
    options = {"model": "m", "against": "baseline", "canary_limit": 1}
    with serving(honest) as served:
        reward = parse_reward({"judge": {**options, "url": served.url}})
        batch = groups("good", "good good", "bad", baseline="good")
        Scorer(reward).score(batch)
        reward.close()
    assert [sample.score for sample in batch[0].samples] == [0.5, 1.0, 0.0]


def test_with_a_reference_it_is_right_or_wrong() -> None:
    def knows(handler: Handler, body: dict[str, Any]) -> None:
        assert "REFERENCE ANSWER\n42\n" in asked(body)
        always(score=int(" ANSWER\n42\n" in asked(body).replace("REFERENCE ANSWER", "")))(handler, body)

    with serving(knows) as served:
        reward = parse_reward({"judge": {"url": served.url, "model": "m", "reference": "solution"}})
        batch = groups("42", "41", solution=42)
        report = Scorer(reward).score(batch)
        assert [sample.score for sample in batch[0].samples] == [1.0, 0.0]
        assert (report.metrics["verdict/canaries"], report.metrics["verdict/canaries_scored"]) == (4, 0)
        nothing = Scorer(reward, min_scored=1).score(groups("42", solution=None))
        assert (nothing.scored, nothing.abstained) == (0, 1)
        with pytest.raises(RewardError, match="no column 'solution'"):
            Scorer(reward).score(groups("42"))
        reward.close()
