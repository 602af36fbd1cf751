"""One shard, written: members KEY.EXT and, for a labelled sample, KEY.cls; at the end come digest and chunk rows."""

import hashlib
from typing import IO

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
        self.count = self.offset = 0
        self._file = file
        self._sha256 = hashlib.sha256()
        self._starts: list[int] = []

    def add(self, data: bytes, extension: str, label: int | None) -> tuple[int, int]:
        """Writes one sample; returns the offsets of its header and of its data."""
        if self.count % self.chunk_samples == 0:
            self._starts.append(self.offset)
        member_offset, key = self.offset, key_of(self.first + self.count)
        self._member(f"{key}.{extension}", data)
        if label is not None:
            self._member(f"{key}.{LABEL_EXTENSION}", b"%d" % label)
        self.count += 1
        return member_offset, member_offset + tar.BLOCK

    def finish(self) -> tuple[int, str, np.ndarray]:
        """Ends the archive: (bytes, sha256, chunk rows of CHUNK_DTYPE)."""
        ends = [*self._starts[1:], self.offset]
        chunks = np.zeros(len(self._starts), CHUNK_DTYPE)
        chunks["shard"] = self.number
        chunks["byte_start"] = self._starts
        chunks["byte_len"] = np.subtract(ends, self._starts)
        chunks["first"] = self.first + np.arange(len(chunks)) * self.chunk_samples
        chunks["n"] = np.minimum(self.chunk_samples, self.first + self.count - chunks["first"])
        self._write(tar.END)
        return self.offset, self._sha256.hexdigest(), chunks

    def _member(self, name: str, data: bytes) -> None:
        self._write(tar.header(name, len(data)))
        self._write(data)
        self._write(bytes(-len(data) % tar.BLOCK))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.offset += len(data)
