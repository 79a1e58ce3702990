"""The plan's arithmetic, on a model whose parameters are counted by hand; and what memory there is."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from klimb import native
from klimb.models import logprobs
from klimb.models.load import LoRA
from klimb.models.outline import Shape
from klimb.models.packing import flat_length, split_by_budget
from klimb.runtime import plan as runtime_plan
from klimb.runtime.memory import _of_control_groups, available
from klimb.runtime.plan import Learning, Plan, Sampled, Work, gigabytes, plan

V, D, LAYERS, FF = 50, 32, 2, 64
PARAMETERS = 2 * V * D + LAYERS * (4 * D * D + 3 * D * FF + 2 * D) + D


@pytest.fixture
def model(tmp_path: Path) -> str:
    transformers.LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


PARAMETERS -= LAYERS * D * D  # of four matrices of attention two have half the rows


def made(model: str, dtype: torch.dtype = torch.float32, **changes: object) -> Plan:
    work = Work(Learning(model), Shape(8, 8, 2))
    return plan(Work(**{**vars(work), **changes}), dtype, 64, checkpointing=False)  # type: ignore[arg-type]


def test_full_weights_in_both_precisions(model: str) -> None:
    single, half = made(model), made(model, torch.bfloat16)
    assert single.held["weights"] == 4 * PARAMETERS
    assert (single.held["masters"], single.held["moments"]) == (0, 8 * PARAMETERS)
    assert single.phases["training"]["gradients"] == 4 * PARAMETERS
    assert (half.held["weights"], half.held["masters"], half.held["moments"]) == tuple(
        n * PARAMETERS for n in (2, 4, 8)
    )
    assert half.phases["training"]["gradients"] == 4 * PARAMETERS
    assert half.phases["training"]["activations"] + half.phases["training"]["head and backward"] >= 2 * PARAMETERS
    assert single.least == 16 * PARAMETERS


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_logits_that_wait_for_the_backward_pass_are_counted(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(Learning(model), Shape(8, 8, 2))
    few = plan(work, torch.float32, 64, checkpointing=False, heap=True).phases["training"]["activations"]
    monkeypatch.setattr(logprobs, "_KEPT_ELEMENTS", 0)
    runtime_plan._training.cache_clear()
    none = plan(work, torch.float32, 64, checkpointing=False, heap=True).phases["training"]["activations"]
    runtime_plan._training.cache_clear()
    assert few - none == 4 * 5 * 8 * V  # 64 tokens hold three prompts and five completions of 8 each


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_a_critic_has_no_logits(model: str) -> None:
    found = plan(Work(Learning(model), Shape(8, 8, 2), critic=Learning(model)), torch.float32, 64,
                 checkpointing=False, heap=True).phases  # fmt: skip
    assert found["training"]["activations"] - found["critic"]["activations"] == 4 * 5 * 8 * V


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_what_computes_is_what_is_counted(model: str) -> None:
    """On a CPU the kernels, if the run has them, elsewhere torch."""
    work = Work(Learning(model), Shape(8, 8, 2))
    of = lambda heap: plan(work, torch.float32, 64, checkpointing=False, heap=heap).phases["training"]  # noqa: E731
    here, elsewhere = of(True)["activations"], of(False)["activations"]
    assert here < 0.8 * elsewhere
    native.use(False)
    try:
        assert of(True)["activations"] == elsewhere
    finally:
        native.use(True)


def test_eight_bits_take_a_quarter_of_the_moments(model: str) -> None:
    moments = made(model, policy=Learning(model, state="8bit")).held["moments"]
    assert moments == pytest.approx(2 * PARAMETERS, rel=0.02)


def test_further_models_are_held_beside(model: str) -> None:
    found = made(model, critic=Learning(model), frozen=(("reference", Learning(model)),))
    assert found.held["critic"] == 12 * PARAMETERS
    assert found.held["reference"] == 4 * PARAMETERS
    shared = made(model, policy=Learning(model, LoRA(rank=2)), critic=Learning(model, LoRA(rank=2)))
    assert shared.held["critic"] == shared.held["adapters"] + shared.held["moments"]


@pytest.mark.parametrize(("prompt", "completion", "together"), [(8, 8, 2), (20, 5, 8), (3, 40, 1), (30, 30, 4)])
@pytest.mark.parametrize("samples", [8, 24, 64])
@pytest.mark.parametrize("budget", [64, 100, 500, 10_000])
def test_micro_batches_are_as_large_as_planned(
    prompt: int, completion: int, together: int, samples: int, budget: int
) -> None:
    shape = Shape(prompt, completion, together)
    batch = shape.batch(samples)
    parts = [[row for i in part for row in batch.rows[i]] for part in split_by_budget(batch, budget)]
    largest = max(flat_length(rows) for rows in parts)
    assert Work(Learning(""), shape, samples=samples).micro_batch(budget) == largest
    assert largest <= max(budget, prompt + completion)


def test_the_cache_is_keys_and_values_of_prompts_once_and_of_samples(model: str) -> None:
    sampled = Sampled(rows=8, prompt=10, completion=20, samples=4)
    cache = made(model, sampled=(sampled,)).phases["sampling"]["KV cache"]
    assert cache == LAYERS * 2 * (D // 2) * (2 * 10 + 8 * 20) * 4


def test_the_peak_is_that_of_one_phase() -> None:
    found = Plan({"weights": 5}, {"training": {"gradients": 3, "activations": 1}, "sampling": {"KV cache": 6}})
    assert (found.peak, found.least, found.lines) == (11, 8, {"weights": 5, "KV cache": 6})


def test_a_limit_of_the_control_group_holds(tmp_path: Path) -> None:
    """Version 2 and version 1; files in the cache are given up for whoever needs the memory."""
    second = (tmp_path / "a" / "b", "memory.max", "memory.current")
    first = (tmp_path / "memory" / "c", "memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder, limit, used in (second, first):
        folder.mkdir(parents=True)
        (folder / limit).write_text("1000\n")
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text("inactive_file 150\nactive_file 50\n")
    (tmp_path / "a" / "memory.max").write_text("max\n")
    process = tmp_path / "cgroup"
    process.write_text("0::/a/b\n")
    assert _of_control_groups(tmp_path, process) == [500]
    process.write_text("4:memory:/c\n1:cpu:/\n")
    assert _of_control_groups(tmp_path, process) == [500]
    assert _of_control_groups(tmp_path, tmp_path / "missing") == []
    assert 0 < available(torch.device("cpu")) < 1 << 50


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much address space is taken")
@pytest.mark.skipif(available(torch.device("cpu")) < 6 << 30, reason="less memory is free than the test forbids to use")
def test_a_limit_of_the_shell_holds() -> None:
    """In a process of its own: `ulimit -v` bounds what it may still take."""
    code = "import torch; from klimb.runtime.memory import available; print(available(torch.device('cpu')))"
    limited = f"ulimit -v {6 << 20}; exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    left = int(subprocess.run(["sh", "-c", limited], capture_output=True, text=True, check=True).stdout)
    assert 0 < left < 6 << 30


def test_sizes_are_said_as_memory_is_sold() -> None:
    assert [gigabytes(n) for n in (24 << 30, 3 << 29, 5 << 20, 10_486)] == ["24.0 GB", "1.5 GB", "5 MB", "0.01 MB"]
