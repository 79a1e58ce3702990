"""Nothing gets out of the sandbox and no verdict is taken by trickery, on every tier that this machine has."""

import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from escapes import ATTEMPT, ATTEMPTS, CHEATS, HANGS, SECRET

from klimb.rewards.sandbox import Sandbox
from klimb.rewards.sandbox.run import NotStarted
from klimb.rewards.sandbox.tiers import TIERS, UNSAFE, attacked

TEST = "def check(candidate):\n    assert candidate({asked!r}) == {expected!r}\n"
LOOPS = """
def check(candidate):
    assert True
    assert all(y == {expected!r} for y in map(candidate, [1, 2])), "a loop that StopIteration would end in silence"
    assert True
    assert 1 < 2
"""


def opened(tier: str, timeout: float) -> Sandbox:
    try:
        return attacked(tier, timeout)
    except NotStarted as error:
        pytest.skip(f"{tier}: {error}")


@pytest.fixture(scope="module", params=TIERS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    box = opened(request.param, 60.0)
    yield box
    box.close()


@pytest.fixture(scope="module", params=TIERS)
def impatient(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    box = opened(request.param, 1.0)
    yield box
    box.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "canary").write_text("untouched")
    os.chmod(tmp_path / "canary", 0o600)
    return tmp_path


def attempt(box: Sandbox, body: str, folder: Path, expected: str) -> str:
    code = ATTEMPT.format(body=f"    {body}")
    verdict = box.check(code, TEST.format(asked=str(folder), expected=expected), entry="f")
    return verdict.kind if verdict.kind != "wrong" else verdict.why


@pytest.mark.parametrize("name", ATTEMPTS)
def test_contained(sandbox: Sandbox, folder: Path, name: str) -> None:
    shared = set(os.listdir("/dev/shm"))
    before = (folder / "canary").stat()
    assert attempt(sandbox, ATTEMPTS[name], folder, "contained") == "ok"
    after = (folder / "canary").stat()
    assert (after.st_mode, after.st_uid, after.st_nlink, after.st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_nlink, before.st_mtime_ns,
    )  # fmt: skip
    assert (folder / "canary").read_text() == "untouched"
    assert os.listdir(folder) == ["canary"]
    assert not list(Path("/tmp").glob("klimb-escape*"))
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "klimb" in name}


CONTROLS = (
    "read a file of the user's", "read /etc/passwd", "reach its descriptors by /proc", "overwrite a file",
    "write a new file", "delete", "a file in memory", "fork", "run a program", "a UNIX socket", "let itself be traced",
)  # fmt: skip


def test_attempts_succeed_without_a_sandbox(tmp_path: Path) -> None:
    """What is contained above is an attempt at something."""
    box = attacked(UNSAFE, 60.0)
    for number, name in enumerate(CONTROLS):
        folder = Path(tempfile.mkdtemp(prefix=f"k{number}"))  # the path of a socket may have 107 bytes
        (folder / "canary").write_text("untouched")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{folder}/socket")
            listening.listen()
            body = ATTEMPTS[name].replace("'/run/klimb.sock'", "folder + '/socket'")
            body = body.replace(".write('mine')", "")  # the limit on the size of files holds here too
            assert attempt(box, body, folder, "escaped") == "ok", name
    box.close()


@pytest.mark.parametrize("name", CHEATS)
def test_no_verdict_is_taken(sandbox: Sandbox, name: str) -> None:
    secret = SECRET + secrets.token_hex(8)
    verdict = sandbox.check(CHEATS[name], TEST.format(asked=1, expected=secret), entry="f")
    assert (verdict.kind, verdict.passed) == ("wrong", 0)
    verdict = sandbox.check(CHEATS[name], LOOPS.format(expected=secret), entry="f", partial=True)
    assert (verdict.kind, verdict.passed) == ("wrong", 0)


def test_who_knows_the_answer_passes(sandbox: Sandbox) -> None:
    for test in (TEST.format(asked=1, expected="it"), LOOPS.format(expected="it")):
        assert sandbox.check("def f(x): return 'it'", test, entry="f", partial=True).kind == "ok"


@pytest.mark.parametrize("name", HANGS)
def test_a_hang_ends(impatient: Sandbox, name: str) -> None:
    started = time.monotonic()
    verdict = impatient.check(HANGS[name], TEST.format(asked=1, expected=1), entry="f")
    assert verdict.kind in ("timeout", "wrong")
    assert time.monotonic() - started < 30  # 1 s, and what a busy machine adds
    assert impatient.check("def f(x): return 1", TEST.format(asked=1, expected=1), entry="f").kind in ("ok", "timeout")
