"""Memory of the machine: how much there is to take, and what was freed handed back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def give_back() -> None:
    """glibc keeps what was freed for itself. After training, before a rollout that needs other blocks, it would hold
    the peak of both together; to let go takes 0.1 ms (a model of 0.1 M parameters) to 15 ms (11 M)."""
    _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim if trim is not None else lambda _: 0


def available(device: torch.device) -> int:
    """Bytes that this process can still take on a device; of a CPU, within its control group and ulimit."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min(_of_the_system(), *_of_control_groups(), *_of_the_process())


def _of_the_system() -> int:
    """What Linux can free without swapping, and what it can swap; elsewhere all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])


def _of_the_process() -> list[int]:
    """What is left of the address space below `ulimit -v`, where one is set and Linux tells how much is taken."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return []
    return [max(limit - taken, 0)] if limit != resource.RLIM_INFINITY else []


def _of_control_groups(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What is left below each limit that holds for this process (version 2, or the memory controller of version 1)."""
    try:
        lines = [line.split(":", 2) for line in process.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in lines:
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        folder, names = (root, ("memory.max", "memory.current")) if not controllers else (
            root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )  # fmt: skip
        for group in [folder, *(folder / part for part in _parents(path))]:
            try:
                limit, used = ((group / name).read_text().strip() for name in names)
                files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                cached = int(files.get("inactive_file", 0)) + int(files.get("active_file", 0))
                left.append(int(limit) - int(used) + cached)
    return left


def _parents(path: str) -> list[str]:
    """`/a/b` → a, a/b."""
    parts = path.strip("/").split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts)) if parts[n]]
