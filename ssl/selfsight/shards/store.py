"""Where the files of a corpus lie, and how their bytes are had: whole small files, and spans of shards.

A `Store` knows names and bytes and checks nothing: who asks compares what comes with the checksums of manifest and
index. Every method may be called from several threads at once.
"""

import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Protocol

OPEN_FILES = 64


class Store(Protocol):
    """Names are relative to the folder of the corpus, or complete paths or URLs by themselves."""

    def locate(self, name: str) -> str:
        """The complete path or URL of a file, for messages."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises OSError."""
        ...

    def span(self, name: str, start: int, stop: int, *, run: tuple[int, int], digest: str) -> bytes:
        """Bytes [start, stop) of a file whose SHA-256 is `digest`; fewer where it ends before. Raises OSError.

        `run` is the range of bytes of which more will be asked soon: a store that is far away fetches it as one.
        """
        ...


def open_store(root: str | Path) -> Store:
    return LocalStore(Path(root))


class LocalStore:
    """Files of this machine. They are read, not mapped: a file cut short under a map would end the process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def locate(self, name: str) -> str:
        return str(self.root / name)

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def span(self, name: str, start: int, stop: int, *, run: tuple[int, int], digest: str) -> bytes:
        file = self._opened(name)
        parts, at = [], start
        while at < stop and (part := os.pread(file.fileno(), stop - at, at)):  # 2 GiB at most in one read
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _opened(self, name: str) -> FileIO:
        with self._lock:
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = FileIO(self.root / name)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)  # closes when its last reader lets go of it
            self._files.move_to_end(name)
            return file
