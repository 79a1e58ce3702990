"""Forks a fresh process for each candidate and each grader, and kills them. It runs nobody's code itself.

A message on the control socket is a kind, a number, and descriptors::

    C 7 [job, verdict]     a candidate that is called, and its grader, with pipes between the two
    P 7 [input, output]    a candidate that is a whole program
    E 7                    end what was started under this number; answered by a byte when it is gone

What the children work on comes to them by pipes that the zygote does not read, so that no candidate is forked from a
process that has seen a test. When the other end closes the socket or dies, everything is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import random
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from . import candidate, grader
from .confine import Confinement, Unconfined

MESSAGE = struct.Struct(">cI")
CALLED, PROGRAM, END = b"C", b"P", b"E"
PRELOADED = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "operator", "re", "statistics", "string", "typing",
)  # fmt: skip


def main() -> None:
    """Say "ready", or why not, then serve until the socket closes."""
    control, tier, memory, cpu = sys.argv[2:6]
    channel = socket.socket(fileno=int(control))
    try:
        zygote = Zygote(Confinement(tier, sys.argv[6:], int(memory)), int(cpu))
    except Unconfined as error:
        channel.sendall(str(error).encode())
        return
    for name in PRELOADED:
        import_module(name)
    grader.definitions("def warm(): pass")  # the first parse of a process makes the types of all nodes
    gc.collect()
    gc.freeze()
    channel.sendall(b"ready")
    while True:
        head, descriptors, _, _ = socket.recv_fds(channel, MESSAGE.size, 4)
        if not head:
            break
        kind, number = MESSAGE.unpack(head)
        if kind == END:
            zygote.end(number)
            channel.sendall(b".")
        else:
            zygote.start(kind, number, descriptors)
    for number in list(zygote.children):
        zygote.end(number)


class Zygote:
    def __init__(self, confinement: Confinement, cpu: int) -> None:
        self.children: dict[int, list[int]] = {}
        self._confinement = confinement
        self._cpu = cpu
        self._null = os.open(os.devnull, os.O_RDWR)

    def start(self, kind: bytes, number: int, descriptors: Sequence[int]) -> None:
        null, ends = self._null, list(descriptors)
        wanted: list[tuple[Callable[[], None], list[int]]]
        if kind == PROGRAM:
            wanted = [(candidate.run_program, [*ends, null])]
        else:
            requests, replies = os.pipe(), os.pipe()
            wanted = [
                (candidate.serve, [null, null, null, requests[0], replies[1]]),
                (grader.serve, [null, null, null, *ends, requests[1], replies[0]]),
            ]
            ends += [*requests, *replies]
        self.children[number] = [self._fork(work, own) for work, own in wanted]
        for end in ends:
            os.close(end)

    def end(self, number: int) -> None:
        """Nobody waits for a child before this, so that its number is still its own."""
        for pid in self.children.pop(number, []):
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _fork(self, work: Callable[[], None], descriptors: Sequence[int]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setpgid(0, 0)
            self._confinement.die_with_parent(signal.SIGKILL)
            if os.getppid() == parent:
                self._keep(descriptors)
                self._confinement.limit(self._cpu)
                self._confinement.enter()
                random.seed(0)
                work()
        finally:
            os._exit(0)

    def _keep(self, descriptors: Sequence[int]) -> None:
        """`descriptors` become 0, 1, 2, …; no other stays open, except Landlock's until it is entered."""
        kept = [*descriptors, *self._confinement.descriptors]
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64) for descriptor in kept]
        for place, descriptor in enumerate(high):
            os.dup2(descriptor, place)
        os.closerange(len(high), os.sysconf("SC_OPEN_MAX"))
        self._confinement.moved(len(descriptors))
