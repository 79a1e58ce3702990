import subprocess
import sys
from pathlib import Path

import pytest
from reward_processes import POISON

from klimb.errors import RewardError
from klimb.rewards.combine import WeightedSum
from klimb.rewards.normalise import Normalised
from klimb.rewards.protocol import FakeReward, Reward
from klimb.rewards.spec import parse_reward, reward_files

pytestmark = pytest.mark.usefixtures("nothing_left")


def values(reward: Reward, texts: list[str], **columns: list) -> list[float | None]:
    try:
        return reward(["p"] * len(texts), texts, columns).values
    finally:
        reward.close()


def test_each_form_of_a_spec() -> None:
    assert values(parse_reward(f"{POISON}:fine"), ["abc"]) == [3.0]
    assert values(parse_reward({f"{POISON}:fine": {"timeout": 5}}), ["abc"]) == [3.0]
    assert values(parse_reward("exact"), ["a", "b"], answer=["a", "a"]) == [1.0, 0.0]
    assert values(parse_reward({"exact": {"column": "c"}}), ["a"], c=["a"]) == [1.0]
    assert values(parse_reward({"exact": None}), ["a"], answer=["a"]) == [1.0]
    assert values(parse_reward({"format": {"pattern": "a"}}), ["a", "b"]) == [1.0, 0.0]
    assert values(parse_reward({"format": {"tags": "a"}}), ["<a></a>"]) == [1.0]
    assert values(parse_reward({"regex": {"pattern": "=(.)"}}), ["=4"], answer=[4]) == [1.0]
    assert values(parse_reward(lambda completions: [7]), ["a"]) == [7.0]
    fake = FakeReward()
    assert parse_reward(fake) is fake


def test_a_weighted_list() -> None:
    reward = parse_reward(
        [
            {"reward": f"{POISON}:fine", "weight": 2},
            {"reward": {"length": {"unit": "words"}}, "weight": -0.5, "name": "brevity"},
            "exact",
        ]
    )
    assert isinstance(reward, WeightedSum)
    scores = reward(["p"], ["a b"], {"answer": ["a b"]})
    reward.close()
    assert scores.parts == {"fine": [3.0], "brevity": [2.0], "exact": [1.0]}
    assert scores.values == [2 * 3.0 - 0.5 * 2.0 + 1.0]
    assert values(parse_reward({"reward": "exact", "weight": 3.0}), ["a"], answer=["a"]) == [3.0]


def test_a_directory_and_a_hub_name_go_to_the_loader(tmp_path: Path) -> None:
    asked: list[str] = []

    def loader(name: str) -> Reward:
        asked.append(name)
        return FakeReward(name="model")

    parse_reward(str(tmp_path), model_loader=loader)
    parse_reward("owner/reward-model", model_loader=loader)
    parts = parse_reward([{"reward": str(tmp_path), "weight": 2.0}], model_loader=loader)
    assert asked == [str(tmp_path), "owner/reward-model", str(tmp_path)]
    assert values(parts, ["abc"]) == [6.0]
    with pytest.raises(RewardError, match="cannot be used here"):
        parse_reward(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exct", r"unknown reward 'exct'.*did you mean 'exact'.*my_reward.py:NAME"),
        ("no_idea", r"unknown reward 'no_idea'; known: .*numeric"),
        ("my_reward.py", r"without the name of a function; write my_reward.py:NAME"),
        ("./missing.py:score", r"missing.py:score: there is no file"),
        (f"{POISON}:fin", r"no 'fin', did you mean 'fine'"),
        ({f"{POISON}:fine": {"time": 3}}, r"unknown option 'time'.*timeout"),
        ({f"{POISON}:fine": {"timeout": "long"}}, r"timeout is 'long'"),
        ({f"{POISON}:fine": {"timeout": 0}}, r"timeout is 0"),
        ({"numeric": {"colum": "x"}}, r"unknown option 'colum'; did you mean 'column'"),
        ({"exact": {}, "numeric": {}}, r"one name and its options.*'exact', 'numeric'"),
        ({"regex": {}}, r"reward regex: an option is missing: .*'pattern'"),
        ({"regex": {"pattern": "a"}}, r"'a' has no group.*`format`"),
        ({"regex": {"pattern": "("}}, r"no regular expression: .*unterminated"),
        ({"format": {}}, r"`tags` or `pattern`"),
        ({"format": {"tags": ["a"], "pattern": "b"}}, r"`tags` or `pattern`"),
        ({"length": {"unit": "word"}}, r"unknown unit 'word'; did you mean 'words'"),
        ([{"reward": "exact", "wieght": 2}], r"unknown key 'wieght'.*'weight'"),
        ([{"reward": "exact", "weight": "2"}], r"reward exact: weight is '2'"),
        ([{"reward": "exact", "weight": float("nan")}], r"weight is nan"),
        (["exact", "exact"], r"two parts are both called 'exact'; give one another `name:`"),
        ([f"{POISON}:fine", "exct"], r"unknown reward 'exct'"),  # the first part's process is closed again
        ([["exact"]], r"a sum within a sum"),
        ({"reward": "exact", "clip": 0}, r"reward exact: clip is 0; give the largest score that counts"),
        ({"reward": "exact", "clip": True}, r"clip is True"),
        ({"reward": "exact", "normalise": "runing"}, r"normalise is 'runing'; write running, or leave it out"),
        ({"reward": "exact", "normalise": "running"}, r"nothing is trained on these scores.*leave normalise out"),
        ([], r"without parts"),
        (3, r"3 is no reward"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said_on_one_line(spec: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        parse_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_scale_that_follows_the_training_is_handed_to_who_keeps_it(tmp_path: Path) -> None:
    running: list[Normalised] = []
    spec = [
        {"reward": str(tmp_path), "normalise": "running", "clip": 5},
        {"reward": "exact", "clip": 0.5},
        {"reward": "length", "normalise": "running", "name": "brevity", "weight": -1},
    ]
    reward = parse_reward(spec, model_loader=lambda name: FakeReward(name="model"), running=running)
    assert isinstance(reward, WeightedSum)
    assert running == [reward.parts[0].reward, reward.parts[2].reward]
    assert [part.name for part in reward.parts] == ["model", "exact", "brevity"]
    assert [part.weight for part in reward.parts] == [1.0, 1.0, -1.0]
    reward.close()
    with pytest.raises(RewardError, match=r"takes no options.*write \{reward: .*, normalise: running, clip: 5\}"):
        parse_reward({str(tmp_path): {"normalise": "running"}}, model_loader=lambda name: FakeReward())


def test_files_for_hashes(tmp_path: Path) -> None:
    spec = [{"reward": f"{POISON}:fine", "weight": 1}, {f"{POISON}:raises": {}}, "exact", str(tmp_path), len]
    assert reward_files(spec) == [Path(POISON), Path(POISON), tmp_path]
    assert reward_files({"reward": str(tmp_path), "normalise": "running"}) == [tmp_path]
    assert reward_files("nowhere.py:score") == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("klimb.rewards.spec", {"torch", "transformers", "numpy", "pickle"}),
        ("klimb.rewards.worker", {"klimb.config", "klimb.rewards.spec", "pydantic", "numpy", "pickle"}),  # began often
    ],
)
def test_nothing_heavy_is_imported(module: str, heavy: set[str]) -> None:
    script = f"import sys; import {module}; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
