"""Names that people type: a value out of a file of theirs, and a helpful error where a name is unknown."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any


def is_reference(text: str) -> bool:
    """Whether `text` points into a file ("rewards.py:score") rather than naming something built in."""
    path, _, name = text.rpartition(":")
    return path.endswith(".py") and name.isidentifier()


def load_attribute(reference: str) -> Any:
    """The value `NAME` of ``path/to/file.py:NAME``. An unchanged file is run once in a process.

    Raises ValueError: no such file, the file fails when it is run, it has no such name.
    """
    path, name = _split(reference)
    module = _module(path)
    if not hasattr(module, name):
        own = (key for key, value in vars(module).items() if not (key.startswith("_") or isinstance(value, ModuleType)))
        raise unknown_name(f"{reference}: the file has no", name, own)
    return getattr(module, name)


def source_hash(reference: str) -> str:
    """SHA-256 of the file that ``file.py:NAME`` points into: a result is reused only while it is the same."""
    return hashlib.sha256(_split(reference)[0].read_bytes()).hexdigest()


def unknown_name(where: str, name: str, known: Iterable[str]) -> ValueError:
    """``algorithm: unknown 'gpro', did you mean 'grpo'? Known: ...`` in one line, for the caller to raise."""
    known = sorted(known)
    swapped = [candidate for candidate in known if sorted(candidate) == sorted(name)]
    near = swapped or difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean '{near[0]}'?" if near else "."
    return ValueError(f"{where} '{name}'{hint} Known: {', '.join(known) or 'none'}.")


def _split(reference: str) -> tuple[Path, str]:
    if not is_reference(reference):
        raise ValueError(f"'{reference}' is no reference into a file: write it as path/to/file.py:NAME.")
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"{reference}: there is no file {path} (looked in {Path.cwd()}); check the path.")
    return path.resolve(), name


def _module(path: Path) -> ModuleType:
    # Keyed by place and content: an edited file is loaded anew, an unchanged one keeps its identity.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    key = f"klimb_plugin_{path.stem}_{digest[:16]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None  # always so for a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # before it runs: dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[key]
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{path}{_line(error, path)}: running the file failed with {type(error).__name__}: {error}"
        ) from error
    return module


def _line(error: Exception, path: Path) -> str:
    """`:LINE` of the last place in the user's own file that the error went through."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f":{line}" if line else ""
