"""Log-probs of the reference on pairs that do not change: computed once, kept, and shared by epochs and runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import klimb
from klimb.batch import TokenBatch
from klimb.data import cache as kept
from klimb.models.faces import Policy, policy_logps
from klimb.runtime import durable, manifest
from klimb.runtime.ranks import rank, share
from klimb.stages.common import Session

CHUNK = 256
"""Items that are computed together, in the order of the data: so the bits are the same whoever computes them."""


@dataclass(frozen=True)
class ReferenceLogps:
    """log π_ref of the marked tokens of all items, by sample: those of sample i are values[ends[i] : ends[i+1]]."""

    values: Tensor
    ends: np.ndarray
    samples: int
    """Of an item: those of its chosen, its rejected, …"""

    def of(self, items: Sequence[int], mask: Tensor) -> Tensor:
        """[B, T] for a batch of these items, in their order; mask [B, T] is the batch's."""
        rows = [item * self.samples + place for item in items for place in range(self.samples)]
        grid = torch.zeros(mask.shape, dtype=self.values.dtype)
        grid[mask] = torch.cat([self.values[self.ends[row] : self.ends[row + 1]] for row in rows])
        return grid


def reference_logps(
    session: Session,
    items: Sequence[Any],
    batch_of: Callable[[Sequence[Any]], TokenBatch],
    facts: dict[str, Any] | None,
    reference: Callable[[], Policy],
) -> ReferenceLogps:
    """Out of the cache of prepared data, or computed and put there. `facts` are those of `reference_facts`; None: its
    weights have no name that says what they are, and nothing is kept. `reference` is called where it is needed."""
    samples = len(batch_of(items[:1]).rows)
    if facts is None:
        session.say("reference log-probs: computed for this run alone, a hub name does not say which weights it has")
        return _joined(_computed(session, items, batch_of, reference()), samples)
    key = str(share(kept.key_of({**facts, "items": _content(items, batch_of)})))
    if share(kept.find(key) is not None):
        session.say(f"reference log-probs: hit: {kept.path_of(key)}")
        return _read(kept.path_of(key), samples)
    found = _joined(_computed(session, items, batch_of, reference()), samples)
    if rank() == 0:
        try:
            kept.keep(key, lambda path: _write(path, found))
            session.say(f"reference log-probs: miss, kept: {kept.path_of(key)}")
        except OSError as error:
            session.say(f"reference log-probs: miss, {kept.folder()} cannot be written: {error.strerror or error}")
    return found


def reference_facts(session: Session, model: str, named: str, how: Sequence[Any]) -> dict[str, Any] | None:
    """All that decides about the bits of log-probs under the model `named`, besides the tokens. how: whatever else."""
    inputs = session.run.manifest["inputs"]
    entry = inputs.get("reference" if named != model else "model", {})
    if not Path(named).exists() or "hash" not in entry:
        return None
    adapter = Path(named) / "adapter_config.json"
    base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.is_file() else None
    if base is not None:
        if not Path(base).exists():
            return None
        base = durable.content_hash(Path(base))
    package = Path(klimb.__file__).parent
    code = [file for folder in ("models", "native") for file in sorted((package / folder).glob("*.*"))]
    decided = session.run.manifest["decisions"]
    return {
        "what": "reference log-probs", "model": entry["hash"], "base": base, "how": list(how),
        "decided": {key: decided.get(key) for key in ("threads", "dtype", "token_budget", "kernels")},
        "device": session.device.type, "versions": manifest.versions(),
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest(),
    }  # fmt: skip


def _content(items: Sequence[Any], batch_of: Callable[[Sequence[Any]], TokenBatch]) -> str:
    """Of the tokens themselves: template and tokenizer are in them."""
    digest = hashlib.sha256()
    for start in range(0, len(items), CHUNK):
        for row in (row for rows in batch_of(items[start : start + CHUNK]).rows for row in rows):
            for part in (row.prompt, row.completion, row.mask):
                digest.update(np.array([len(part), *part], np.int32).tobytes())
    return digest.hexdigest()


def _computed(
    session: Session, items: Sequence[Any], batch_of: Callable[[Sequence[Any]], TokenBatch], reference: Policy
) -> list[tuple[Tensor, Tensor]]:
    """Of each chunk: the values, and how many each sample has."""
    found = []
    with session.timed("reference"):
        for start in range(0, len(items), CHUNK):
            batch = batch_of(items[start : start + CHUNK])
            logps = policy_logps(reference, batch, budget=session.scoring).logps.cpu()
            found.append((logps[batch.mask], batch.mask.sum(dim=1)))
    return found


def _joined(parts: list[tuple[Tensor, Tensor]], samples: int) -> ReferenceLogps:
    counts = torch.cat([counts for _, counts in parts]).numpy()
    return ReferenceLogps(torch.cat([values for values, _ in parts]), np.r_[0, np.cumsum(counts)], samples)


def _write(path: Path, logps: ReferenceLogps) -> dict[str, Any]:
    table = pa.table({
        "logps": pa.ListArray.from_arrays(pa.array(logps.ends, pa.int32()), pa.array(logps.values.numpy()))
    })  # fmt: skip
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {"what": "reference log-probs"}


def _read(path: Path, samples: int) -> ReferenceLogps:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        column = reader.read_all().column("logps").combine_chunks()
    values = torch.from_numpy(column.values.to_numpy().copy())
    return ReferenceLogps(values, column.offsets.to_numpy().astype(np.int64), samples)
