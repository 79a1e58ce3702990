"""Code against hidden tests: every form of test, every verdict, and nothing that is left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import humaneval
import pytest
from reward_processes import descendants

from klimb.errors import RewardError
from klimb.rewards.code import CodeReward, Options, code_of, sandbox_tier
from klimb.rewards.protocol import Reward, Scores
from klimb.rewards.sandbox import Verdict, open_sandbox
from klimb.rewards.sandbox.inside.confine import Confinement, Unconfined
from klimb.rewards.sandbox.run import NotStarted
from klimb.rewards.sandbox.tiers import TIERS, attacked
from klimb.rewards.scorer import Scorer
from klimb.rewards.spec import parse_reward
from klimb.types import Group, Prompt, Sample

HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"
ADD = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(5, 5) == 10\n"
DOUBLE = [{"input": "2\n", "output": "4\n"}, {"input": "5\n", "output": "10"}]

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> str:
    try:
        attacked(request.param, 30.0).close()
    except NotStarted as error:
        pytest.skip(f"{request.param}: {error}")
    return str(request.param)


@pytest.fixture
def reward() -> Iterator[Any]:
    """Makes rewards of options, and closes them."""
    made: list[CodeReward] = []

    def make(**options: Any) -> CodeReward:
        try:
            made.append(CodeReward(Options(**{"timeout": 30.0, **options})))
        except RewardError as error:
            pytest.skip(str(error))
        return made[-1]

    yield make
    for one in made:
        one.close()


def scores(reward: Reward, completions: list[str], tests: Any, prompt: str = "?", **columns: Any) -> Scores:
    given = {name: [value] * len(completions) for name, value in columns.items()}
    return reward([prompt] * len(completions), completions, {"test": [tests] * len(completions), **given})


def test_functions_are_asked_and_programs_are_run(reward: Any) -> None:
    code = reward()
    right, half, wrong = "def f(a, b): return a + b", "def f(a, b): return 3", "def f(a, b): return [a + b]"
    assert scores(code, [right, half, wrong, "def f(", ""], ADD).values == [1.0, 0.0, 0.0, 0.0, 0.0]
    programs = [
        "print(2 * int(input()))",
        "print(4)",
        "import sys\nprint(sys.stdin.read())",
        "exit()",
        "import os; os._exit(0)",
    ]
    assert scores(code, programs, DOUBLE).values == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(code, ["while True: print('x' * 10**6)"], DOUBLE).values == [0.0]


def test_part_of_the_tests_is_part_of_the_score(reward: Any) -> None:
    code = reward(partial=True)
    assert scores(code, ["def f(a, b): return a + b", "def f(a, b): return 3"], ADD).values == [1.0, 0.5]
    assert scores(code, ["print(4)", "print(2 * int(input()))"], DOUBLE).values == [0.5, 1.0]
    loop = "def check(candidate):\n    for i in range(4):\n        assert candidate(i, 0) == i\n    assert 1 == 1\n"
    assert scores(code, ["def f(a, b): return a % 3", "def f(a, b): 1 / 0"], loop).values == [0.75, 0.0]
    early = "def check(candidate):\n    x = candidate(1, 1)[0]\n    assert x == 1\n    assert candidate(1, 1) == [1]\n"
    assert scores(code, ["def f(a, b): return [1]", "def f(a, b): return 1"], early).values == [1.0, 0.0]


def test_every_verdict_is_counted(reward: Any) -> None:
    code = reward(timeout=3.0)
    rows: list[tuple[str, Any]] = [
        ("def f(a, b): return a + b", ADD),
        ("def f(a, b): return 0", ADD),
        ("def f(a, b): return 0", None),
        ("def f(a, b): return 0", "def check(candidate):\n    assert candidate(print, 1) == 2\n"),
        ("def f(a, b):\n    while True: pass", ADD),
        ("def f(a, b): return 0", "def check(candidate)"),
        ("def f(a, b): return 0", "def check(candidate):\n    missing\n    candidate(1, 2)\n"),
        ("def f(a, b): return 0", "def check(candidate):\n    assert True\n"),
        ("def f(a, b): return 0", "x = 1"),
        ("def f(a, b): return 0", [{"input": 1}]),
    ]
    found = code(["?"] * len(rows), [text for text, _ in rows], {"test": [tests for _, tests in rows]})
    assert found.values == [1.0, 0.0, None, None, 0.0, None, None, None, None, None]
    assert found.counts == {"ok": 1, "wrong": 1, "abstain": 2, "timeout": 1, "error": 5}
    assert [failure.row for failure in found.failures] == [5, 6, 7, 8, 9]
    assert "NameError" in found.failures[1].reason


def test_values_travel_and_what_they_do_does_not(reward: Any) -> None:
    code = reward()
    test = (
        "from fractions import Fraction\nfrom decimal import Decimal\ndef check(candidate):\n"
        "    for v in (None, True, -1, 2.5, float('inf'), 'é\\ud800', b'\\xff', [1, (2,)], {1: {2}, (3,): 'x'},\n"
        "              1j, 7**9999, frozenset('a'), Fraction(1, 3), Decimal('0.1'), []):\n"
        "        got = candidate(v)\n        assert got == v and type(got) is type(v)\n"
        "    assert list(candidate(range(3))) == [0, 1, 2]\n"
    )
    subclass = "import collections\ndef f(x): return collections.OrderedDict(x) if isinstance(x, dict) else x"
    assert scores(code, ["def f(x): return x", subclass], test).values == [1.0, 1.0]
    raising = (
        "def check(candidate):\n    try:\n        candidate(1)\n        assert False\n"
        "    except ValueError:\n        pass\n    assert candidate(2) == 2\n"
    )
    answers = ["def f(x):\n    if x == 1: raise ValueError\n    return x", "def f(x): return x"]
    assert scores(code, answers, raising).values == [1.0, 0.0]
    generator = "def check(candidate):\n    assert candidate(3) == [0, 1, 2]\n"
    assert scores(code, ["def f(n): return list(range(n))", "def f(n): yield from range(n)"], generator).values == [
        1.0,
        0.0,
    ]


def test_the_prompt_goes_before_the_code_where_it_is_code(reward: Any) -> None:
    code = reward(entry_point="entry")
    prompt = 'from typing import List\n\ndef helper(x):\n    return x + 1\n\ndef f(x: int) -> int:\n    """Twice."""\n'
    test = "def check(candidate):\n    assert candidate(helper(1)) == 4\n    assert f(3) == 6\n"
    texts = [
        "    return 2 * x\n",
        "```python\ndef f(x: List) -> int:\n    return helper(x) + x - 1\n```",
        "    return x",
    ]
    assert scores(code, texts, test, prompt, entry="f").values == [1.0, 1.0, 0.0]
    cheat = "    return 4\n\ndef helper(x): return 0"  # the test's helper is the prompt's
    assert scores(code, [cheat], test.replace("f(3) == 6", "helper(0) == 1"), prompt, entry="f").values == [1.0]
    asked = f"Write it:\n```python\n{prompt}```\n"
    assert scores(code, ["```\ndef f(x): return 2 * x\n```"], test, asked, entry="f").values == [1.0]
    assert scores(code, ["def g(x): return 4"], ADD, "Write f.", entry="f").values == [0.0]


def test_the_code_is_the_last_fenced_block() -> None:
    assert code_of("x = 1") == "x = 1"
    assert code_of("```\na\n```\nand\n```python\nb\n```\nthat is it") == "b\n"
    assert code_of("so:\n```py\ncut off") == "cut off"
    assert code_of("```\nwhole\n```\nthen\n```\ncut off") == "whole\n"
    assert code_of("```x = 1```") == "x = 1"


def test_the_same_verdicts_every_time(reward: Any) -> None:
    """Hashes of texts and random numbers too: a run that is done again ends with the same bits."""
    test = "import random\ndef check(candidate):\n    for i in range(20): assert candidate(random.random()) != i\n"
    words = "import random\ndef f(x): return int(list(set('abcdefghijk')).index('a') + 5 * random.random())"
    found = set()
    for _ in range(2):
        code = reward(partial=True)
        found.add(tuple(scores(code, [words] * 3, test).values))
        code.close()
    assert len(found) == 1
    assert len(set(found.pop())) == 1


def test_several_parts_keep_their_counts_and_their_tier(reward: Any) -> None:
    reward().close()
    sums = parse_reward([{"reward": {"code": {"timeout": 30}}, "name": "tests", "clip": 5}, "length"])
    assert sandbox_tier(sums) in TIERS
    assert sandbox_tier(parse_reward("exact")) is None
    prompt = Prompt("p", text="?", tokens=[1], columns={"test": ADD})
    groups = [
        Group(prompt, [Sample("p", index=i, segments=[], finish="stop", text=t) for i, t in enumerate(["x", "y"])])
    ]
    report = Scorer(sums).score(groups)
    assert report.metrics["verdict/tests/wrong"] == 2.0
    assert report.metrics["verdict/tests/ok"] == 0.0
    sums.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"test": "x"}, "'tests'"), ({"timeout": 0}, "timeout is 0"), ({"timeout": True}, "timeout is True"),
     ({"partial": 1}, "partial is 1"), ({"tests": ""}, "column"), ({"unsafe_local": "yes"}, "true or false")],
)  # fmt: skip
def test_mistakes_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        parse_reward({"code": options})


def test_a_column_that_is_not_there(reward: Any) -> None:
    with pytest.raises(RewardError, match="no column 'tests'; did you mean 'test'"):
        reward(tests="tests")(["?"], ["x"], {"test": [ADD]})


@pytest.mark.parametrize("victim", ["the zygote", "everything"])
def test_a_sandbox_that_dies_is_replaced(tier: str, victim: str) -> None:
    box = attacked(tier, 30.0)
    slow = "import time\ndef f(a, b):\n    time.sleep(0.5)\n    return a + b"
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(box.check(slow, ADD, entry="f")))
    before = descendants(os.getpid())
    thread.start()
    time.sleep(0.3)
    for pid in sorted(before)[-1:] if victim == "the zygote" else sorted(descendants(os.getpid())):
        with suppress(ProcessLookupError):  # gone with the one before: a namespace ends with its first process
            os.kill(pid, signal.SIGKILL)
    thread.join()
    assert found == [Verdict("ok", 2, 0, "")]
    box.close()


def test_nothing_outlives_a_trainer_that_is_killed(tier: str) -> None:
    code = (
        "import sys\nfrom klimb.rewards.sandbox.tiers import attacked\nbox = attacked(sys.argv[1], 600.0)\n"
        "print('ready', flush=True)\nbox.check('import time\\ntime.sleep(600)', sys.argv[2], entry='f')"
    )
    command = [sys.executable, "-c", code, tier, ADD]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    while len(below := descendants(trainer.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(below) >= 3  # the zygote, the candidate, the grader
    trainer.kill()
    trainer.communicate()
    while any(map(_lives, below)) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not [pid for pid in below if _lives(pid)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


NEITHER = """
import ctypes, errno, struct, sys
from klimb.rewards.sandbox.inside import confine
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, confine.LANDLOCK_CREATE), (6, 0, 0, 0x50000 | errno.ENOSYS)]
lines.append((6, 0, 0, 0x7FFF0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
from klimb.rewards.spec import parse_reward
from klimb.errors import RewardError
try:
    parse_reward("code")
except RewardError as error:
    print(error)
reward = parse_reward({"code": {"unsafe_local": True}})
print(reward.tier, reward(["?"], ["def f(a, b): return a + b"], {"test": [sys.argv[1]]}).values)
reward.close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes Landlock away by a filter of system calls")
def test_without_bubblewrap_and_landlock_it_refuses() -> None:
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", NEITHER, ADD], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    refusal, unsafe = done.stdout.splitlines()
    for part in ("no sandbox", "bubblewrap: not installed", "Landlock", "apt install bubblewrap", "unsafe_local: true"):
        assert part in refusal
    assert unsafe == "unsafe_local [1.0]"


@pytest.mark.parametrize("machine", ["aarch64", "i686"])
def test_a_machine_whose_system_calls_are_not_known_gets_no_sandbox(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    for tier in TIERS:
        with pytest.raises(Unconfined, match=machine):
            Confinement(tier, [], 1 << 29)


def test_a_tier_that_leaks_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The escape test, let loose on what confines nothing."""
    monkeypatch.setattr("klimb.rewards.sandbox.tiers.UNSAFE", "none")
    with pytest.raises(RewardError, match=r"unsafe_local: escaped: read a file, .*a UNIX socket"):
        open_sandbox(30.0, tiers=("unsafe_local",))


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not in the sibling folder shared/data")
def test_humaneval(tier: str) -> None:
    """Three problems, one with helpers in its prompt; tests/rewards/humaneval.py does all."""
    rows = [
        row
        for row in humaneval.problems(HUMANEVAL)
        if row["task_id"] in ("HumanEval/0", "HumanEval/38", "HumanEval/51")
    ]
    box = attacked(tier, 5.0)
    found = humaneval.matrix(box, box, rows)
    box.close()
    assert len(found) == 11
    for name, counts in found.items():
        assert counts["ok"] == (len(rows) if name == "canonical" else 0), json.dumps({name: counts})
