"""An export is what the run had in memory, for transformers and peft alone, and its card says no more than the run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from world import SMALL_RL, Played, World, klimb, lines, play

from klimb import __version__
from klimb.runtime.durable import file_hash

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """One run of each kind that leaves a model."""
    folder = tmp_path_factory.mktemp("runs")
    small: dict[str, Any] = {"steps": 4, "batch_size": 8}
    measure = {"data": world.prompts, "reward": world.reward("count"), "max_tokens": 4, "samples_per_prompt": 4}
    sft = play("sft", folder / "sft", model=world.model, data=world.demonstrations, **small)
    tuned = play("sft", folder / "tuned", model=world.model, data=world.demonstrations, lora=LORA, **small)
    return {
        "sft": sft,
        "tuned": tuned,
        "dpo": play("preference", folder / "dpo", model=tuned.model, data=world.preferences, lora=LORA, **small),
        "rl": play("rl", folder / "rl", model=sft.model, data=world.prompts, reward=world.reward("count"), steps=2,
                   measure=measure, **SMALL_RL),
        "rm": play("reward", folder / "rm", model=world.model, data=world.preferences, eval_fraction=0.3, **small),
    }  # fmt: skip


def export(run: Path | str, *arguments: str) -> dict[str, Any]:
    said = klimb("export", str(run), *arguments, "--json")
    assert said.code == 0, said.err
    return dict(json.loads(said.out))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.tensor([[14, 1, 0, 9, 10, 1, 11, 15]])).logits


@pytest.mark.parametrize("name", ["sft", "rl", "rm"])
def test_whole_weights_are_copied_to_the_bit(name: str, runs: dict[str, Played], here: Path) -> None:
    run = runs[name]
    found = export(run.path, "out=mine")
    assert found["weights"] == "whole"
    for file in (run.path / "model").iterdir():
        assert file_hash(here / "mine" / file.name) == file_hash(file)
    kind = AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM
    assert torch.equal(logits(kind.from_pretrained("mine")), logits(kind.from_pretrained(run.model)))
    assert AutoTokenizer.from_pretrained("mine").get_vocab() == AutoTokenizer.from_pretrained(run.model).get_vocab()


@pytest.mark.parametrize("name", ["tuned", "dpo"])
def test_an_adapter_is_merged_or_kept(name: str, runs: dict[str, Played], here: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trained = logits(AutoPeftModelForCausalLM.from_pretrained(runs[name].model))
    assert export(runs[name].path, "out=merged")["weights"] == "merged"
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert torch.allclose(logits(merged), trained, atol=1e-5)  # fp32: W + BA once, instead of Wx + BAx
    assert not list(Path("merged").glob("adapter*"))
    assert export(runs[name].path, "out=kept", "lora=kept")["weights"] == "adapter"
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("kept")), trained)
    for folder in ("merged", "kept"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id]


def test_the_card_tells_where_the_model_comes_from(runs: dict[str, Played], world: World, here: Path) -> None:
    export(runs["dpo"].path, "out=mine")
    card = Path("mine/README.md").read_text()
    facts = yaml.safe_load(card.split("---")[1])
    assert facts == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["klimb", "preference"]}
    training = card.split("## Training")[1].split("## Figures")[0]
    assert training.index("supervised fine-tuning") < training.index("direct preference optimisation")
    for file in (world.demonstrations, world.preferences):
        assert f"`{file}` (SHA-256 `{file_hash(Path(file))[:16]}…`)" in training
    assert f"trained from `{world.model}`" in card
    assert "Nothing was measured on held-out data." in card
    assert f"seed 0, klimb {__version__}" in training
    assert "LoRA of rank 4" in training


def test_every_figure_of_a_card_is_the_runs(runs: dict[str, Played], here: Path) -> None:
    run = runs["rl"]
    export(run.path, "out=mine")
    figures = Path("mine/README.md").read_text().split("## Figures")[1].split("## What")[0]
    evaluation = run.result["evaluation"]
    held = [evaluation[key] for key in ("proxy", "proxy_low", "proxy_high", "kl", "length", "finished")]
    last = lines(run.path / "metrics.jsonl")[-1]
    seen = [last[key] for key in ("step", "loss", "reward/mean", "kl", "length/mean")]
    bare = re.sub(r"`[^`]*`", "", figures)
    numbers = [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", bare)]
    known = [*held, *seen, evaluation["n"], evaluation["prompts"], 95]
    assert [n for n in numbers if not any(n == pytest.approx(value, rel=1e-3, abs=1e-12) for value in known)] == []
    assert all(any(n == pytest.approx(value, rel=1e-3, abs=1e-12) for n in numbers) for value in held)


def test_the_accuracy_of_a_reward_model_is_on_its_card(runs: dict[str, Played], here: Path) -> None:
    export(runs["rm"].path, "out=mine")
    card = Path("mine/README.md").read_text()
    result = runs["rm"].result
    interval = f"(95 % interval {result['accuracy_low']:.4g} to {result['accuracy_high']:.4g})"
    assert f"| accuracy | {result['accuracy']:.4g} {interval} | {result['held_out_pairs']} held-out" in card
    assert f"its mean was {result['mean']:.4g}" in card


def test_a_start_that_changed_since_is_not_told_of(world: World, here: Path) -> None:
    small: dict[str, Any] = {"steps": 1, "batch_size": 4, "data": world.demonstrations}
    first = play("sft", here / "first", model=world.model, **small)
    second = play("sft", here / "second", model=first.model, **small)
    (here / "first" / "model" / "config.json").write_text("{}")
    export(second.path, "out=mine")
    card = Path("mine/README.md").read_text()
    assert card.count("**supervised fine-tuning**") == 1
    assert f"trained from `{first.model}`" in card


def test_the_folder_of_a_model_stands_for_its_run(runs: dict[str, Played], here: Path) -> None:
    run = runs["sft"]
    found = export(run.path / "model")
    assert found["model"] == f"exports/{run.path.parent.name}-sft"
    assert Path(found["model"], "model.safetensors").is_file()


def test_nothing_is_written_over_and_nothing_half(runs: dict[str, Played], here: Path) -> None:
    (here / "mine").mkdir()
    export(runs["sft"].path, "out=mine")  # an empty folder is no loss
    card = Path("mine/README.md")
    card.write_text("my own words")
    said = klimb("export", str(runs["rl"].path), "out=mine")
    assert said.code == 1
    assert "mine: is there already" in said.err
    assert card.read_text() == "my own words"
    (here / "file").write_text("")
    assert klimb("export", str(runs["rl"].path), "out=file/deep").code == 1
    assert sorted(path.name for path in here.iterdir()) == ["file", "mine"]
