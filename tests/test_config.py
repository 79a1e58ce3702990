from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from klimb.config import (
    StageConfig,
    config_changes,
    config_hash,
    dump_config,
    find_references,
    load_config,
    load_recipe,
    load_yaml,
    parse_seeds,
    parse_value,
    parse_yaml,
    resolve_references,
)
from klimb.errors import ConfigError, KlimbError, did_you_mean, nearest


class Leash(StageConfig):
    beta: float = 0.1
    where: Literal["reward", "loss"] = "loss"


class Algorithm(StageConfig):
    name: str = "grpo"
    kl: Leash = Leash()


class Config(StageConfig):
    model: str
    algorithm: str | Algorithm = "grpo"
    lr: float = 1e-6
    steps: int = 3
    gold: str | None = None
    center: bool = False
    stages: list[Leash] = Field(default=[])
    parts: dict[str, Leash] = Field(default={})
    columns: dict[str, Any] = Field(default={})
    out: str | None = None
    device: Literal["auto", "cpu"] = "auto"


def load(*overrides: str, **values: Any) -> Config:
    return load_config(Config, {"model": "base", **values}, overrides, where="my.yaml")


def complaints(*overrides: str, **values: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(*overrides, **values)
    return str(error.value).split("\n")


# ---------------------------------------------------------------- round trip

texts = st.text(max_size=12) | st.sampled_from(
    [
        "no",
        "1e-6",
        "010",
        "2024-01-01",
        "1:30",
        "null",
        "~",
        "",
        " x ",
        "0x1f",
        "1_0",
        "a: b",
        "#",
        "<<",
        "=",
        "\x85",
    ]
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
leashes = st.builds(Leash, beta=numbers, where=st.sampled_from(["reward", "loss"]))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
configs = st.builds(
    Config,
    model=texts,
    algorithm=texts | st.builds(Algorithm, name=texts, kl=leashes),
    lr=numbers,
    steps=st.integers(),
    gold=st.none() | texts,
    center=st.booleans(),
    stages=st.lists(leashes, max_size=2),
    parts=st.dictionaries(texts, leashes, max_size=2),
    columns=st.dictionaries(texts, anything, max_size=2),
)


@given(configs)
@settings(max_examples=150, deadline=None)
def test_a_dumped_config_loads_back_byte_for_byte(config: Config) -> None:
    text = dump_config(config)
    loaded = load_config(Config, parse_yaml(text))
    assert loaded == config
    assert dump_config(loaded) == text
    assert yaml.safe_load(text) == config.model_dump(mode="json")  # a reader of YAML 1.1 sees the same values


@given(texts)
@settings(max_examples=60, deadline=None)
def test_text_survives_a_quoted_override(text: str) -> None:
    assert load(f"gold={yaml.safe_dump(text, width=10**6, default_style=chr(34))}").gold == text


# ---------------------------------------------------------------- what is read


def test_overrides_change_values_at_any_depth() -> None:
    config = load("lr=1e-4", "algorithm.kl.beta=0.3", "stages=[{beta: 1}]", algorithm={"name": "ppo"})
    assert (config.lr, config.stages) == (1e-4, [Leash(beta=1.0)])
    assert config.algorithm == Algorithm(name="ppo", kl=Leash(beta=0.3))


def test_an_override_below_a_name_keeps_the_name() -> None:
    assert load("algorithm.kl.beta=0", algorithm="dapo").algorithm == Algorithm(name="dapo", kl=Leash(beta=0))


def test_overrides_leave_the_values_of_the_file_alone() -> None:
    values = {"model": "base", "parts": {"a": {"beta": 1.0}}}
    load_config(Config, values, ["parts.a.beta=2"])
    assert values["parts"] == {"a": {"beta": 1.0}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-.5", -0.5),
        ("12", 12),
        ("0x10", 16),
        (".inf", float("inf")),
        ("true", True),
        ("null", None),
        ("", None),
        # YAML 1.1 makes these False, True, 8, a date, 90 and 10
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1_0", "1_0"),
        ("0..4", "0..4"),
        ("my_reward.py:score", "my_reward.py:score"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_values_of_the_command_line(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_numbers_may_be_text_but_text_may_not_be_a_number() -> None:
    assert load(lr="1e-6").lr == 1e-6
    fix = """if it is text, quote it: "12" in a file, '"12"' on the command line"""
    assert complaints("gold=12") == [f"command line: gold: expected a string, got 12; {fix}"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("modle=x", "unknown key 'modle'; did you mean 'model'?"),
        ("algorithm.kl.bta=1", "unknown key 'algorithm.kl.bta'; did you mean 'algorithm.kl.beta'?"),
        ("beta=1", "unknown key 'beta'; did you mean 'algorithm.kl.beta'?"),
        ("stages=[{beta: 1}, {bet: 1}]", "unknown key 'stages.1.bet'; did you mean 'stages.1.beta'?"),
        ("parts={a: {xyz: 1}}", "unknown key 'parts.a.xyz'; known: beta, where"),
        ("lr=fast", "lr: expected a number, got 'fast'"),
        ("lr=.nan", "lr: expected a finite number, got nan"),
        ("steps=1.5", "steps: expected an integer, got 1.5"),
        ("device=cpuu", "device: expected 'auto' or 'cpu', got 'cpuu'; did you mean 'cpu'?"),
        ("algorithm=[1]", "algorithm: expected a string or keys with values, got [1]"),
    ],
)
def test_a_wrong_key_or_value_is_one_line(override: str, complaint: str) -> None:
    assert complaints(override) == [f"command line: {complaint}"]


def test_all_problems_are_listed_each_with_its_origin() -> None:
    assert complaints("steps=many", lrr=1, center="perhaps") == [
        "command line: steps: expected an integer, got 'many'",
        "my.yaml: center: expected a boolean, got 'perhaps'",
        "my.yaml: unknown key 'lrr'; did you mean 'lr'?",
    ]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^my\.yaml: model: is required$"):
        load_config(Config, {}, where="my.yaml")


def test_malformed_overrides() -> None:
    assert complaints("model") == ["command line: expected key=value, got 'model'"]
    assert complaints("a..b=1") == ["command line: expected key=value, got 'a..b=1'"]
    assert complaints("steps.x=1", steps=3) == ["command line: steps.x: 'steps' is 3, it has no keys of its own"]
    assert complaints("gold=*x")[0].endswith("""if it is text, quote it twice: '"*x"'""")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: not YAML: key 'a' is given twice"),
        ("a: 1\nb: [", "f.yaml:2: not YAML: expected the node content, but found '<stream end>'"),
        ("a: !!python/object:os.system x", "f.yaml:1: not YAML: could not determine a constructor"),
        ("[" * 500, "f.yaml: not YAML: maximum recursion depth exceeded"),
    ],
)
def test_yaml_errors_name_the_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f.yaml")
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: expected `key: value` lines, got \[1\]$"):
        load_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match=r"recpe\.yaml: no such file; did you mean 'recipe\.yaml'\?$"):
        load_recipe(str(tmp_path / "recpe.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    with pytest.raises(ConfigError, match="no recipe 'surely-not-shipped'"):
        load_recipe("surely-not-shipped")


def test_a_recipe_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("stages: {sft: {lr: 1e-3}}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"))[::2] == ("mine", {"stages": {"sft": {"lr": 1e-3}}})


# ---------------------------------------------------------------- identity


def test_the_hash_sees_values_and_inputs_but_not_out_nor_order() -> None:
    config = load()
    assert config_hash(config) == config_hash(load(out="elsewhere")) == config_hash(load("lr=0.000001"))
    assert config_hash({"a": 1, "b": 2}) == config_hash({"b": 2, "a": 1})
    different = [config_hash(config), config_hash(load("lr=2e-6")), config_hash(config, {"data": "1"})]
    different.append(config_hash(config, {"data": "2"}))
    assert len(set(different)) == 4


def test_changes_are_listed_by_key() -> None:
    old = {"lr": 1e-6, "kl": {"beta": 0.1, "where": "loss"}, "gone": 1, "out": "a"}
    new = {"lr": 2e-6, "kl": {"beta": 0.1, "where": "reward"}, "new": None, "out": "b"}
    assert config_changes(old, new) == [
        "lr: 1e-06 → 2e-06",
        "kl.where: 'loss' → 'reward'",
        "gone: 1 → (none)",
        "new: (none) → None",
    ]


# ---------------------------------------------------------------- references and seeds

RESULTS = {"sft": {"model": "runs/sft/model", "steps": 12, "evaluation": {"gold": None}}}


def test_references_are_resolved_anywhere_and_keep_their_type() -> None:
    value = {
        "a": "${sft.model}",
        "b": ["x/${sft.model}/${sft.steps}", 3, "${sft.steps}"],
        "c": "${sft.evaluation.gold}",
    }
    assert resolve_references(value, RESULTS) == {
        "a": "runs/sft/model",
        "b": ["x/runs/sft/model/12", 3, 12],
        "c": None,
    }
    assert find_references(value) == [
        "sft.model",
        "sft.model",
        "sft.steps",
        "sft.steps",
        "sft.evaluation.gold",
    ]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("${stf.model}", "r.yaml: no result of a stage 'stf' for ${stf.model}; did you mean 'sft'?"),
        ("${rl.model}", "r.yaml: no result of a stage 'rl' for ${rl.model}; known: sft"),
        ("${sft.modle}", "r.yaml: ${sft.modle}: the result has no 'modle'; did you mean 'model'?"),
        ("${sft}", "r.yaml: ${sft} names no key; write ${stage.key}"),
        ("x${sft.model", "r.yaml: '${' without its '}' in 'x${sft.model'"),
    ],
)
def test_references_that_point_nowhere(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_references([text], RESULTS, where="r.yaml")
    assert str(error.value).startswith(complaint)


def test_seeds() -> None:
    assert parse_seeds(3) == [3]
    assert parse_seeds("0..4") == [0, 1, 2, 3, 4]
    assert parse_seeds("0, 2..3,2") == [0, 2, 3]
    assert parse_seeds([1, 0]) == [1, 0]
    for wrong in ("4..0", "a", "", "-1", "0..", "1.5"):
        with pytest.raises(ConfigError, match="seed: expected 0"):
            parse_seeds(wrong)


# ---------------------------------------------------------------- errors


def test_an_error_is_what_where_why_and_fix_on_one_line() -> None:
    error = KlimbError("3 rows are empty", where=Path("a.jsonl"), why=ValueError("no\n text"), fix="remove them")
    assert str(error) == "a.jsonl: 3 rows are empty: no text; remove them"
    assert str(KlimbError("stop")) == "stop"


def test_nearest_name() -> None:
    assert nearest("GROP", ["ppo", "grpo", "dapo"]) == "grpo"
    assert nearest("zzz", ["ppo", "grpo"]) is None
    assert did_you_mean("zzz", ["ppo", "grpo"]) == "known: ppo, grpo"


def test_config_loads_without_torch() -> None:
    code = "import sys, klimb.config, klimb.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
