"""Programs on a SandboxFusion-style server: what is sent, every verdict, and every fault of the server's."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from reward_server import Fault, RewardServer, answers, hangs_up

from klimb.errors import RewardError
from klimb.rewards import service
from klimb.rewards.code import CodeReward
from klimb.rewards.spec import parse_reward


def run_code(asked: dict[str, Any]) -> dict[str, Any]:
    """What the service does, by its documented types, for programs of these tests."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", asked["code"]], input=asked["stdin"], capture_output=True, text=True,
            timeout=asked["run_timeout"],
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        result: dict[str, Any] = {"status": "TimeLimitExceeded", "execution_time": asked["run_timeout"], "stdout": ""}
        return {"status": "Failed", "message": "", "compile_result": None, "run_result": result}
    result = {"status": "Finished", "execution_time": 0.1, "return_code": done.returncode,
              "stdout": done.stdout, "stderr": done.stderr}  # fmt: skip
    status = "Failed" if done.returncode else "Success"
    return {"status": status, "message": "", "compile_result": None, "run_result": result, "files": {}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(service, "LONGEST_WAIT", 0.02)
    with RewardServer(run_code) as running:
        yield running


def code(server: RewardServer, **options: Any) -> CodeReward:
    reward = parse_reward({"code": {"service": server.url.removesuffix("/score") + "/", "timeout": 5, **options}})
    assert isinstance(reward, CodeReward)
    assert (reward.tier, reward.independent, reward.waits) == ("service", True, True)
    return reward


SUMS = [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": "4"}]
ADDS = "```python\nprint(sum(map(int, input().split())))\n```"


def test_programs_are_judged_by_what_they_print(server: RewardServer) -> None:
    reward = code(server, timeout=2, partial=True)
    texts = [ADDS, "print(3)", "print(9)", "1/0", "while 1: pass", ADDS, ADDS]
    tests: list[Any] = [SUMS, SUMS, SUMS, SUMS, SUMS, None, "def check(f): assert f(1, 2) == 3"]
    scores = reward(["p"] * 7, texts, {"test": tests})
    reward.close()
    assert scores.values == [1.0, 0.5, 0.0, 0.0, 0.0, None, None]
    assert scores.counts == {"ok": 1, "wrong": 3, "abstain": 1, "timeout": 1, "error": 1}
    assert scores.failures[0].reason == "a service runs programs: give tests as a list of input and output"
    assert {"code": "print(3)", "language": "python", "stdin": "1 2", "run_timeout": 2} in server.asked
    assert set(server.paths) == {"/run_code"}
    assert not any("output" in json.dumps(asked) for asked in server.asked)  # what is expected stays here


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (answers(200, b'{"status": "SandboxError", "message": "full", "run_result": null}'), "gave no result: full"),
        (answers(200, b"[]"), "gave no result"),
        (answers(200, b'{"status": "Success", "run_result": {"status": "Finished", "stdout": 3}}'), "that is none"),
        (answers(500), "answered 500"),
        (answers(200, b"<html>"), "no JSON"),
    ],
    ids=["its own error", "list", "stdout", "500", "html"],
)  # fmt: skip
def test_a_fault_of_the_service_is_an_error_and_never_wrong(server: RewardServer, fault: Fault, why: str) -> None:
    server.first(1, fault)
    reward = code(server)
    assert reward(["p"], [ADDS], {"test": [SUMS]}).values == [1.0]  # once is forgiven
    server.always(fault)
    scores = reward(["p"], [ADDS], {"test": [SUMS]})
    reward.close()
    assert scores.values == [None]
    assert why in scores.failures[0].reason
    assert scores.counts == {"ok": 0, "wrong": 0, "abstain": 0, "timeout": 0, "error": 1}


def test_a_dead_service_ends_the_run_and_its_time_reports_are_not_believed(server: RewardServer) -> None:
    server.score = lambda asked: {**run_code(asked), "run_result": {
        "status": "Finished", "stdout": "3", "execution_time": -1e9}}  # fmt: skip
    reward = code(server)
    assert reward(["p"], ["print(3)"], {"test": [SUMS]}).values == [0.0]
    server.always(hangs_up)
    reward.service._patience = 0.3  # type: ignore[union-attr]
    with pytest.raises(RewardError, match=r"reward code: http://.*/run_code: no answer for 0.3 s: RemoteDisconnected"):
        reward(["p"] * 3, [ADDS] * 3, {"test": [SUMS] * 3})
    reward.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_env": "K"}, "a key without a service"),
        ({"service": "http://x", "unsafe_local": True}, "service and unsafe_local"),
        ({"service": "x"}, "'x/run_code' is no url"),
        ({"service": "http://x", "key_env": "no-name"}, "key_env is not the name of an environment variable"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match="reward code") as caught:
        parse_reward({"code": options})
    assert message in str(caught.value)
