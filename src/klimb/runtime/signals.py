"""Ctrl-C or SIGTERM once: finish the step, save, leave; outside the steps leave at the next border. Twice: at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from klimb.runtime.rehearsal import Rehearsal


@dataclass
class Interrupt:
    """Stages read `requested` at the border between two steps, and between two groups that are sampled outside them."""

    requested: bool = False
    rehearsal: Rehearsal | None = None
    """Of a dry run, which leaves by itself."""


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Collects the first signal in the value it yields; the second raises KeyboardInterrupt.

    Outside the main thread, where Python gets no signals, the value never changes.
    """
    interrupt = Interrupt()

    def handle(number: int, _frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        after = "saving after this step, or ending the sampling, then leaving"
        line = f"{signal.Signals(number).name}: {after}; once more leaves at once\n"
        os.write(2, line.encode())  # print() could interrupt itself here

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
