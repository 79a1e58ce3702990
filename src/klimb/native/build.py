"""kernels.c → a library for this processor, made by the C compiler that is here and kept for the next time."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime is the one that the library finds when it is loaded)

_SOURCE = Path(__file__).with_name("kernels.c")
# OpenMP when compiling, not when linking: a second runtime beside torch's would fight with it for the cores.
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=gnu11", "-fPIC", "-c")
_PATIENCE = 120  # seconds for the compiler, which takes three


class Unavailable(Exception):
    """Why there are no kernels here; torch's operators do the work."""


def library() -> ctypes.CDLL:
    """Raises Unavailable."""
    if sys.platform != "linux":
        raise Unavailable(f"they are built on Linux only, this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise Unavailable("no C compiler was found; install gcc")
    place = _cache() / f"kernels-{_identity(compiler)}.so"
    try:
        if not place.exists():
            _build(compiler, place)
        return ctypes.CDLL(str(place))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} built nothing that can be loaded: {error}") from None


def identity() -> str:
    """Compiler and source that the kernels come from, for the manifest: other ones round differently."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    return _identity(compiler) if compiler else ""


def _identity(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_PATIENCE).stdout
    parts = (_SOURCE.read_bytes(), version, " ".join(_COMPILE).encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What -march=native looks at: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU"))}))


def _cache() -> Path:
    """The user's cache, or a folder for this process alone where that cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klimb"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="klimb-kernels-"))
    return base if os.access(base, os.W_OK) else Path(tempfile.mkdtemp(prefix="klimb-kernels-"))


def _build(compiler: str, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        for command in ([*_COMPILE, _SOURCE, "-o", compiled], ["-shared", compiled, "-o", linked, "-lm"]):
            done = subprocess.run([compiler, *map(str, command)], capture_output=True, text=True, timeout=_PATIENCE)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or ["no message"])[0])
        linked.replace(place)  # whole or not at all: another process may build it too
