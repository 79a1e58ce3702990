"""Processes and descriptors of this process, as the system sees them."""

import os
from pathlib import Path

POISON = str(Path(__file__).parent / "poison.py")


def descendants(root: int) -> set[int]:
    """Pids below `root`, zombies included."""
    found: set[int] = set()
    for task in Path(f"/proc/{root}/task").glob("*"):
        try:
            children = [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in children:
            found |= {child} | descendants(child)
    return found


def strays() -> set[int]:
    """Processes that come from a test of this process, wherever they hang in the tree."""
    found, mark = set(), os.environ["DAEMON_MARK"].encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
