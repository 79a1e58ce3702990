"""`klimb doctor`: what is here, and whether a job fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from world import World, klimb

from klimb.commands.doctor import packages


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shape of Qwen3-1.7B, without weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    transformers.Qwen3Config(
        hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=6144, vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=40960,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_it_says_what_is_here_and_that_klimb_can_train() -> None:
    said = klimb("doctor")
    assert said.code == 0
    assert said.out.splitlines()[-1] == "klimb can train here"
    for part in ("klimb", "torch", "transformers", "cpu", "free", "kernels"):
        assert part in said.out
    found = {row["part"]: row for row in json.loads(klimb("doctor", "--json").out)}
    assert found["torch"]["ok"] is True


def test_what_is_missing_comes_with_the_line_that_brings_it() -> None:
    rows = {row.part: row for row in packages(["torch<1", "no-such-package>=2", "other; extra == 'more'"])}
    assert (rows["torch"].ok, rows["torch"].fix) == (False, "pip install 'torch<1'")
    assert rows["no-such-package"].found == "missing, >=2 is needed"
    assert (rows["[more]"].ok, rows["[more]"].fix) == (None, "pip install 'klimb[more]'")


def test_full_weights_of_a_large_model_do_not_fit_and_lora_does(large: str) -> None:
    """1.72 billion parameters: 2 bytes of weights, 4 of masters, 8 of moments, 4 of gradients, a reference."""
    said = klimb("doctor", "dpo", f"model={large}", "--memory", "24", "--json")
    answer = json.loads(said.out)
    assert said.code == 1
    assert answer["lines"]["weights"] == answer["lines"]["reference"] == 2 * 1_720_574_976
    assert answer["lines"]["masters"] == answer["lines"]["gradients"] == 4 * 1_720_574_976
    assert answer["peak"] > 20 * 1_720_574_976 > 24 * 2**30
    assert answer["proposals"][0].startswith("lora.rank=16 (")
    for method in ("dpo", "grpo"):
        said = klimb("doctor", method, f"model={large}", "lora.rank=16", "--memory", "24")
        assert said.code == 0
        assert "it fits" in said.out


def test_a_run_tells_its_plan_before_it_starts(world: World) -> None:
    shown = klimb("dpo", f"model={world.model}", f"data={world.preferences}", "device=cpu", "--dry-run")
    assert [line for line in shown.out.splitlines() if line.startswith("# memory: about ")] != []


def test_jobs_that_do_not_exist(tmp_path: Path) -> None:
    said = klimb("doctor", "dpoo", f"model={tmp_path}")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "did you mean 'dpo'?" in said.err
    said = klimb("doctor", "dpo", f"model={tmp_path}")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "config.json" in said.err


def test_it_says_what_model_written_code_would_run_in() -> None:
    found = {row["part"]: row for row in json.loads(klimb("doctor", "--json").out)}["sandbox"]
    assert "withstood the escape test" in found["found"] or found["fix"] == "apt install bubblewrap"
