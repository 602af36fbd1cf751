"""Every byte of a corpus read again: shards against their digests, headers against their checksums, images against the
index, chunks and counts against the manifest. Each fault is named with the file and the sample it touches.
"""

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from selfsight.console import progress
from selfsight.shards import tar
from selfsight.shards.corpus import CHUNK_DTYPE, CHUNKS_NAME, LABEL_EXTENSION, REJECTED_NAME, key_of
from selfsight.shards.decode import EXTENSIONS
from selfsight.shards.index import schema
from selfsight.shards.manifest import Manifest, Shard

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Fault:
    file: str  # inside the corpus
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(folder: str | Path) -> list[Fault]:
    """All faults of the corpus, an empty list for a sound one. Raises UserError where there is no corpus to verify."""
    root = Path(folder)
    manifest = Manifest.load(root)
    faults: list[Fault] = []
    chunks = _chunks(root, manifest, faults)
    if _digest(root / REJECTED_NAME) != manifest.rejected_sha256:
        faults.append(Fault(REJECTED_NAME, "is missing or not the file that was built"))
    known = {s.tar for s in manifest.shards} | {s.index for s in manifest.shards}
    for path in sorted((*root.glob("shards/*"), *root.glob("index/*"))):
        if (name := path.relative_to(root).as_posix()) not in known:
            faults.append(Fault(name, "is not in the manifest"))
    total = 0
    with progress("verify", manifest.n) as bar:
        for shard in manifest.shards:
            rows = _index(root, shard, faults)
            own = None if chunks is None else chunks[chunks["shard"] == shard.number]
            faults.extend(Fault(shard.tar, what) for what in _shard_faults(root, shard, rows, own, manifest.classes))
            total += sum(r["size"] for r in rows) if rows else 0
            bar.advance(shard.count, faults=len(faults))
    if not faults and total != manifest.image_bytes:
        faults.append(Fault("manifest.json", f"says {manifest.image_bytes} image bytes, the index {total}"))
    return faults


def _chunks(root: Path, manifest: Manifest, faults: list[Fault]) -> np.ndarray | None:
    """The chunk table, where it is that of the manifest and covers the samples without a gap."""
    if _digest(root / CHUNKS_NAME) != manifest.chunks_sha256:
        faults.append(Fault(CHUNKS_NAME, "is missing or not the file that was built"))
    try:
        chunks = np.load(root / CHUNKS_NAME, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if chunks.dtype != CHUNK_DTYPE or chunks.ndim != 1:
        faults.append(Fault(CHUNKS_NAME, "is not a chunk table"))
        return None
    counts = chunks["n"].astype(np.int64)
    if (
        len(chunks) != manifest.chunks
        or (chunks["first"] != np.cumsum(counts) - counts).any()
        or counts.sum() != manifest.n
    ):
        faults.append(Fault(CHUNKS_NAME, "does not cover the samples one after the other"))
    return chunks


def _index(root: Path, shard: Shard, faults: list[Fault]) -> list[dict[str, Any]] | None:
    """The index rows of one shard; faults and None where they cannot be trusted to say where samples lie."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _digest(root / shard.index) != shard.index_sha256:
        faults.append(Fault(shard.index, "is missing or not the file that was built"))
    try:
        table = pq.ParquetFile(root / shard.index).read()
    except (OSError, pa.ArrowException):
        return None
    if table.schema != schema() or table.num_rows != shard.count:
        faults.append(Fault(shard.index, f"does not hold {shard.count} rows of this version's columns"))
        return None
    return table.to_pylist()


def _shard_faults(
    root: Path, shard: Shard, rows: list[dict[str, Any]] | None, chunks: np.ndarray | None, classes: list[str] | None
) -> Iterator[str]:
    path = root / shard.tar
    try:
        length = path.stat().st_size
        digest = _digest(path)
    except OSError as e:
        yield f"cannot be read ({e.strerror})"
        return
    if digest is None:
        yield "is missing"
        return
    if length != shard.bytes:
        yield f"is {length} bytes long instead of {shard.bytes}"
    if digest != shard.sha256:
        yield "its SHA-256 is not that of the manifest"
    if not length:
        return
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end = 0
        starts: list[int] = []
        for at in range(shard.count):
            starts.append(end)
            row = rows[at] if rows else None
            try:
                end = yield from _sample_faults(data, end, shard.first + at, row, classes)
            except tar.DamagedTar as e:
                yield f"sample {key_of(shard.first + at)}: {e}"
                if rows is None:
                    return  # nothing says where the next sample begins
                following = rows[at + 1]["member_offset"] if at + 1 < len(rows) else shard.bytes - len(tar.END)
                if not end < following <= length:
                    return
                end = following
        if data[end:] != tar.END:
            yield f"does not end with its two empty blocks at byte {end}"
        if chunks is not None:
            yield from _chunk_faults(chunks, starts, shard, end)


def _sample_faults(
    data: mmap.mmap, offset: int, ordinal: int, row: dict[str, Any] | None, classes: list[str] | None
) -> Iterator[Any]:
    """Faults of the sample whose header is at `offset`; returns where the next one begins. Raises DamagedTar."""
    key = key_of(ordinal)
    member = tar.parse(data[offset : offset + tar.BLOCK], offset)
    if member.end > len(data):
        raise tar.DamagedTar("the file ends inside a member", offset)
    name = member.name.decode("ascii", "replace")
    if not name.startswith(f"{key}.") or name != f"{key}.{name.partition('.')[2]}":
        yield f"sample {key}: its member is called {name}"
    if data[offset : offset + tar.BLOCK] != tar.header(f"{key}.{name.partition('.')[2]}"[:100], member.size):
        yield f"sample {key}: its header is not the one that was written"
    body = data[member.data_offset : member.data_offset + member.size]
    if row is not None:
        expected = {
            "sample": ordinal,
            "key": key,
            "member_offset": offset,
            "data_offset": member.data_offset,
            "size": member.size,
            "crc32c": google_crc32c.value(body),
            "sha256": hashlib.sha256(body).digest(),
        }
        wrong = [k for k, v in expected.items() if row[k] != v]
        if name.partition(".")[2] != EXTENSIONS.get(row["format"]):
            wrong.append("format")
        if wrong:
            yield f"sample {key} ({row['source']}): {', '.join(wrong)} not as in the index"
    if any(data[member.data_offset + member.size : member.end]):
        yield f"sample {key}: bytes where there should be padding"
    label = row["label"] if row is not None else None
    if classes is None:
        if label is not None:
            yield f"sample {key}: a label in an unlabelled corpus"
        return member.end
    written = tar.parse(data[member.end : member.end + tar.BLOCK], member.end)
    text = data[written.data_offset : written.data_offset + written.size]
    if written.name != f"{key}.{LABEL_EXTENSION}".encode() or not text.isdigit() or int(text) >= len(classes):
        raise tar.DamagedTar("no label where one belongs", member.end)
    if row is not None and int(text) != label:
        yield f"sample {key}: label {int(text)} in the shard, {label} in the index"
    return written.end


def _chunk_faults(chunks: np.ndarray, starts: list[int], shard: Shard, end: int) -> Iterator[str]:
    at = chunks["first"].astype(np.int64) - shard.first
    if len(at) == 0 or at.min() < 0 or at.max() >= shard.count:
        yield f"{CHUNKS_NAME} does not point into it"
        return
    begins = np.array([starts[i] for i in at])
    if (begins != chunks["byte_start"]).any() or (np.append(begins[1:], end) - begins != chunks["byte_len"]).any():
        yield f"{CHUNKS_NAME} does not say where its samples lie"


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(BLOCK_BYTES):
                digest.update(block)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
