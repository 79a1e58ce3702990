"""The process group, where there is one: who am I, how many are we, and what do the others say."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """A JSON value from every rank, in their order. As bytes and never as pickles: what another host sends is data."""
    if world() == 1:
        return [value]
    payload = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(payload)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(payload)] = payload
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(received, padded)
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(received, sizes, strict=True)]


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun started this process for; without one, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
