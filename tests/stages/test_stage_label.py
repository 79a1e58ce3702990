"""Labelling by a judge, and constitutional AI: what is written is what the stages of training read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import Handler, Served, always, asked, block, honest, serving, status
from kills import KILLED, at_call, fork
from tiny import chat_model
from world import SMALL_RL, Played, World, klimb, lines, play, write

from klimb.errors import ConfigError, DataError, RewardError
from klimb.rewards.judge.principles import SHIPPED, load_principles, principle_for

QUESTIONS = [{"prompt": f"{n} ?", "completions": [f"good {'good ' * (n % 3)}a", "good good b"]} for n in range(12)]
"""The judge counts "good": four prompts each where the second is better, neither, the first."""


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klimb.rewards.judge.server.FIRST_PAUSE", 0.02)


def label(out: Path, served: Served, data: Any, judge: dict[str, Any] | None = None, **values: Any) -> Played:
    asking = {"url": served.url, "canary_limit": 1, "timeout": 10, **(judge or {})}
    return play("label", out, model="m", data=data, judge=asking, **values)


def test_preferences_are_written_as_peoples_are(tmp_path: Path) -> None:
    with serving(honest) as served:
        done = label(tmp_path / "run", served, QUESTIONS)
    preferred, undecided = lines(done.path / "preferences.jsonl"), lines(done.path / "undecided.jsonl")
    assert [row["prompt"] for row in preferred] == [f"{n} ?" for n in range(12) if n % 3 != 1]
    for row in preferred:
        assert row["chosen"].count("good") > row["rejected"].count("good")
        assert row["annotator"] == "ai:m"
    assert [row["verdict"] for row in undecided] == ["tie"] * 4
    assert done.result["endings"] == {"tie": 4, "abstain": 0, "timeout": 0, "error": 0}
    assert (done.result["pairs"], done.result["compared"], done.result["agreement"]) == (8, 12, None)
    assert (done.result["consistency"], done.result["first_slot"]) == (1.0, 0.5)
    assert done.result["spent"] == {"requests": 24, "prompt": 2400, "completion": 240}


def test_rows_of_one_prompt_belong_together(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in [("x", "a"), ("y", "a"), ("x", "good"), ("y", "a"), ("x", "b")]]
    with serving(honest) as served:
        done = label(tmp_path / "run", served, rows)
    pairs = {(row["chosen"], row["rejected"]) for row in lines(done.path / "preferences.jsonl")}
    assert pairs == {("good", "a")}  # of x the last, b, meets the first, a: a tie; y says the same twice
    assert [row["completions"] for row in lines(done.path / "undecided.jsonl")] == [["b", "a"]]


def test_completions_that_say_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    """As `klimb sample` writes them where a model ends at once, in plain text and in a chat."""
    rows: list[dict[str, Any]] = [{"prompt": "x", "completion": text} for text in ("a", "", "good")]
    asked = [{"role": "user", "content": "y"}]
    rows += [
        {"prompt": asked, "completion": [{"role": "assistant", "content": text}]} for text in ("", "a", "good", "")
    ]
    with serving(honest) as served:
        done = label(tmp_path / "run", served, rows)
    assert done.result["pairs"] == done.result["compared"] == 2
    assert json.loads((done.path / "manifest.json").read_text())["data"]["data"]["empty"] == 3
    assert "3 of 7 rows are left out: their completions are empty" in done.said


def test_what_a_judge_does_not_say_is_kept_and_counted(tmp_path: Path) -> None:
    def moody(handler: Handler, body: dict[str, Any]) -> None:
        prompt = block(body, "QUESTION")
        answer = {"0 ?": always(), "1 ?": status(413), "2 ?": always(better="A")}.get(prompt, honest)
        answer(handler, body)

    with serving(moody) as served:
        done = label(tmp_path / "run", served, QUESTIONS)
    assert done.result["endings"] == {"tie": 4, "abstain": 1, "timeout": 0, "error": 1}  # 2 ? is one, 1 ? no longer
    assert done.result["pairs"] == 6
    found = {row["prompt"]: row for row in lines(done.path / "undecided.jsonl")}
    assert found["0 ?"]["verdict"] == "abstain"
    assert "no key" not in found["0 ?"]["why"]
    assert "status 413" in found["1 ?"]["why"]
    assert sum(value for key, value in done.rows[0].items() if key in ("verdict/ok", "verdict/abstain", "verdict/error")
               ) == 12  # fmt: skip


def test_agreement_with_people(tmp_path: Path) -> None:
    """Four pairs as the judge would have it, one the other way round, one that it finds equal."""
    rows = [{"prompt": f"{n} ?", "chosen": f"good {n}", "rejected": "bad"} for n in range(4)]
    rows += [{"prompt": "5 ?", "chosen": "bad", "rejected": "good"}, {"prompt": "6 ?", "chosen": "a", "rejected": "b"}]
    with serving(honest) as served:
        done = label(tmp_path / "run", served, rows)
    found = done.result["agreement"]
    assert (found["pairs"], found["decided"], found["accuracy"]) == (6, 5, 0.8)
    assert found["accuracy_low"] < 0.8 < found["accuracy_high"]
    assert done.result["endings"]["tie"] == 1


def test_what_was_paid_for_is_not_asked_again_after_a_kill(tmp_path: Path) -> None:
    with serving(honest) as served:

        def job() -> None:
            with at_call("klimb.rewards.judge.ledger.Ledger.put", 11):
                label(tmp_path / "run", served, QUESTIONS, judge={"concurrency": 1})

        assert fork(job) == KILLED
        paid = served.requests
        assert 11 <= paid <= 13  # ten verdicts were kept; the next was on its way, and perhaps another
        done = label(tmp_path / "run", served, QUESTIONS, judge={"concurrency": 1})
        assert served.requests - paid == 24 - 10
        assert [row["step"] for row in done.rows] == [1]
        whole = label(tmp_path / "whole", served, QUESTIONS, judge={"concurrency": 1})
    for name in ("preferences.jsonl", "undecided.jsonl"):
        assert (done.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_server_in_ruins_ends_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    with serving(status(500)) as served:
        with pytest.raises(RewardError, match="12 of 12 pairs failed"):
            label(tmp_path / "run", served, QUESTIONS, judge={"timeout": 2})
        served.behave = honest
        done = label(tmp_path / "run", served, QUESTIONS, judge={"timeout": 2})
    assert done.result["pairs"] == 8


def test_a_judge_that_canaries_talk_round_ends_the_run(tmp_path: Path) -> None:
    def flattered(handler: Handler, body: dict[str, Any]) -> None:
        better = next((name for name in "AB" if "good" not in block(body, f"ANSWER {name}")), "A")
        always(better=better)(handler, body)

    with serving(flattered) as served, pytest.raises(RewardError, match="canaries were preferred in 100% of 4"):
        label(tmp_path / "run", served, QUESTIONS, judge={"canary_limit": 0.5})


def test_principles_are_drawn_by_content(tmp_path: Path) -> None:
    principles = load_principles(None)
    with serving(honest) as served:
        forth = label(tmp_path / "forth", served, QUESTIONS, principles="default")
        back = label(tmp_path / "back", served, QUESTIONS[::-1], principles=str(SHIPPED))
        said = {principle.compare: principle.name for principle in principles}
        found = {next(said[text] for text in said if text in asked(body)) for body in served.bodies}
    rows = lines(forth.path / "preferences.jsonl")
    assert rows == lines(back.path / "preferences.jsonl")[::-1]
    assert {row["principle"] for row in rows} <= found
    assert len(found) >= 3  # of five, twelve draws
    assert principle_for(principles, 0, "a") == principle_for(principles, 0, "a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "no list"),
        ("[]", "no list"),
        ("- 3", "principle 1"),
        ("- {name: a, criticise: b, revise: c}", "'compare'"),
        ("- {name: a, criticise: b, revise: c, compare: ' '}", "'compare'"),
        ("- {name: a, criticise: b, revise: c, compare: d, e: f}", "'e'"),
        ("- [", "not YAML"),
    ],
)
def test_principles_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_principles(str(tmp_path / "p.yaml"))


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "x", "completions": ["a"]}],
        [{"prompt": "x", "completions": "ab"}],
        [{"prompt": "x", "completions": ["a", ""]}],
        [{"prompt": "x", "completions": ["a", [{"role": "assistant", "content": "b"}]]}],
        [{"prompt": "x", "completion": "a"}, {"prompt": "y", "completion": "b"}],
        [{"prompt": "x", "completions": ["a", "a"]}],
        [{"question": "x", "answer": "a"}],
    ],
    ids=lambda rows: json.dumps(rows[0])[:40],
)
def test_rows_without_two_completions(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with serving(honest) as served, pytest.raises(DataError):
        label(tmp_path / "run", served, rows)
    assert served.requests == 0


# Constitutional AI ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_model(tmp_path_factory.mktemp("model"), context=4096)


def test_from_prompts_to_demonstrations_and_preferences_that_train(model: str, tmp_path: Path) -> None:
    """A model of random numbers throughout: what it writes means nothing, and is valid all the same."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(24)])
    made = play("revise", tmp_path / "revise", model=model, data=prompts, rounds=2, max_tokens=192)
    rows = lines(tmp_path / "revise" / "demonstrations.jsonl")
    assert len(rows) == made.result["kept"] == 24 - sum(made.result["left_out"].values()) > 0
    names = {principle.name for principle in load_principles(None)}
    for row in rows:
        assert len(row["principles"]) == len(row["critiques"]) == 2
        assert {*row["principles"]} <= names
        assert row["completion"][0]["content"] != row["first_answer"]
    again = play("revise", tmp_path / "again", model=model, data=prompts, rounds=2, max_tokens=192)
    assert Path(again.result["demonstrations"]).read_bytes() == Path(made.result["demonstrations"]).read_bytes()

    drawn = play("sample", tmp_path / "draw", model=model, data=prompts, samples_per_prompt=8, max_tokens=24)
    chosen = play("label", tmp_path / "label", model=model, data=drawn.result["samples"], principles="default",
                  judge={"canary_limit": 1}, on_bad="drop")  # fmt: skip
    assert chosen.result["pairs"] + sum(chosen.result["endings"].values()) == chosen.result["compared"]
    # It prefers what stands first in nearly all of them, whatever it is: of 96 pairs a few are left.
    assert 0 < chosen.result["pairs"] < 48
    assert chosen.result["first_slot"] > 0.8
    for stage, data in (("sft", made.result["demonstrations"]), ("preference", chosen.result["preferences"]),
                        ("reward", chosen.result["preferences"])):  # fmt: skip
        done = play(stage, tmp_path / stage, model=model, data=data, steps=1, batch_size=2)
        assert done.rows[0]["loss"] > 0
        assert lines(tmp_path / stage / "events.jsonl") == []
        said = klimb("check", data, f"model={model}", "--json")
        assert (said.code, said.err) == (0, "")


def test_prompts_in_plain_text_are_revised_in_plain_text(model: str, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(8)])
    made = play("revise", tmp_path / "run", model=model, data=prompts, max_tokens=192)
    assert all(isinstance(row["completion"], str) for row in lines(Path(made.result["demonstrations"])))


def test_nothing_that_was_finished_is_an_error(model: str, tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{n}?"} for n in range(4)])
    with pytest.raises(DataError, match=r"no revision was finished.*cut off"):
        play("revise", tmp_path / "run", model=model, data=prompts, max_tokens=1, seed=3)


# From the command line ------------------------------------------------------------------------------------------------


def test_from_the_command_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "sk-not-to-be-seen")
    data = write(here / "answers.jsonl", QUESTIONS)
    with serving(honest) as served:
        words = ["label", "model=m", f"data={data}", f"judge.url={served.url}", "judge.key_env=A_KEY", "out=run",
                 "judge.canary_limit=1", "threads=1", "device=cpu"]  # fmt: skip
        tried = klimb(*words, "--dry-run", "--json")
        assert (tried.code, served.requests) == (0, 8)  # four pairs
        assert not (here / "run").exists()
        said = klimb(*words, "--json")
        assert said.code == 0, said.err
        assert json.loads(said.out)["pairs"] == 8
        again = klimb(*words, "--json")
        assert json.loads(again.out)["pairs"] == 8
        assert served.requests == 8 + 24
        assert {*served.keys} == {"Bearer sk-not-to-be-seen"}
    files = [file for file in here.rglob("*") if file.is_file()]
    assert not any(b"sk-not" in file.read_bytes() for file in files)
    assert (here / "run" / "report.html").exists()


@pytest.mark.parametrize("stage", ["label", "recipe", "reward"])
def test_a_key_is_written_nowhere(here: Path, stage: str) -> None:
    """Who types it where it does not belong is told so, before a file is made of it."""
    data = write(here / "rows.jsonl", QUESTIONS)
    key = "sk-not-to-be-seen"
    if stage == "label":
        said = klimb("label", "model=m", f"data={data}", "judge.url=https://host/v1", f"judge.key_env={key}")
    elif stage == "reward":
        said = klimb(
            "grpo", "model=m", f"data={data}", f"reward={{judge: {{model: m, url: https://h, api_key: {key}}}}}"
        )
    else:
        judge = f"{{judge: {{url: https://host/v1, model: m, key_env: {key}}}}}"
        Path("r.yaml").write_text(
            f"name: r\nstages:\n  a: {{stage: sample, model: m, data: {data}, reward: {judge}}}\n"
        )
        said = klimb("run", "r.yaml")
        Path("r.yaml").unlink()
    assert said.code == 1
    assert key not in said.err + said.out
    assert not any(key.encode() in file.read_bytes() for file in here.rglob("*") if file.is_file())


# In training and measuring --------------------------------------------------------------------------------------------


def yes(handler: Handler, body: dict[str, Any]) -> None:
    """Counts "yes" in the answer, as the rewards of the small world do."""
    score = 1 + min(block(body, "ANSWER").split().count("yes"), 4)
    always(score=score)(handler, body)


def test_a_policy_climbs_a_judge_and_a_kill_changes_nothing(world: World, tmp_path: Path) -> None:
    """No completion is judged twice, whatever it is sampled for; a run that was cut off goes on to the same bits."""
    judge = {"model": "m", "scale": [1, 5], "rubric": "count"}
    settings: dict[str, Any] = {**SMALL_RL, "model": world.model, "data": world.prompts, "steps": 12,
                                "algorithm": "rloo", "checkpoint_every": 4}  # fmt: skip
    with serving(yes) as served:
        settings["reward"] = {"judge": {**judge, "url": served.url}}
        whole = play("rl", tmp_path / "whole", **settings)
        paid = served.requests
        assert paid < 12 * 48 / 2  # replies of four words repeat themselves

        def job() -> None:
            with at_call("klimb.rewards.judge.judge.Judge.answered", 7):
                play("rl", tmp_path / "cut", **settings)

        assert fork(job) == KILLED
        cut = play("rl", tmp_path / "cut", **settings)
        assert served.requests - paid <= paid + 1
    assert whole.rows[-1]["reward/mean"] > whole.rows[0]["reward/mean"]
    assert (Path(cut.model) / "model.safetensors").read_bytes() == (
        Path(whole.model) / "model.safetensors"
    ).read_bytes()
    assert [row["reward/mean"] for row in cut.rows] == [row["reward/mean"] for row in whole.rows]
    row = whole.rows[0]
    assert (row["verdict/ok"], row["verdict/canaries"], row["verdict/canaries_scored"]) == (48, 4, 0)


def test_a_judge_measures_beside_the_reward(world: World, tmp_path: Path) -> None:
    with serving(yes) as served:
        gold = {"judge": {"url": served.url, "model": "m", "scale": [1, 5]}}
        measure = {"data": world.prompts, "reward": world.reward("count"), "gold": gold, "samples_per_prompt": 4,
                   "max_tokens": 4}  # fmt: skip
        done = play("evaluate", tmp_path / "run", model=world.model, measure=measure)
    assert 1.0 <= done.result["evaluation"]["gold"] <= 5.0
    assert (tmp_path / "run" / "judge.sqlite").exists()
