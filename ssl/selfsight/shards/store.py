"""Where the files of a corpus lie, and how their bytes are had: whole small files, and spans of shards.

A `Store` knows names and bytes and checks nothing: who asks compares what comes with the checksums of manifest and
index. Every method may be called from several threads at once; after a fork, open another.
"""

import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path

from selfsight.shards.cache import Cache, Opened
from selfsight.shards.remote import LISTED, Patience, RemoteFiles

OPEN_FILES = 64
FILE_SCHEME = "file://"


def is_url(place: str | Path) -> bool:
    """Whether `place` is anything but a path of this machine."""
    return "://" in str(place) and not str(place).startswith(FILE_SCHEME)


def open_store(root: str | Path, *, cache: Cache | None = None, patience: Patience | None = None) -> "Store":
    """The store of the corpus at a path or any URL of fsspec.

    `cache` and `patience` None are those of the environment: SELFSIGHT_CACHE, SELFSIGHT_CACHE_BYTES; SELFSIGHT_TRIES,
    SELFSIGHT_PAUSE, SELFSIGHT_SILENCE.
    """
    return Store(root, cache, patience)


class Store:
    """Names are relative to the root of the corpus, or complete paths or URLs by themselves."""

    def __init__(self, root: str | Path, cache: Cache | None = None, patience: Patience | None = None) -> None:
        self.root = str(root).removeprefix(FILE_SCHEME)
        self._cache, self._patience = cache, patience
        self._here = LocalFiles()
        self._away: RemoteFiles | None = None
        self._lock = threading.Lock()

    def locate(self, name: str) -> str:
        """The complete path or URL of a file."""
        if is_url(name):
            return name
        if is_url(self.root) and not (os.path.isabs(name) or name.startswith(FILE_SCHEME)):
            return f"{self.root.rstrip('/')}/{name}"
        return str(Path(self.root) / name.removeprefix(FILE_SCHEME))

    def missing(self, names: list[str]) -> list[str]:
        """Those of `names` that are not there.

        Every path is looked at. Below a root that is a URL, folders are listed, where that takes few requests and the
        place allows it; whether other URLs hold anything will be seen when they are read.
        """
        places = {n: self.locate(n) for n in names}
        below = [n for n in names if is_url(places[n]) and not is_url(n)]
        folders = {os.path.dirname(n) for n in below} if len(below) <= LISTED else ()
        listed = {folder: self._remote().names(self.locate(folder)) for folder in folders}

        def is_missing(name: str) -> bool:
            if not is_url(places[name]):
                return not os.path.isfile(places[name])
            folder, last = os.path.split(name)
            return not is_url(name) and (known := listed.get(folder)) is not None and last not in known

        return [n for n in names if is_missing(n)]

    def read(self, name: str) -> bytes:
        """A whole file as it is now. Raises OSError."""
        place = self.locate(name)
        return self._remote().read(place) if is_url(place) else Path(place).read_bytes()

    def open(self, name: str, digest: str) -> Opened:
        """A whole file whose SHA-256 should be `digest`, for the caller to close: a FileIO wherever there is room for
        it on this machine. Raises OSError."""
        place = self.locate(name)
        return self._remote().kept(place, digest) if is_url(place) else FileIO(place)

    def span(
        self, name: str, start: int, stop: int, *, run: tuple[int, int], digest: str, again: bool = False
    ) -> bytes:
        """Bytes [start, stop) of a file whose SHA-256 is `digest`; fewer where it ends before. Raises OSError.

        `run` is the range of bytes of which more will be asked soon: if it is far away, it is fetched as one and kept
        on this machine. `again` says that what came last was damaged: it is fetched once more from where it lies.
        """
        place = self.locate(name)
        if is_url(place):
            return self._remote().span(place, start, stop, run=run, digest=digest, again=again)
        return self._here.span(place, start, stop)

    def too_small_for(self, need: int) -> str | None:
        """A sentence where reading keeps `need` bytes in use at once and the cache of this machine has less."""
        cache = self._remote().cache
        if (capacity := cache.capacity()) >= need:
            return None
        return (
            f"reading {self.root} keeps {need / 1e9:.1f} GB in use at once, the cache {cache.folder} may hold "
            f"{capacity / 1e9:.1f} GB: raise SELFSIGHT_CACHE_BYTES, or its runs are fetched many times over"
        )

    def _remote(self) -> RemoteFiles:
        with self._lock:
            if self._away is None:
                self._away = RemoteFiles(self._cache, self._patience)
            return self._away


class LocalFiles:
    """Files of this machine. They are read, not mapped: a file cut short under a map would end the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def span(self, path: str, start: int, stop: int) -> bytes:
        file = self._opened(path)
        parts, at = [], start
        while at < stop and (part := os.pread(file.fileno(), stop - at, at)):  # 2 GiB at most in one read
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _opened(self, path: str) -> FileIO:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = FileIO(path)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)  # closes when its last reader lets go of it
            self._files.move_to_end(path)
            return file
