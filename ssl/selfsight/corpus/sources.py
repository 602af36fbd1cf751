"""What images come in: folders, tars (also compressed, also WebDataset shards), zips and Parquet tables.

A source lists its files in one fixed order and hands them out as units of work. Archives are read by offset and never
unpacked by name, so no member can write anywhere; what cannot be read by offset (a compressed tar, a deflated zip
member, a Parquet cell) goes through a spool file.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from selfsight.corpus.discover import compression, image_column, kind_of_file, opened_kind, walk
from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards import Corpus, tar
from selfsight.shards.manifest import is_corpus

UNIT_FILES = 128
UNIT_BYTES = 64 << 20
MAX_LABEL_BYTES = 4096
# What the decompressors raise besides OSError, which carries no errno then; RuntimeError is of a missing password.
UNPACK_ERRORS = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class Candidate(NamedTuple):
    """One file of a source. `size` -1 means the whole of `path`; `problem` says why it cannot even be tried."""

    name: bytes  # inside the source
    path: str  # the file that holds its bytes
    offset: int = 0
    size: int = -1
    tag: str | None = None  # label text that came with it
    problem: str | None = None


@dataclass(frozen=True)
class Unit:
    """A piece of pass 1. `ranges`: candidates read by offset; `zip`: deflated members; `parquet`: one row group."""

    source: int
    number: int
    kind: str
    path: str
    items: list[Any]
    spool: str  # where bytes go that cannot be read by offset


@dataclass
class Source:
    """One input. `name` is what the index calls it; `class_names` give names to integer labels."""

    name: str
    path: Path
    kind: str
    class_names: list[str] | None = None
    only: tuple[bytes, ...] | None = None  # the files of a folder that were named one by one
    exclude: Path | None = None  # the corpus being built may lie inside
    spooled: Path | None = field(default=None, compare=False)
    listed: int | None = field(default=None, compare=False)  # files that `describe` counted

    def describe(self) -> dict[str, Any]:
        """Names and sizes as a digest: two sources that list the same are the same build."""
        digest, files, total = hashlib.sha256(), 0, 0
        for name, size in self._listing():
            digest.update(b"%d %d " % (len(name), size) + name)
            files, total = files + 1, total + size
        self.listed = files
        return {"name": self.name, "kind": self.kind, "files": files, "bytes": total, "listing": digest.hexdigest()}

    def spool(self, folder: Path, number: int) -> None:
        """Unpacks a compressed tar, once, into a plain one that can be read by offset."""
        if self.kind != "compressed tar":
            return
        self.spooled = folder / f"{number:06d}.tar"
        if self.spooled.exists():
            return
        opener = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[compression(self.path) or "gzip"]
        with self._unpacking(), opener(self.path, "rb") as packed, publish(self.spooled) as f:
            while block := packed.read(1 << 20):
                f.write(block)

    def remarks(self) -> list[str]:
        """What is odd about this source but no reason to refuse it."""
        if self.kind not in ("tar", "compressed tar"):
            return []
        with open(self.spooled or self.path, "rb") as f:
            f.seek(-min(tar.BLOCK, f.seek(0, os.SEEK_END)), os.SEEK_END)
            ended = not f.read().strip(b"\0")
        return (
            [] if ended else [f"{self.name} has no end mark: if it was cut off, the images behind the cut are missing"]
        )

    def count(self) -> int:
        """How many files (table rows) there are to look at."""
        if self.kind == "parquet":
            return self._parquet_metadata().num_rows
        return sum(1 for _ in self.files()) if self.listed is None or self.spooled else self.listed

    def units(self, number: int, spool: Path) -> Iterator[Unit]:
        """The work of this source, always cut the same way."""

        def unit(kind: str, items: list[Any]) -> Unit:
            nonlocal made
            made += 1
            path = spool / f"{number:06d}-{made:08d}.bin"
            return Unit(number, made, kind, str(self.path), items, str(path))

        made = 0
        if self.kind == "parquet":
            for group in range(self._parquet_metadata().num_row_groups):
                yield unit("parquet", [group])
            return
        kind, batch, size = "ranges", [], 0
        for candidate in self.files():
            wanted = "zip" if candidate.offset < 0 else "ranges"
            if batch and (wanted != kind or len(batch) == UNIT_FILES or size > UNIT_BYTES):
                yield unit(kind, batch)
                batch, size = [], 0
            kind = wanted
            batch.append(candidate)
            size += max(candidate.size, 0)
        if batch:
            yield unit(kind, batch)

    def files(self) -> Iterator[Candidate]:
        if self.kind == "folder":
            return self._walk()
        if self.kind == "zip":
            return self._zip_members()
        return self._tar_members()

    def _listing(self) -> Iterable[tuple[bytes, int]]:
        if self.kind == "folder":
            return ((c.name, os.stat(c.path).st_size if c.problem is None else 0) for c in self._walk())
        if self.kind in ("tar", "zip"):
            return ((c.name, c.size) for c in self.files())
        return [(os.fsencode(self.path.name), self.path.stat().st_size)]

    def _walk(self) -> Iterator[Candidate]:
        """The files below a folder, without the archives, which are sources of their own."""
        if self.only is None:
            files = ((p, r) for p, r in walk(self.path, self.exclude) if opened_kind(p) is None)
        else:
            files = ((f"{self.path}/{name}", name) for name in map(os.fsdecode, self.only))
        for path, relative in files:
            problem = None if os.path.isfile(path) else "a dangling link or not a regular file"
            yield Candidate(os.fsencode(relative), path, problem=problem)

    def _tar_members(self) -> Iterator[Candidate]:
        path = self.spooled or self.path
        with open(path, "rb") as f:

            def read(offset: int, size: int) -> bytes:
                f.seek(offset)
                return f.read(size)

            def found() -> Iterator[Candidate]:
                for m in tar.members(read, os.fstat(f.fileno()).st_size):
                    name = normal(m.name)
                    if m.type in tar.REGULAR:
                        yield Candidate(name, str(path), m.data_offset, m.size)
                    elif m.type in (b"1", b"2"):
                        yield Candidate(name, str(path), 0, 0, problem="a link inside a tar")
                    elif m.type != b"5":
                        yield Candidate(name, str(path), 0, 0, problem="not a regular file")

            try:
                yield from tagged(found(), lambda c: read(c.offset, min(c.size, MAX_LABEL_BYTES)))
            except tar.DamagedTar as e:
                raise self._damaged(str(e)) from None

    def _zip_members(self) -> Iterator[Candidate]:
        with self._unpacking(), zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as f:

            def found() -> Iterator[Candidate]:
                for number, info in enumerate(archive.infolist()):
                    name = normal(info.filename.encode("utf-8", "surrogateescape"))
                    if info.is_dir():
                        continue
                    if info.flag_bits & 1:
                        yield Candidate(name, str(self.path), 0, 0, problem="encrypted")
                    elif info.compress_type != zipfile.ZIP_STORED:
                        yield Candidate(name, str(self.path), -1 - number, info.file_size)
                    else:
                        f.seek(info.header_offset)
                        local = f.read(30)
                        if local[:4] != b"PK\3\4":
                            raise self._damaged(f"no member at byte {info.header_offset}")
                        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                        yield Candidate(name, str(self.path), info.header_offset + 30 + names, info.file_size)

            def text(c: Candidate) -> bytes:
                if c.offset < 0:
                    with archive.open(archive.infolist()[-1 - c.offset]) as member:
                        return member.read(MAX_LABEL_BYTES)
                f.seek(c.offset)
                return f.read(min(c.size, MAX_LABEL_BYTES))

            yield from tagged(found(), text)

    def _parquet_metadata(self):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with open(self.path, "rb") as f:  # pyarrow takes no path that is not UTF-8
                return pq.read_metadata(f)
        except pa.ArrowInvalid as e:
            raise self._damaged(str(e)) from None

    @contextmanager
    def _unpacking(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (*UNPACK_ERRORS, ValueError) as e:
            raise self._damaged(str(e)) from None
        except OSError as e:
            if e.errno is None:
                raise self._damaged(str(e)) from None
            raise

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.path} is damaged ({what}): fetch it again, or leave it out")


def shown(name: bytes) -> str:
    """A file name as text; bytes that are not UTF-8 are written as escapes."""
    return name.decode("utf-8", "backslashreplace")


def normal(name: bytes) -> bytes:
    """A member's name without what does not distinguish it: leading ./ and doubled slashes."""
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def tagged(found: Iterable[Candidate], text: Callable[[Candidate], bytes]) -> Iterator[Candidate]:
    """WebDataset samples: neighbours with one key share the label in KEY.cls. Every image stays a sample of its own."""
    group: list[Candidate] = []
    key, extensions = b"", set()

    def close() -> Iterator[Candidate]:
        label = next((c for c in group if c.problem is None and c.name == key + b".cls"), None)
        if label is None or len(group) == 1:
            yield from group
            return
        tag = text(label).decode("utf-8", "replace").strip()
        yield from (c._replace(tag=tag) for c in group if c is not label)

    for candidate in found:
        folder, slash, base = candidate.name.rpartition(b"/")
        stem, _, extension = base.partition(b".")
        # A second file of the same name begins a second sample under the same key.
        if folder + slash + stem != key or extension in extensions:
            yield from close()
            group, key, extensions = [], folder + slash + stem, set()
        group.append(candidate)
        extensions.add(extension)
    yield from close()


def find_sources(inputs: Iterable[str | Path], out: Path) -> list[Source]:
    """The sources behind what was named, in an order that does not depend on how it was named.

    Archives inside a folder are sources too. Raises UserError for what does not exist or is of no known kind.
    """
    found: dict[Path, Source] = {}
    single: dict[Path, set[bytes]] = {}
    for given in inputs:
        path = Path(os.path.abspath(given))
        if not path.exists():
            raise UserError(f"{given} does not exist: name a folder, an archive or a Parquet file of images")
        if path.resolve() == out:
            raise UserError(f"{given} is the corpus to be written: choose another --out")
        if path.is_dir() or kind_of_file(path):
            for source in _expand(path, out):
                found.setdefault(source.path, source)
        else:
            single.setdefault(path.parent, set()).add(os.fsencode(path.name))
    files = [Source(path.name, path, "folder", only=tuple(sorted(names))) for path, names in single.items()]
    return _told_apart([*found.values(), *files])


def _told_apart(sources: list[Source]) -> list[Source]:
    """In order of their names, of which two alike take in as much of their paths as tells them apart."""
    for source in sources:
        source.name = shown(os.fsencode(source.name))
    for depth in range(2, max((len(s.path.parts) for s in sources), default=0)):
        times = Counter(s.name for s in sources)
        for source in sources:
            if times[source.name] > 1:
                source.name = shown(os.fsencode("/".join(source.path.parts[-depth:])))
    return sorted(sources, key=lambda s: (s.name, str(s.path), s.only or ()))


def _expand(path: Path, out: Path) -> Iterator[Source]:
    if not path.is_dir():
        source = _archive(path.name, path, kind_of_file(path) or "")
        if source.kind == "parquet" and image_column(path) is None:
            raise UserError(f"{path} has no column of image bytes: name another file")
        yield source
    elif is_corpus(path):
        corpus = Corpus.open(path)
        for shard in corpus.manifest.shards:
            yield Source(f"{path.name}/{shard.tar}", path / shard.tar, "tar", class_names=corpus.classes)
    else:
        yield Source(path.name, path, "folder", exclude=out)
        class_names: dict[Path, list[str] | None] = {}  # of the corpora on the way
        for archive, relative in walk(path, out):
            if kind := opened_kind(archive):
                source = _archive(f"{path.name}/{relative}", Path(archive), kind)
                home = source.path.parents[1]
                if home not in class_names:
                    class_names[home] = Corpus.open(home).classes if is_corpus(home) else None
                source.class_names = source.class_names or class_names[home]
                yield source


def _archive(name: str, path: Path, kind: str) -> Source:
    column = image_column(path) if kind == "parquet" else None
    return Source(name, path, kind, class_names=column[3] if column else None)
