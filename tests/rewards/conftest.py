"""No test of a reward may leave anything behind."""

import os
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
    assert descendants(os.getpid()) == before[0]
    assert open_files() == before[1]
    assert strays() == before[2]
