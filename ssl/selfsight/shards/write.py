"""One shard, written: members KEY.EXT and, for a labelled sample, KEY.cls; at the end come digest and chunk rows."""

import hashlib
from typing import IO

import google_crc32c
import numpy as np

from selfsight.shards import tar
from selfsight.shards.corpus import CHUNK_DTYPE, LABEL_EXTENSION, key_of


def stored_size(image_bytes: int, labelled: bool) -> int:
    """How many bytes of a shard one sample takes."""
    return tar.BLOCK + tar.padded(image_bytes) + (2 * tar.BLOCK if labelled else 0)


class ShardWriter:
    """Appends samples to an open binary file. `first` is the ordinal of the first one; ordinals follow each other."""

    def __init__(self, file: IO[bytes], *, number: int, first: int, chunk_samples: int) -> None:
        self.number, self.first, self.chunk_samples = number, first, chunk_samples
        self.offset = 0
        self._file = file
        self._sha256 = hashlib.sha256()
        self._crc32c = 0  # of the sample in hand
        self._extents: list[dict[str, int]] = []

    def add(self, data: bytes, extension: str, label: int | None) -> None:
        """Writes one sample."""
        member_offset, key = self.offset, key_of(self.first + len(self._extents))
        self._crc32c = 0
        self._member(f"{key}.{extension}", data)
        if label is not None:
            self._member(f"{key}.{LABEL_EXTENSION}", b"%d" % label)
        self._extents.append({"member_offset": member_offset, "data_offset": member_offset + tar.BLOCK})
        self._close()

    def finish(self) -> tuple[int, str, np.ndarray, list[dict[str, int]]]:
        """Ends the archive: (bytes, sha256, chunk rows of CHUNK_DTYPE, index columns that say where each sample is)."""
        self._write(tar.END)
        self._close()
        chunks = chunk_rows(self._extents, number=self.number, first=self.first, chunk_samples=self.chunk_samples)
        return self.offset, self._sha256.hexdigest(), chunks, self._extents

    def _close(self) -> None:
        self._extents[-1] |= {"end": self.offset, "extent_crc32c": self._crc32c}

    def _member(self, name: str, data: bytes) -> None:
        self._write(tar.header(name, len(data)))
        self._write(data)
        self._write(bytes(-len(data) % tar.BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self.offset += len(data)


def chunk_rows(extents: list[dict[str, int]], *, number: int, first: int, chunk_samples: int) -> np.ndarray:
    """The chunk table of one shard, CHUNK_DTYPE, from `member_offset` and `end` of its samples."""
    starts = extents[::chunk_samples]
    ends = [*(e["member_offset"] for e in starts[1:]), extents[-1]["end"]]
    chunks = np.zeros(len(starts), CHUNK_DTYPE)
    chunks["shard"] = number
    chunks["byte_start"] = [e["member_offset"] for e in starts]
    chunks["byte_len"] = ends - chunks["byte_start"].astype(np.int64)
    chunks["first"] = first + np.arange(len(chunks)) * chunk_samples
    chunks["n"] = np.minimum(chunk_samples, first + len(extents) - chunks["first"].astype(np.int64))
    return chunks
