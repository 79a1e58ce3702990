"""A side of the benchmark in its own process: it does one step whenever it is told to, and says what it cost."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


class Finished(Exception):
    """The driver wants no further step."""


class Channel:
    """JSON lines to and from the driver, over what were standard input and output; prints go to standard error."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def say(self, message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=self._answers)

    def loaded(self) -> None:
        """Everything is in memory, nothing was computed: from here on the peak counts."""
        self._loaded = resident_mb("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self.say({"loaded_mb": self._loaded})
        self.wait()
        self._cpu = time.process_time()

    def step(self, **measured: float) -> None:
        """A step is over; returns when the next one may begin."""
        cpu = time.process_time() - self._cpu
        self.say({**measured, "cpu": cpu, "mb": resident_mb("VmHWM") - self._loaded})
        self.wait()
        self._cpu = time.process_time()

    def wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            raise Finished


def resident_mb(field: str) -> float:
    """VmRSS: resident now. VmHWM: the most since the mark of clear_refs. MB = 2^20 bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


Options = dict[str, Any]


def serve(time_steps: Callable[[Options, Channel], None], gate: Callable[[Options], dict[str, Any]]) -> None:
    """`python side_x.py OPTIONS` with options as JSON; {"gate": true} asks for the numbers of the fixed batch."""
    options = json.loads(sys.argv[1])
    channel = Channel()
    if options.get("gate"):
        channel.say(gate(options))
        return
    with contextlib.suppress(Finished):
        time_steps(options, channel)
