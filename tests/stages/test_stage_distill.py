"""Distillation: the student ends where its teacher is, from either side, and refuses what it could not compare."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import KILLED, at_call, differences, fork
from transformers import AutoModelForCausalLM
from world import CONTEXT, LETTERS, WORDS, World, play

from klimb.batch import Row, TokenBatch
from klimb.commands.check_recipe import sources_of
from klimb.errors import ConfigError
from klimb.lab.scratch import make_model, word_tokenizer
from klimb.models.faces import divergence, sequence_kl
from klimb.models.logprobs import Head, full_divergence
from klimb.objective.supervised import forward_kl, generalised_jsd, reverse_kl
from klimb.stages.registry import stage_config


@pytest.fixture(scope="module")
def teacher(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """It says "yes" to everything, with some variety behind it."""
    rows = tmp_path_factory.mktemp("taught") / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{a} ?", "completion": "yes {b}"}}\n' for a in LETTERS for b in ("so", "it")))
    out = tmp_path_factory.mktemp("teacher") / "sft"
    return play("sft", out, model=world.model, data=str(rows), steps=60, batch_size=12).model


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("on_policy", [1.0, 0.5, 0.0])
def test_the_student_comes_to_its_teacher(
    world: World, teacher: str, tmp_path: Path, beta: float, on_policy: float
) -> None:
    done = play(
        "distill", tmp_path, model=world.model, teacher=teacher, data=world.demonstrations, beta=beta,
        on_policy=on_policy, steps=60, prompts_per_step=8, max_tokens=6,
    )  # fmt: skip
    first, last = done.rows[0]["loss"], done.rows[-1]["loss"]
    assert first > 0.3
    assert 0 <= last < first / 4


def test_with_its_own_teacher_there_is_nothing_to_learn(world: World, tmp_path: Path) -> None:
    done = play(
        "distill", tmp_path, model=world.model, teacher=world.model, data=world.prompts, steps=1, prompts_per_step=6,
        max_tokens=4,
    )  # fmt: skip
    assert done.rows[0]["loss"] == pytest.approx(0, abs=1e-6)  # rounding of float32


@pytest.mark.parametrize(("target", "nth"), [("klimb.runtime.checkpoint.save", 2), ("klimb.runtime.run.Run.log", 6)])
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_one(
    world: World, teacher: str, tmp_path: Path, target: str, nth: int
) -> None:
    run = partial(
        play, "distill", model=world.model, teacher=teacher, data=world.demonstrations, on_policy=0.5, beta=0.5,
        steps=6, prompts_per_step=4, max_tokens=4, checkpoint_every=2,
    )  # fmt: skip
    run(out=tmp_path / "whole")
    with at_call(target, nth):
        assert fork(lambda: run(out=tmp_path / "killed")) == KILLED
    run(out=tmp_path / "killed")
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


@pytest.mark.parametrize("measure", [forward_kl, reverse_kl, partial(generalised_jsd, beta=0.3)])
@pytest.mark.parametrize("padding", [0, 3, -2])
def test_chunks_of_the_head_give_the_loss_and_gradient_of_the_whole(measure: Any, padding: int) -> None:
    random = torch.Generator().manual_seed(0)
    states, other = torch.randn(2, 300, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(9_000, 5, generator=random, dtype=torch.float64).requires_grad_()
    theirs = torch.randn(9_000 + padding, 5, generator=random, dtype=torch.float64)
    ours = states.clone().requires_grad_()
    found = full_divergence(Head(weight), ours, Head(theirs), other, measure, 0.7)
    assert found.shape == (300,)
    gradients = torch.autograd.grad(found.square().sum(), [ours, weight])
    known = min(9_000, 9_000 + padding)
    logps = [((h @ w.T)[:, :known] / 0.7).log_softmax(-1) for h, w in ((other, theirs), (ours, weight))]
    expected = measure(*logps)
    assert torch.allclose(found, expected, rtol=1e-10)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected.square().sum(), [ours, weight]), strict=True):
        assert torch.allclose(gradient, exact, atol=1e-9)


def test_on_its_own_states_the_reverse_divergence_is_the_sequence_kl(world: World, teacher: str) -> None:
    from klimb.models.backbone import Backbone
    from klimb.models.faces import Policy

    student, taught = (Policy(Backbone(AutoModelForCausalLM.from_pretrained(m)), None) for m in (world.model, teacher))
    rows = [[Row([1, 5, 4], [11, 12, 2], [True, True, True])], [Row([1, 6, 4], [11, 2], [True, True])]]
    batch = TokenBatch.from_rows(rows, [0, 1], ["a", "b"])
    per_token = divergence(student, taught, batch, reverse_kl)
    kl = sequence_kl(student, taught, batch, budget=64)
    assert torch.allclose(per_token.sum(dim=1).double(), kl, rtol=1e-5)
    assert per_token[1, 2] == 0


def test_a_teacher_of_another_vocabulary(world: World, tmp_path: Path) -> None:
    other = make_model(
        tmp_path / "other", tokenizer=word_tokenizer((*WORDS[1:], WORDS[0])), architecture="gpt2", hidden=16, layers=1,
        heads=2, mlp=32, context=CONTEXT, seed=0,
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"teacher=.*other: its vocabulary is another than the trained model's.*klimb sample"
    ):
        play("distill", tmp_path / "run", model=world.model, teacher=str(other), data=world.prompts, max_tokens=4)


def test_what_it_reads_is_checked_before_it_runs(world: World) -> None:
    values = {"model": world.model, "teacher": world.model, "data": world.demonstrations, "max_tokens": 4}
    half = stage_config("distill", {**values, "on_policy": 0.5, "prompts_per_step": 4})
    assert [source.key for source in sources_of("distill", half)] == ["data", "demonstrations"]
    assert [source.key for source in sources_of("distill", stage_config("distill", values))] == ["data"]
