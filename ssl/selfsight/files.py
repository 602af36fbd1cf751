"""How anything gets its name on disk: written under a temporary name in the same folder, fsynced, renamed.

A reader sees the old file, the new one, or none, and never half of one, whenever the writer dies.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def publish(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync_files(folder: Path) -> None:
    """Makes the files that lie in `folder` durable, and then their names."""
    for path in (p for p in folder.iterdir() if p.is_file()):
        sync(path)
    sync(folder)


def sweep(folder: Path) -> None:
    """Removes what a killed writer left under temporary names."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
