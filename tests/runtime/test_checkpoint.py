from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klimb.errors import RunError
from klimb.runtime import checkpoint
from klimb.runtime.checkpoint import damage, load, load_latest, save

STATE = {
    "sampler": {"seed": 1, "epoch": 0, "position": 7},
    "beta": 0.1,
    "inf": float("inf"),
    "list": [None, True],
}


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    return {
        "policy": {"head": weight, "bias": weight[0].bfloat16()},
        "optimizer": {"step": torch.tensor(step)},
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    def all_bits(parts: dict[str, dict[str, Tensor]]) -> list[Any]:
        return [(part, name, bits(tensor)) for part, named in parts.items() for name, tensor in named.items()]

    return all_bits(a) == all_bits(b)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def silent(line: str) -> None:
    raise AssertionError(f"unexpected: {line}")


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("shard_bytes", [2**20, 24, 1])
def test_bits_shapes_and_types_survive_in_shards_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    nan_with_payload = torch.tensor([0x7FC00123, -0x80000000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    base = torch.arange(12.0).reshape(3, 4)
    saved = {
        "policy": {
            "odd floats": nan_with_payload,
            "bf16": torch.randn(5, 3).bfloat16(),
            "transposed": base.t(),
            "overlapping": base[1:],
            "a/b#c.d": torch.tensor([True, False]),
        },
        "optimizer": {
            "step": torch.tensor(7),
            "big": torch.tensor([2**62 + 1, -(2**63)]),
            "empty": torch.empty(0, 3),
            "double": torch.tensor(0.1, dtype=torch.float64),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
    }
    path = save(tmp_path, 12, saved, STATE)
    loaded = load_latest(tmp_path, silent)
    assert loaded is not None
    assert same(loaded.tensors, saved)
    assert (loaded.step, loaded.state) == (12, STATE)
    assert [list(part) for part in loaded.tensors.values()] == [list(part) for part in saved.values()]
    shards = len(list(path.glob("*.safetensors")))
    elements = sum(tensor.numel() for part in saved.values() for tensor in part.values())
    assert shards == 1 if shard_bytes == 2**20 else shards > 5
    assert shards <= elements + 1


def test_shared_tensors_are_stored_once_and_stay_shared(tmp_path: Path) -> None:
    embedding = torch.randn(64, 64)
    size = save(tmp_path / "one", 1, {"policy": {"embed": embedding}}, {}).joinpath("tensors-00001.safetensors")
    tied = {"policy": {"embed": embedding, "head": embedding}}
    path = save(tmp_path / "tied", 1, tied, {})
    assert path.joinpath("tensors-00001.safetensors").stat().st_size == size.stat().st_size
    policy = load(path).tensors["policy"]
    assert policy["head"] is policy["embed"]
    assert same(load(path).tensors, tied)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", silent) is None
    assert load_latest(tmp_path, silent) is None


def test_the_newest_are_kept_and_strangers_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for step in (1, 2, 10):
        save(tmp_path, step, tensors(step), STATE, keep=2)
    assert names(tmp_path) == ["notes", "step-000002", "step-000010"]
    save(tmp_path, 11, tensors(11), STATE, keep=1)
    assert names(tmp_path) == ["notes", "step-000011"]
    with pytest.raises(ValueError, match="keep=0"):
        save(tmp_path, 12, {}, {}, keep=0)


@pytest.mark.parametrize("state", [{1: "a"}, {"a": (1, 2)}, {"a": [{"b": torch.tensor(1)}]}])
def test_state_that_json_would_bend_is_refused(tmp_path: Path, state: dict[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"^state(\.a)?"):
        save(tmp_path, 1, {}, state)


def test_saving_a_step_again_changes_nothing_and_another_state_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 3, tensors(3), STATE)
    before = path.joinpath("manifest.json").stat().st_mtime_ns
    save(tmp_path, 3, tensors(3), STATE)
    assert path.joinpath("manifest.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="a checkpoint of this step holds another state"):
        save(tmp_path, 3, tensors(3), {"other": 1})


# ---------------------------------------------------------------- killed while writing


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_operation_a_verified_checkpoint_is_there(
    tmp_path: Path, keep: int, run_and_kill: Callable[[Callable[[], object], int], bool]
) -> None:
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        save(directory, 1, tensors(1), STATE, keep)
        finished = run_and_kill(lambda directory=directory: save(directory, 2, tensors(2), STATE, keep), at)
        assert all(damage(path) is None for path in directory.glob("step-*"))  # whole or gone, old ones too
        found = load_latest(directory, silent)
        assert found is not None, f"nothing left after operation {at}"
        assert found.step == 2 if finished else found.step in (1, 2)
        assert same(found.tensors, tensors(found.step))
        assert found.state == STATE
        save(directory, 3, tensors(3), STATE, keep=1)
        assert names(directory) == ["step-000003"]  # what the dead process left is gone
        if finished:
            break
    assert at > 15  # the operations were seen at all


# ---------------------------------------------------------------- a full disk


def fail_to_write_after(monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    real, written = os.write, 0

    def write(descriptor: int, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)


@pytest.mark.parametrize("allowed", [0, 100, 400, 700, 1000])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    save(tmp_path, 1, tensors(1), STATE, keep=1)
    fail_to_write_after(monkeypatch, allowed)
    with pytest.raises(RunError, match="cannot save the checkpoint: No space left on device; make room") as error:
        save(tmp_path, 2, tensors(2), STATE, keep=1)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-000001"]
    assert damage(tmp_path / "step-000001") is None


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors(1), STATE)
    child = os.fork()
    if not child:  # the limit could not be lifted again in this process
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(tmp_path, 2, {"policy": {"big": torch.ones(4096)}}, STATE)
        except RunError as error:
            os._exit(7 if "File too large" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert names(tmp_path) == ["step-000001"]


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunError, match="cannot save the checkpoint: File exists"):
        save(tmp_path / "checkpoints", 1, {}, {})


def test_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, tensors(1), STATE, keep=1)

    def rename(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(RunError, match="Input/output error"):
        save(tmp_path, 2, tensors(2), STATE, keep=1)
    assert names(tmp_path) == ["step-000001"]


def test_the_older_one_goes_only_when_the_new_one_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, tensors(1), STATE, keep=1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, b"\0" * len(data)))  # a disk that loses what it is given
    with pytest.raises(RunError, match="cannot be read back"):
        save(tmp_path, 2, tensors(2), STATE, keep=1)
    monkeypatch.undo()
    found = load_latest(tmp_path, lambda line: None)
    assert found is not None
    assert found.step == 1


# ---------------------------------------------------------------- damaged afterwards


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "state.json", "tensors-00001.safetensors"])
def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1, tensors(1), STATE)
    whole = (path / name).read_bytes()
    for position in range(0, len(whole), 3):
        if name == "manifest.json" and whole[position : position + 1].isspace():
            continue  # between two values it carries nothing
        flip(path / name, position)
        with pytest.raises(RunError, match="the checkpoint is damaged"):
            load(path)
        (path / name).write_bytes(whole)
    assert same(load(path).tensors, tensors(1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "state.json", "tensors-00001.safetensors"])
@pytest.mark.parametrize("harm", [truncate, lengthen, Path.unlink, lambda path: flip(path, 5)])
def test_a_damaged_one_is_passed_over_with_its_reason(tmp_path: Path, name: str, harm: Callable[[Path], None]) -> None:
    for step in (1, 2):
        save(tmp_path, step, tensors(step), STATE)
    harm(tmp_path / "step-000002" / name)
    told: list[str] = []
    for _ in range(2):  # and it stays passed over
        found = load_latest(tmp_path, told.append)
        assert found is not None
        assert found.step == 1
    assert len(told) == 2
    assert told[0].startswith(f"skipped a checkpoint: {tmp_path / 'step-000002'}: the checkpoint is damaged: ")
    save(tmp_path, 2, tensors(2), STATE)  # training comes by again and replaces it
    assert load(tmp_path / "step-000002").step == 2


def forge(path: Path, name: str, data: bytes) -> None:
    """Puts `data` there with a manifest that vouches for it."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / name).write_bytes(data)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tensors-00001.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        ("tensors-00001.safetensors", b""),
        ("index.json", b"[" * 100_000),
        ("index.json", b'{"policy": {"head": {"shape": [1000000000000], "pieces": []}}}'),
        ("index.json", b'{"policy": {"head": {"same_as": "head"}}}'),
        ("state.json", b"\xff"),
        ("../../elsewhere", b"x"),
    ],
)
def test_absurd_contents_are_refused_even_with_the_right_hash(tmp_path: Path, name: str, data: bytes) -> None:
    path = save(tmp_path / "a" / "b", 1, tensors(1), STATE)
    forge(path, name, data)
    with pytest.raises(RunError, match="the checkpoint is damaged"):
        load(path)


def test_a_machine_without_memory_makes_no_checkpoint_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passed over, it would be trained again from an older one."""
    save(tmp_path, 1, tensors(1), STATE)
    monkeypatch.setattr(checkpoint, "_assemble", lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_latest(tmp_path, silent)


def test_absurd_sizes_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1, tensors(1), STATE)
    monkeypatch.setattr(checkpoint, "_JSON_BYTES", 600)
    with (path / "state.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(RunError, match="the checkpoint is damaged"):
        load(path)
