"""Where extracted features are kept: a folder per key, one memory-mapped array, filled block by block by any number of
processes.

The key is a digest of everything that decides a feature, so an entry cannot be stale: other weights, another corpus or
another preprocessing are another folder. A block is claimed by a lock that dies with its process and is marked done
once its rows are on the disk, so that no image is computed twice and a killed extraction goes on where it was.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from eval_probes.pooling import Pooling
from selfsight.errors import UserError
from selfsight.files import sync

SCHEMA = 2
ARRAY, KEY, BLOCKS = "features.npy", "key.json", "blocks"
BLOCK = 4096  # rows, at least
MOST_BLOCKS = 4096  # of an entry


def default_folder() -> Path:
    """$SELFSIGHT_CACHE or ~/.cache/selfsight, and there `features`."""
    root = os.environ.get("SELFSIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "selfsight") / "features"


class FeatureStore:
    """`entry` gives the place of a key's features, which several processes may fill together."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def entry(self, key: dict[str, Any], pooling: Pooling, n: int, embed_dim: int, dtype: str) -> "Entry":
        """The entry for the features of `n` images under the JSON-able `key`: one that is complete and holds at least
        what `pooling` wants, or else this pooling's own, begun or new.

        Raises UserError when the disk has no room for it.
        """
        text = json.dumps({"schema": SCHEMA, **key, "dtype": dtype}, sort_keys=True, indent=1)
        family = self.folder / hashlib.sha256(text.encode()).hexdigest()
        stored = pooling.stored
        wider = sorted((w for w in _poolings(family) if w.covers(stored)), key=lambda w: w.width(embed_dim))
        for candidate in wider:
            found = Entry(family / candidate.tag, candidate, (n, candidate.width(embed_dim)), np.dtype(dtype))
            if found.complete:
                return found
        entry = Entry(family / stored.tag, stored, (n, stored.width(embed_dim)), np.dtype(dtype))
        if not entry.begun:
            entry.begin(text)
        return entry


class Entry:
    """Features (n, width) on their way to being complete."""

    def __init__(self, path: Path, pooling: Pooling, shape: tuple[int, int], dtype: np.dtype) -> None:
        self.path, self.pooling, self.shape, self.dtype = path, pooling, shape, dtype
        self.rows = max(BLOCK, -(-shape[0] // MOST_BLOCKS))
        self.n_blocks = -(-shape[0] // self.rows)

    @property
    def begun(self) -> bool:
        """Whether the array is there and whole, filled or not."""
        return self._map("r") is not None

    @property
    def complete(self) -> bool:
        return self.begun and all(self._done(block) for block in range(self.n_blocks))

    def begin(self, key: str) -> None:
        """Makes the empty entry, if nobody else was faster."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who looks, removes and makes does it alone
            if self.begun:
                return
            shutil.rmtree(self.path, ignore_errors=True)  # a damaged one
            self._reserve()
            temporary = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent))
            try:
                np.lib.format.open_memmap(temporary / ARRAY, mode="w+", dtype=self.dtype, shape=self.shape).flush()
                (temporary / KEY).write_text(key + "\n", encoding="utf-8")
                (temporary / BLOCKS).mkdir()
                os.rename(temporary, self.path)
                sync(self.path.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def read(self) -> np.ndarray:
        """The whole array, memory-mapped; writing to it does not reach the file."""
        # Copy-on-write: torch wants arrays that it could write to, and the file stays as it is whatever anyone writes.
        array = self._map("c")
        assert array is not None
        return array

    def claims(self) -> Iterator["Claim"]:
        """The blocks that are left, each for this process alone; at the end all are done, by whoever it was.

        A claim that is not `Claim.finish`ed when the next is asked for stays held: close it.
        """
        for wait in (False, True):  # what others have in hand comes last: they may die over it
            for block in range(self.n_blocks):
                if not self._done(block) and (claim := self._claim(block, wait=wait)):
                    yield claim

    def _claim(self, block: int, *, wait: bool) -> "Claim | None":
        lock = os.open(self.path / BLOCKS / f"{block:06d}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(lock)
            return None
        if os.fstat(lock).st_size:  # done meanwhile
            os.close(lock)
            return None
        return Claim(self, block, lock)

    def _done(self, block: int) -> bool:
        try:
            return (self.path / BLOCKS / f"{block:06d}").stat().st_size > 0
        except FileNotFoundError:
            return False

    def _map(self, mode: Any) -> np.ndarray | None:
        try:
            array = np.load(self.path / ARRAY, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError):
            return None
        return array if array.shape == self.shape and array.dtype == self.dtype else None

    def _reserve(self) -> None:
        # Writing to a mapped file on a full disk kills the process instead of raising an error.
        needed = self.dtype.itemsize * self.shape[0] * self.shape[1]
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise UserError(
                f"{self.path.parent} has {free >> 20} MB free and the features need {needed >> 20}: make room, or set "
                "SELFSIGHT_CACHE to another disk"
            )


class Claim:
    """One block of an entry, held by a lock."""

    def __init__(self, entry: Entry, block: int, lock: int) -> None:
        self.entry, self._lock = entry, lock
        self.start = block * entry.rows
        self.stop = min(self.start + entry.rows, entry.shape[0])

    def finish(self, features: np.ndarray) -> None:
        """Writes the rows [start, stop), and when they are on the disk the mark that says so."""
        array = self.entry._map("r+")
        if array is None:
            raise UserError(f"{self.entry.path} was removed while it was being filled: give the same command again")
        assert features.shape == (self.stop - self.start, array.shape[1])
        array[self.start : self.stop] = features
        array.flush()  # type: ignore[attr-defined]
        os.write(self._lock, b"done\n")
        os.fsync(self._lock)
        self.close()

    def close(self) -> None:
        """Gives the block back if it is not finished."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _poolings(family: Path) -> Iterator[Pooling]:
    with suppress(FileNotFoundError):
        for path in family.iterdir():
            if not path.name.startswith("."):
                with suppress(UserError):  # of a version that named them otherwise: they are made anew
                    yield Pooling.parse(path.name)
