"""The trainer's side of the sandbox: a zygote that is warm, and what is asked of the processes it forks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from klimb.rewards.sandbox.inside.wire import LENGTH, MAX_FRAME
from klimb.rewards.sandbox.inside.zygote import CALLED, END, MESSAGE, PROGRAM

START_TIMEOUT = 20.0
MAX_CODE = 150_000
"""Characters. Longer code is wrong without being run."""

Kind = Literal["ok", "wrong", "abstain", "timeout", "error"]
Command = Callable[[int], Sequence[str]]
"""The command line of a zygote whose control socket is this descriptor."""


class Verdict(NamedTuple):
    """abstain: the test cannot be put to a candidate here. error: it is the test or the sandbox that fails."""

    kind: Kind
    passed: int = 0
    failed: int = 0
    why: str = ""


class NotStarted(Exception):
    """Why this tier cannot be had here, in one line."""


class ZygoteGone(Exception):
    """It died, and what was running with it."""


class Zygote:
    """One life of the process that forks. Raises NotStarted."""

    def __init__(self, command: Command) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_TIMEOUT)
        self._lock = threading.Lock()
        try:
            self._process = subprocess.Popen(
                command(theirs.fileno()), pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                env={"PYTHONHASHSEED": "0"},
            )  # fmt: skip
        except (OSError, NotStarted) as error:
            self._socket.close()
            raise NotStarted(str(error)) from error
        finally:
            theirs.close()
        try:
            said = self._socket.recv(1000).decode("utf-8", "replace")
        except OSError:
            said = f"it did not start within {START_TIMEOUT:g} s"
        if said != "ready":
            last = self.close().strip().rpartition("\n")[2]
            raise NotStarted(said or last or f"its process ended with {self._process.returncode}")

    def start(self, kind: bytes, number: int, descriptors: Sequence[int]) -> None:
        try:
            with self._lock:
                socket.send_fds(self._socket, [MESSAGE.pack(kind, number)], descriptors)
        except OSError as error:
            raise ZygoteGone(str(error)) from error

    def end(self, number: int) -> None:
        """Returns when the processes of `number` are gone. Raises ZygoteGone: what came back is worth nothing then."""
        try:
            with self._lock:
                self._socket.sendall(MESSAGE.pack(END, number))
                ended = self._socket.recv(1)
        except OSError as error:
            raise ZygoteGone(str(error)) from error
        if not ended:
            raise ZygoteGone("its process was killed")

    def close(self) -> str:
        """End everything. Returns what it wrote to stderr."""
        self._socket.close()  # it hears that, kills its children, and ends
        try:
            said = self._process.communicate(timeout=5.0)[1]
        except subprocess.TimeoutExpired:
            self._process.kill()
            said = self._process.communicate()[1]
        return said.decode("utf-8", "replace")


class Sandbox:
    """Runs code in fresh processes; from several threads at once. `timeout` bounds one call, in seconds."""

    def __init__(self, tier: str, command: Command, timeout: float) -> None:
        self.tier = tier
        self.timeout = timeout
        self._command = command
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._zygote: Zygote | None = Zygote(command)

    def check(
        self, code: str, test: str, *, prompts: Sequence[str] = (), entry: str = "", partial: bool = False
    ) -> Verdict:
        """Put ``check(candidate)`` of `test` to the function `entry` of `code` (empty: its last function).

        The first of `prompts` that is Python and defines something goes before the code. partial: all assertions are
        tried, not up to the first that fails.
        """
        if len(code) > MAX_CODE:
            return Verdict("wrong", why=f"the code has {len(code)} characters, more than {MAX_CODE}")
        nonce = secrets.token_hex(16)
        job = {"nonce": nonce, "prompts": list(prompts), "code": code, "test": test, "entry": entry, "partial": partial}
        try:
            said, state = self._run(CALLED, framed(json.dumps(job)), time.monotonic() + self.timeout)
        except ZygoteGone as error:
            return Verdict("error", why=f"the sandbox died: {error}")
        if state == "timeout":
            return Verdict("timeout", why=f"no verdict within {self.timeout:g} s")
        return _verdict(said, nonce)

    def check_program(self, code: str, pairs: Sequence[tuple[str, str]], *, partial: bool = False) -> Verdict:
        """Run `code` once for each (input, expected output); spaces at the ends of lines do not count."""
        if len(code) > MAX_CODE:
            return Verdict("wrong", why=f"the code has {len(code)} characters, more than {MAX_CODE}")
        deadline = time.monotonic() + self.timeout
        passed = failed = 0
        why = ""
        for place, (given, expected) in enumerate(pairs):
            try:
                said, state = self._run(PROGRAM, framed(code) + _bytes(given), deadline)
            except ZygoteGone as error:
                return Verdict("error", why=f"the sandbox died: {error}")
            if state == "timeout":
                return Verdict("timeout", why=f"no end within {self.timeout:g} s, at test {place}")
            same = state == "ended" and lines_of(said.decode("utf-8", "replace")) == lines_of(expected)
            passed, failed = passed + same, failed + (not same)
            if not same:
                why = why or f"test {place}: {'another output' if state == 'ended' else 'it prints too much'}"
                if not partial:
                    break
        return Verdict("ok" if passed and not failed else "wrong", passed, failed, why)

    def output(self, code: str, given: str = "") -> str:
        """What the program prints, for the escape test."""
        said, state = self._run(PROGRAM, framed(code) + _bytes(given), time.monotonic() + self.timeout)
        return said.decode("utf-8", "replace") if state == "ended" else f"({state})"

    def _run(self, kind: bytes, sent: bytes, deadline: float) -> tuple[bytes, str]:
        """What came back, and "ended", "timeout" or "too much". A zygote that died by chance is replaced once."""
        try:
            return self._attempt(kind, sent, deadline)
        except ZygoteGone:
            return self._attempt(kind, sent, deadline + self.timeout)

    def _attempt(self, kind: bytes, sent: bytes, deadline: float) -> tuple[bytes, str]:
        with self._lock:
            try:
                zygote = self._zygote = self._zygote or Zygote(self._command)
            except NotStarted as error:
                raise ZygoteGone(str(error)) from error
            number = next(self._numbers)
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        try:
            try:
                zygote.start(kind, number, (theirs_in, theirs_out))
            finally:
                os.close(theirs_in)
                os.close(theirs_out)
            done, ours_in = exchange(ours_in, sent, ours_out, deadline), -1
            zygote.end(number)
            return done
        except ZygoteGone:
            with self._lock:
                if self._zygote is zygote:
                    self._zygote = None
                    zygote.close()
            raise
        finally:
            os.close(ours_out)
            if ours_in >= 0:
                os.close(ours_in)

    def close(self) -> None:
        with self._lock:
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None


def exchange(to: int, data: bytes, source: int, deadline: float) -> tuple[bytes, str]:
    """Write `data` and close, and read to the end, both as far as the other side goes along."""
    os.set_blocking(to, False)
    rest, received = memoryview(data), bytearray()
    poll = select.poll()
    poll.register(source, select.POLLIN)
    poll.register(to, select.POLLOUT)
    try:
        while (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000 + 1):
                if fd == source:
                    chunk = os.read(source, 1 << 16)
                    received += chunk
                    if not chunk:
                        return bytes(received), "ended"
                    if len(received) > MAX_FRAME:
                        return bytes(received), "too much"
                    continue
                with contextlib.suppress(BlockingIOError):
                    rest = rest[_written(to, rest) :]
                if not rest:
                    poll.unregister(to)
                    os.close(to)
                    to = -1
        return bytes(received), "timeout"
    finally:
        if to >= 0:
            os.close(to)


def _written(fd: int, rest: memoryview) -> int:
    try:
        return os.write(fd, rest[: 1 << 16])
    except BrokenPipeError:  # nobody reads any more: the rest is as good as written
        return len(rest)


def framed(text: str) -> bytes:
    body = _bytes(text)
    return LENGTH.pack(len(body)) + body


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _verdict(said: bytes, nonce: str) -> Verdict:
    try:
        told: dict[str, Any] = json.loads(said[LENGTH.size :])
    except ValueError:
        return Verdict("error", why="the grader ended without a verdict")
    if not secrets.compare_digest(str(told.get("nonce")), nonce):
        return Verdict("error", why="a verdict that is not the grader's")
    return Verdict(told["verdict"], told["passed"], told["failed"], told["why"])
