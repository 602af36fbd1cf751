"""Shards that others wrote: found by pattern, read once from front to back, cut into samples by WebDataset's rule.

Nothing here seeks, so an object store serves a shard in one pass, and nothing is kept but the sample in hand.
"""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import google_crc32c

from selfsight.corpus.sources import normal
from selfsight.errors import UserError
from selfsight.shards import tar
from selfsight.shards.store import FILE_SCHEME, is_url

BLOCK_BYTES = 4 << 20  # of one read
SIZES_AT_ONCE = 16
META = re.compile(rb"__[^/]*__($|/)")
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def find_shards(patterns: Iterable[str]) -> list[tuple[str, int]]:
    """(absolute path or URL, bytes) of every shard that `patterns` name, in their order, each once.

    Braces are expanded as WebDataset does, `{000000..000123}` and `{a,b}`, then `*`, `?` and `[…]` on any file system
    that can list, sorted. Raises UserError for what names nothing.
    """
    found: dict[str, int | None] = {}
    for pattern in patterns:
        for name in _braces(pattern):
            found.update(dict.fromkeys(_globbed(name)))
    with ThreadPoolExecutor(SIZES_AT_ONCE) as pool:
        return list(zip(found, pool.map(_size, found), strict=True))


@contextmanager
def opened(url: str, length: int) -> "Iterator[ShardBytes]":
    """A shard of `length` bytes, to be read once. Raises UserError where it cannot be opened."""
    try:
        if is_url(url):
            fs, path = _file_system(url)
            file = fs.open(path, "rb")
        else:
            file = open(url, "rb")  # noqa: SIM115
    except Exception as e:  # every file system has errors of its own
        raise _unreadable(url, e) from None
    with file:
        yield ShardBytes(url, file, length)


class ShardBytes:
    """One pass over the bytes of a shard: what is behind has been summed, what is ahead has not been read.

    Every method raises UserError where the shard cannot be read.
    """

    def __init__(self, url: str, file: IO[bytes], length: int) -> None:
        self.url, self.length = url, length
        self._file = file
        self._sha256 = hashlib.sha256()
        self._crc32c = 0
        self._begin = 0  # of the bytes at hand
        self._at_hand = bytearray()
        self._last = b""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer bytes where the file ends; `offset` must not lie behind what was passed. What is read stays at hand."""
        at = offset - self._begin
        assert at >= 0, "a shard is read forwards"
        while len(self._at_hand) < at + size:
            try:
                block = self._file.read(BLOCK_BYTES)
            except Exception as e:
                raise _unreadable(self.url, e) from None
            if not block:
                break
            self._at_hand += block
        return bytes(self._at_hand[at : at + size])

    def pass_to(self, offset: int) -> None:
        """Sums and lets go of all bytes before `offset`."""
        while self._begin < offset and (self._at_hand or self.read(self._begin, 1)):
            passed = bytes(self._at_hand[: offset - self._begin])
            self._sha256.update(passed)
            self._crc32c = google_crc32c.extend(self._crc32c, passed)
            del self._at_hand[: len(passed)]
            self._begin += len(passed)
            self._last = (self._last + passed[-tar.BLOCK :])[-tar.BLOCK :]

    def crc32c(self) -> int:
        """Of what was passed since this was asked last."""
        value, self._crc32c = self._crc32c, 0
        return value

    def finish(self) -> str:
        """Reads the rest; the SHA-256 of the whole, in hex."""
        self.pass_to(self.length)
        if self._begin != self.length or self.read(self._begin, 1):
            raise UserError(f"{self.url} is not {self.length} bytes long any more: restore it, or adopt it again")
        return self._sha256.hexdigest()

    def has_end_mark(self) -> bool:
        """Whether the last block, once read, is one of the empty ones that end an archive."""
        return not self._last.strip(b"\0")


@dataclass
class Group:
    """Neighbouring members under one key, a sample of WebDataset's; every image wanted of it has an extent of its own.

    The extents share out the group: the first begins with it, each ends where the next one or the next group begins.
    """

    key: bytes
    begin: int
    extensions: set[bytes] = field(default_factory=set)
    extents: list[tuple[int, int, int]] = field(default_factory=list)  # begin, end, CRC-32C
    whole: bool = True


def split_name(name: bytes) -> tuple[bytes, bytes] | None:
    """WebDataset's key and extension of a member: before and after the first dot of its file name, in small letters.

    None for what it passes over: hidden files, files without an extension, __meta__ files and folders.
    """
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot or META.match(name):
        return None
    return folder + slash + stem, extension.lower()


def walk(
    shard: ShardBytes,
    look: Callable[[bytes, tar.Member], bool],
    go_on: Callable[[tar.DamagedTar], bool],
) -> Iterator[Group]:
    """The samples of a shard, each when all of it was seen.

    `look` sees every member (name, normalised) while its bytes can be read, and says whether it is an image wanted.
    `go_on` is told of damage: where it says so, the walk goes on at the next sound header. What was lost may have been
    a member of the group before or behind, so these are marked as not whole, except where they have the extensions of
    the whole group before them. Raises DamagedTar where it does not.
    """
    offset: int | None = 0
    group: Group | None = None
    behind_damage, wanted = False, 0
    usual: set[bytes] | None = None  # extensions of a whole group

    def cut(end: int) -> None:
        """Ends the extent in hand, if there is an image in it."""
        assert group is not None
        shard.pass_to(end)
        if wanted:
            begin = group.extents[-1][1] if group.extents else group.begin
            group.extents.append((begin, end, shard.crc32c()))

    def ended(end: int, beside_damage: bool) -> Group:
        nonlocal usual
        assert group is not None
        cut(end)
        group.whole = not beside_damage or group.extensions == usual
        usual = group.extensions if group.whole else usual
        return group

    while offset is not None:
        try:
            for name, member in _members(shard, offset):
                key, extension = split_name(name) or (None, b"")
                if key is None:
                    look(name, member)
                    shard.pass_to(member.end)
                    continue
                # A second file of the same name begins a second sample under the same key.
                if group is None or key != group.key or extension in group.extensions:
                    if group is not None:
                        yield ended(member.header_offset, behind_damage)
                        behind_damage = False
                    shard.pass_to(member.header_offset)
                    shard.crc32c()
                    group, wanted = Group(key, member.header_offset), 0
                group.extensions.add(extension)
                if look(name, member):
                    if wanted:
                        cut(member.header_offset)
                    wanted += 1
                shard.pass_to(member.end)
            break
        except tar.DamagedTar as damage:
            if not go_on(damage):
                raise
            if group is not None:
                yield ended(damage.offset, True)
            group, behind_damage = None, True
            offset = _next_header(shard, damage.offset + tar.BLOCK)
    if group is not None:
        yield ended(shard.length, behind_damage)


def _members(shard: ShardBytes, begin: int) -> Iterator[tuple[bytes, tar.Member]]:
    """The files and links behind `begin`, with their normalised names. Raises DamagedTar."""
    try:
        for m in tar.members(lambda offset, size: shard.read(begin + offset, size), shard.length - begin):
            if m.type != b"5":
                yield normal(m.name), tar.Member(m.name, begin + m.header_offset, begin + m.data_offset, m.size, m.type)
    except tar.DamagedTar as e:
        raise tar.DamagedTar(e.what, begin + e.offset) from None


def _next_header(shard: ShardBytes, offset: int) -> int | None:
    """Where the next block lies that is a sound USTAR or GNU header."""
    while offset + tar.BLOCK <= shard.length:
        shard.pass_to(offset)
        block = shard.read(offset, tar.BLOCK)
        if block[257:262] == b"ustar":
            try:
                tar.parse(block, offset)
                return offset
            except tar.DamagedTar:
                pass
        offset += tar.BLOCK
    return None


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    if "{" not in pattern or os.path.lexists(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as e:
        raise UserError(f"the braces of {pattern} do not pair ({e}): write them like {{000000..000123}}") from None


def _globbed(name: str) -> list[str]:
    name = name.removeprefix(FILE_SCHEME)
    if not is_url(name):
        if os.path.isdir(name):
            raise UserError(f"{name} is a folder: name its shards, as in '{name}/*.tar'")
        found = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"{name} does not exist: name the shards to adopt")
        return [os.path.abspath(path) for path in found]
    if "::" in name or not any(c in name for c in ("*[" if name.startswith("http") else "*[?")):
        return [name]  # a chain of file systems cannot list; ? begins the query of a web address
    try:
        fs, path = _file_system(name)
        found = sorted(fs.unstrip_protocol(p) for p in fs.glob(path))
    except Exception as e:
        raise _unreadable(name, e) from None
    if not found:
        raise UserError(f"{name} matches nothing: name the shards to adopt")
    return found


def _size(url: str) -> int:
    try:
        if not is_url(url):
            return os.stat(url).st_size
        fs, path = _file_system(url)
        size = fs.size(path)
    except Exception as e:
        raise _unreadable(url, e) from None
    if size is None:
        raise UserError(f"{url} does not say how long it is: copy it to a disk or an object store first")
    return int(size)


def _file_system(url: str):
    from fsspec.core import url_to_fs

    return url_to_fs(url)


def _unreadable(url: str, error: Exception) -> UserError:
    words = str(getattr(error, "strerror", None) or error)
    if isinstance(error, FileNotFoundError):  # of which some file systems say the name only
        words = "there is no such file"
    what = " ".join(words.split()) or type(error).__name__
    return UserError(f"{url} cannot be read ({what}): mend that, then run the same command again")


def refuse_packed(shard: ShardBytes) -> None:
    """Raises UserError for a compressed shard, of which no sample can be read by its offset."""
    head = shard.read(0, tar.BLOCK)
    for magic, kind in PACKED.items():
        if head.startswith(magic):
            raise UserError(
                f"{shard.url} is compressed ({kind}): unpack it, or make a corpus with selfsight corpus build"
            )
