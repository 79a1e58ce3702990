"""Tasks of reasoning-gym: what is split how, what is refused, and the scorer in its process."""

import importlib.util
import json
from pathlib import Path

import pytest

from klimb.errors import DataError, RewardError
from klimb.lab.gym import part_of, prepare, refuse_constant
from klimb.rewards.spec import parse_reward
from klimb.rewards.verifiers.gym import gym, score

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is not installed: pip install 'klimb[verify]'",
)


def rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.slow
def test_a_task_trains_and_measures_with_the_same_scorer(tmp_path: Path) -> None:
    world = prepare(tmp_path, seed=1, task="chain_sum", train=40, test=10, max_terms=3)
    prompts, test, shown = (rows(world[name]) for name in ("prompts", "test", "demonstrations"))
    assert (len(prompts), len(test), len(shown)) == (40, 10, 40)
    assert not {row["prompt"] for row in prompts} & {row["prompt"] for row in test}
    assert "completion" not in prompts[0]
    reward = parse_reward({"gym": {"tag": "answer"}})
    items = [row["item"] for row in shown[:2]] + [None]
    right = [f"hm, 7? <answer> {row['completion']}</answer>" for row in shown[:2]]
    scores = reward(["p"] * 3, [right[0], "<answer>zzz</answer>", "1"], {"item": items})
    plain = parse_reward(world["reward"])
    assert plain(["p"], [shown[0]["completion"]], {"item": items[:1]}).values == [1.0]
    reward.close()
    plain.close()
    assert scores.values == [1.0, 0.0, None]
    assert scores.counts == {"ok": 1, "wrong": 1, "abstain": 1, "timeout": 0, "error": 0}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("game_of_life_halting", "refused: the answer '0' earns 1.00 on average"),
        ("coin_flip", "refused: the answer '0' earns"),
        ("circuit_logic", "refused: the answer '0' earns"),
        ("isomorphic_strings", "refused: the answer '(True|False)' earns"),
        ("ransom_note", "refused: the answer '(True|False)' earns"),
        ("course_schedule", "refused: the answer '(True|False)' earns"),
        ("list_functions", "does not give the same questions twice"),
        ("graph_color", "cannot be used: of .* have no answer"),
        ("boxnet", "cannot be used: of .* have no answer"),
        ("chain_sm", "no task 'chain_sm'; did you mean 'chain_sum'"),
        ("composite", "the options of composite do not fit"),
    ],
)
@pytest.mark.slow
def test_a_task_that_cannot_be_trusted_is_refused(task: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / "world", seed=0, task=task, train=60, test=40)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "world").exists()


def test_a_scorer_is_judged_by_what_a_constant_answer_earns() -> None:
    items = [{"answer": str(place)} for place in range(10)]

    def generous(answer: str, entry: dict) -> float:
        return float(answer == entry["answer"] or (answer == "zzz" and int(entry["answer"]) < 4))

    with pytest.raises(DataError, match=r"the answer 'zzz' earns 0\.40 on average over 10 questions"):
        refuse_constant("task", generous, items)
    refuse_constant("task", lambda answer, entry: float(answer == entry["answer"]), items)


def test_a_scorer_that_raises_has_seen_a_wrong_answer() -> None:
    def strict(answer: str, entry: dict) -> float:
        return {"seven": 1.0, "some": 0.05, "much": 7.0}[answer]

    assert [score(strict, answer, {}) for answer in ("seven", "some", "much", "other")] == [1.0, 0.0, 1.0, 0.0]
    assert gym(tag="a")._answer("<a>1</a> <a> 2 </a> 3") == "2"
    assert gym(tag="a")._answer("1 </a> <a>") == ""
    assert gym()._answer(" 3 ") == "3"


def test_the_part_of_a_question_does_not_depend_on_the_seed() -> None:
    parts = [part_of(f"question {number}", 0.25) for number in range(2000)]
    assert 400 < parts.count("test") < 600  # 500 ± 5 standard deviations
    assert parts == [part_of(f"question {number}", 0.25) for number in range(2000)]


def test_without_reasoning_gym_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for act in (lambda: parse_reward("gym"), lambda: prepare(tmp_path, seed=0, task="chain_sum")):
        with pytest.raises(RewardError, match=r"reasoning-gym is not installed; pip install 'klimb\[verify\]'"):
            act()
