"""The C sources here → a library for this processor, made by the compiler that is here, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime is the one that the library finds when it is loaded)

_FOLDER = Path(__file__).parent
_SOURCES = ("attention.c", "decoder.c", "head.c", "layers.c", "panels.c")
_KINDS = {"fp32": (), "bf16": ("-DBF16",)}
"""What tensors hold: each source is compiled for both."""
# OpenMP when compiling, not when linking: a second runtime beside torch's would fight with it for the cores.
_COMPILE = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-std=gnu11", "-fPIC", "-c")
_PATIENCE = 120  # seconds for the compiler, which takes three


class Unavailable(Exception):
    """Why there are no kernels here; torch's operators do the work."""


@cache
def identity() -> str:
    """Of sources, compiler and processor: others may round differently. Raises Unavailable."""
    try:
        version = subprocess.run([*_compiler(), "--version"], capture_output=True, check=True, timeout=_PATIENCE).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the C compiler does not run: {error}") from None
    sources = [path.read_bytes() for path in sorted(_FOLDER.glob("*.[ch]"))]
    flags = " ".join([*_compiler()[1:], *_COMPILE, *itertools.chain(*_KINDS.values())]).encode()
    return hashlib.sha256(b"\0".join([*sources, version, flags, _processor()])).hexdigest()[:16]


def library() -> ctypes.CDLL:
    """Raises Unavailable."""
    place = _cache() / f"kernels-{identity()}.so"
    try:
        if place.exists():
            try:
                return ctypes.CDLL(str(place))
            except OSError:  # cut off or spoiled since: made again
                place.unlink()
        _build(place)
        return ctypes.CDLL(str(place))
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{shlex.join(_compiler())} built nothing that can be loaded: {error}") from None


def _compiler() -> list[str]:
    """With what comes before and behind it: CC="ccache gcc -m64"."""
    if sys.platform != "linux":
        raise Unavailable(f"they are built on Linux only, this is {sys.platform}")
    given = os.environ.get("CC") or "cc"
    try:
        command, *more = shlex.split(given)
    except ValueError as error:
        raise Unavailable(f"CC={given} is no command: {error}") from None
    compiler = shutil.which(command)
    if compiler is None:
        raise Unavailable("no C compiler was found; install gcc" + (f" (CC={given})" if "CC" in os.environ else ""))
    return [compiler, *more]


def _processor() -> bytes:
    """What -march=native looks at: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"\n".join(
        sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU"))})
    )


def _cache() -> Path:
    """The user's cache, or a folder for this process alone where that cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klimb"
    try:
        base.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="klimb-kernels-"))
    return base if os.access(base, os.W_OK) else Path(tempfile.mkdtemp(prefix="klimb-kernels-"))


def _build(place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        linked = Path(folder, "kernels.so")
        objects = []
        for source, kind in itertools.product(_SOURCES, _KINDS):
            objects.append(Path(folder, f"{source}-{kind}.o"))
            _run(*_compiler(), *_COMPILE, *_KINDS[kind], _FOLDER / source, "-o", objects[-1])
        _run(*_compiler(), "-shared", *objects, "-o", linked, "-lm")
        linked.replace(place)  # whole or not at all: another process may build it too


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["no message"])[0])
