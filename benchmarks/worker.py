"""A side of the benchmark in its own process: it does one step whenever it is told to, and says what it cost.

`Channel` and `serve` are the worker's end of the line, `Side` is the driver's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

Options = dict[str, Any]


class Finished(Exception):
    """No further step is wanted."""


class EndedEarly(Exception):
    """A side's process ended without an answer; its last words are the message."""


class Channel:
    """JSON lines to and from the driver, over what were standard input and output; prints go to standard error."""

    def __init__(self, device: str) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._memory = GpuMemory() if device == "cuda" else ResidentMemory()

    def say(self, message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=self._answers)

    def loaded(self) -> None:
        """Everything is in memory, nothing was computed: from here on the peak counts."""
        self._memory.mark()
        self.say({"loaded_mb": self._memory.loaded_mb})
        self._wait()

    def step(self, **measured: float) -> None:
        """A step is over; returns when the next one may begin. Its time is that since the last return."""
        peak = self._memory.peak_mb()  # on a GPU it waits for the step's end
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        self.say({**measured, "seconds": seconds, "cpu": cpu, "mb": peak})
        self._wait()

    def _wait(self) -> None:
        if sys.stdin.readline().strip() != "go":
            raise Finished
        self._started, self._cpu = time.perf_counter(), time.process_time()


class ResidentMemory:
    """Of the process, less what was resident when all was loaded. MB = 2^20 bytes."""

    loaded_mb = 0.0

    def mark(self) -> None:
        self.loaded_mb = _resident_mb("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def peak_mb(self) -> float:
        return _resident_mb("VmHWM") - self.loaded_mb


def _resident_mb(field: str) -> float:
    """VmRSS: resident now. VmHWM: the most since the mark of clear_refs."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


class GpuMemory:
    """What torch has allocated on the device, weights included."""

    loaded_mb = 0.0

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda

    def mark(self) -> None:
        self.loaded_mb = self.cuda.memory_allocated() / 2**20
        self.cuda.reset_peak_memory_stats()

    def peak_mb(self) -> float:
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated() / 2**20


def serve(**tasks: Callable[[Options, Channel], None]) -> None:
    """`python side_x.py OPTIONS` with options as JSON, of which "task" names the task."""
    options = json.loads(sys.argv[1])
    channel = Channel(options["device"])
    with contextlib.suppress(Finished):
        tasks[options["task"]](options, channel)


class Side:
    """A worker process that takes a step when it is asked."""

    def __init__(self, name: str, options: Options, environment: Mapping[str, str]) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the side)
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(f"side_{name}.py")), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1, env=environment,
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise EndedEarly(f"{self.name} ended early:\n{self.log.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()
