"""A finished corpus, read: any sample by its global ordinal, straight from its shards.

The chunk table says in which run of bytes a sample lies, the index where exactly and what the checksum of its extent
is: headers, image, label and padding together. One comparison tells a sound sample; what is wrong with another is then
looked for, so that it can be named. Nothing is opened before it is needed, and each process opens its own, so a Corpus
can be pickled, forked and shared between threads. It may lie in a folder or at a URL.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import google_crc32c
import numpy as np

from selfsight.errors import UserError
from selfsight.shards import tar
from selfsight.shards.cache import Opened
from selfsight.shards.decode import EXTENSIONS
from selfsight.shards.index import foreign_index, read_index
from selfsight.shards.manifest import Manifest, Shard
from selfsight.shards.remote import Unreachable
from selfsight.shards.store import FILE_SCHEME, is_url, open_store

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_DTYPE = np.dtype([("shard", "<u4"), ("byte_start", "<u8"), ("byte_len", "<u8"), ("first", "<u8"), ("n", "<u2")])
CHUNKS_NAME = "chunks.npy"
REJECTED_NAME = "rejected.jsonl"
KEY_DIGITS = 12
LABEL_EXTENSION = "cls"
UNLABELLED = -1
# Of the index, what finding and checking a sample takes: int64, UNLABELLED for no label.
FOUND_BY = ("member_offset", "end", "data_offset", "size", "crc32c", "extent_crc32c", "label")
INDEXED_SHARDS = 64
REQUESTS = 32  # index files on their way at once
# An order has lanes × window chunks in hand, 256 × 16 at its defaults, and every process that reads needs them all:
# finding one in the index of its shard takes longer than decoding an image, keeping one 16 kB.
KNOWN_CHUNKS = 8192

Value = TypeVar("Value")


def key_of(ordinal: int) -> str:
    return f"{ordinal:0{KEY_DIGITS}d}"


@dataclass(frozen=True, slots=True)
class Sample:
    ordinal: int
    key: str
    data: bytes  # the image file, as it came
    extension: str  # of the file's true format, without the dot
    label: int | None


class Corpus:
    """`Corpus.open(folder)`; `n` samples, named by their global ordinal 0 … n-1."""

    path: Path | str  # a URL as it was given
    manifest: Manifest
    chunks: np.ndarray  # CHUNK_DTYPE, one row per chunk, memory-mapped where it lies or is kept on this machine

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """The corpus at a path or any URL of fsspec. Raises UserError where there is no finished one."""
        corpus = cls()
        corpus.path = str(folder) if is_url(folder) else Path(str(folder).removeprefix(FILE_SCHEME))
        corpus._forget()
        corpus.manifest = Manifest.load(folder, corpus._store)
        corpus._open_chunks(check=True)
        if missing := corpus._store.missing([s.tar for s in corpus.manifest.shards]):
            raise UserError(f"{folder} lacks {missing[0]} ({len(missing)} shards in all): restore it, or build again")
        return corpus

    @property
    def name(self) -> str:
        """Its folder's, for titles."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def n(self) -> int:
        return self.manifest.n

    @property
    def classes(self) -> list[str] | None:
        return self.manifest.classes

    def __len__(self) -> int:
        return self.n

    def sample(self, ordinal: int) -> Sample:
        """Random access: O(log chunks) once its chunk is known.

        Raises IndexError outside 0 … n-1, DamagedTar where the shard does not hold what the index says, OSError where
        it cannot be read, Unreachable where no answer came, and UserError where the index is not what it should be.
        """
        if not 0 <= ordinal < self.n:
            raise IndexError(f"sample {ordinal} of a corpus of {self.n}")
        self._in_this_process()
        chunk = int(np.searchsorted(self._firsts, ordinal, side="right")) - 1
        shard, at = self.manifest.shards[self.chunks["shard"][chunk]], ordinal - int(self.chunks["first"][chunk])
        extensions, found = self._known(chunk, shard)
        begin, end, data_offset, size, crc32c, extent_crc32c, label = found[at].tolist()
        run = self._run(chunk)
        for again in (False, True, True):  # damaged in a cache; damaged on its way; and then it is the shard
            extent = self._store.span(shard.tar, begin, end, run=run, digest=shard.sha256, again=again)
            if sound := google_crc32c.value(extent) == extent_crc32c:
                break
        data = extent[data_offset - begin : data_offset - begin + size]
        if not sound:
            damage = _damage(extent, end - begin, data if google_crc32c.value(data) != crc32c else None)
            raise tar.DamagedTar(
                f"{self._store.locate(shard.tar)}: sample {key_of(ordinal)}: {damage.what}", begin + damage.offset
            )
        return Sample(ordinal, key_of(ordinal), data, extensions[at], None if label == UNLABELLED else label)

    def prefetch(self, chunk: int) -> None:
        """Brings a chunk that is far away into the cache of this machine, for a thread that runs ahead of the readers.

        Raises as `sample` does.
        """
        self._in_this_process()
        shard = self.manifest.shards[self.chunks["shard"][chunk]]
        if is_url(self._store.locate(shard.tar)):
            self._known(chunk, shard)
            start, stop = self._run(chunk)
            self._store.span(shard.tar, start, start, run=(start, stop), digest=shard.sha256)

    @property
    def is_far(self) -> bool:
        """Whether some of its shards do not lie on this machine."""
        return any(is_url(self._store.locate(shard.tar)) for shard in self.manifest.shards)

    def whereabouts(self, ordinal: int) -> str:
        """Sample and shard, for messages."""
        chunk = int(np.searchsorted(self._firsts, ordinal, side="right")) - 1
        return f"{key_of(ordinal)} in {self._store.locate(self.manifest.shards[self.chunks['shard'][chunk]].tar)}"

    def labels(self) -> np.ndarray | None:
        """int64 (n,), or None for an unlabelled corpus."""
        if self.classes is None:
            return None
        return self.index(["label"])["label"].to_numpy().astype(np.int64)

    def index(self, columns: list[str] | None = None) -> "pa.Table":
        """The index, one row per sample, by ordinal. Raises UserError where a file of it is missing or damaged, and
        Unreachable where no answer came."""
        import pyarrow as pa

        if not is_url(self.path):
            return pa.concat_tables(self._index(s, columns) for s in self.manifest.shards)
        with ThreadPoolExecutor(REQUESTS) as pool:
            return pa.concat_tables(pool.map(lambda s: self._index(s, columns), self.manifest.shards))

    def too_large_for_cache(self, lanes: int, window: int) -> str | None:
        """A sentence where the `lanes` that this machine reads, with `window` chunks open in each, keep more bytes in
        use than the cache may hold; None where they fit, and where all shards lie on this machine."""
        away = np.array([is_url(self._store.locate(s.tar)) for s in self.manifest.shards])
        sizes = self.chunks["byte_len"][away[self.chunks["shard"]]]
        if not len(sizes):
            return None
        return self._store.too_small_for(int(sizes.mean()) * min(lanes * window, len(sizes)))

    def _index(self, shard: Shard, columns: list[str] | None) -> "pa.Table":
        name = self._store.locate(shard.index)
        try:
            with self._store.open(shard.index, shard.index_sha256) as opened:
                file = opened.read()
        except Unreachable:  # which says nothing against the index
            raise
        except OSError as e:
            raise UserError(f"{name} cannot be read ({e}): run `selfsight corpus verify`") from None
        if hashlib.sha256(file).hexdigest() != shard.index_sha256:
            raise foreign_index(name)
        return read_index(file, name, shard.count, columns)

    def _open_chunks(self, *, check: bool) -> None:
        digest, name = self.manifest.chunks_sha256, self._store.locate(CHUNKS_NAME)
        try:
            with self._store.open(CHUNKS_NAME, digest) as file:
                foreign = check and hashlib.file_digest(file, "sha256").hexdigest() != digest
                file.seek(0)
                self.chunks = _mapped(file)
        except UserError:
            raise
        except (OSError, ValueError) as e:
            raise UserError(f"{name} cannot be read ({e}): restore it, or build the corpus again") from None
        if foreign or self.chunks.dtype != CHUNK_DTYPE or self.chunks.shape != (self.manifest.chunks,):
            raise UserError(f"{name} is not that of the manifest: restore it, or build the corpus again")
        # Of another type, or with gaps between its items, it would be copied at every search.
        self._firsts = self.chunks["first"].astype(np.int64)

    def _run(self, chunk: int) -> tuple[int, int]:
        """The bytes of a chunk in its shard: [start, stop)."""
        start = int(self.chunks["byte_start"][chunk])
        return start, start + int(self.chunks["byte_len"][chunk])

    def _in_this_process(self) -> None:
        if self._pid != os.getpid():  # forked: the parent's locks may be held by threads that are not here
            self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(REQUESTS)]
        self._store = open_store(self.path)
        self._indexed: OrderedDict[int, tuple[list[str], np.ndarray]] = OrderedDict()
        self._chunks_known: OrderedDict[int, tuple[list[str], np.ndarray]] = OrderedDict()
        self._pid = os.getpid()  # last: another thread that finds it renewed takes up all of the above

    def _known(self, chunk: int, shard: Shard) -> tuple[list[str], np.ndarray]:
        """Of each sample of a chunk the extension, and int64 (n, 7): the columns FOUND_BY."""

        def of_shard() -> tuple[list[str], np.ndarray]:
            table = self._index(shard, ["label", *FOUND_BY[:-1], "format"])
            table = table.set_column(0, "label", table["label"].fill_null(UNLABELLED))
            columns = [table[name].to_numpy().astype(np.int64) for name in FOUND_BY]
            return [EXTENSIONS.get(name, "bin") for name in table["format"].to_pylist()], np.stack(columns, axis=1)

        def of_chunk() -> tuple[list[str], np.ndarray]:
            with self._turns[shard.number % REQUESTS]:  # one thread reads an index, others may read others
                extensions, found = _kept(self._indexed, self._lock, shard.number, of_shard, INDEXED_SHARDS)
            row = self.chunks[chunk]
            rows = slice(int(row["first"]) - shard.first, int(row["first"]) - shard.first + int(row["n"]))
            return extensions[rows], found[rows].copy()

        return _kept(self._chunks_known, self._lock, chunk, of_chunk, KNOWN_CHUNKS)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        self._open_chunks(check=False)


def _mapped(file: Opened) -> np.ndarray:
    """The array of a .npy file of version 1.0, read only; mapped where the file lies on this machine."""
    if not isinstance(file, FileIO):
        return np.load(file, allow_pickle=False)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)


def _damage(extent: bytes, length: int, broken: bytes | None) -> tar.DamagedTar:
    """What is wrong with the bytes of a sample, which should be `length`; `broken` is its image if that is damaged."""
    if len(extent) < length:
        return tar.DamagedTar("the shard ends inside it", len(extent))
    try:
        for _ in tar.members(lambda offset, size: extent[offset : offset + size], length):
            pass
    except tar.DamagedTar as damage:
        return damage
    if broken is not None:
        return tar.DamagedTar("the image is not what was stored", 0)
    return tar.DamagedTar("a header, label or padding is not what was stored", 0)


def _kept(
    cache: OrderedDict[int, Value], lock: threading.Lock, key: int, make: Callable[[], Value], most: int
) -> Value:
    """`make()`, remembered in `cache` until `most` others were asked for since. It is made outside the lock."""
    with lock:
        if key in cache:
            cache.move_to_end(key)
            return cache[key]
    made = make()
    with lock:
        cache[key] = made
        cache.move_to_end(key)
        if len(cache) > most:
            cache.popitem(last=False)
    return made
