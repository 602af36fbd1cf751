"""Bytes that came from far away, kept on this machine: a folder of bounded size that all processes of a node share.

A file's name says what is in it, so nothing in here can be stale, and two URLs of one shard share their runs. The least
recently used file goes first, by its modification time, which every use renews. All that processes must agree on is the
folder itself and locks that die with their holders: killed at any moment, a process leaves nothing to repair. What is
read back is not checked here; who asks has the checksums.
"""

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path

from selfsight.console import say
from selfsight.errors import UserError

Opened = FileIO | BytesIO  # a file of this machine, or bytes for which it has no room

LOCK, PART = "lock", ".part"
SHARE = 0.5  # of the disk's free bytes and the cache's own, where no bound is given
SLACK = 32  # making room frees a 32nd of the bound at once: finding the oldest files takes a look at all
TRUSTED_SECONDS = 3600.0  # for so long the sum of sizes that stands in the lock file is believed
REST_SECONDS = 60.0  # for so long a cache that failed, because the disk is full, say, is left alone
PATIENCE_SECONDS = 300.0  # for so long another process may take to bring a file, before this one goes for itself
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def default_folder() -> Path:
    """$SELFSIGHT_CACHE, $XDG_CACHE_HOME/selfsight or ~/.cache/selfsight, and there `runs`."""
    if own := os.environ.get("SELFSIGHT_CACHE"):
        return Path(own) / "runs"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "selfsight" / "runs"


def default_bound() -> int | None:
    """$SELFSIGHT_CACHE_BYTES, such as 500G, or None. Raises UserError where that is no size."""
    text = os.environ.get("SELFSIGHT_CACHE_BYTES", "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+)([KMGT]?)(?:I?B)?", text.upper())
    if found is None:
        raise UserError(f"SELFSIGHT_CACHE_BYTES is {text!r}, which is no size: write it like 500G")
    return int(found[1]) << UNITS[found[2]]


class Cache:
    """Files of at most `bound` bytes together; None is SHARE of what the disk has left, 0 keeps nothing.

    Threads and processes may use one folder, through one Cache or through many.
    """

    def __init__(self, folder: Path | None = None, bound: int | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self.bound = default_bound() if bound is None else bound
        self._rests_until = 0.0
        self._complained = False

    def keeps(self, size: int) -> bool:
        """Whether `size` bytes would be kept now, as far as can be told without looking."""
        return time.monotonic() >= self._rests_until and (self.bound is None or size <= self.bound)

    def capacity(self) -> int:
        """The bound in bytes, as the disk is now where none was given."""
        return self._bound(self._sum()[0] or 0)

    def take(self, key: str, size: int | None, fetch: Callable[[], bytes]) -> Opened:
        """A file at its beginning, for the caller to close: what is kept as `key`, or else what `fetch` brings.

        `key` is a file name. `size` is what the file must have to be used or kept; None where that is not known.
        Of several who ask at once, one fetches. Raises what `fetch` raises and nothing else.
        """
        path = self.folder / key
        if found := self._opened(path, size):
            return found
        if not self.keeps(size or 0):
            return BytesIO(fetch())
        part = path.with_name(key + PART)
        handle = self._claimed(part)
        try:
            if found := self._opened(path, size):  # brought by another while this one waited
                return found
            data = fetch()
            if handle is not None and size in (None, len(data)):
                self._keep(handle, part, path, data)
            return self._opened(path, len(data)) or BytesIO(data)
        finally:
            if handle is not None:
                _release(handle, part)

    def drop(self, key: str) -> None:
        with suppress(OSError):
            (self.folder / key).unlink()

    def _opened(self, path: Path, size: int | None) -> FileIO | None:
        try:
            file = FileIO(path)
        except OSError:
            return None
        if size is not None and os.fstat(file.fileno()).st_size != size:  # a machine that lost its power
            file.close()
            self.drop(path.name)
            return None
        with suppress(OSError):  # it belongs to another user
            os.utime(file.fileno())
        return file

    def _claimed(self, part: Path) -> int | None:
        """A handle to the file `part`, locked; None where none can be had, and the cache is to be done without.

        Who holds the lock of the file that has this name is the one who fetches. The lock ends with its holder.
        """
        give_up = time.monotonic() + PATIENCE_SECONDS
        handle, pause = None, 0.001
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while time.monotonic() < give_up:
                if handle is None:
                    handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
                if _locked(handle):
                    if _is_named(handle, part):
                        return handle
                elif _is_named(handle, part):
                    time.sleep(pause)
                    pause = min(2 * pause, 0.05)
                    continue
                os.close(handle)  # published or given up meanwhile
                handle = None
        except OSError as e:
            self._fail(e)
        if handle is not None:
            os.close(handle)
        return None

    def _keep(self, handle: int, part: Path, path: Path, data: bytes) -> None:
        """Publishes `data` as `path`. It is not synced: after a power cut a checksum fails, and it is fetched again."""
        try:
            if self._reserve(handle, len(data)):
                view = memoryview(data)
                while view:
                    view = view[os.write(handle, view) :]
                with self._alone():  # a rename during a look at all files could hide this one from it
                    os.replace(part, path)
        except OSError as e:
            self._fail(e)

    def _reserve(self, handle: int, size: int) -> bool:
        """Makes room for `size` bytes and lets the file of `handle` take it; False where there is too little.

        The sum of all sizes stands in the lock file, so that not every new file costs a look at all others. It grows
        before the file does: who dies in between leaves it too large, never too small, and the next look mends it.
        """
        with self._alone() as lock:
            used, looked = self._sum()
            bound = self._bound(used or 0)
            if size > bound:
                return False
            if used is None or used + size > bound:
                used, looked = self._make_room(size, bound), time.time()
                if used + size > bound:
                    return False
            os.pwrite(lock, f"{used + size:020d} {looked:020.3f}\n".encode(), 0)
            os.ftruncate(handle, size)
            return True

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """A handle to the lock file, while no other adds a file or looks at all."""
        lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # closing is not enough where a child was forked meanwhile
            os.close(lock)

    def _sum(self) -> tuple[int | None, float]:
        """The sum of all sizes, None where somebody has to look, and when somebody last did."""
        try:
            used, looked = (self.folder / LOCK).read_text().split()
            fresh = 0 <= time.time() - float(looked) < TRUSTED_SECONDS
            return int(used) if fresh else None, float(looked)
        except (OSError, ValueError):
            return None, 0.0

    def _bound(self, used: int) -> int:
        if self.bound is not None:
            return self.bound
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        return int(SHARE * (shutil.disk_usage(there).free + used))

    def _make_room(self, size: int, bound: int) -> int:
        """Removes what dead processes left, and the oldest files where `size` does not fit; the bytes that remain."""
        used, files = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.name == LOCK or (entry.name.endswith(PART) and _swept(entry.path)):
                        continue
                    status = entry.stat()
                    used += status.st_size
                    if not entry.name.endswith(PART):
                        files.append((status.st_mtime_ns, entry.name, status.st_size))
        if used + size > bound:
            for _, name, length in sorted(files):
                if used + size <= bound - bound // SLACK:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(self.folder / name)  # who has it open goes on reading
                used -= length
        return used

    def _fail(self, problem: OSError) -> None:
        self._rests_until = time.monotonic() + REST_SECONDS
        if not self._complained:
            self._complained = True
            what = problem.strerror or str(problem)
            say(f"the cache {self.folder} cannot be written ({what}): reading goes on without it, and slower")


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_named(handle: int, path: str | Path) -> bool:
    """Whether the file of `handle` is still the one called `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _release(handle: int, part: str | Path) -> None:
    """Ends a claim; what was not published goes."""
    try:
        with suppress(OSError):
            if _is_named(handle, part):
                os.unlink(part)
        fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _swept(part: str) -> bool:
    """Removes a part file whose writer is dead."""
    handle = os.open(part, os.O_RDWR)
    if not _locked(handle):
        os.close(handle)
        return False
    _release(handle, part)
    return True
