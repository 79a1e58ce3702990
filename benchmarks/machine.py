"""What the figures were measured on, and where they are kept."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LOAD_AT_START = os.getloadavg()[0]


def facts(threads: int, malloc: str) -> dict[str, Any]:
    return {
        "processor": processor(), "threads": threads, "malloc": malloc,
        "load_before_and_now": [LOAD_AT_START, os.getloadavg()[0]], "system": platform.platform(),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers"),
        "trl": version_of("trl"), "klimb": version("klimb"), "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }  # fmt: skip


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def multiplies_bf16() -> bool:
    """Are there units for it? Without them bfloat16 is slower than float32 and a comparison in it says nothing."""
    return "_bf16" in processor()


def processor() -> str:
    """Name, and what it can multiply."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ", ".join([name, f"{os.cpu_count()} cores", *wide])


def keep(result: dict[str, Any], file: Path | None) -> None:
    """Write a result, where a file was asked for."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n")
