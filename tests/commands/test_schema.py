"""The schema and the completions say what the configs and the parser say."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from world import klimb

from klimb.cli import app
from klimb.commands.schema import config_class, keys, schema
from klimb.commands.schema import stage_of as stage_of_command
from klimb.config import load_yaml, shipped_recipes
from klimb.objective.algorithms import ALGORITHMS
from klimb.stages.registry import STAGES

STARTER = Path(__file__).parents[2] / "src" / "klimb" / "commands" / "starter" / "recipe.yaml"


# Schema -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_schema_knows_the_keys_of_a_config_and_no_others(stage: str) -> None:
    found = schema(stage)
    assert found["additionalProperties"] is False
    assert found["properties"].keys() == config_class(stage).model_fields.keys()
    required = [name for name, field in config_class(stage).model_fields.items() if field.is_required()]
    brought = getattr(config_class(stage), "from_task", ())
    assert found["required"] == [name for name in required if name not in brought]
    if needed := sorted({*brought} & {*required}):  # a task brings them, or they are written
        assert found["anyOf"] == [{"required": ["task"]}, {"required": needed}]


@pytest.mark.parametrize("command", ["grpo", "ppo", "dpo", "ipo", "sft"])
def test_an_algorithm_has_the_schema_of_its_stage(command: str) -> None:
    found = json.loads(klimb("schema", command).out)
    assert found == {**schema(stage_of_command(command)), "title": f"klimb {command}"}


def test_a_key_shows_its_choices_and_its_meaning() -> None:
    found = schema("rl")
    assert "dapo" in found["properties"]["algorithm"]["anyOf"][0]["enum"]
    assert found["$defs"]["Optimizer"]["properties"]["decay"]["enum"] == ["constant", "linear", "cosine"]
    assert found["properties"]["max_tokens"]["description"] == "longest completion"


@pytest.mark.parametrize("name", [*shipped_recipes(), "starter"])
def test_our_recipes_are_valid_and_their_slips_are_not(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    shipped = name in shipped_recipes()
    values = load_yaml(shipped_recipes()[name] if shipped else STARTER)
    check = jsonschema.Draft202012Validator(schema() if shipped else schema("grpo"))
    check.check_schema(check.schema)
    assert [error.message for error in check.iter_errors(values)] == []
    trained = ("sft", "reward", "rl", "preference")  # stages with steps
    settings = next(s for s in values["stages"].values() if s.get("stage") in trained) if shipped else values
    settings["stpes"] = 3
    assert not check.is_valid(values)
    del settings["stpes"]
    settings["steps"] = "many"
    assert not check.is_valid(values)
    settings["steps"] = "${sft.steps}"
    assert check.is_valid(values) == shipped


# Completion ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripts")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(klimb("completion", shell).out)
    return {shell: folder / shell for shell in ("bash", "zsh", "fish")}


def completed(script: Path, line: str, folder: Path) -> list[str]:
    """What bash offers at the end of `line`."""
    words = line.split(" ")
    program = (
        f'source {script}; COMP_LINE="{line}"; COMP_POINT={len(line)}; COMP_CWORD={len(words) - 1}; '
        f'COMP_WORDS=({" ".join(words)}); _klimb; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split()


CASES = {
    "klimb expo": ["export"],
    "klimb grp": ["grpo"],
    "klimb grpo optimizer.dec": ["optimizer.decay="],
    "klimb grpo optimizer.decay=co": ["constant", "cosine"],
    "klimb rl algorithm=dr_": ["dr_grpo"],
    "klimb export lora=": ["merged", "kept"],
    "klimb check data.jsonl transcripts=": ["text", "chat"],
    "klimb chat runs temp": ["temperature="],
    "klimb sft model=mod": ["models"],
    "klimb run rec": ["recipe.yaml"],
    "klimb sft --dr": ["--dry-run"],
    "klimb export --dr": [],
}


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(line: str, scripts: dict[str, Path], here: Path) -> None:
    (here / "models").mkdir()
    (here / "recipe.yaml").touch()
    assert completed(scripts["bash"], line, here) == CASES[line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_reads_its_script(shell: str, scripts: dict[str, Path]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", str(scripts[shell])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_every_key_of_a_stage_is_there(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    commands = [stage for stage in STAGES if stage != "evaluate_reward"]  # `klimb evaluate reward=DIR` runs it
    for name in [*ALGORITHMS, *commands, "quickstart", "new", "chat", "schema", "completion"]:
        assert name in text
    for stage in STAGES:
        for key in leaves(schema(stage), schema(stage).get("$defs", {})):
            assert f"{key}=" in text, key


def leaves(section: dict[str, Any], sections: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in section["properties"].items():
        inner = [part["$ref"].rpartition("/")[2] for part in [value, *value.get("anyOf", [])] if "$ref" in part]
        if inner:
            yield from leaves(sections[inner[0]], sections, f"{above}{key}.")
        else:
            yield f"{above}{key}"


@pytest.mark.parametrize("command", ["sft", "grpo", "dpo", "evaluate"])
def test_help_lists_every_key_with_its_default(command: str) -> None:
    """As deep as they can be set on the command line."""
    said = CliRunner().invoke(app, [command, "--help"], terminal_width=200)
    assert said.exit_code == 0
    listed = {line.split("=")[0].strip() for line in said.output.split("Keys, with their defaults:")[1].splitlines()}
    assert set(schema(command)["properties"]) <= {key.partition(".")[0] for key in listed}
    assert {"sft": "optimizer.lr", "grpo": "critic.optimizer.lr", "dpo": "lora.rank", "evaluate": "measure.max_tokens"}[
        command
    ] in listed


def test_defaults_are_written_as_on_the_command_line() -> None:
    told = {line.split("=")[0]: line.split("=", 1)[1] for line, _ in keys("grpo")}
    assert told["optimizer.betas"] == "[0.9, 0.999]"
    assert (told["lora"], told["measure_kl"], told["failure_limit"], told["model"]) == ("none", "false", "0.05", "")
