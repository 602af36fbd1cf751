"""Images in, a corpus out, in two parallel passes: scan every file (read, hash, decode), then write the shards.

The order of the corpus is that of a seeded hash over content and name, so it is shuffled, and neither the number of
workers nor the order of the inputs changes a byte. What was done is kept under `.build/` until the manifest is
published, so a build that was killed goes on where it was.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.console import progress, say
from selfsight.corpus.classes import LabelKey, resolve
from selfsight.corpus.ledger import Ledger
from selfsight.corpus.pool import each
from selfsight.corpus.scan import Files, Image, Scanner
from selfsight.corpus.sources import Source, find_sources, shown
from selfsight.errors import UserError
from selfsight.files import publish, sha256_of, sweep
from selfsight.machine import available_cores
from selfsight.shards.corpus import CHUNK_DTYPE, CHUNKS_NAME, REJECTED_NAME, key_of
from selfsight.shards.decode import EXTENSIONS
from selfsight.shards.index import write_index
from selfsight.shards.manifest import NAME as MANIFEST_NAME
from selfsight.shards.manifest import SCHEMA, Manifest, Shard, merkle_root
from selfsight.shards.tar import END
from selfsight.shards.write import ShardWriter, stored_size

BUILD_FOLDER = ".build"
MIN_CHUNKS = 64  # so that the lanes of a run have something to mix, however small the corpus
LISTED = 20  # rejected files named in the report; all of them are in rejected.jsonl
INLINE_FILES = 256  # below this many, starting processes takes longer than the work


@dataclass(frozen=True)
class BuildReport:
    path: str
    id: str
    n: int
    image_bytes: int
    shards: int
    classes: int | None  # None: unlabelled
    counts: dict[str, int]  # seen = kept + rejected + skipped + outside; duplicates are among the kept
    rejected_reasons: dict[str, int]
    listed: list[dict[str, str]]  # the first of those in rejected.jsonl
    notes: list[str]
    seconds: float
    was_complete: bool  # nothing had to be done

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build(
    sources: list[str | Path],
    out: str | Path,
    *,
    workers: int | None = None,
    shard_bytes: int = 256 << 20,
    chunk_samples: int = 256,
    seed: int = 0,
    hash_range: tuple[float, float] = (0.0, 1.0),
) -> BuildReport:
    """Builds the corpus `out` from folders, archives, Parquet files or corpora; a finished identical build is a no-op.

    `hash_range=(a, b)` keeps the images whose content hash, as a number in [0, 1), falls into [a, b): disjoint ranges
    are splits that exact duplicates cannot cross, with one list of classes. Raises UserError for what the user can
    mend, a full or unwritable disk included; what was there before stays.
    """
    started = time.monotonic()
    if not 0 <= hash_range[0] < hash_range[1] <= 1:
        raise UserError(f"hash range {hash_range[0]}:{hash_range[1]} is empty: give A:B with 0 <= A < B <= 1")
    if shard_bytes < 1 or not 1 <= chunk_samples < 2**16 or (workers is not None and workers < 1):
        raise UserError("shard size, chunk samples (below 65536) and workers must be at least 1")
    if not sources:
        raise UserError("no sources: name a folder, an archive or a Parquet file of images")
    out = Path(out).resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    found = find_sources(sources, out)
    recipe = {
        "schema": SCHEMA,
        "seed": seed,
        "hash_range": [float(hash_range[0]), float(hash_range[1])],
        "shard_bytes": shard_bytes,
        "chunk_samples": chunk_samples,
        "sources": [s.describe() for s in found],
    }
    if not any(s["files"] for s in recipe["sources"]):
        raise UserError(f"no images in {', '.join(map(str, sources[:3]))}: it holds no files")
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    if _finished(out, digest):
        return _report(out, started, was_complete=True)

    existed = out.exists()
    work = out / BUILD_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        with closing(Ledger(work, digest)) as ledger:
            try:
                _scan(found, ledger, work, Scanner(seed, hash_range), workers or available_cores())
                _write(found, ledger, out, recipe, digest, workers or available_cores())
            except UserError:
                # The inputs are at fault and will change: nothing of this attempt is worth keeping.
                _discard(out, existed)
                raise
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(
            f"building {out} stopped: {e.strerror or e}{where}: mend that (free space, permissions), then run"
            " the same command and it goes on"
        ) from None
    shutil.rmtree(work)
    return _report(out, started, was_complete=False)


def _finished(out: Path, recipe_digest: str) -> bool:
    """Whether `out` is this very build, complete. Raises UserError when it is something else that must not be lost."""
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        if manifest.recipe_digest != recipe_digest:
            raise UserError(
                f"{out} already holds another corpus (id {manifest.id[:12]}…): choose another --out, or remove it"
            )
        shutil.rmtree(out / BUILD_FOLDER, ignore_errors=True)
        return True
    if out.exists() and not (out / BUILD_FOLDER).exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no corpus: choose another --out")
    return False


def _discard(out: Path, existed: bool) -> None:
    for name in (BUILD_FOLDER, "shards", "index"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (CHUNKS_NAME, REJECTED_NAME):
        (out / name).unlink(missing_ok=True)
    if not existed:
        out.rmdir()


def _scan(sources: list[Source], ledger: Ledger, work: Path, scanner: Scanner, workers: int) -> None:
    spool = work / "spool"
    spool.mkdir(exist_ok=True)
    sweep(spool)
    for number, source in enumerate(sources):
        source.spool(spool, number)
    done = ledger.units()
    total = sum(source.count() for source in sources)
    before = ledger.counts()
    units = (
        unit
        for number, source in enumerate(sources)
        for unit in source.units(number, spool)
        if (unit.source, unit.number) not in done
    )
    rejected = before["rejected"]
    with progress("scan", total, before["seen"]) as bar:
        for scan in each(scanner, units, workers if total > INLINE_FILES else 1):
            ledger.add(scan)
            rejected += len(scan.rejected)
            bar.advance(scan.seen, rejected=rejected)


@dataclass(frozen=True)
class ShardTask:
    out: str
    number: int
    first: int
    chunk_samples: int
    images: list[Image]
    labels: list[int | None]
    sources: list[str]


def _write(sources: list[Source], ledger: Ledger, out: Path, recipe: dict[str, Any], digest: str, workers: int) -> None:
    counts = ledger.counts()
    n = counts["kept"]
    if not n:
        raise _nothing(sources, ledger, counts)
    classes, labels, how = resolve(ledger.labels(), sources)
    folders = [out, out / "shards", out / "index"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        sweep(folder)
    chunk_samples = max(1, min(recipe["chunk_samples"], n // MIN_CHUNKS))
    records, chunks = {}, {}
    for number, (record, rows) in ledger.shards().items():
        shard = Shard(**json.loads(record))
        if (out / shard.tar).is_file() and (out / shard.index).is_file():  # somebody may have tidied up in between
            records[number], chunks[number] = shard, np.frombuffer(rows, CHUNK_DTYPE)
    tasks = (
        task
        for task in _tasks(ledger.images(), labels, sources, out, recipe["shard_bytes"], chunk_samples)
        if task.number not in records
    )
    with progress("write", n, sum(s.count for s in records.values())) as bar:
        for shard, rows in each(write_shard, tasks, workers if n > INLINE_FILES else 1):
            ledger.add_shard(shard.number, json.dumps(asdict(shard)), rows.tobytes())
            records[shard.number], chunks[shard.number] = shard, rows
            bar.advance(shard.count)

    table = publish_tables(out, chunks, ledger, [source.name for source in sources])
    shards = [records[i] for i in range(len(records))]
    for folder in folders:  # a worker of a build that was killed lives a moment longer than it, and may have written
        sweep(folder)
    Manifest(
        id=merkle_root(shards),
        n=n,
        image_bytes=ledger.image_bytes(),
        shards=shards,
        chunks=len(table),
        chunks_sha256=sha256_of(out / CHUNKS_NAME),
        rejected_sha256=sha256_of(out / REJECTED_NAME),
        classes=classes,
        counts=counts,
        rejected_reasons=ledger.reasons(),
        recipe=recipe,
        recipe_digest=digest,
        notes=[how, *(remark for source in sources for remark in source.remarks())],
    ).save(out)


def publish_tables(out: Path, chunks: dict[int, np.ndarray], ledger: Ledger, names: Sequence[str]) -> np.ndarray:
    """Publishes chunks.npy, from the rows of each shard by its number, and rejected.jsonl; returns the chunk table.
    `names` are those of the sources."""
    table = np.concatenate([chunks[i] for i in range(len(chunks))])
    with publish(out / CHUNKS_NAME) as f:
        np.save(f, table, allow_pickle=False)
    with publish(out / REJECTED_NAME) as f:
        for source, name, kind, reason in ledger.refused():
            line = {"source": f"{names[source]}/{shown(name)}", "kind": kind, "reason": reason}
            f.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    return table


def _tasks(
    images: Iterator[Image],
    labels: dict[LabelKey, int],
    sources: list[Source],
    out: Path,
    shard_bytes: int,
    chunk_samples: int,
) -> Iterator[ShardTask]:
    """Cuts the ordered images into shards of at most `shard_bytes`, but never less than one image."""
    names = [s.name for s in sources]
    number = first = 0
    batch: list[Image] = []
    size = len(END)

    def task() -> ShardTask:
        marks = [labels.get((i.source, i.folder, i.tag)) for i in batch]
        return ShardTask(str(out), number, first, chunk_samples, batch, marks, names)

    for image in images:
        grown = stored_size(image.size, bool(labels))
        if batch and size + grown > shard_bytes:
            yield task()
            number, first, batch, size = number + 1, first + len(batch), [], len(END)
        batch.append(image)
        size += grown
    if batch:
        yield task()


def write_shard(task: ShardTask) -> tuple[Shard, np.ndarray]:
    """Pass 2, for one shard: copies its images, publishes tar and index. Raises UserError if a source has changed."""
    path, rows = Path(task.out) / "shards" / f"{task.number:06d}.tar", []
    with Files() as files, publish(path) as f:
        writer = ShardWriter(f, number=task.number, first=task.first, chunk_samples=task.chunk_samples)
        for ordinal, (image, label) in enumerate(zip(task.images, task.labels, strict=True), task.first):
            source = f"{task.sources[image.source]}/{shown(image.name)}"
            if hashlib.sha256(data := _bytes_of(image, files)).digest() != image.sha256:
                raise UserError(f"{source} changed while the corpus was built: run again when the source stands still")
            writer.add(data, EXTENSIONS[image.format], label)
            copied = {k: getattr(image, k) for k in COPIED}
            rows.append(
                {
                    "sample": ordinal,
                    "key": key_of(ordinal),
                    "source": source,
                    "progressive": bool(image.progressive),
                    "label": label,
                    **copied,
                }
            )
        size, sha256, chunks, extents = writer.finish()
    index = path.parents[1] / "index" / f"{task.number:06d}.parquet"
    write_index(index, [row | extent for row, extent in zip(rows, extents, strict=True)])
    return Shard(task.number, task.first, len(rows), size, sha256, sha256_of(index)), chunks


def _bytes_of(image: Image, files: Files) -> bytes:
    """What lies now where pass 1 found the image; nothing where it has gone. Raises OSError where a disk fails."""
    try:
        return files.read(image.path, image.offset, image.size + image.whole, -1 if image.whole else image.size)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""


COPIED = ("size", "crc32c", "sha256", "width", "height", "format", "mode", "frames", "exif_orientation")


def _nothing(sources: list[Source], ledger: Ledger, counts: dict[str, int]) -> UserError:
    names = ", ".join(str(s.path) for s in sources[:3])
    if counts["outside"]:
        return UserError(
            f"no readable image of {names} falls into the hash range ({counts['outside']} lie outside):"
            " give more images, or a wider range"
        )
    if counts["rejected"]:
        source, name, _, reason = next(ledger.refused())
        return UserError(
            f"none of the {counts['rejected']} images in {names} can be decoded"
            f" (first: {sources[source].name}/{shown(name)}: {reason}): check the files"
        )
    return UserError(f"no images in {names} ({counts['skipped']} other files): name a folder or archive of images")


def _report(out: Path, started: float, was_complete: bool) -> BuildReport:
    m = Manifest.load(out)
    if was_complete:
        say(f"{out} is complete already, built from the same files with the same options")
    with open(out / REJECTED_NAME, encoding="utf-8") as f:
        listed = [json.loads(line) for line, _ in zip(f, range(LISTED), strict=False)]
    return BuildReport(
        path=str(out),
        id=m.id,
        n=m.n,
        image_bytes=m.image_bytes,
        shards=len(m.shards),
        classes=None if m.classes is None else len(m.classes),
        counts=m.counts,
        rejected_reasons=m.rejected_reasons,
        listed=listed,
        notes=m.notes,
        seconds=time.monotonic() - started,
        was_complete=was_complete,
    )
