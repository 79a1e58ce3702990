"""The worker's life: starting, dying, being killed at random, and its end with the trainer."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from reward_processes import POISON, descendants

from klimb.errors import RewardError
from klimb.rewards.function import from_file
from klimb.rewards.process import WorkerProcess

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(completions) return 1", r"reward.py:1.*SyntaxError"),
        ("x = 1\n1 / 0\n", r"reward.py:2.*ZeroDivisionError"),
        ("import no_such_module\n", r"reward.py:1.*no_such_module"),
        ("def skore(): pass\n", r"no 'score', did you mean 'skore'"),
        ("score = 3\n", r"reward.py:score.*it is a int"),
        ("class score: pass\n", r"it is a class"),
        ("import sys; sys.exit(3)\n", r"cannot be loaded.*SystemExit: 3"),
        ("import os; os._exit(3)\n", r"could not be loaded.*exit code 3"),
        ("print('oh no'); import os; os.abort()\n", r"could not be loaded.*SIGABRT"),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why_on_one_line(tmp_path: Path, source: str, message: str) -> None:
    file = tmp_path / "reward.py"
    file.write_text(source)
    with pytest.raises(RewardError, match=message) as caught:
        from_file(f"{file}:score")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"nothing.py:score: there is no file"):
        from_file(f"{tmp_path}/nothing.py:score")


def test_a_file_that_hangs_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klimb.rewards.function.START_TIMEOUT", 0.5)
    file = tmp_path / "reward.py"
    file.write_text("import time; time.sleep(60)\n")
    with pytest.raises(RewardError, match=r"could not be loaded: no answer within 0.5 s"):
        from_file(f"{file}:score")


def test_helpers_beside_the_file_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("def value(): return 4.0\n")
    (tmp_path / "reward.py").write_text("from helper_of_mine import value\ndef score(completions): return [value()]\n")
    reward = from_file(f"{tmp_path}/reward.py:score")
    assert reward(["p"], ["c"], {}).values == [4.0]
    reward.close()


def test_a_file_that_changes_during_the_run_stops_it(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("import os\ndef score(completions): os._exit(1)\n")
    reward = from_file(f"{file}:score")
    file.write_text("def score(completions): return [1.0]\n")
    with pytest.raises(RewardError, match=r"the file was changed while the run was going"):
        reward(["p"], ["c"], {})
    reward.close()


def test_a_column_that_is_no_json_is_named() -> None:
    reward = from_file(f"{POISON}:mutates")
    with pytest.raises(RewardError, match=r"cannot be sent to the reward's process: 'answer'.*from Python"):
        reward(["p"], ["c"], {"answer": [object()]})
    reward.close()


def test_a_large_batch_passes() -> None:
    reward = from_file(f"{POISON}:fine", timeout=20.0)
    texts = [chr(97 + row % 26) * 20_000 for row in range(500)]  # 10 MB, much more than a pipe holds
    assert reward(texts, texts, {}).values == [20_000.0] * 500
    reward.close()


def test_thirty_random_kills_change_no_score(tmp_path: Path) -> None:
    """The scores depend on the whole batch, so that a batch that was split in secret would show."""
    file = tmp_path / "reward.py"
    file.write_text(
        "import time\n"
        "def score(completions):\n"
        "    time.sleep(0.01)\n"
        "    return [int(text) / sum(map(int, completions)) for text in completions]\n"
    )
    reward = from_file(f"{file}:score", timeout=20.0)
    dice = random.Random(4)
    notes = []
    for batch in range(30):
        victim = dice.choice(sorted(descendants(os.getpid())))  # the worker or its supervisor
        killer = threading.Timer(dice.random() * 0.015, os.kill, (victim, signal.SIGKILL))
        killer.start()
        numbers = [batch * 8 + row + 1 for row in range(8)]
        scores = reward(["p"] * 8, [str(number) for number in numbers], {})
        killer.join()
        assert scores.values == [number / sum(numbers) for number in numbers]
        assert scores.failures == []
        notes += scores.notes
        time.sleep(0.001 * dice.randrange(3))
        reward(["p"], ["1"], {})  # a kill after the answer is noticed, and made good, here
    reward.close()
    assert len(notes) >= 10  # most hit a call; the others came after its answer


def test_a_killed_supervisor_is_replaced_and_what_it_watched_is_killed() -> None:
    reward = from_file(f"{POISON}:forks_and_stays")
    assert reward(["p"], ["bad"], {}).values == [3.0]
    assert isinstance(reward._engine, WorkerProcess)
    os.kill(reward._engine._process.pid, signal.SIGKILL)
    assert reward(["p"], ["fine"], {}).values == [4.0]
    reward.close()


@pytest.mark.parametrize("name", ["fine", "sleeps", "forks_and_stays", "starts_a_daemon"])
def test_a_killed_trainer_takes_the_worker_with_it(name: str) -> None:
    script = (
        "import os, threading, time\n"
        "from klimb.rewards.function import from_file\n"
        f"reward = from_file({POISON!r} + ':{name}')\n"
        "threading.Thread(target=reward, args=(['p'], ['bad'], {}), daemon=True).start()\n"
        "time.sleep(0.4)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    below = descendants(trainer.pid)
    assert len(below) >= 2
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 5.0
    while any(alive(pid) for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in below if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
