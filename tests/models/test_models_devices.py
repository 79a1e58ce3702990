"""Which device and which type a run gets, on machines that are not here: torch's answers about them are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from klimb.errors import KlimbError
from klimb.models.load import resolve_device, resolve_dtype
from klimb.stages.common import device_of, on_an_old_card
from klimb.stages.registry import stage_config

CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A CUDA card of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


OLD, NEW = [(6, 1), (7, 0), (7, 5)], [(8, 0), (8, 9), (9, 0), (12, 0)]
old = pytest.mark.parametrize("card", OLD, indirect=True)
new = pytest.mark.parametrize("card", NEW, indirect=True)


@new
@pytest.mark.usefixtures("card")
def test_a_card_that_computes_in_bfloat16_does() -> None:
    assert resolve_device("auto").type == "cuda"
    assert resolve_dtype("auto", CARD) == torch.bfloat16
    assert on_an_old_card(SimpleNamespace(dtype="auto"), CARD, torch.bfloat16) is None  # type: ignore[arg-type]


@old
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("asked", "dtype", "told"),
    [
        ("auto", torch.float32, "no bfloat16: computing in float32; dtype=float16 is faster"),
        ("bfloat16", torch.bfloat16, "no bfloat16: it is emulated, slower than float32"),
        ("float16", torch.float16, None),
        ("float32", torch.float32, None),
    ],
)
def test_an_older_card_is_named_in_one_line(asked: str, dtype: torch.dtype, told: str | None) -> None:
    assert resolve_dtype(asked, CARD) == dtype
    line = on_an_old_card(SimpleNamespace(dtype=asked), CARD, dtype)  # type: ignore[arg-type]
    if told is None:
        assert line is None
        return
    assert line is not None
    assert line.startswith("cuda:0: Tesla T4 (compute capability ")
    assert told in line
    assert "\n" not in line


@pytest.mark.usefixtures("apple")
def test_mps_is_taken_where_it_can_do_the_work() -> None:
    """It has no float64, in which tokens are drawn."""
    sft = {"model": "base", "data": "rows.jsonl"}
    measured = {**sft, "measure": {"data": "prompts.jsonl"}}
    rl = {**sft, "reward": "exact"}
    assert device_of(stage_config("sft", sft)).type == "mps"
    assert device_of(stage_config("preference", sft)).type == "mps"
    for stage, values in (("sft", measured), ("rl", rl), ("sample", sft)):
        assert device_of(stage_config(stage, values)).type == "cpu"
        with pytest.raises(KlimbError, match="device=mps: tokens cannot be drawn there: klimb draws in float64"):
            device_of(stage_config(stage, {**values, "device": "mps"}))
    assert resolve_dtype("auto", torch.device("mps")) == torch.float32
    with pytest.raises(KlimbError, match="dtype=float64: mps lacks it"):
        resolve_dtype("float64", torch.device("mps"))


@old
@pytest.mark.usefixtures("apple", "card")
def test_cuda_goes_before_mps() -> None:
    assert resolve_device("auto").type == "cuda"


def test_a_device_that_is_not_here_is_refused() -> None:
    for name in ("cuda", "mps"):
        if resolve_device("auto").type != name:
            with pytest.raises(KlimbError, match=f"device={name}: torch sees no "):
                resolve_device(name)
