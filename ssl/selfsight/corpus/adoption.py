"""Foreign WebDataset shards → a corpus that reads them where they lie: index, chunks, manifest; no byte is rewritten.

Every shard is read once, in parallel, and every image decoded, as a build does. A sample is an image with its
neighbours under one key; its extent ends where the next key begins, so members that are no images are checked with it.
A sample without an image that decodes has no extent: it lies between those of others and is never read again. The order
is that of the shards, whose authors have shuffled them or not.
"""

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageFile

from selfsight.console import progress
from selfsight.corpus.classes import LabelKey, resolve
from selfsight.corpus.foreign import ShardBytes, find_shards, opened, refuse_packed, split_name, walk
from selfsight.corpus.ingest import (
    BUILD_FOLDER,
    COPIED,
    MIN_CHUNKS,
    BuildReport,
    _discard,
    _finished,
    _report,
    publish_tables,
)
from selfsight.corpus.ledger import Ledger
from selfsight.corpus.pool import each
from selfsight.corpus.scan import Image, Scan, Scanner
from selfsight.corpus.sources import MAX_LABEL_BYTES, Candidate, Source, Unit, shown
from selfsight.errors import UserError
from selfsight.files import publish, sha256_of, sweep
from selfsight.machine import available_cores
from selfsight.shards import tar
from selfsight.shards.corpus import CHUNKS_NAME, LABEL_EXTENSION, REJECTED_NAME, key_of
from selfsight.shards.index import write_index
from selfsight.shards.manifest import SCHEMA, Manifest, Shard, merkle_root
from selfsight.shards.write import chunk_rows

INLINE_BYTES = 64 << 20  # below this, starting processes takes longer than the work
EXTENTS = "extents"  # folder of the working state: one array per shard
NO_IMAGE = "a sample without an image"
NOT_WHOLE = "beside damage in its shard, and not whole"
OTHER = "not an image"  # what the scan says of labels, captions and the like


def adopt(
    urls: list[str],
    out: str | Path,
    *,
    workers: int | None = None,
    chunk_samples: int = 256,
    skip_damaged: bool = False,
) -> BuildReport:
    """Makes the corpus `out` of the shards that `urls` name: paths, fsspec URLs, with {000000..000123} and globs.

    What was done is kept until the manifest is published, so that the same command goes on after a failure; a finished
    corpus of the same shards is a no-op. A damaged shard is refused unless `skip_damaged`, which adopts the samples
    that damage does not touch and lists the rest. Raises UserError for what the user can mend.
    """
    started = time.monotonic()
    if not 1 <= chunk_samples < 2**16 or (workers is not None and workers < 1):
        raise UserError("chunk samples (below 65536) and workers must be at least 1")
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    shards = find_shards(urls)
    if not shards:
        raise UserError("no shards: name the WebDataset shards to adopt")
    recipe = {
        "schema": SCHEMA,
        "chunk_samples": chunk_samples,
        "adopted": [{"url": url, "bytes": size} for url, size in shards],
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    if _finished(out, digest):
        return _report(out, started, was_complete=True)
    existed, work = out.exists(), out / BUILD_FOLDER
    workers = 1 if sum(size for _, size in shards) < INLINE_BYTES else workers or available_cores()
    try:
        (work / EXTENTS).mkdir(parents=True, exist_ok=True)
        with closing(Ledger(work, digest)) as ledger:
            sweep(work / EXTENTS)
            _scan(shards, ledger, work, skip_damaged, workers)
            if not ledger.counts()["kept"]:
                reasons = ledger.reasons() or {"they hold none": 0}
                _discard(out, existed)
                raise UserError(f"no images in {len(shards)} shards ({next(iter(reasons))}): check {shards[0][0]}")
            _write([url for url, _ in shards], ledger, out, recipe, digest, workers)
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(
            f"adopting into {out} stopped: {e.strerror or e}{where}: mend that (free space, permissions), then run"
            " the same command and it goes on"
        ) from None
    shutil.rmtree(work)
    return _report(out, started, was_complete=False)


@dataclass(frozen=True)
class ReadTask:
    number: int
    url: str
    bytes: int
    extents: str  # where the array of extents goes
    skip_damaged: bool


def _scan(shards: list[tuple[str, int]], ledger: Ledger, work: Path, skip_damaged: bool, workers: int) -> None:
    done = {number for number, _ in ledger.units()}
    tasks = (
        ReadTask(number, url, size, str(work / EXTENTS / f"{number:06d}.npy"), skip_damaged)
        for number, (url, size) in enumerate(shards)
        if number not in done
    )
    before = ledger.counts()
    images, rejected = before["kept"], before["rejected"]
    with progress("adopt", len(shards), len(done)) as bar:
        for scan, record in each(read_shard, tasks, workers):
            ledger.add_shard(scan.number, json.dumps(record), b"")
            ledger.add(scan)
            images, rejected = images + len(scan.images), rejected + len(scan.rejected)
            bar.advance(1, images=images, rejected=rejected)


def read_shard(task: ReadTask) -> tuple[Scan, dict[str, Any]]:
    """One shard, read once: (what it holds, its record); publishes the extents, int64 (images, 3): begin, end, CRC-32C.

    Raises UserError where it cannot be read, is compressed, or is damaged and that is not allowed for.
    """
    scan = Scan(task.number, task.number)
    extents: list[tuple[int, int, int]] = []

    def go_on(damage: tar.DamagedTar) -> bool:
        if not task.skip_damaged:
            raise UserError(
                f"{task.url} is damaged ({damage}): fetch it again, or take what is sound of it with --skip-damaged"
            )
        scan.rejected.append((b"byte %d" % damage.offset, damage.what))
        return True

    with opened(task.url, task.bytes) as shard, _quiet_pillow():
        refuse_packed(shard)
        look = _Look(shard, task)
        for group in walk(shard, look, go_on):
            images, rejected, skipped, tag = look.taken()
            scan.rejected += rejected
            scan.skipped += skipped
            if not group.whole:
                scan.rejected += [(i.name, NOT_WHOLE) for i in images] or [(group.key, NOT_WHOLE)]
                continue
            if not images and not rejected and not skipped:
                scan.skipped.append((group.key, NO_IMAGE))
            for image, extent in zip(images, group.extents, strict=True):
                row = len(scan.images)
                order = task.number.to_bytes(8, "big") + row.to_bytes(8, "big")
                scan.images.append(image._replace(order=order, row=row, tag=tag))
                scan.labels[0, image.folder, tag] += 1
                extents.append(extent)
        scan.skipped += look.strays
        record = {"sha256": shard.finish(), "has_end_mark": shard.has_end_mark()}
    with publish(Path(task.extents)) as f:
        np.save(f, np.array(extents, np.int64).reshape(-1, 3), allow_pickle=False)
    return scan, record


class _Look:
    """What the members of one group are, found by the scan of a build; `taken` hands it over and begins anew."""

    def __init__(self, shard: ShardBytes, task: ReadTask) -> None:
        self.strays: list[tuple[bytes, str]] = []
        self._shard = shard
        self._scanner = Scanner(0, (0.0, 1.0))
        self._unit = Unit(task.number, task.number, "ranges", task.url, [], "")
        self._begin()

    def _begin(self) -> None:
        self._scan, self._tag = Scan(self._unit.source, self._unit.number), None

    def taken(self) -> tuple[list[Image], list[tuple[bytes, str]], list[tuple[bytes, str]], str | None]:
        """(images, rejected, skipped, label text) of the group."""
        scan, tag = self._scan, self._tag
        self._begin()
        return scan.images, scan.rejected, [s for s in scan.skipped if s[1] != OTHER], tag

    def __call__(self, name: bytes, member: tar.Member) -> bool:
        """Whether the member is an image that decodes."""
        split = split_name(name)
        if split is None:
            self.strays.append((name, "not named as a member of a sample"))
            return False
        problem = None
        if member.type not in tar.REGULAR:
            problem = "a link inside a tar" if member.type in (b"1", b"2") else "not a regular file"
        elif split[1] == LABEL_EXTENSION.encode():
            text = self._shard.read(member.data_offset, min(member.size, MAX_LABEL_BYTES))
            self._tag = text.decode("utf-8", "replace").strip()
            return False
        url, at = self._unit.path, member.data_offset
        candidate = Candidate(name, url, at, member.size, problem=problem)
        if not self._scanner._worth_reading(candidate, self._scan, lambda n: self._shard.read(at, min(n, member.size))):
            return False
        data = self._shard.read(at, member.size)
        return self._scanner._examine(self._unit, self._scan, 0, candidate, data, url, at, False)


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Truncated images are errors, and odd EXIF blocks no warnings, as in the scan of a build."""
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


@dataclass(frozen=True)
class IndexTask:
    out: str
    shard: Shard  # all but the digest of the index
    name: str
    extents: str
    chunk_samples: int
    images: list[Image]
    labels: list[int | None]


def _write(urls: list[str], ledger: Ledger, out: Path, recipe: dict[str, Any], digest: str, workers: int) -> None:
    counts = ledger.counts()
    classes, labels, how = resolve(ledger.labels(), [Source("these shards", Path(), "tar")])
    names = _names(urls)
    folders = [out, out / "index"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        sweep(folder)
    chunk_samples = max(1, min(recipe["chunk_samples"], counts["kept"] // MIN_CHUNKS))
    records = {number: json.loads(record) for number, (record, _) in ledger.shards().items()}
    sizes = [s["bytes"] for s in recipe["adopted"]]
    shards: dict[int, Shard] = {}
    chunks: dict[int, np.ndarray] = {}
    empty = dict.fromkeys(names)

    def tasks() -> Iterator[IndexTask]:
        first = 0
        for at, (number, found) in enumerate(groupby(ledger.images(), key=lambda image: image.source)):
            images = list(found)
            shard = Shard(at, first, len(images), sizes[number], records[number]["sha256"], "", urls[number])
            marks = [labels.get(_label_key(i)) for i in images]
            extents = out / BUILD_FOLDER / EXTENTS / f"{number:06d}.npy"
            yield IndexTask(str(out), shard, names[number], str(extents), chunk_samples, images, marks)
            del empty[names[number]]
            first += len(images)

    with progress("index", counts["kept"]) as bar:
        for shard, rows in each(index_shard, tasks(), workers):
            shards[shard.number], chunks[shard.number] = shard, rows
            bar.advance(shard.count)
    table = publish_tables(out, chunks, ledger, names)
    ordered = [shards[i] for i in range(len(shards))]
    cut_off = [names[n] for n, record in records.items() if not record["has_end_mark"]]
    for folder in folders:
        sweep(folder)
    Manifest(
        id=merkle_root(ordered),
        n=counts["kept"],
        image_bytes=ledger.image_bytes(),
        shards=ordered,
        chunks=len(table),
        chunks_sha256=sha256_of(out / CHUNKS_NAME),
        rejected_sha256=sha256_of(out / REJECTED_NAME),
        classes=classes,
        counts=counts,
        rejected_reasons=ledger.reasons(),
        recipe=recipe,
        recipe_digest=digest,
        notes=[
            how,
            f"{len(ordered)} shards adopted where they lie",
            *(f"{name} holds no image and is left out" for name in empty),
            *(f"{name} has no end mark: if it was cut off, the samples behind the cut are missing" for name in cut_off),
        ],
    ).save(out)


def index_shard(task: IndexTask) -> tuple[Shard, np.ndarray]:
    """Publishes the index of one shard: (the shard, its chunk rows)."""
    extents = np.load(task.extents, allow_pickle=False).tolist()
    rows = [
        {
            "sample": ordinal,
            "key": key_of(ordinal),
            "source": f"{task.name}/{shown(image.name)}",
            "member_offset": begin,
            "data_offset": image.offset,
            "end": end,
            "extent_crc32c": crc32c,
            "progressive": bool(image.progressive),
            "label": label,
            **{k: getattr(image, k) for k in COPIED},
        }
        for ordinal, (image, label, (begin, end, crc32c)) in enumerate(
            zip(task.images, task.labels, extents, strict=True), task.shard.first
        )
    ]
    path = Path(task.out) / task.shard.index
    write_index(path, rows)
    chunks = chunk_rows(rows, number=task.shard.number, first=task.shard.first, chunk_samples=task.chunk_samples)
    return replace(task.shard, index_sha256=sha256_of(path)), chunks


def _label_key(image: Image) -> LabelKey:
    return 0, image.folder, image.tag


def _names(urls: list[str]) -> list[str]:
    """What the index calls the shards: all of their paths that they do not share."""
    folders = [url.rpartition("/")[0].split("/") for url in urls]
    shared = 0
    while all(len(f) > shared for f in folders) and len({f[shared] for f in folders}) == 1:
        shared += 1
    return ["/".join(url.split("/")[shared:]) for url in urls]
