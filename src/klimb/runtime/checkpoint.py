"""Checkpoints: atomic, hashed, free of pickle, in logical tensors that any number of ranks can read.

    checkpoints/step-000012/   the state after the 12th step
        tensors-00001.safetensors …   pieces of at most SHARD_BYTES
        index.json      {part: {name: {"shape": […], "pieces": [[file, key], …]} or {"same_as": name}}}
        state.json      sampler, algorithm scalars, keys of the random streams
        manifest.json   size and SHA-256 of each file, written last

A checkpoint is written under another name, brought to the disk, renamed, read back and compared; only then
are older ones deleted. At every instant at least one verified checkpoint exists, once there has been one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from klimb.errors import RunError, out_of_memory
from klimb.runtime import durable

Tensors = Mapping[str, Mapping[str, Tensor]]
"""{"policy": {"model.embed_tokens.weight": …}, "optimizer": {…}}: full logical tensors by part and name."""

SHARD_BYTES = 256 * 2**20
_JSON_BYTES = 256 * 2**20
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """On the CPU. Names that shared their memory when saved are one tensor here."""
    state: dict[str, Any]


def save(directory: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes the checkpoint of `step` and deletes all but the newest `keep`. Needs space for one more.

    `state` must come back from JSON as it was: dicts with text keys, lists, text, numbers, bool, None.
    Raises RunError when the disk does not take it; what was saved before is then still there.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
    _check_plain(state, "state")
    text = json.dumps(state, indent=1).encode()
    target = directory / f"step-{step:06d}"
    fix = "make room and run the same command again: it continues from the checkpoint before"
    with durable.explained("cannot save the checkpoint", target, fix):
        directory.mkdir(parents=True, exist_ok=True)
        durable.remove_leftovers(directory)
        if target.exists():
            if damage(target) is None:
                return _same_moment(target, text)
            durable.remove_folder(target)
        with durable.new_folder(target) as folder:
            _write(folder, step, tensors, text)
        if found := damage(target):
            raise RunError("the checkpoint just written cannot be read back", where=target, why=found)
        for _, old in _steps(directory, before=step)[keep - 1 :]:
            durable.remove_folder(old)
    return target


def load_latest(directory: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written; `report` gets a line for each that is not."""
    for _, path in _steps(directory):
        try:
            return load(path)
        except RunError as error:
            report(f"skipped a checkpoint: {error}")
    return None


def load(path: Path) -> Checkpoint:
    """Reads and verifies one checkpoint. Raises RunError that says what is wrong with it."""
    try:
        files = _manifest(path)
        index, state = (json.loads(_verified(path, name, files)) for name in ("index.json", "state.json"))
        shards = {
            name: safetensors.torch.load(_verified(path, name, files))
            for name in files
            if name.endswith(".safetensors")
        }
        tensors = {part: _assemble(entries, shards) for part, entries in index.items()}
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise RunError("the checkpoint is damaged", where=path, why=error) from error
    return Checkpoint(int(path.name.removeprefix("step-")), tensors, state)


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, None when every byte is as written."""
    try:
        files = _manifest(path)
        for name in files:
            _verified(path, name, files)
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None


# ---------------------------------------------------------------- writing


def _write(folder: Path, step: int, tensors: Tensors, state: bytes) -> None:
    files: dict[str, dict[str, Any]] = {}

    def write(name: str, data: bytes) -> None:
        durable.write_new(folder / name, data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    index: dict[str, dict[str, Any]] = {part: {} for part in tensors}
    for name, shard in _shards(tensors, index):
        write(name, safetensors.torch.save(shard))
    write("index.json", json.dumps(index).encode())
    write("state.json", state)
    manifest = {"format": _FORMAT, "step": step, "files": files}
    durable.write_new(folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _shards(tensors: Tensors, index: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file, pieces) of bounded size; notes in `index` where each tensor went, and which share memory."""
    number, shard, room = 1, dict[str, Tensor](), SHARD_BYTES
    for part, named in tensors.items():
        first_name: dict[tuple[Any, ...], str] = {}
        for name, tensor in named.items():
            memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel() and memory in first_name:
                index[part][name] = {"same_as": first_name[memory]}
                continue
            first_name[memory] = name
            index[part][name] = {"shape": list(tensor.shape), "pieces": []}
            for i, piece in enumerate(_pieces(tensor.detach())):
                if shard and piece.nbytes > room:
                    yield _shard_name(number), shard
                    number, shard, room = number + 1, {}, SHARD_BYTES
                key = f"{part}/{name}#{i}"
                shard[key] = piece.to("cpu", copy=True, memory_format=torch.contiguous_format)
                room -= piece.nbytes
                index[part][name]["pieces"].append([_shard_name(number), key])
    if shard:
        yield _shard_name(number), shard


def _shard_name(number: int) -> str:
    return f"tensors-{number:05d}.safetensors"


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor as it is, or flat and cut when it does not fit a shard."""
    if tensor.nbytes <= SHARD_BYTES:
        return (tensor,)
    return tensor.reshape(-1).split(max(1, SHARD_BYTES // tensor.element_size()))


def _same_moment(target: Path, state: bytes) -> Path:
    """A step is saved once; Ctrl-C right after a save asks for it again."""
    if (target / "state.json").read_bytes() != state:
        fix = "start afresh with --fresh or another out"
        raise RunError("a checkpoint of this step holds another state", where=target, fix=fix)
    return target


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if type(key) is not str:
                raise TypeError(f"{place}: key {key!r} is not text and would come back as text")
            _check_plain(inner, f"{place}.{key}")
    elif type(value) is list:
        for number, inner in enumerate(value):
            _check_plain(inner, f"{place}.{number}")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"{place}: a {type(value).__name__} does not come back from JSON as it was")


# ---------------------------------------------------------------- reading


def _steps(directory: Path, before: int | None = None) -> list[tuple[int, Path]]:
    """(step, path), the newest first."""
    found = [
        (int(match[1]), path)
        for path in (directory.iterdir() if directory.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d{6,12})", path.name))
    ]
    return sorted((pair for pair in found if before is None or pair[0] < before), reverse=True)


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """{file: {"size", "sha256"}}: plain names in this folder."""
    manifest = json.loads(_read(path / "manifest.json", _JSON_BYTES))
    if manifest["format"] != _FORMAT or manifest["step"] != int(path.name.removeprefix("step-")):
        raise ValueError("manifest.json: of another format or another step")
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name in files:
        if not re.fullmatch(r"(index|state)\.json|tensors-\d{5,}\.safetensors", name):
            raise ValueError(f"manifest.json: names {name!r}, which no checkpoint has")
    for name in ("index.json", "state.json"):
        if name not in files:
            raise ValueError(f"manifest.json: does not name {name}")
        if files[name]["size"] > _JSON_BYTES:
            raise ValueError(f"{name}: {files[name]['size']} bytes are no plausible size")
    return files


def _verified(path: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The bytes that were compared, so that nothing else can be parsed."""
    data = _read(path / name, limit=files[name]["size"])
    if len(data) != files[name]["size"] or hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise ValueError(f"{name}: not the bytes that were written")
    return data


def _read(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path.name}: {size} bytes where at most {limit} were expected")
    return path.read_bytes()


def _assemble(entries: Mapping[str, Any], shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if "same_as" in entry:
            tensors[name] = tensors[entry["same_as"]]
            continue
        pieces = [shards[file][key] for file, key in entry["pieces"]]
        tensors[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(entry["shape"])
    return tensors
