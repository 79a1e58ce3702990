"""Without a compiler, with a spoiled library, in a folder that cannot be written: klimb goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from klimb import native

PROGRAM = "from klimb import native; print(native.why_not())"


def reason(cache: Path, **variables: str) -> str:
    """What a fresh process says."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("/nowhere/cc", "no C compiler was found; install gcc"),
        ("'cc", "is no command"),
        ("false", "the C compiler does not run"),
        ("echo", "built nothing that can be loaded"),
    ],
)
def test_a_compiler_that_does_not_work_is_named(tmp_path: Path, compiler: str, told: str) -> None:
    assert told in reason(tmp_path, CC=compiler)


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_a_compiler_may_be_started_by_another_program(tmp_path: Path) -> None:
    assert reason(tmp_path, CC="env cc -pipe") == "None"


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_the_library_is_kept_and_made_again_when_it_is_spoiled(tmp_path: Path) -> None:
    assert reason(tmp_path) == "None"
    (library,) = (tmp_path / "klimb").iterdir()
    made = library.stat().st_mtime_ns
    assert reason(tmp_path) == "None"
    assert library.stat().st_mtime_ns == made
    library.write_bytes(library.read_bytes()[:100])
    assert reason(tmp_path) == "None"
    assert library.stat().st_size > 1000


@pytest.mark.skipif(native.why_not() is not None, reason=f"no kernels: {native.why_not()}")
def test_a_cache_that_cannot_be_made_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "klimb").write_text("a file where the folder would be")
    assert reason(tmp_path) == "None"
