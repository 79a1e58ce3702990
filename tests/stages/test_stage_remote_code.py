"""Python code that comes with a model: refused, run where that was typed, pinned, and looked at again on resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from world import Played, World, klimb, play

from klimb.errors import ConfigError, KlimbError, RunError
from klimb.lab.scratch import make_model
from klimb.models.code import fingerprint, loading
from klimb.stages.registry import stage_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from .extra import NOTE

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

if NOTE:
    Path(NOTE).touch()
"""


@pytest.fixture
def own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code of its own, which leaves a note when it runs."""
    folder = make_model(tmp_path / "own", tokenizer=AutoTokenizer.from_pretrained(world.model), architecture="llama",
                        hidden=16, layers=1, heads=2, mlp=32, context=24, seed=0)  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "own.py").write_text(CODE)
    (folder / "extra.py").write_text(f"NOTE = {str(tmp_path / 'ran')!r}\n")
    return folder


def sft(world: World, out: Path, model: Path | str, **values: Any) -> Played:
    return play("sft", out, model=str(model), data=world.demonstrations, steps=2, batch_size=4, **values)


def test_it_is_refused_and_the_line_says_how(world: World, own: Path, tmp_path: Path) -> None:
    with pytest.raises(KlimbError, match=r"own: .*only where that is typed: read it, then set trust_remote_code=true"):
        sft(world, tmp_path / "run", own)
    said = klimb("sft", f"model={own}", f"data={world.demonstrations}", "steps=1", "--dry-run")
    assert "trust_remote_code=true" in said.err or said.code == 0
    assert not (tmp_path / "ran").exists()


def test_it_runs_where_that_is_typed_and_the_manifest_says_what_ran(world: World, own: Path, tmp_path: Path) -> None:
    done = sft(world, tmp_path / "run", own, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert done.rows[-1]["loss"] < done.rows[0]["loss"]
    decided = json.loads((done.path / "manifest.json").read_text())["decisions"]["remote_code"]
    assert decided == {str(own): fingerprint(str(own), None)}
    assert any(line.startswith(f"{own}: its own Python code runs here, sha256 ") for line in done.said)
    assert any(line.startswith("memory: about") for line in done.said)  # it was planned with its own code, too
    assert loading(str(own)) == {"trust_remote_code": False}  # the permission ended with the run

    # What it made has the code beside it, and the next stage is asked again.
    with pytest.raises(KlimbError, match="trust_remote_code=true"):
        sft(world, tmp_path / "again", done.model)
    rl = {"data": world.prompts, "reward": world.reward("count"), "prompts_per_step": 2, "samples_per_prompt": 4}
    further = play("rl", tmp_path / "rl", model=done.model, steps=1, max_tokens=4, trust_remote_code=True,
                   measure_kl=True, **rl)  # fmt: skip
    assert (Path(further.model) / "own.py").is_file()


def test_an_adapter_is_merged_with_the_code_that_it_was_trained_with(world: World, own: Path, tmp_path: Path) -> None:
    done = sft(world, tmp_path / "run", own, trust_remote_code=True, lora={"rank": 2})
    assert klimb("export", str(done.path), f"out={tmp_path / 'merged'}").code == 0
    (own / "extra.py").write_text("NOTE = ''\n")
    said = klimb("export", str(done.path), f"out={tmp_path / 'other'}")
    assert said.code == 1
    assert "its Python code is not that with which the run began" in said.err
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_with_no_other_code(world: World, own: Path, tmp_path: Path) -> None:
    """The adapter is what the run hashes; the code lies with its base."""
    tuned = sft(world, tmp_path / "tuned", own, trust_remote_code=True, lora={"rank": 2})
    lora = {"trust_remote_code": True, "lora": {"rank": 2}, "checkpoint_every": 1}
    done = sft(world, tmp_path / "run", tuned.model, **lora)
    (done.path / "result.json").unlink()
    shutil.rmtree(done.path / "model")
    sft(world, done.path, tuned.model, **lora)
    (done.path / "result.json").unlink()
    (own / "extra.py").write_text("NOTE = ''\n")
    with pytest.raises(RunError, match=r"model: its Python code is not that with which the run began: then .* now "):
        sft(world, done.path, tuned.model, **lora)


def test_what_it_is_known_by_is_every_file_of_it(own: Path) -> None:
    before = fingerprint(str(own), None)
    (own / "README.md").write_text("no code")
    assert fingerprint(str(own), None) == before
    (own / "extra.py").rename(own / "other.py")
    assert fingerprint(str(own), None) != before


def test_code_in_another_repository_is_not_pinned(world: World, own: Path, tmp_path: Path) -> None:
    settings = json.loads((own / "config.json").read_text())
    settings["auto_map"]["AutoModelForCausalLM"] = "somebody/else--own.OwnModel"
    (own / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"own: its Python code lies in another repository, somebody/else"):
        sft(world, tmp_path / "run", own, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_nothing_to_trust_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code: no model here has Python code of its own; leave it out"):
        sft(world, tmp_path / "run", world.model, trust_remote_code=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"model": "some/model", "trust_remote_code": True},
            "some/model is no folder here; of a hub model, pin the code with revision=COMMIT",
        ),
        ({"model": "some/model", "revision": "main"}, "revision=main: a branch or tag can move"),
        ({"model": ".", "revision": COMMIT}, "revision: . is a folder"),
    ],
)
def test_the_keys_contradict_themselves(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        stage_config("sft", {"data": "rows.jsonl", **values})
    stage_config("sft", {"data": "rows.jsonl", "model": "some/model", "revision": COMMIT})


HUB = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from world import play
common = dict(model="some/model", data=sys.argv[2], steps=1, batch_size=4, trust_remote_code=True)
done = play("sft", Path(sys.argv[3]), revision=sys.argv[4], **common)
print([line for line in done.said if "its own Python code" in line])
common |= dict(model="plain/model", trust_remote_code=False)
done = play("sft", Path(sys.argv[3] + "-plain"), revision=sys.argv[4], **common)
print(any(line.startswith("memory: about") for line in done.said))
common |= dict(model="some/model", trust_remote_code=True)
try:
    play("sft", Path(sys.argv[3] + "-other"), revision="f" * 40, **common)
except Exception as error:
    print(type(error).__name__)
"""


def test_of_a_hub_model_the_pinned_commit_runs_and_no_other(world: World, own: Path, tmp_path: Path) -> None:
    """A cache as the hub's client keeps it, and no network: what `main` means today is another commit."""
    snapshots = tmp_path / "hub" / "models--some--model" / "snapshots"
    shutil.copytree(own, snapshots / COMMIT)
    shutil.copytree(own, snapshots / ("a" * 40))
    (snapshots / ("a" * 40) / "own.py").write_text("raise RuntimeError('this is not what was pinned')\n")
    shutil.copytree(world.model, tmp_path / "hub" / "models--plain--model" / "snapshots" / COMMIT)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("a" * 40)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
                   "HF_MODULES_CACHE": str(tmp_path / "modules")}  # fmt: skip
    script = [
        sys.executable,
        "-c",
        HUB,
        str(Path(__file__).parent),
        world.demonstrations,
        str(tmp_path / "run"),
        COMMIT,
    ]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"some/model: its own Python code runs here, commit {COMMIT}" in done.stdout
    assert done.stdout.splitlines()[-2] == "True"
    assert done.stdout.splitlines()[-1] == "ConfigError"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["decisions"]["remote_code"] == {"some/model": {"commit": COMMIT}}
