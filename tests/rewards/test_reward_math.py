"""The reward `math`: what is read as the answer, what is equal, and what happens to the pathological."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
from math_pairs import DIFFERENT, EQUAL

from klimb.errors import RewardError
from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.symbolic import MAX_EXPRESSION, final_answer

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is not installed: pip install 'klimb[math]'",
)
DEADLINE = 2.0


def scored(reward, texts: list[str], references: list):
    return reward(["p"] * len(texts), texts, {"answer": references})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\fbox{3} \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a} #### b", "a"),
        ("48/2=24 #### 24", "24"),
        ("#### 24 \n#### x+1\nthe end", "x+1"),
        ("first 3, then -4", "-4"),
        ("1,234.5 in all", "1,234.5"),
        (r"\boxed{unclosed 7", "7"),
        (r"\boxed{}", None),
        ("nothing", None),
        ("", None),
        (r"\boxed{" + "1+" * MAX_EXPRESSION + "1}", None),
    ],
)
def test_the_answer_of_a_completion(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_extraction_of_a_hostile_text_is_linear() -> None:
    started = time.process_time()
    for text in ["\\boxed{" * 150_000, "{" * 1_000_000, "#" * 1_000_000, "1," * 500_000, "\\" * 1_000_000]:
        final_answer(text)
    assert time.process_time() - started < 1.0  # 0.05 s when it was written; quadratic work takes minutes


@needs_math_verify
@pytest.mark.usefixtures("nothing_left")
def test_fifty_pairs_that_are_equal_and_fifty_that_are_not() -> None:
    assert (len(set(EQUAL)), len(set(DIFFERENT))) == (50, 50)
    reward = parse_reward({"math": {"timeout": 20}})  # a slow machine is not what is tested here
    for pairs, wanted, kind in ((EQUAL, 1.0, "ok"), (DIFFERENT, 0.0, "wrong")):
        scores = scored(reward, [rf"thus \boxed{{{given}}}" for given, _ in pairs], [ref for _, ref in pairs])
        assert [pair for pair, value in zip(pairs, scores.values) if value != wanted] == []
        assert scores.counts == {"ok": 0, "wrong": 0, "abstain": 0, "timeout": 0, "error": 0} | {kind: 50}
    reward.close()


@needs_math_verify
@pytest.mark.usefixtures("nothing_left")
def test_each_ending_is_told_and_counted() -> None:
    reward = parse_reward("math")
    texts = [r"\boxed{2x}", r"\boxed{x}", "7 #### 8", "none", "5", r"\boxed{1}", "x+2\n"]
    scores = scored(reward, texts, ["x+x", "x+x", ["7", "8.0"], "8", None, r"\boxed{}", "x+2"])
    assert scores.values == [1.0, 0.0, 1.0, 0.0, None, None, 1.0]
    assert scores.counts == {"ok": 3, "wrong": 2, "abstain": 1, "timeout": 0, "error": 1}
    assert "is no expression" in scores.failures[0].reason
    with pytest.raises(RewardError, match="no column 'answer'; did you mean 'answers'"):
        reward(["p"], ["1"], {"answers": ["1"]})
    reward.close()


PATHOLOGICAL = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "{" * 100_000,
    r"\sum_{i=1}^{10^9} \frac{1}{i^3+1}",
    r"\frac{1}{1+" * 80 + "x" + "}" * 80,
]


@needs_math_verify
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_a_pathological_expression_keeps_the_deadline_and_the_next_one_is_scored() -> None:
    reward = parse_reward("math")
    seconds = []
    for expression in PATHOLOGICAL:
        started = time.monotonic()
        scores = scored(reward, [rf"\boxed{{{expression}}}"], ["x+1"])
        seconds.append(time.monotonic() - started)
        assert scores.values == [0.0]
        assert scores.counts["timeout"] + scores.counts["wrong"] == 1
        scored(reward, [r"\boxed{1+x}"], ["x+1"])  # starts a new process where the last was killed
    reward.close()
    assert max(seconds) < 3 * DEADLINE, dict(zip(PATHOLOGICAL, seconds))  # 2.05 s on an idle machine


@needs_math_verify
@pytest.mark.usefixtures("nothing_left")
def test_a_pair_that_takes_too_long_is_a_timeout_and_not_a_hang() -> None:
    reward = parse_reward({"math": {"timeout": 0.5}})
    started = time.monotonic()
    scores = scored(reward, ["1000000!".join([r"\boxed{", "}"]), r"\boxed{1+x}"], ["x+1", "x+1"])
    assert scores.values == [0.0, 1.0]
    assert scores.counts["timeout"] == 1
    assert scores.failures == []
    assert time.monotonic() - started < 30
    reward.close()


@needs_math_verify
@pytest.mark.usefixtures("nothing_left")
def test_a_worker_that_is_killed_between_two_rows_costs_nothing() -> None:
    reward = parse_reward("math")
    worker = reward._idle.get_nowait()
    os.kill(worker.pid, 9)
    reward._idle.put(worker)
    assert scored(reward, [r"\boxed{2x}"], ["x+x"]).values == [1.0]
    reward.close()


@needs_math_verify
@pytest.mark.usefixtures("nothing_left")
def test_a_megabyte_is_bounded_in_time() -> None:
    reward = parse_reward("math")
    scored(reward, ["1"], ["1"])
    started = time.monotonic()
    scores = scored(reward, ["x" * 1_000_000 + r" \boxed{2}", "{" * 1_000_000], ["2", "2"])
    assert scores.values == [1.0, 0.0]
    assert time.monotonic() - started < 2.0  # 0.05 s when it was written
    reward.close()


@needs_math_verify
def test_the_trainer_never_loads_what_evaluates() -> None:
    script = (
        "import sys; from klimb.rewards.spec import parse_reward; r = parse_reward('math')\n"
        "s = r(['p'], ['\\\\boxed{x+x}'], {'answer': ['2x']}); r.close()\n"
        "print(s.values, {'sympy', 'math_verify', 'latex2sympy2_extended'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == "[1.0] set()\n"


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
def test_a_worker_gives_up_files_network_and_processes() -> None:
    script = """
import json, os, socket
from klimb.rewards.verifiers.isolated import confine
def outcome(act):
    try:
        act()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return "done"
confine()
print(json.dumps([outcome(act) for act in (
    lambda: open("/etc/passwd").read(), lambda: open("/tmp/klimb-escape", "w"), lambda: socket.socket(),
    lambda: os.fork() or os._exit(0), lambda: bytearray(1 << 31), lambda: open(os.__file__).read())]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    outcomes = json.loads(done.stdout)
    if outcomes[2] == "done":
        pytest.skip("this kernel has no Landlock: memory alone is bounded")
    assert "done" not in outcomes[:5]
    assert outcomes[5] == "done"


def test_without_math_verify_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"math-verify is not installed; pip install 'klimb\[math\]'"):
        parse_reward("math")
