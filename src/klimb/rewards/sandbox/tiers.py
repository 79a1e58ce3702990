"""Which sandbox this machine has: each tier is started and attacked before it is believed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from klimb.errors import RewardError
from klimb.rewards.sandbox.run import NotStarted, Sandbox, ZygoteGone

TIERS = ("bubblewrap", "landlock")
UNSAFE = "unsafe_local"
MEMORY = 1 << 29
"""Bytes of address space for each candidate and each grader."""
PATIENCE = 30.0
"""Seconds for each part of the escape test."""
HERE = Path(__file__).resolve().parent
BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from inside.zygote import main; del sys.path[0]; main()"

ESCAPES = """
import ctypes, json, os, socket
canary = input()

def attempts():
    yield "read a file", lambda: open(canary).read()
    yield "list a directory", lambda: os.listdir(os.path.dirname(canary))
    yield "write a file", lambda: open(canary + "-", "w")
    yield "write to /dev/shm", lambda: open("/dev/shm/klimb-escape", "w")
    yield "delete a file", lambda: os.unlink(canary)
    yield "change a mode", lambda: os.chmod(canary, 0o777)
    yield "read another process", lambda: open(f"/proc/{os.getppid()}/environ", "rb").read()
    yield "a TCP socket", lambda: socket.socket()
    yield "a UDP socket", lambda: socket.socket(type=socket.SOCK_DGRAM)
    yield "a UNIX socket", lambda: socket.socket(socket.AF_UNIX)
    yield "signal the parent", lambda: os.kill(os.getppid(), 0)
    yield "a new process", lambda: os.fork() or os._exit(0)
    yield "a program", lambda: os.posix_spawn("/bin/sh", ["sh", "-c", "true"], {})
    yield "the memory of another", lambda: failing(ctypes.CDLL(None).syscall(310, os.getppid(), 0, 0, 0, 0, 0))
    yield "too much memory", lambda: bytearray(1 << 31)

def failing(result):
    if result < 0:
        raise OSError

def succeeds(act):
    try:
        act()
    except (OSError, MemoryError):
        return False
    return True

escaped = [name for name, act in attempts() if succeeds(act)]
print(json.dumps({"escaped": escaped, "library": succeeds(lambda: open(os.__file__).read())}))
"""


def open_sandbox(timeout: float, *, unsafe_local: bool = False, tiers: Sequence[str] = TIERS) -> Sandbox:
    """The first of `tiers` that holds here. Raises RewardError where none does and `unsafe_local` is not given."""
    reasons = []
    for tier in (*tiers, UNSAFE) if unsafe_local else tiers:
        try:
            return attacked(tier, timeout)
        except NotStarted as error:
            reasons.append(f"{tier}: {error}")
    raise RewardError(
        "no sandbox for code on this machine", where="reward code", why="; ".join(reasons),
        fix="install bubblewrap (apt install bubblewrap) or run on Linux 5.13 or later with Landlock; "
        "unsafe_local: true runs the policy's code with your rights",
    )  # fmt: skip


def attacked(tier: str, timeout: float) -> Sandbox:
    """A sandbox that has withstood the escape test. Raises NotStarted, also where it has not."""
    sandbox = Sandbox(tier, partial(command, tier, timeout), PATIENCE)
    try:
        problem = _weakness(sandbox)
        sandbox.timeout = timeout
    except ZygoteGone as error:
        problem = f"it died in the escape test: {error}"
    if problem:
        sandbox.close()
        raise NotStarted(problem)
    return sandbox


def _weakness(sandbox: Sandbox) -> str:
    """What is wrong with the sandbox, in one line; empty where nothing is found."""
    test = "def check(candidate):\n    assert candidate([1, 2]) == (3, {'a': 1.5})\n"
    for answer, wanted in (("(3, {'a': 1.5})", "ok"), ("4", "wrong")):
        verdict = sandbox.check(f"def f(x): return {answer}", test, entry="f")
        if verdict.kind != wanted:
            return f"a check gave {verdict.kind} instead of {wanted}: {verdict.why}"
    if sandbox.tier == UNSAFE:
        return ""
    with tempfile.TemporaryDirectory(prefix="klimb-canary-") as folder:
        canary = Path(folder, "canary")
        canary.write_text("not for the candidate")
        said = sandbox.output(ESCAPES, f"{canary}\n")
    try:
        found = json.loads(said)
    except ValueError:
        return f"the escape test ended with {said[:200]!r}"
    if not found["library"]:
        return "Python cannot read its own library in it"
    return f"escaped: {', '.join(found['escaped'])}" if found["escaped"] else ""


def command(tier: str, timeout: float, control: int) -> list[str]:
    """The command line of a zygote. Raises NotStarted where there is no bwrap."""
    executable = os.path.realpath(sys.executable)
    base = sys.base_prefix
    readable = [f"{base}/lib", f"{base}/{sys.platlibdir}", "/lib", "/lib64", "/usr/lib", "/usr/lib64",
                "/etc/ld.so.cache", executable]  # fmt: skip
    readable = [path for path in dict.fromkeys(readable) if os.path.exists(path)]
    cpu = str(int(timeout) + 2)  # the deadline comes first, unless there are several threads
    python = [executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", BOOT, str(HERE), str(control), tier]
    python += [str(MEMORY), cpu, *readable]
    if tier != "bubblewrap":
        return python
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NotStarted("not installed")
    binds = [word for path in (*readable, str(HERE)) for word in ("--ro-bind", path, path)]
    return [
        bwrap, "--unshare-all", "--new-session", "--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", *binds,
        "--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/", "--", *python,
    ]  # fmt: skip
