"""A finished corpus, read: any sample by its global ordinal, straight from memory-mapped shards.

The chunk table says where a run of samples lies; its tar headers are walked with their checksums and kept for the next
sample of the run, and every image is compared with its checksum in the index. Nothing is opened before it is needed,
and each process opens its own, so a Corpus can be pickled, forked and shared between threads.
"""

import mmap
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import google_crc32c
import numpy as np

from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.shards import tar
from selfsight.shards.index import read_index
from selfsight.shards.manifest import Manifest, Shard

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_DTYPE = np.dtype([("shard", "<u4"), ("byte_start", "<u8"), ("byte_len", "<u8"), ("first", "<u8"), ("n", "<u2")])
CHUNKS_NAME = "chunks.npy"
REJECTED_NAME = "rejected.jsonl"
KEY_DIGITS = 12
LABEL_EXTENSION = "cls"
UNLABELLED = -1
MAPPED_SHARDS = 64  # address space and file handles; of memory only the checksums, 4 bytes a sample
# An order has lanes × window chunks in hand, 256 × 16 at its defaults, and every process that reads needs them all:
# parsing one takes as long as decoding an image, keeping one 8 kB.
PARSED_CHUNKS = 8192

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

    path: Path
    manifest: Manifest
    chunks: np.ndarray  # CHUNK_DTYPE, one row per chunk, memory-mapped

    @classmethod
    def open(cls, folder: str | Path) -> "Corpus":
        """Raises UserError where there is no finished corpus."""
        corpus = cls()
        corpus.path = Path(folder)
        corpus.manifest = Manifest.load(corpus.path)
        corpus._open_chunks()
        if sha256_of(corpus.path / CHUNKS_NAME) != corpus.manifest.chunks_sha256:
            raise _foreign_chunks(corpus.path)
        missing = [s.tar for s in corpus.manifest.shards if not (corpus.path / s.tar).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]} ({len(missing)} shards in all): restore it, or build again")
        return corpus

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
        """Random access: O(log chunks) once the chunk's headers are known.

        Raises IndexError outside 0 … n-1, DamagedTar where the shard is not what the chunk table and the index say,
        and UserError where the index cannot be read.
        """
        if not 0 <= ordinal < self.n:
            raise IndexError(f"sample {ordinal} of a corpus of {self.n}")
        chunk = int(np.searchsorted(self.chunks["first"], ordinal, side="right")) - 1
        row = self.chunks[chunk]
        shard, at = self.manifest.shards[row["shard"]], ordinal - int(row["first"])
        mapped = self._shard(shard)
        try:
            extensions, numbers = self._parsed(chunk, shard, mapped)
        except tar.DamagedTar as e:
            raise tar.DamagedTar(f"{self.path / shard.tar}: {e.what}", e.offset) from None
        offset, size, label, crc32c = numbers[at].tolist()
        data = mapped[offset : offset + size]
        if google_crc32c.value(data) != crc32c:
            raise tar.DamagedTar(f"{self.path / shard.tar}: sample {key_of(ordinal)} is not what was stored", offset)
        return Sample(ordinal, key_of(ordinal), data, extensions[at], None if label == UNLABELLED else label)

    def labels(self) -> np.ndarray | None:
        """int64 (n,), or None for an unlabelled corpus."""
        if self.classes is None:
            return None
        return self.index(["label"])["label"].to_numpy().astype(np.int64)

    def index(self, columns: list[str] | None = None) -> "pa.Table":
        """The index, one row per sample, by ordinal. Raises UserError where a file of it is missing or damaged."""
        import pyarrow as pa

        return pa.concat_tables(read_index(self.path / s.index, s.count, columns) for s in self.manifest.shards)

    def _open_chunks(self) -> None:
        path = self.path / CHUNKS_NAME
        try:
            self.chunks = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be read ({e}): restore it, or build the corpus again") from None
        if self.chunks.dtype != CHUNK_DTYPE or self.chunks.shape != (self.manifest.chunks,):
            raise _foreign_chunks(self.path)
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._shards: OrderedDict[int, mmap.mmap] = OrderedDict()
        self._checksums: OrderedDict[int, np.ndarray] = OrderedDict()
        self._headers: OrderedDict[int, tuple[tuple[str, ...], np.ndarray]] = OrderedDict()

    def _shard(self, shard: Shard) -> mmap.mmap:
        if self._pid != os.getpid():  # forked: the parent's lock may be held by a thread that is not here
            self._forget()
        with self._lock:
            # An evicted map closes when its last reader lets go of it.
            return _kept(self._shards, shard.number, lambda: self._map(shard), MAPPED_SHARDS)

    def _map(self, shard: Shard) -> mmap.mmap:
        with open(self.path / shard.tar, "rb") as f:
            if os.fstat(f.fileno()).st_size != shard.bytes:
                raise tar.DamagedTar(f"{shard.tar} should be {shard.bytes} bytes long and is not: it ends", 0)
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def _parsed(self, chunk: int, shard: Shard, mapped: mmap.mmap) -> tuple[tuple[str, ...], np.ndarray]:
        """Of each sample of a chunk the extension, and int64 (n, 4): data offset, size, label, crc32c."""

        def checksums() -> np.ndarray:
            return read_index(self.path / shard.index, shard.count, ["crc32c"])["crc32c"].to_numpy()

        def parse() -> tuple[tuple[str, ...], np.ndarray]:
            row = self.chunks[chunk]
            extensions, *numbers = zip(*parse_chunk(mapped, row), strict=True)
            column = _kept(self._checksums, shard.number, checksums, MAPPED_SHARDS)
            stored = column[int(row["first"]) - shard.first :][: int(row["n"])]
            return tuple(map(sys.intern, extensions)), np.array([*numbers, stored], dtype=np.int64).T

        with self._lock:
            return _kept(self._headers, chunk, parse, PARSED_CHUNKS)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_chunks()


def parse_chunk(shard: mmap.mmap | bytes, row: np.void) -> list[tuple[str, int, int, int]]:
    """(extension, data offset, size, label or UNLABELLED) of each sample. Raises DamagedTar where the headers say
    something else."""
    offset = int(row["byte_start"])
    end, first, count = offset + int(row["byte_len"]), int(row["first"]), int(row["n"])
    samples: list[tuple[str, int, int, int]] = []
    while offset < end:
        member = tar.parse(shard[offset : offset + tar.BLOCK], offset)
        if member.end > end:
            raise tar.DamagedTar("a member reaches out of its chunk", offset)
        key, _, extension = member.name.decode("ascii", "replace").partition(".")
        if extension == LABEL_EXTENSION and samples and key == key_of(first + len(samples) - 1):
            text = shard[member.data_offset : member.data_offset + member.size]
            if not text.isdigit():
                raise tar.DamagedTar("a label that is no number", member.data_offset)
            samples[-1] = (*samples[-1][:3], int(text))
        elif key == key_of(first + len(samples)) and len(samples) < count:
            samples.append((extension, member.data_offset, member.size, UNLABELLED))
        else:
            raise tar.DamagedTar(f"unexpected member {key}.{extension}", offset)
        offset = member.end
    if len(samples) != count:
        raise tar.DamagedTar(f"{len(samples)} samples instead of {count} in the chunk", int(row["byte_start"]))
    return samples


def _kept(cache: OrderedDict[int, Value], key: int, make: Callable[[], Value], most: int) -> Value:
    """`make()`, remembered in `cache` until `most` others were asked for since."""
    found = cache.get(key)
    if found is None:
        found = cache[key] = make()
        if len(cache) > most:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return found


def _foreign_chunks(folder: Path) -> UserError:
    return UserError(f"{folder / CHUNKS_NAME} is not that of the manifest: restore it, or build the corpus again")
