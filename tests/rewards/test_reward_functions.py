"""Functions that misbehave: each gets a verdict for its rows, none hangs, none leaves anything behind."""

import asyncio
import re
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from reward_processes import POISON

from klimb.errors import RewardError
from klimb.rewards.calling import CallFailed, Signature
from klimb.rewards.function import FunctionReward, from_callable, from_file, in_halves
from klimb.rewards.protocol import Columns, Failure, Scores

TEXTS = ["a", "bb", "ccc", "bad", "eeeee", "ffffff", "g", "hh"]
BAD = TEXTS.index("bad")
LENGTHS = [float(len(text)) for text in TEXTS]
WITHOUT_BAD = [None if row == BAD else value for row, value in enumerate(LENGTHS)]

pytestmark = pytest.mark.usefixtures("nothing_left")


def ask(name: str, timeout: float = 1.0, **columns: list) -> Scores:
    reward = from_file(f"{POISON}:{name}", timeout=timeout)
    try:
        return reward(["p"] * len(TEXTS), TEXTS, columns)
    finally:
        reward.close()


@pytest.mark.parametrize("name", ["fine", "fine_async", "prints_a_lot", "forks_and_stays", "forks_and_both_answer"])
def test_functions_that_answer_are_believed(name: str) -> None:
    scores = ask(name, timeout=20.0)
    assert scores == Scores(LENGTHS)


@pytest.mark.parametrize(
    ("name", "reason", "details"),
    [
        (
            "raises",
            r"ValueError: cannot judge this \(poison.py:\d+\)",
            r'^Traceback.*\n.*poison.py", line \d+, in raises',
        ),
        ("raises_unprintable", r"Unprintable: \(an error that cannot be printed\)", "Traceback"),
        ("raises_surrogate", r"half a pair: \?", "Traceback"),
        ("exits", r"SystemExit: 3", "Traceback"),
        ("nan", r"returned nan", ""),
        ("infinity", r"returned inf", ""),
        ("minus_infinity", r"returned -inf", ""),
        ("huge_int", r"no number", ""),
        ("string", r"returned '1.0' \(str\), which is no number", ""),
        ("a_list", r"returned \[1.0\] \(list\), which is no number", ""),
        ("prints_then_dies", r"ended \(exit code 7\)", "the last words"),
        ("segfaults", r"ended \(SIGSEGV\)", r'poison.py", line \d+ in segfaults'),
        ("kills_its_group", r"ended \(SIGKILL\)", ""),
        ("terminates_its_group", r"ended \(SIG(TERM|KILL)\)", ""),
        ("closes_everything", r"ended", ""),
        ("writes_everywhere", r"something else than an answer", ""),
        ("daemonises_and_dies", r"ended \(exit code 3\)", ""),
        ("sleeps", r"no answer within", r'poison.py", line \d+ in sleeps'),
        ("stubborn", r"no answer within", r'poison.py", line \d+ in stubborn'),
    ],
)
def test_one_bad_row_is_found_and_the_others_are_scored(name: str, reason: str, details: str) -> None:
    started = time.monotonic()
    scores = ask(name, timeout=3.0)  # the last tries have an eighth of it, in which a busy machine has to answer
    assert scores.values == WITHOUT_BAD
    assert [failure.row for failure in scores.failures] == [BAD]
    assert re.search(reason, scores.failures[0].reason)
    assert re.search(details, scores.failures[0].details)
    late = name in ("sleeps", "stubborn")
    assert scores.endings() == {"scored": 7, "abstain": 0, "timeout": int(late), "error": int(not late)}
    assert time.monotonic() - started < 15.0


@pytest.mark.parametrize("name", ["nothing", "empty", "only_one", "one_short", "one_more", "a_number", "a_string"])
def test_a_wrong_number_of_scores_fails_every_row_and_is_never_spread(name: str) -> None:
    scores = ask(name)
    assert scores.values == [None] * len(TEXTS)
    assert [failure.row for failure in scores.failures] == list(range(len(TEXTS)))
    assert "for 8 completions" in scores.failures[0].reason or "a list of 8 scores" in scores.failures[0].reason


def test_a_fork_that_returns_as_well_answers_nothing() -> None:
    reward = from_file(f"{POISON}:forks_and_both_answer")
    for length in range(1, 20):
        assert reward(["p"] * 2, ["bad", "x" * length], {}).values == [3.0, float(length)]
    reward.close()


def test_none_is_no_failure_and_bools_are_numbers() -> None:
    assert ask("says_none") == Scores(WITHOUT_BAD)
    assert ask("a_bool") == Scores([float(text != "bad") for text in TEXTS])


def test_a_daemon_dies_with_the_reward() -> None:
    scores = ask("starts_a_daemon")
    assert scores.values == LENGTHS  # that nothing is left is what the fixture says


@pytest.mark.parametrize("where", ["file", "callable"])
def test_arguments_that_are_changed_change_nothing_here(where: str) -> None:
    import poison

    reward = from_file(f"{POISON}:mutates") if where == "file" else from_callable(poison.mutates)
    prompts, completions, answer = ["p", "q"], ["a", "bb"], [["x"], ["y"]]
    assert reward(prompts, completions, {"answer": answer}).values == [1.0, 2.0]
    assert (prompts, completions, answer) == (["p", "q"], ["a", "bb"], [["x"], ["y"]])
    reward.close()


def test_a_reward_that_always_hangs_is_given_up_after_four_timeouts() -> None:
    reward = from_file(f"{POISON}:sleeps", timeout=0.4)
    started = time.monotonic()
    scores = reward(["p"] * 32, ["bad"] * 32, {})
    reward.close()
    assert scores.values == [None] * 32
    assert [failure.row for failure in scores.failures] == list(range(32))
    assert scores.endings() == {"scored": 0, "abstain": 0, "timeout": 32, "error": 0}
    # Each try that times out is followed by the start of a new process, hence the room.
    assert time.monotonic() - started < 4 * 0.4 + 3.0


def test_only_what_the_signature_names_is_passed(tmp_path) -> None:
    file = tmp_path / "named.py"
    file.write_text(
        "def some(completions, answer): return [answer[0]]\n"
        "def everything(**columns): return [len(columns)]\n"
        "def wants_more(completions, answr): return [0.0]\n"
        "def default(completions, missing=2.0): return [missing]\n"
    )
    columns = {"answer": [3.0], "level": [1]}
    for name, value in [("some", 3.0), ("everything", 4.0), ("default", 2.0)]:
        reward = from_file(f"{file}:{name}")
        assert reward(["p"], ["c"], columns).values == [value]
        reward.close()
    reward = from_file(f"{file}:wants_more")
    with pytest.raises(RewardError, match=r"named.py:wants_more: the function wants 'answr'.*did you mean 'answer'"):
        reward(["p"], ["c"], columns)
    reward.close()


def test_messages_arrive_as_messages() -> None:
    reward = from_callable(lambda prompts, completions: [float(len(completions[0]))])
    assert reward([[{"role": "user", "content": "hi"}]], [[{"role": "assistant", "content": "ho"}]], {}).values == [1.0]
    reward.close()


@pytest.mark.parametrize(
    "given",
    [1, True, np.float32(1), np.int64(1), np.array([1.0])[0], Decimal(1), torch.ones((), requires_grad=True)],
)
def test_numbers_of_all_kinds_are_numbers(given: object) -> None:
    reward = from_callable(lambda completions: [given])
    value = reward(["p"], ["c"], {}).values[0]
    assert value == 1.0
    assert type(value) is float
    reward.close()


@pytest.mark.parametrize("given", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1.0, 2.0)])
def test_sequences_of_all_kinds_are_lists(given: object) -> None:
    reward = from_callable(lambda completions: given)
    assert reward(["p"] * 2, ["c"] * 2, {}).values == [1.0, 2.0]
    reward.close()


def test_a_callable_that_hangs_ends_the_run_and_its_late_answer_is_for_nobody() -> None:
    delays = [0.5, 0.0]

    def slow(completions: list[str]) -> list[float]:
        delay = delays.pop(0)
        time.sleep(delay)
        return [delay]

    reward = from_callable(slow, timeout=0.15)
    with pytest.raises(RewardError, match=r"slow: .*still running after 0.15 s at .*functions.py:\d+.*my_reward.py"):
        reward(["p"], ["c"], {})
    time.sleep(0.5)
    assert reward(["p"], ["c"], {}).values == [0.0]
    reward.close()


def test_an_async_function_keeps_its_event_loop() -> None:
    loops = []

    async def score(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [1.0]

    reward = from_callable(score)
    assert [reward(["p"], ["c"], {}).values for _ in range(2)] == [[1.0], [1.0]]
    assert loops[0] is loops[1]
    reward.close()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (dict, "it is a class"),
        (3, "it is a int"),
        (lambda completions, /: [], "positional-only"),
    ],
)
def test_what_is_no_reward_function_is_refused(function: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        from_callable(function)  # type: ignore[arg-type]


def test_halving_finds_any_set_of_guilty_rows_and_keeps_the_others_in_order() -> None:
    for guilty in [set(), {0}, {7}, {3, 4}, {0, 1, 2, 3, 4, 5, 6, 7}]:
        tries = []

        def attempt(rows: list[int], seconds: float, guilty: set[int] = guilty, tries: list = tries) -> Scores:
            tries.append(rows)
            if guilty & set(rows):
                raise CallFailed("raised", "boom")
            return Scores([10.0 * row for row in rows])

        scores = in_halves(attempt, 8, timeout=5.0)
        assert scores.values == [None if row in guilty else 10.0 * row for row in range(8)]
        assert scores.failures == [Failure(row, "boom") for row in sorted(guilty)]
        assert len(tries) <= 1 + 2 * len(guilty) * 3  # two halves on each of log2(8) levels


def test_a_process_that_dies_once_costs_no_score_and_is_noted() -> None:
    deaths = [CallFailed("died", "the process ended (SIGKILL)")]

    def attempt(rows: list[int], seconds: float) -> Scores:
        if deaths:
            raise deaths.pop()
        return Scores([1.0] * len(rows))  # as one batch again, not in halves: a batch may be scored relative to itself

    scores = in_halves(attempt, 4, timeout=5.0)
    assert scores.values == [1.0] * 4
    assert scores.failures == []
    assert scores.notes == ["the process ended (SIGKILL); 4 rows were scored again by a new one"]


def test_a_process_killed_while_it_starts_is_started_once_more() -> None:
    starts = []

    class Engine:
        signature = Signature(None, frozenset())

        def score(self, arguments: Columns, rows: int, timeout: float) -> Scores:
            raise CallFailed("died", "killed")

        def close(self) -> None: ...

    def start() -> Engine:
        starts.append(len(starts))
        if len(starts) == 2:
            raise RewardError("not loaded") from CallFailed("died", "killed")
        return Engine()

    reward = FunctionReward("fragile", "fragile", start, timeout=1.0)
    assert [failure.reason for failure in reward(["p"], ["c"], {}).failures] == ["killed"]
    assert starts == [0, 1, 2]
