"""Pass 1: every file of a source is read, hashed and decoded once; what it is, or why it is not an image, comes out.

Runs in worker processes on one `Unit` at a time and returns plain rows; the bytes themselves stay where they are, or go
to the unit's spool file when they cannot be read again by offset.
"""

import hashlib
import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
from PIL import ImageFile

from selfsight.corpus.discover import image_column
from selfsight.corpus.sources import UNPACK_ERRORS, Candidate, Unit, normal
from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards.decode import DecodeError, load, open_image, orientation, to_rgb

MAX_FILE_BYTES = 1 << 30
SNIFFED_BYTES = 64
IMAGE_SUFFIXES = (
    b".jpg", b".jpeg", b".jpe", b".jfif", b".mpo", b".png", b".apng", b".gif", b".webp", b".bmp", b".dib", b".tif",
    b".tiff", b".ppm", b".pgm", b".pbm", b".pnm", b".jp2", b".j2k", b".jpx", b".avif", b".qoi",
)  # fmt: skip
# Read by no decoder here, but images to whoever named them so: they are listed as rejected, not as something else.
FOREIGN_SUFFIXES = (
    b".heic", b".heif", b".jxl", b".svg", b".psd", b".eps", b".ico", b".tga", b".dng", b".cr2", b".nef", b".arw",
    b".raw",
)  # fmt: skip
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"qoif", b"\0\0\0\x0cjP  ")


class Image(NamedTuple):
    """An accepted image: where its bytes lie and what they are."""

    order: bytes  # 16 bytes: the seeded hash of content and name that orders the corpus
    name: bytes
    source: int
    unit: int
    row: int  # of the unit
    folder: bytes
    tag: str | None
    path: bytes
    offset: int
    size: int  # bytes of the image file
    whole: int  # 1: `path` is the image file itself
    sha256: bytes
    crc32c: int
    width: int
    height: int
    format: str
    mode: str
    frames: int
    progressive: int
    exif_orientation: int


@dataclass
class Scan:
    """What one unit held. `labels` counts (source, folder, tag) of all that opens as an image, in the hash range or
    not, so that the two halves of a split agree on their classes."""

    source: int
    number: int
    images: list[Image] = field(default_factory=list)
    rejected: list[tuple[bytes, str]] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    labels: Counter = field(default_factory=Counter)
    outside: int = 0

    @property
    def seen(self) -> int:
        return len(self.images) + len(self.rejected) + len(self.skipped) + self.outside


@dataclass(frozen=True)
class Scanner:
    """The function of pass 1, with its options; it travels to the workers."""

    seed: int
    hash_range: tuple[float, float]

    def __call__(self, unit: Unit) -> Scan:
        scan = Scan(unit.source, unit.number)
        truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF or size; outcomes are in the scan
                if unit.kind == "ranges":
                    self._ranges(unit, scan)
                else:
                    with publish(Path(unit.spool)) as spool:
                        self._spooled(unit, scan, spool)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
        return scan

    def _ranges(self, unit: Unit, scan: Scan) -> None:
        with Files() as files:
            for row, candidate in enumerate(unit.items):
                looked = self._worth_reading(
                    candidate, scan, lambda n, c=candidate: files.read(c.path, c.offset, n, c.size)
                )
                if not looked:
                    continue
                try:
                    data = files.read(candidate.path, candidate.offset, candidate.size, candidate.size)
                except OSError as e:
                    scan.rejected.append((candidate.name, f"cannot be read ({e.strerror})"))
                    continue
                whole = candidate.size < 0
                self._examine(unit, scan, row, candidate, data, candidate.path, candidate.offset, whole)

    def _spooled(self, unit: Unit, scan: Scan, spool: IO[bytes]) -> None:
        offset = 0
        cells = _zip_cells(unit, self, scan) if unit.kind == "zip" else _parquet_cells(unit, scan)
        for row, (candidate, data) in enumerate(cells):
            if self._examine(unit, scan, row, candidate, data, unit.spool, offset, False):
                spool.write(data)
                offset += len(data)

    def _worth_reading(self, candidate: Candidate, scan: Scan, head) -> bool:
        """Sorts out links, non-images and giants before their bytes are read."""
        name = candidate.name.lower()
        base = name.rpartition(b"/")[2]
        if candidate.problem is not None:
            scan.skipped.append((candidate.name, candidate.problem))
        elif base.startswith(b"._"):
            scan.skipped.append((candidate.name, "a resource fork, not an image"))
        else:
            try:
                size = candidate.size if candidate.size >= 0 else os.stat(candidate.path).st_size
                known = name.endswith(IMAGE_SUFFIXES)
                start = b"" if known else head(SNIFFED_BYTES)
                # A camera's raw file is a TIFF outside, of which Pillow would take the thumbnail.
                if name.endswith(FOREIGN_SUFFIXES) and (start[:2] in (b"II", b"MM") or not looks_like_image(start)):
                    scan.rejected.append((candidate.name, "a format that is not supported"))
                elif not known and not looks_like_image(start):
                    scan.skipped.append((candidate.name, "not an image"))
                elif size > MAX_FILE_BYTES:
                    scan.rejected.append((candidate.name, f"larger than {MAX_FILE_BYTES >> 20} MiB"))
                else:
                    return True
            except OSError as e:
                scan.rejected.append((candidate.name, f"cannot be read ({e.strerror})"))
        return False

    def _examine(
        self, unit: Unit, scan: Scan, row: int, candidate: Candidate, data: bytes, path: str, offset: int, whole: bool
    ) -> bool:
        """Hashes and decodes one file into `scan`; whether it was accepted."""
        digest = hashlib.sha256(data).digest()
        inside = self.hash_range[0] <= int.from_bytes(digest[:8], "big") / 2**64 < self.hash_range[1]
        folder = candidate.name.rpartition(b"/")[0]
        try:
            image = open_image(data)
            scan.labels[unit.source, folder, candidate.tag] += 1
            if not inside:
                scan.outside += 1
                return False
            width, height, mode = image.width, image.height, image.mode
            load(image)
            progressive = bool(image.info.get("progressive") or image.info.get("progression"))
            turned = orientation(image)
            to_rgb(image)
        except DecodeError as e:
            if inside:
                scan.rejected.append((candidate.name, str(e)))
            else:
                scan.outside += 1
            return False
        order = hashlib.sha256(b"%d\0" % self.seed + digest + candidate.name).digest()[:16]
        scan.images.append(
            Image(
                order, candidate.name, unit.source, unit.number, row, folder, candidate.tag, os.fsencode(path), offset,
                len(data), int(whole), digest, google_crc32c.value(data), width, height, str(image.format), mode,
                _frames(image),
                int(progressive), turned,
            )
        )  # fmt: skip
        return True


class Files:
    """Reads ranges of files, keeping the last archive open."""

    def __init__(self) -> None:
        self._path, self._file = None, None

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def read(self, path: str | bytes, offset: int, n: int, size: int) -> bytes:
        """`n` bytes at `offset` (-1: all); `size` -1 says that `path` is a file of its own, not worth keeping open."""
        if size < 0:
            with open(path, "rb") as f:
                return f.read(n)
        if path != self._path:
            self.__exit__()
            self._path, self._file = path, open(path, "rb")  # noqa: SIM115
        assert self._file is not None
        self._file.seek(offset)
        return self._file.read(min(n, size))


def looks_like_image(head: bytes) -> bool:
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)
    return bitmap or head.startswith(MAGIC) or head[8:12] == b"WEBP" or head[4:12] in (b"ftypavif", b"ftypavis")


def _zip_cells(unit: Unit, scanner: Scanner, scan: Scan) -> Iterator[tuple[Candidate, bytes]]:
    with zipfile.ZipFile(unit.path) as archive:
        infos = archive.infolist()
        for candidate in unit.items:
            info = infos[-1 - candidate.offset]
            try:
                with archive.open(info) as f:
                    head = f.read(SNIFFED_BYTES)
                    if scanner._worth_reading(candidate, scan, lambda n, head=head: head):
                        # The declared size was checked; zipfile cuts off a member that holds more than it declares.
                        yield candidate, head + f.read(candidate.size)
            except (*UNPACK_ERRORS, OSError) as e:
                scan.rejected.append((candidate.name, f"cannot be unpacked ({' '.join(str(e).split())})"))


def _parquet_cells(unit: Unit, scan: Scan) -> Iterator[tuple[Candidate, bytes]]:
    found = image_column(Path(unit.path))
    assert found is not None
    column, struct, label, _ = found
    for row, cells in _parquet_rows(unit, [column, label] if label else [column]):
        cell = cells[column]
        name = f"row{row:012d}"
        if struct and cell:
            name, cell = cell.get("path") or name, cell.get("bytes")
        tag = str(cells[label]) if label and cells[label] is not None else None
        tag = None if tag and tag.startswith("-") else tag  # -1 is how data sets write that there is none
        candidate = Candidate(normal(name.encode("utf-8", "surrogatepass")), unit.path, tag=tag)
        if cell is None:
            scan.rejected.append((candidate.name, "no bytes in its row"))
        elif len(cell) > MAX_FILE_BYTES:
            scan.rejected.append((candidate.name, f"larger than {MAX_FILE_BYTES >> 20} MiB"))
        else:
            yield candidate, cell


def _parquet_rows(unit: Unit, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the table, cells) of the rows of a unit. Raises UserError where the table is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    group = unit.items[0]
    try:
        with open(unit.path, "rb") as f:
            table = pq.ParquetFile(f)
            row = sum(table.metadata.row_group(g).num_rows for g in range(group))
            for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=columns):
                yield from enumerate(batch.to_pylist(), row)
                row += batch.num_rows
    # A damaged page is an OSError to pyarrow, text that is none a UnicodeDecodeError.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{unit.path} is damaged ({e}): fetch it again, or leave it out") from None


def _frames(image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # later frames may be damaged; the first one, which is what is used, is not
        return 1
