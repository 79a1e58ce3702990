"""Reward servers that are down, slow or mad: each gets its verdict, in bounded time, and nothing of it is silent."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from reward_server import (
    Fault,
    RewardServer,
    answers,
    chunked,
    cuts,
    drips,
    floods,
    hangs,
    hangs_up,
    lengths,
    speaks_otherwise,
)

from klimb.errors import RewardError
from klimb.rewards import post, service
from klimb.rewards.remote import HttpReward
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward
from klimb.types import Group, Prompt, Sample, Segment


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest wait between two tries is 20 ms here."""
    monkeypatch.setattr(service, "LONGEST_WAIT", 0.02)


@pytest.fixture
def server() -> Iterator[RewardServer]:
    with RewardServer() as running:
        yield running


def http(server: RewardServer, **options: Any) -> HttpReward:
    reward = parse_reward({"http": {"url": server.url, "timeout": 20, "patience": 0.6, **options}})
    assert isinstance(reward, HttpReward)
    reward.service.tell = told.append
    told.clear()
    return reward


told: list[str] = []


def asked(reward: HttpReward, texts: list[str], **columns: list[Any]) -> Any:
    try:
        return reward(["p"] * len(texts), texts, columns)
    finally:
        reward.close()


def test_rows_come_back_in_their_order_whatever_the_portions(server: RewardServer) -> None:
    texts = ["x" * (n * 7 % 11) for n in range(23)]
    server.score = lambda given: time.sleep(random.Random(len(given["completions"])).random() / 50) or lengths(given)
    for batch, concurrent in ((100, 1), (1, 8), (5, 3)):
        scores = asked(http(server, batch=batch, concurrent=concurrent), texts, answer=[*range(23)])
        assert scores.values == [float(len(text)) for text in texts]
        assert scores.counts == {"scored": 23, "abstain": 0, "timeout": 0, "error": 0}
    for each in server.asked:
        assert each["completions"] == [texts[row] for row in each["columns"]["answer"]]
    assert server.asked[0] == {"prompts": ["p"] * 23, "completions": texts, "columns": {"answer": [*range(23)]}}


def test_only_the_columns_that_are_named_are_sent(server: RewardServer) -> None:
    columns = {"answer": ["a"], "secret": ["s"], "completion_ids": [[1]], "finish": ["stop"]}
    asked(http(server), ["a"], **columns)
    asked(http(server, columns=["finish"]), ["a"], **columns)
    assert [set(each["columns"]) for each in server.asked] == [{"answer", "secret"}, {"finish"}]
    with pytest.raises(RewardError, match=r"no column 'answr'; did you mean 'answer'"):
        asked(http(server, columns=["answr"]), ["a"], **columns)


def test_a_chunked_answer_is_an_answer(server: RewardServer) -> None:
    server.always(chunked)
    assert asked(http(server), ["a", "bb"]).values == [1.0, 2.0]


def test_null_is_no_score_and_what_is_no_number_fails_its_row(server: RewardServer) -> None:
    server.score = lambda given: [1, None, float("nan"), "2", True, [3], 10**400]
    scores = asked(http(server), ["a"] * 7)
    assert scores.values == [1.0, None, None, None, 1.0, None, None]
    assert [failure.row for failure in scores.failures] == [2, 3, 5, 6]
    assert scores.counts == {"scored": 2, "abstain": 1, "timeout": 0, "error": 4}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (answers(200, b"<html>proxy</html>"), "answered no JSON: '<html>proxy</html>'"),
        (answers(200, b"[" * 100_000), "answered no JSON"),
        (answers(200, b"[1.0]"), "returned 1 scores for 4 completions"),
        (answers(200, b'{"score": 1}'), "instead of a list of 4 scores"),
        (answers(200, b"1.0"), "instead of a list of 4 scores"),
        (answers(500, b"Traceback \xff"), "answered 500 Internal Server Error: Traceback"),
        (answers(422, b"no"), "answered 422"),
        (floods, "more than 16 MB"),
    ],
    ids=["html", "deep", "short", "mapping", "number", "500", "422", "flood"],
)
def test_who_answers_nonsense_is_asked_again_and_then_the_rows_fail(
    server: RewardServer, fault: Fault, reason: str
) -> None:
    server.always(fault)
    scores = asked(http(server), ["a", "bb", "ccc", "dddd"])
    assert scores.values == [None] * 4
    assert all(reason in failure.reason for failure in scores.failures)
    assert scores.counts == {"scored": 0, "abstain": 0, "timeout": 0, "error": 4}
    assert len(server.asked) >= service.TRIES
    server.first(1, fault)  # once is forgiven
    assert asked(http(server, batch=1), ["a"]).values == [1.0]


@pytest.mark.parametrize("fault", [answers(500), answers(400)], ids=["500", "400"])
def test_the_row_that_breaks_the_server_is_found(server: RewardServer, fault: Fault) -> None:
    server.on("bad", fault)
    scores = asked(http(server), ["a", "bb", "bad", "dddd", "eeeee"])
    assert scores.values == [1.0, 2.0, None, 4.0, 5.0]
    assert [failure.row for failure in scores.failures] == [2]


@pytest.mark.parametrize("fault", [hangs, drips])
def test_slow_and_dripping_answers_end_at_the_deadline(server: RewardServer, fault: Fault) -> None:
    server.on("bad", fault)
    began = time.monotonic()
    scores = asked(http(server, timeout=0.6), ["a", "bad", "ccc"])
    assert scores.values == [1.0, None, 3.0]
    assert scores.counts == {"scored": 2, "abstain": 0, "timeout": 1, "error": 0}
    assert time.monotonic() - began < 4 * 0.6 + 1.5  # four timeouts find the row; the rest is a busy machine


@pytest.mark.parametrize(
    "fault",
    [answers(503), answers(502), answers(429), hangs_up, cuts, speaks_otherwise],
    ids=["503", "502", "429", "hangs up", "cuts", "no http"],
)
def test_who_may_come_back_is_waited_for(server: RewardServer, fault: Fault) -> None:
    state = random.getstate()
    reward = http(server, patience=20)
    reward(["p"], ["a"], {})
    server.first(6, fault)
    assert asked(reward, ["a", "bb"]).values == [1.0, 2.0]
    assert len(server.asked) == 1 + 6 + 1
    assert "the run waits for it" in told[0]
    assert "it answers again" in told[1]
    assert len(told) == 2
    assert random.getstate() == state  # jitter comes from elsewhere


def test_retry_after_is_honoured(server: RewardServer) -> None:
    server.first(1, answers(429, Retry_After="1"))
    assert asked(http(server, patience=20), ["a"]).values == [1.0]
    assert server.times[1] - server.times[0] >= 1.0


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("2", 2.0),
        ("soon", None),
        ("-3", 0.0),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("²", None),
        ("nan", None),
        ("9" * 400, None),
        (None, None),
    ],
)
def test_any_retry_after_is_a_number_of_seconds_or_none(said: str | None, seconds: float | None) -> None:
    assert post._seconds(said) == seconds


def test_a_dead_server_ends_the_run_after_its_patience(server: RewardServer) -> None:
    reward = http(server)
    assert reward(["p"], ["a"], {}).values == [1.0]
    server.stop()
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"^reward http: http://.*/score: no answer for 0.6 s: .*refused.*start it"):
        asked(reward, ["a"] * 100)
    assert 0.5 < time.monotonic() - began < 3.0
    assert len(told) == 1  # of four requests that wait
    server.start()


def test_a_server_that_never_answered_gets_few_tries(server: RewardServer) -> None:
    server.stop()
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer in 4 tries: .*refused.*is this its url"):
        asked(http(server, patience=600), ["a"])
    assert time.monotonic() - began < 3.0
    assert told == []
    server.start()


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_a_wrong_address_or_key_ends_at_once(server: RewardServer, status: int) -> None:
    server.always(answers(status, Location="/elsewhere"))
    with pytest.raises(RewardError, match=rf"answered {status} .*correct its url or key"):
        asked(http(server), ["a"])
    assert len(server.asked) == 1


def test_a_key_goes_to_the_server_and_nowhere_else(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "sk-not-for-anybody")
    asked(http(server, key_env="REWARD_KEY"), ["a"])
    assert server.headers[0]["Authorization"] == "Bearer sk-not-for-anybody"
    server.always(answers(500, b"you sent Bearer sk-not-for-anybody"))  # it repeats what it should not
    scores = asked(http(server, key_env="REWARD_KEY"), ["a"])
    assert "you sent Bearer ***" in scores.failures[0].reason
    assert "sk-not" not in repr(scores) + "".join(told)
    for body in (b"Bearer sk-not-for-anybody", b'["sk-not-for-anybody"]'):
        server.always(answers(200, body))
        scores = asked(http(server, key_env="REWARD_KEY"), ["a"])
        assert "***" in scores.failures[0].reason
        assert "sk-not" not in repr(scores) + "".join(told)


def test_leaving_ends_the_wait(server: RewardServer) -> None:
    reward = http(server, patience=600)
    reward(["p"], ["a"], {})
    server.always(answers(503, Retry_After="500"))
    threading.Timer(0.3, reward.close).start()
    began = time.monotonic()
    with pytest.raises(RewardError, match="left while it was waited for"):
        reward(["p"], ["a"], {})
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "without a url"),
        ({"url": "ftp://x/y"}, "'ftp://x/y' is no url; write http://HOST"),
        ({"url": "http://a b/"}, "is no url"),
        ({"url": "http://x:99999/"}, "is no url"),
        ({"url": "http://me:pw@x/"}, "a url with a password in it"),
        ({"url": "http://x", "timout": 3}, "unknown option 'timout'; did you mean 'timeout'"),
        ({"url": "http://x", "timeout": 0}, "timeout is 0"),
        ({"url": "http://x", "batch": 0.5}, "batch is 0.5; give a whole number"),
        ({"url": "http://x", "columns": "answer"}, "columns is 'answer'; give a list"),
        ({"url": "http://x", "key_env": "sk-123"}, "key_env is not the name of an environment variable"),
        ({"url": "http://x", "key_env": "NO_SUCH_KEY"}, "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match="reward http") as caught:
        parse_reward({"http": options})
    assert message in str(caught.value)
    assert "sk-123" not in str(caught.value)
    assert "pw" not in str(caught.value).replace("password", "")


# Early scores ---------------------------------------------------------------------------------------------------------


def groups_of(n: int) -> list[Group]:
    return [
        Group(
            Prompt(f"p{i}", [0], f"p{i}?", {"answer": i}),
            [Sample(f"p{i}", k, [Segment([1])], "stop", "x" * (3 * i + k)) for k in range(4)],
        )
        for i in range(n)
    ]


def test_groups_that_were_scored_early_are_scored_the_same(server: RewardServer) -> None:
    """Whatever order they finished in: values, parts, failures, counts and events."""

    def some(given: dict[str, Any]) -> list[Any]:
        time.sleep(random.Random(given["completions"][0]).random() / 20)
        return [None if n == 5 else "no" if n == 9 else float(n) for n in map(len, given["completions"])]

    server.score = some
    spec = [{"http": {"url": server.url}}, {"reward": {"length": {"unit": "characters"}}, "weight": -0.5, "clip": 4}]
    results = []
    for order in (None, [0, 1, 2, 3, 4], [4, 1, 3, 0, 2]):
        events: list[Any] = []
        reward = parse_reward(spec)
        scorer = Scorer(reward, failure_limit=1.0, on_event=events.append)
        groups = groups_of(5)
        for i in order or ():
            scorer.begin(groups[i])
        report = scorer.score(groups)
        reward.close()
        samples = [(s.score, list(s.rewards.items())) for group in groups for s in group.samples]
        results.append((samples, list(report.metrics.items()), report.failed, scorer.counts, scorer.weights, events))
    assert results[0] == results[1] == results[2]
    assert results[0][1][0][0] == "reward/mean"
    assert results[0][2] == 2


def test_only_rewards_that_say_so_are_asked_early(server: RewardServer) -> None:
    calls: list[int] = []

    def counting(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        return [1.0] * len(completions)

    for reward in (parse_reward([counting, {"http": {"url": server.url}}]), parse_reward("length")):
        scorer = Scorer(reward)
        groups = groups_of(3)
        for group in groups:
            scorer.begin(group)
        assert scorer._begun == {}
        scorer.score(groups)
        reward.close()
    assert calls == [12]  # a function sees the whole step, as ever
