"""The trainer's side of a worker process (see worker.py): start it, ask it within a deadline, kill it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import Any

from klimb.errors import RewardError
from klimb.rewards.calling import MAX_DETAILS, CallFailed, Kind, Signature
from klimb.rewards.frames import LENGTH, frame
from klimb.rewards.protocol import Columns, Failure, Scores

MAX_REPLY = 1 << 28
"""Bytes; a longer reply is nonsense that the user's code wrote into the pipe."""


class WorkerProcess:
    """One life of a worker. It is not restarted: whoever owns it makes a new one.

    Raises RewardError where the function cannot be loaded within `start_timeout` seconds.
    """

    def __init__(self, target: str, start_timeout: float) -> None:
        self.target = target
        requests_read, self._requests = os.pipe()
        self._replies, replies_write = os.pipe()
        command = [
            sys.executable,
            "-u",
            "-m",
            "klimb.rewards.worker",
            target,
            str(requests_read),
            str(replies_write),
        ]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(requests_read, replies_write),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._requests)
            os.close(self._replies)
            raise RewardError("the reward's process could not be started", where=target, why=error) from error
        finally:
            os.close(requests_read)
            os.close(replies_write)
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._printed = bytearray()
        for end in (self._requests, self._replies, self._output):
            os.set_blocking(end, False)
        hello = self._hello(start_timeout)
        self.pid: int = hello["pid"]
        accepts = hello["accepts"]
        self.signature = Signature(None if accepts is None else frozenset(accepts), frozenset(hello["requires"]))

    def _hello(self, timeout: float) -> dict[str, Any]:
        try:
            hello = self._exchange(b"", timeout)
        except CallFailed as failed:
            self.close()
            last = failed.details.strip().rpartition("\n")[2]
            raise RewardError(
                "the reward function could not be loaded",
                where=self.target,
                why=f"{failed.reason}{f', after printing: {last}' if last else ''}",
                fix="import the file in Python to see why",
            ) from failed
        if "error" in hello:
            self.close()
            raise RewardError(hello["error"])
        return hello

    def score(self, arguments: Columns, rows: int, timeout: float) -> Scores:
        """One call. Raises CallFailed; after `timeout` and `died` the worker is closed."""
        try:
            message = frame({"arguments": arguments, "rows": rows, "timeout": timeout})
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"a column cannot be sent to the reward's process: {self._unsendable(arguments)}",
                where=self.target, why=error, fix="pass the function from Python, which runs in process",
            ) from error  # fmt: skip
        try:
            reply = self._exchange(message, timeout)
        except CallFailed:
            self.close()
            raise
        if "failed" in reply:
            raise CallFailed(*reply["failed"])
        return Scores(reply["values"], [Failure(*failure) for failure in reply["failures"]])

    @staticmethod
    def _unsendable(arguments: Columns) -> str:
        for name, values in arguments.items():
            try:
                json.dumps(values)
            except (TypeError, ValueError):
                return repr(name)
        return "(unknown)"

    def _exchange(self, message: bytes, timeout: float) -> dict[str, Any]:
        """Send a frame (if any) and wait for one, reading what is printed meanwhile so nothing blocks."""
        deadline = time.monotonic() + timeout
        self._printed.clear()
        outgoing, incoming = memoryview(message), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            if outgoing:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0:
                ready = {key.fd for key, _ in selector.select(min(left, 0.05))}
                if self._output in ready and self._read_output() == b"":
                    selector.unregister(self._output)
                if self._requests in ready:
                    outgoing = outgoing[self._sent(outgoing) :]
                    if not outgoing:
                        selector.unregister(self._requests)
                if self._replies in ready:
                    chunk = os.read(self._replies, 1 << 20)
                    incoming += chunk
                    if not chunk:  # the worker has ended; its supervisor follows at once and knows how
                        selector.unregister(self._replies)
                    elif (reply := _complete(incoming)) is not None:
                        return reply
                elif self._process.poll() is not None:
                    raise self._failed("died", f"the process of the reward function ended ({self._ending()})")
        raise self._failed("timeout", f"no answer within {timeout:.3g} s")

    def _sent(self, outgoing: memoryview) -> int:
        try:
            return os.write(self._requests, outgoing[: 1 << 20])
        except BlockingIOError:
            return 0
        except BrokenPipeError:  # it died; the caller's loop finds out how
            return len(outgoing)

    def _read_output(self) -> bytes | None:
        """Keep the end of what was printed. None: nothing at present; b"": nobody can print any more."""
        try:
            chunk = os.read(self._output, 1 << 20)
        except BlockingIOError:
            return None
        self._printed += chunk
        del self._printed[:-MAX_DETAILS]
        return chunk

    def _failed(self, kind: Kind, reason: str) -> CallFailed:
        for _ in range(64):  # what it said last, but not for ever
            if not self._read_output():
                break
        printed = self._printed.decode("utf-8", "replace")
        return CallFailed(kind, reason, f"{reason}; the last it printed:\n{printed}" if printed else "")

    def _ending(self) -> str:
        code = self._process.returncode
        number = -code if code < 0 else code - 128
        if number > 0 and number in {entry.value for entry in signal.Signals}:
            return signal.Signals(number).name
        return f"exit code {code}"

    def close(self) -> None:
        """Kill everything that the worker has started, and wait for it."""
        if self._requests < 0:
            return
        os.close(self._requests)
        self._requests = -1
        self._process.terminate()  # the supervisor hears it, kills its children, and ends
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what a killed supervisor could not end
        self._process.wait()
        os.close(self._replies)
        assert self._process.stdout is not None
        self._process.stdout.close()


def _complete(received: bytearray) -> dict[str, Any] | None:
    """The message in `received` once it is whole. Raises CallFailed where it is none."""
    if len(received) < LENGTH.size:
        return None
    length = LENGTH.unpack(received[: LENGTH.size])[0]
    if length > MAX_REPLY:
        raise CallFailed("died", "something else than an answer came from the reward's process")
    if len(received) < LENGTH.size + length:
        return None
    try:
        return json.loads(received[LENGTH.size :])
    except ValueError as error:
        raise CallFailed("died", "something else than an answer came from the reward's process") from error
