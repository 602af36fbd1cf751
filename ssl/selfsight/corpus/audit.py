"""Every byte of a corpus read again: shards against their digests, headers against their checksums, images against the
index, chunks and counts against the manifest. Each fault is named with the file and the sample it touches.
"""

import hashlib
import mmap
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from selfsight.console import progress
from selfsight.corpus.foreign import ShardBytes, opened
from selfsight.corpus.pool import each
from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.machine import available_cores
from selfsight.shards import tar
from selfsight.shards.corpus import CHUNK_DTYPE, CHUNKS_NAME, LABEL_EXTENSION, REJECTED_NAME, key_of
from selfsight.shards.decode import EXTENSIONS
from selfsight.shards.index import read_index, schema
from selfsight.shards.interop import DALI_SUFFIX, ENERGON_SUFFIX, beside, stray
from selfsight.shards.manifest import NAME as MANIFEST_NAME
from selfsight.shards.manifest import Manifest, Shard

INLINE_BYTES = 64 << 20  # below this, starting processes takes longer than the work
ALTERED = "is missing or not the file that was built"


@dataclass(frozen=True)
class Fault:
    file: str  # inside the corpus
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class ShardTask:
    root: Path
    shard: Shard
    chunks: np.ndarray | None  # its rows of the chunk table, None where that is not to be trusted
    n_classes: int | None


def verify(folder: str | Path, *, workers: int | None = None) -> list[Fault]:
    """All faults of the corpus, an empty list for a sound one. Raises UserError where there is no corpus to verify."""
    root = Path(folder)
    manifest = Manifest.load(root)
    faults: list[Fault] = []
    chunks = _chunks(root, manifest, faults)
    if _digest(root / REJECTED_NAME) != manifest.rejected_sha256:
        faults.append(Fault(REJECTED_NAME, ALTERED))
    known = {s.tar for s in manifest.shards} | {s.index for s in manifest.shards}
    known |= {beside(s, suffix) for s in manifest.shards for suffix in (DALI_SUFFIX, ENERGON_SUFFIX)}
    for path in sorted((*root.glob("shards/*"), *root.glob("index/*"))):
        if (name := path.relative_to(root).as_posix()) not in known:
            faults.append(Fault(name, "is not in the manifest"))
    n_classes = None if manifest.classes is None else len(manifest.classes)
    parts = repeat(None)
    if chunks is not None:  # rows of a shard lie together; comparing all of them for every shard would take hours
        parts = np.split(chunks, np.searchsorted(chunks["shard"], np.arange(1, len(manifest.shards))))
    tasks = (ShardTask(root, s, part, n_classes) for s, part in zip(manifest.shards, parts, strict=False))
    workers = min(workers or available_cores(), len(manifest.shards))
    if sum(s.bytes for s in manifest.shards) < INLINE_BYTES:
        workers = 1
    image_bytes, found = 0, {}
    with progress("verify", manifest.n) as bar:
        for shard, own, size in each(verify_shard, tasks, workers):
            found[shard.number] = own
            image_bytes += size
            bar.advance(shard.count, faults=sum(map(len, found.values())))
    faults += [fault for number in sorted(found) for fault in found[number]]
    if not faults and image_bytes != manifest.image_bytes:
        faults.append(Fault(MANIFEST_NAME, f"says {manifest.image_bytes} image bytes, the index {image_bytes}"))
    return faults


def verify_shard(task: ShardTask) -> tuple[Shard, list[Fault], int]:
    """One shard with its index: (shard, faults, image bytes that the index counts)."""
    faults: list[Fault] = []
    rows = _index(task.root, task.shard, faults)
    in_tar = _tar_faults(task, rows) if task.shard.url is None else _adopted_faults(task, rows)
    faults += [Fault(task.shard.tar, what) for what in in_tar]
    if rows and task.shard.url is None:
        faults += [Fault(name, "is not the index of its shard") for name in stray(task.root, task.shard, rows)]
    return task.shard, faults, sum(r["size"] for r in rows or ())


def _chunks(root: Path, manifest: Manifest, faults: list[Fault]) -> np.ndarray | None:
    """The chunk table, where it is that of the manifest and covers the samples without a gap."""
    if _digest(root / CHUNKS_NAME) != manifest.chunks_sha256:
        faults.append(Fault(CHUNKS_NAME, ALTERED))
    try:
        chunks = np.load(root / CHUNKS_NAME, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if chunks.dtype != CHUNK_DTYPE or chunks.ndim != 1:
        faults.append(Fault(CHUNKS_NAME, "is not a chunk table"))
        return None
    n = chunks["n"].astype(np.int64)
    if len(chunks) != manifest.chunks or (chunks["first"] != np.cumsum(n) - n).any() or n.sum() != manifest.n:
        faults.append(Fault(CHUNKS_NAME, "does not cover the samples one after the other"))
    return chunks


def _index(root: Path, shard: Shard, faults: list[Fault]) -> list[dict[str, Any]] | None:
    """The index rows of one shard; faults and None where they cannot say where samples lie."""
    altered = _digest(root / shard.index) != shard.index_sha256
    if altered:
        faults.append(Fault(shard.index, ALTERED))
    try:
        table = read_index((root / shard.index).read_bytes(), shard.index, shard.count)
        if table.schema == schema():
            return table.to_pylist()
    except (OSError, UserError):
        pass
    if not altered:
        faults.append(Fault(shard.index, f"does not hold {shard.count} rows of this version's columns"))
    return None


def _tar_faults(task: ShardTask, rows: list[dict[str, Any]] | None) -> Iterator[str]:
    shard, path = task.shard, task.root / task.shard.tar
    try:
        digest = _digest(path)
    except OSError as e:
        yield f"cannot be read ({e.strerror})"
        return
    if digest is None:
        yield "is missing"
        return
    length = path.stat().st_size
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
            try:
                end = yield from _sample_faults(data, end, shard.first + at, rows[at] if rows else None, task.n_classes)
            except tar.DamagedTar as e:
                yield f"sample {key_of(shard.first + at)}: {e}"
                if rows is None:
                    return  # nothing says where the next sample begins
                last = at + 1 == shard.count
                following = shard.bytes - len(tar.END) if last else rows[at + 1]["member_offset"]
                if not end < following <= length:
                    return
                end = following
        if rows and digest == shard.sha256:  # else its damage has been named
            yield from _extent_faults(data, rows, starts)
        if data[end:] != tar.END:
            yield f"does not end with two empty blocks at byte {end}"
        if task.chunks is not None:
            yield from _chunk_faults(task.chunks, starts, shard, shard.bytes)


def _adopted_faults(task: ShardTask, rows: list[dict[str, Any]] | None) -> Iterator[str]:
    """A shard that somebody else wrote need not look like ours; every sample must be as it was adopted."""
    shard = task.shard
    borders = [border for row in rows or () for border in (row["member_offset"], row["end"])]
    if borders != sorted(borders) or any(border > shard.bytes for border in borders):
        yield "its index does not say where its samples lie"
        rows = None
    try:
        with opened(shard.tar, shard.bytes) as data:
            for row in rows or ():
                yield from _adopted_sample_faults(data, row)
            if data.finish() != shard.sha256:
                yield "its SHA-256 is not that of the manifest"
    except UserError as e:
        yield str(e).removeprefix(f"{shard.tar} ")
        return
    for row in rows or ():
        label = row["label"]
        if (label is None) != (task.n_classes is None) or (label is not None and not 0 <= label < task.n_classes):
            yield f"sample {row['key']} ({row['source']}): label {label} is none of the corpus"
    if task.chunks is not None and rows:
        yield from _chunk_faults(task.chunks, [r["member_offset"] for r in rows], shard, rows[-1]["end"])


def _adopted_sample_faults(data: ShardBytes, row: dict[str, Any]) -> Iterator[str]:
    begin, end, name = row["member_offset"], row["end"], f"sample {row['key']} ({row['source']})"
    data.pass_to(begin)
    extent = data.read(begin, end - begin)
    if google_crc32c.value(extent) == row["extent_crc32c"]:
        image = extent[row["data_offset"] - begin :][: row["size"]]
        if (google_crc32c.value(image), hashlib.sha256(image).digest()) != (row["crc32c"], row["sha256"]):
            yield f"{name}: crc32c, sha256 not as in the index"
        return
    try:
        for _ in tar.members(lambda offset, size: extent[offset : offset + size], end - begin):
            pass
        yield f"{name}: not as it was adopted"
    except tar.DamagedTar as e:
        yield f"{name}: {tar.DamagedTar(e.what, begin + e.offset)}"


def _sample_faults(
    data: mmap.mmap, offset: int, ordinal: int, row: dict[str, Any] | None, n_classes: int | None
) -> Generator[str, None, int]:
    """Faults of the sample whose header is at `offset`; returns where the next one begins. Raises DamagedTar."""
    key = key_of(ordinal)
    member, extension = _member(data, offset, key)
    if extension not in EXTENSIONS.values():
        yield f"sample {key}: {extension!r} is no image extension"
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
        wrong = [name for name, value in expected.items() if row[name] != value]
        if extension != EXTENSIONS.get(row["format"]):
            wrong.append("format")
        if wrong:
            yield f"sample {key} ({row['source']}): {', '.join(wrong)} not as in the index"
    label = row["label"] if row is not None else None
    if n_classes is None:
        if label is not None:
            yield f"sample {key}: a label in the index of an unlabelled corpus"
        return member.end
    written, extension = _member(data, member.end, key)
    text = data[written.data_offset : written.data_offset + written.size]
    if extension != LABEL_EXTENSION or not text.isdigit() or int(text) >= n_classes:
        yield f"sample {key}: no label where one belongs, at byte {member.end}"
    elif row is not None and int(text) != label:
        yield f"sample {key}: label {int(text)} in the shard, {label} in the index"
    return written.end


def _member(data: mmap.mmap, offset: int, key: str) -> tuple[tar.Member, str]:
    """The member KEY.EXT at `offset`, to the last bit what was written, and its extension. Raises DamagedTar."""
    block = data[offset : offset + tar.BLOCK]
    member = tar.parse(block, offset)
    if member.end > len(data):
        raise tar.DamagedTar("the file ends inside a member", offset)
    name = member.name.decode("ascii", "replace")
    found, _, extension = name.partition(".")
    if found != key or not extension.isascii():
        raise tar.DamagedTar(f"a member called {name!r}", offset)
    if block != tar.header(name, member.size):
        raise tar.DamagedTar("a header that is not as it was written", offset)
    if any(data[member.data_offset + member.size : member.end]):
        raise tar.DamagedTar("bytes where there should be padding", member.data_offset + member.size)
    return member, extension


def _extent_faults(data: mmap.mmap, rows: list[dict[str, Any]], starts: list[int]) -> Iterator[str]:
    for row, start, end in zip(rows, starts, [*starts[1:], len(data)], strict=True):
        if (row["end"], row["extent_crc32c"]) != (end, google_crc32c.value(data[start:end])):
            yield f"sample {row['key']} ({row['source']}): end, extent_crc32c not as in the index"


def _chunk_faults(chunks: np.ndarray, starts: list[int], shard: Shard, end: int) -> Iterator[str]:
    at = chunks["first"].astype(np.int64) - shard.first
    if len(at) == 0 or at.min() < 0 or at.max() >= shard.count:
        yield f"{CHUNKS_NAME} does not point into it"
        return
    begins = np.array([starts[i] for i in at])
    lengths = np.append(begins[1:], end) - begins
    if (begins != chunks["byte_start"]).any() or (lengths != chunks["byte_len"]).any():
        yield f"{CHUNKS_NAME} does not say where its samples lie"


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    try:
        return sha256_of(path)
    except FileNotFoundError:
        return None
