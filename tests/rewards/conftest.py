"""No test of a reward may leave anything behind."""

import os
import time
from collections.abc import Iterator

import pytest
from reward_processes import descendants, open_files, strays


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves a process, a zombie, a daemon or an open file behind."""
    os.environ["DAEMON_MARK"] = (
        f"started-by-the-tests-of-{os.getpid()}"  # no confusion with tests that run beside these
    )
    before = (descendants(os.getpid()), open_files(), strays())
    yield
    assert not descendants(os.getpid()) - before[0]  # one of an earlier test may have ended meanwhile
    assert open_files() <= before[1]
    deadline = time.monotonic() + 5.0
    while strays() != before[2] and time.monotonic() < deadline:
        time.sleep(0.01)  # an orphan that was killed ends in its own time: only init can wait for it
    assert strays() == before[2]
