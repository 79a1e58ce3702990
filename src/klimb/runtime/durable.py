"""Files that are whole or absent, whenever the process is killed or the power goes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klimb.errors import RunError

TEMPORARY = ".tmp-"
"""Prefix of what is not finished. Whoever owns the folder may delete it."""


@contextmanager
def explained(what: str, where: Path, fix: str) -> Iterator[None]:
    """What the system refuses (disk full, no permission) becomes a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(what, where=where, why=error.strerror or error, fix=fix) from error


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that nobody reads yet, down to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Readers see the old content or the new one, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        write_new(temporary, data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill. As `path`, which must be free, it appears whole, on an error not at all."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    remove_folder(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Under its own name the folder is whole or gone, also when the deletion is cut short."""
    if path.exists() and not path.name.startswith(TEMPORARY):
        doomed = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path = path.rename(doomed)
    if path.exists():
        shutil.rmtree(path)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a killed process left unfinished in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def sync(path: Path) -> None:
    """Down to the disk with a file, or with the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names; hidden ones do not count."""
    if not path.is_dir():
        return file_hash(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{file_hash(file)} {name.as_posix()}\n".encode())
    return digest.hexdigest()
