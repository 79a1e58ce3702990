"""Rewards of many parts, that take their time, or go away: a run waits, says so, and loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from kills import KILLED, at_call, differences, fork, remains
from reward_server import RewardServer, answers
from world import World, klimb, lines, play

from klimb.errors import Interrupted, RewardError
from klimb.report.page import write_report
from klimb.rewards import service


def shares(asked: dict[str, Any]) -> list[float]:
    return [text.split().count("yes") / max(len(text.split()), 1) for text in asked["completions"]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setattr(service, "LONGEST_WAIT", 0.02)
    with RewardServer(shares) as running:
        yield running


def job(world: World, server: RewardServer, **changes: Any) -> Callable[[Path], Any]:
    """Seven steps; the scale of the reward follows the training, so that a score that was lost or came twice shows."""
    reward = {"reward": {"http": {"url": server.url, "patience": 0.5}}, "normalise": "running"}
    values = {
        "model": world.model, "data": world.prompts, "reward": reward, "algorithm": "grpo", "steps": 7,
        "prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 4, "checkpoint_every": 3, **changes,
    }  # fmt: skip
    return lambda out: play("rl", out, **values)


def goes_away_at(server: RewardServer, step: int) -> None:
    """One request for the dry run, and one a step."""
    server.faults = lambda number, asked: answers(503) if number >= step else None


@pytest.fixture
def whole(world: World, server: RewardServer, tmp_path: Path) -> Path:
    job(world, server)(tmp_path / "whole")
    server.asked.clear()
    return tmp_path / "whole"


def test_a_server_that_stays_away_ends_the_run_with_everything_saved(
    world: World, server: RewardServer, whole: Path, tmp_path: Path
) -> None:
    run, out = job(world, server), tmp_path / "run"
    goes_away_at(server, 5)
    with pytest.raises(RewardError) as caught:
        run(out)
    said = str(caught.value)
    assert (
        f"no answer for 0.5 s: answered 503 Service Unavailable; start it again; saved after step 4 of 7 in {out}"
        in said
    )
    assert "\n" not in said
    assert (out / "checkpoints" / "step-000004").is_dir()  # although it was not due
    told = [event["message"] for event in lines(out / "events.jsonl") if event["kind"] == "run/report"]
    assert ["the run waits for it" in message for message in told].count(True) == 1
    server.faults = lambda number, asked: None
    again = run(out)
    assert "continuing after step 4" in again.said
    assert [file for file in differences(out, whole) if not file.startswith("checkpoints/step-000004")] == []


def test_a_step_that_was_begun_is_not_saved(world: World, server: RewardServer, tmp_path: Path) -> None:
    """SFT asks the server after its update, when the weights are those of a step that has not ended."""
    reward = {"http": {"url": server.url, "patience": 0.5}}
    until = {"data": world.prompts, "reward": reward, "at_least": 2.0, "every": 1, "max_tokens": 4}
    server.faults = lambda number, asked: answers(404) if number >= 2 else None
    with pytest.raises(RewardError, match=r"answered 404 Not Found; correct its url or key$"):
        play("sft", tmp_path / "run", model=world.model, data=world.demonstrations, steps=5, batch_size=4, until=until,
             checkpoint_every=0)  # fmt: skip
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_command_ends_with_one_line_and_a_code(world: World, server: RewardServer, here: Path) -> None:
    goes_away_at(server, 1 + 2 * 2)  # each of the two groups of a step is scored by itself, as soon as it is there
    said = klimb(
        "grpo", f"model={world.model}", f"data={world.prompts}", "steps=4", "threads=1", "device=cpu", "out=run",
        "prompts_per_step=2", "samples_per_prompt=4", "max_tokens=4",
        f"reward={{http: {{url: '{server.url}', patience: 0.5}}}}",
    )  # fmt: skip
    assert said.code == 1
    [line] = [line for line in said.err.splitlines() if line.startswith("klimb: ")]
    assert line.endswith("saved after step 2 of 4 in run; the same command continues")
    assert [line for line in said.err.splitlines() if "the run waits for it" in line]


def test_ctrl_c_while_it_waits_saves_and_leaves(
    world: World, server: RewardServer, whole: Path, tmp_path: Path
) -> None:
    patient = {"reward": {"http": {"url": server.url, "patience": 600}}, "normalise": "running"}
    run, out = job(world, server, reward=patient), tmp_path / "run"
    goes_away_at(server, 5)

    def leave() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with (
        at_call("klimb.rewards.service.Service._wait", 6, leave),
        pytest.raises(Interrupted, match="saved after step 4"),
    ):
        run(out)
    server.faults = lambda number, asked: None
    run(out)
    different = differences(out, whole)
    assert [file for file in different if not file.startswith("checkpoints/step-000004")] == []


@pytest.mark.parametrize("nth", [1, 5], ids=["at the first silence", "in the middle of the wait"])
def test_killed_while_it_waits(world: World, server: RewardServer, whole: Path, tmp_path: Path, nth: int) -> None:
    run, out = job(world, server), tmp_path / "run"
    goes_away_at(server, 6)

    def killed() -> None:
        with at_call("klimb.rewards.service.Service._wait", nth):
            run(out)

    assert fork(killed) == KILLED
    assert len(lines(out / "metrics.jsonl")) == 5
    server.faults = lambda number, asked: None
    assert fork(partial(run, out)) == 0
    assert differences(out, whole) == []


def test_a_server_that_comes_back_changes_nothing(
    world: World, server: RewardServer, whole: Path, tmp_path: Path
) -> None:
    server.faults = lambda number, asked: answers(503) if 3 <= number < 9 else None
    done = job(world, server)(tmp_path / "run")
    assert differences(tmp_path / "run", whole) == []
    assert [line for line in done.said if "the run waits for it" in line]
    assert [line for line in done.said if "it answers again" in line]


SLEEPY = '''
import time

def sleepy(completions, answer, **_):
    """Waits for something as long as a step of this world takes."""
    time.sleep(0.002 * len(completions))
    return [None if c.startswith("no") else c.split().count("yes") + len(a) for c, a in zip(completions, answer)]
'''


def test_scores_that_were_taken_early_are_the_same(world: World, tmp_path: Path) -> None:
    """Samples, events, metrics and weights; the function sees each group by itself, or all of them at once."""
    file = tmp_path / "sleepy.py"
    file.write_text(SLEEPY)
    found = {}
    for independent in (False, True):
        reward = [{f"{file}:sleepy": {"independent": independent}}, {"reward": "length", "weight": -0.1}]
        values: dict[str, Any] = {"prompts_per_step": 6, "samples_per_prompt": 4, "max_tokens": 4, "steps": 3}
        play("rl", tmp_path / str(independent), model=world.model, data=world.prompts, reward=reward, algorithm="grpo",
             **values)  # fmt: skip
        found[independent] = remains(tmp_path / str(independent))
        del found[independent]["result.json"]  # it names the run
    assert found[False] == found[True]
    assert any(row["verdict/sleepy/abstain"] for row in found[True]["metrics.jsonl"])


def test_early_scores_are_taken(world: World, tmp_path: Path) -> None:
    from klimb.rewards.scorer import Scorer

    file = tmp_path / "sleepy.py"
    file.write_text(SLEEPY)
    begun: list[int] = []
    real = Scorer._collected

    def counted(scorer: Scorer, groups: Any) -> Any:
        begun.append(len(scorer._begun))
        return real(scorer, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "_collected", counted)
        reward = {f"{file}:sleepy": {"independent": True}}
        play("rl", tmp_path / "run", model=world.model, data=world.prompts, algorithm="grpo", reward=reward, steps=2,
             prompts_per_step=6, samples_per_prompt=4, max_tokens=4)  # fmt: skip
    assert begun == [6, 6]


def test_every_part_of_a_mixture_is_stored_with_its_sample(world: World, tmp_path: Path) -> None:
    worth = {"reward": {"gate": {"when": world.reward("rare"), "then": world.reward("count"), "else": -1}}, "weight": 2}
    to = {"a": [worth, "length"], **{letter: {"length": {"unit": "words"}} for letter in "bcdef"}}
    done = play("rl", tmp_path / "run", model=world.model, data=world.prompts, algorithm="grpo", steps=1, max_tokens=4,
                reward={"route": {"column": "answer", "to": to}}, prompts_per_step=6, samples_per_prompt=8)  # fmt: skip
    table = pyarrow.parquet.read_table(tmp_path / "run" / "samples" / "step-000001.parquet").to_pylist()
    assert len(table) == 48
    seen = set()
    for row in table:
        letter, words = row["prompt"][0], row["completion"].split()
        if letter != "a":
            assert row["score"] == row[f"reward.{letter}"] == len(words)
            assert row["reward.a/gate"] is None
            continue
        rare = words.count("yes") >= 2
        seen.add(rare)
        share = words.count("yes") / max(len(words), 1)
        assert row["reward.a/gate/rare"] == rare
        assert row["reward.a/gate/count"] == (share if rare else None)
        assert row["score"] == 2 * (share if rare else -1) + row["reward.a/length"]
        assert row["reward.f"] is None
    assert seen == {True, False}
    counted = done.rows[0]
    assert sum(counted[f"verdict/{ending}"] for ending in ("scored", "abstain", "timeout", "error")) == 48
    assert sum(counted[f"verdict/{letter}/scored"] for letter in "abcdef") == 48
    write_report(tmp_path / "run")
