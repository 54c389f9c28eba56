"""Files that are whole or not there: written aside, synced, renamed. What the disk refuses becomes one line for the user."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upo.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once. Raises OSError with nothing changed."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path, option: str) -> None:
    """Raise RunError if this folder, which need not exist yet, cannot be written to. `option` starts the message."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise RunError(f"{option} {folder}: {there} is a file. Name a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"{option} {folder}: {there} cannot be written to (no permission, or a read-only file system). Name another folder.")


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Within it an OSError (disk full, read-only, no permission) becomes a RunError about `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}). {remedy}") from None
