"""The mean of weights: to the last bit that float64 and one rounding leave, and what cannot be averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from world import WORDS, World, play

from klimb.errors import ConfigError, KlimbError
from klimb.lab.scratch import make_model, word_tokenizer


def weights(model: str) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in load_file(Path(model) / "model.safetensors").items()}


def reward_model(world: World, out: Path, seed: int) -> str:
    return play("reward", out, model=world.model, data=world.preferences, steps=3, batch_size=4, seed=seed).model


def test_reward_models(world: World, tmp_path: Path) -> None:
    models = [reward_model(world, tmp_path / f"rm-{seed}", seed) for seed in range(3)]
    done = play("average", tmp_path / "mean", models=models, data=world.preferences)
    each, mean = [weights(model) for model in models], weights(done.model)
    assert mean.keys() == each[0].keys()
    assert "score.weight" in mean
    for name, value in mean.items():
        expected = sum(member[name] for member in each) / 3
        assert torch.equal(value, expected.float().double())
    assert any(not torch.equal(value, each[0][name]) for name, value in mean.items())
    saved = json.loads((Path(done.model) / "reward.json").read_text())
    assert saved == {key: done.result[key] for key in ("mean", "std")}
    assert saved["std"] > 0
    assert saved != json.loads((Path(models[0]) / "reward.json").read_text())
    assert len(done.result["members"]) == 3
    # Scaled anew: on the replies of `data` its scores have mean 0 and std 1, as `evaluate` finds them.
    found = play("evaluate_reward", tmp_path / "check", reward=done.model, data=world.preferences,
                 reference=world.preferences, probes=0).result  # fmt: skip
    assert found["accuracy"] == done.result["accuracy"]
    assert found["trust"]["drift"]["score"]["now"] == pytest.approx(0.0, abs=1e-6)


def test_policies(world: World, tmp_path: Path) -> None:
    tuned = [
        play(
            "sft", tmp_path / str(seed), model=world.model, data=world.demonstrations, steps=2, batch_size=4, seed=seed
        )
        for seed in (0, 1)
    ]
    done = play("average", tmp_path / "mean", models=[each.model for each in tuned])
    a, b, mean = weights(tuned[0].model), weights(tuned[1].model), weights(done.model)
    assert all(torch.equal(value, ((a[name] + b[name]) / 2).float().double()) for name, value in mean.items())
    assert any(not torch.equal(a[name], b[name]) for name in a)
    play("sample", tmp_path / "samples", model=done.model, data=world.prompts, max_tokens=2)  # it is a policy


def test_what_cannot_be_averaged(world: World, tmp_path: Path) -> None:
    rm = reward_model(world, tmp_path / "rm", 0)

    def refused(message: str, *models: str, **more: str) -> None:
        with pytest.raises(KlimbError, match=message):
            play("average", tmp_path / "out", models=list(models), **more)

    wide = make_model(tmp_path / "wide", tokenizer=word_tokenizer(WORDS), architecture="gpt2", hidden=32, layers=1,
                      heads=2, mlp=32, context=24, seed=0)  # fmt: skip
    words = make_model(tmp_path / "words", tokenizer=word_tokenizer((*WORDS[1:], "?")), architecture="gpt2", hidden=16,
                       layers=1, heads=2, mlp=32, context=24, seed=0)  # fmt: skip
    refused("reward models and others cannot be averaged", rm, world.model)
    refused(r"weights differ in name or shape.*transformer", world.model, str(wide))
    refused(r"its tokenizer or chat template is not that of", world.model, str(words))
    refused(r"models: one is named twice", rm, rm)
    refused(r"give two or more", rm)
    refused(r"data would not be looked at.*leave it out", world.model, str(wide), data=world.preferences)


@pytest.mark.parametrize("kind", ["attributes", "ordinal"])
def test_ratings_are_neither_log_odds_nor_averaged(world: World, tmp_path: Path, kind: str) -> None:
    """Their scores order replies; how much more probable the better one is they do not say."""
    rows = [{"prompt": "a ?", "completion": word, "worth": worth} for worth, word in enumerate(("no", "so", "yes"))]
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"attributes": {"attributes": {"worth": 1.0}}, "ordinal": {"rating": "worth"}}[kind]
    done = play("reward", tmp_path / "rm", model=world.model, data=str(data), kind=kind, steps=2, batch_size=3, **given)
    found = play("evaluate_reward", tmp_path / "check", reward=done.model, data=world.preferences, probes=0).result
    assert 0 <= found["accuracy"] <= 1
    assert found["trust"]["calibration"] is None
    with pytest.raises(ConfigError, match=f"kind={kind}"):
        play("average", tmp_path / "mean", models=[done.model, reward_model(world, tmp_path / "one", 0)],
             data=world.preferences)  # fmt: skip
