from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

OPERATIONS = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
FINISHED, RAISED, KILLED = 0, 1, 9


@pytest.fixture
def run_and_kill() -> Callable[[Callable[[], object], int], bool]:
    """Runs a job in a forked child that ends, as by SIGKILL, after its n-th operation on the disk, from 1.

    If that is a write, it is cut in half. True when the job got through before.
    """

    def run(job: Callable[[], object], operations: int) -> bool:
        child = os.fork()
        if not child:
            try:
                with _ending_after(operations):
                    job()
                os._exit(FINISHED)
            except BaseException:
                traceback.print_exc()
                os._exit(RAISED)
        outcome = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert outcome in (FINISHED, KILLED), f"the job itself failed before operation {operations}"
        return outcome == FINISHED

    return run


def _ending_after(operations: int) -> Any:
    left = operations

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def operation(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and name == "write":
                args = (args[0], memoryview(args[1])[: len(args[1]) // 2])
            try:
                return real(*args, **options)
            finally:
                if left == 0:
                    os._exit(KILLED)

        return operation

    return mock.patch.multiple(os, **{name: counted(name) for name in OPERATIONS})
