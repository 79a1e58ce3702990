"""The process that a reward function from a file runs in.

``python -m klimb.rewards.worker TARGET REQUESTS REPLIES`` is two processes. The supervisor, which runs none of
the user's code, waits; its child, the worker proper, loads the function and answers requests::

    trainer ── requests ────────▶ worker    a frame a call: {"arguments": {…}, "rows": 8, "timeout": 60}
            ◀──────── replies ───           a frame each: {"values": […], "failures": […]} or {"failed": …}
            ◀── stdout + stderr ──          whatever the user prints; never read as an answer

When the trainer closes the requests or dies, and when the worker ends, the supervisor kills whatever the
user's code has started, daemons included, because Linux hands it every orphan below it. Frames are JSON
behind four bytes of length.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from klimb.errors import KlimbError, RewardError, one_line
from klimb.rewards.calling import Caller, CallFailed, raised
from klimb.rewards.frames import read_frame, write_frame

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STDERR = 2


def main() -> None:
    target, requests, replies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trainer = os.getppid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    worker = os.fork()
    if worker == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == supervisor:
            serve(target, requests, replies)
        os._exit(0)
    os.close(replies)
    os._exit(supervise(worker, requests, trainer))


# ---- the supervisor


def supervise(worker: int, requests: int, trainer: int) -> int:
    """Wait until the worker or the trainer ends, then kill what is left. Returns the worker's status as a
    shell does.
    """
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    hang_up = select.poll()
    hang_up.register(requests, 0)  # the reading end hears POLLHUP once nobody can write any more
    status = None
    while status is None and not told and not hang_up.poll(50) and os.getppid() == trainer:
        status = _reaped(worker)
    deadline = time.monotonic() + 4.0
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
        ended = _reaped(worker)
        status = ended if status is None else status
    code = os.waitstatus_to_exitcode(status or 0)
    return code if code >= 0 else 128 - code


def _reaped(worker: int) -> int | None:
    """Wait for every child that has ended, adopted ones included. Returns the worker's status if it was
    among them.
    """
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, ended = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == worker:
                status = ended
    return status


def _children() -> list[int]:
    """Living and dead children of this process. Empty where the system does not tell: the trainer kills the
    group.
    """
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# ---- the worker proper


def serve(target: str, requests: int, replies: int) -> None:
    """Load the function, say what it accepts, and answer until the requests end."""
    faulthandler.enable(file=STDERR)
    me = os.getpid()
    for end in (requests, replies):
        os.set_inheritable(end, False)  # programs that the user starts do not get them
    try:
        caller = Caller(load(target), target)
    except KlimbError as error:
        write_frame(replies, {"error": str(error)})
        return
    except BaseException as error:  # whatever the user's file does when it is loaded
        failure = RewardError("the file cannot be loaded", where=target, why=raised(error).reason, fix="correct it")
        write_frame(replies, {"error": str(failure)})
        return
    signature = caller.signature
    accepts = None if signature.accepts is None else sorted(signature.accepts)
    write_frame(replies, {"pid": me, "accepts": accepts, "requires": sorted(signature.requires)})
    while (request := read_frame(requests)) is not None:
        reply = answer(caller, request)
        if os.getpid() != me:  # the user's function forked and both sides returned; one answer is enough
            os._exit(0)
        write_frame(replies, reply)


def load(target: str) -> Any:
    """The function named by ``file.py:name``, or the rule described by a JSON object."""
    if target.startswith("{"):
        from klimb.rewards.catalogue import parse_rule
        from klimb.rewards.rules import rule_function

        [(name, options)] = json.loads(target).items()
        rule = parse_rule(name, options)
        getattr(rule, "begin", lambda: None)()
        return rule_function(rule)
    from klimb.plugin import load_attribute

    sys.path.insert(0, str(Path(target.rpartition(":")[0]).expanduser().resolve().parent))  # as for any script
    try:
        return load_attribute(target)
    except ValueError as error:
        raise RewardError(one_line(error)) from error


def answer(caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request. Half-way to the deadline the stack goes to stderr, to show where it hangs."""
    faulthandler.dump_traceback_later(0.5 * request["timeout"], file=STDERR)
    try:
        scores = caller(request["arguments"], request["rows"])
    except CallFailed as failed:
        return {"failed": [failed.kind, failed.reason, failed.details]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    failures = [[failure.row, failure.reason, failure.details] for failure in scores.failures]
    return {"values": scores.values, "failures": failures}


# ---- frames


if __name__ == "__main__":
    main()
