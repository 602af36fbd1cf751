"""USTAR headers, written and read by hand: 512 bytes, octal fields, a checksum.

Python's tarfile takes a damaged header for the end of the archive and says nothing; here every header's checksum is
checked and a bad one raises. Writing gives the same bytes every time: mtime 0, uid and gid 0, mode 644, no user names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_SIZE = 8**11 - 1  # what eleven octal digits hold: 8 GiB - 1
MAX_EXTENSION_RECORD = 1 << 20  # a PAX or long-name record larger than this is no path
REGULAR = (b"0", b"\0", b"7")


class DamagedTar(ValueError):
    """A header that is no header, or a file that ends too early. `offset` is the byte where it shows."""

    def __init__(self, what: str, offset: int) -> None:
        super().__init__(f"{what} at byte {offset}")
        self.what, self.offset = what, offset

    def __reduce__(self):
        return DamagedTar, (self.what, self.offset)


@dataclass(frozen=True, slots=True)
class Member:
    name: bytes
    header_offset: int  # of the member's first header block, extension records included
    data_offset: int
    size: int
    type: bytes = b"0"

    @property
    def end(self) -> int:
        """Offset of the next member's header."""
        return self.data_offset + padded(self.size)


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def header(name: str, size: int) -> bytes:
    """The 512 header bytes of a regular file `name` (ASCII, at most 100 bytes) of `size` bytes."""
    raw = name.encode("ascii")
    assert len(raw) <= 100, name
    assert 0 <= size <= MAX_SIZE, size
    block = bytearray(BLOCK)
    block[0 : len(raw)] = raw
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[156:157] = b"0"
    block[257:265] = b"ustar\00000"
    block[329:337] = block[337:345] = b"0000000\0"
    block[148:156] = b"%06o\0 " % checksum(block)
    return bytes(block)


def checksum(block: bytes | bytearray) -> int:
    """The unsigned sum of a header's bytes, its checksum field taken as eight spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 0x20


def parse(block: bytes, offset: int) -> Member:
    """One header block as a Member; raises DamagedTar where the checksum or a number is wrong."""
    if len(block) < BLOCK:
        raise DamagedTar("the file ends inside a header", offset)
    stored = _number(block[148:156], offset)
    total = checksum(block)
    # Some historic writers summed signed bytes.
    if stored != total and stored != total - 256 * sum(b > 127 for b in block[:148] + block[156:]):
        raise DamagedTar("bad header checksum", offset)
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    size = _number(block[124:136], offset)
    if size < 0:
        raise DamagedTar("negative size", offset)
    return Member(name, offset, offset + BLOCK, size, block[156:157])


def members(read: Callable[[int, int], bytes], length: int) -> Iterator[Member]:
    """The regular files and links of a foreign tar, in order; PAX and GNU long names and sizes are honoured.

    `read(offset, size)` gives bytes and `length` is the file's. Blocks of zeros between members are passed over, as
    `tar --ignore-zeros` does, so that concatenated archives lose nothing. Links come with size 0 and their type.
    Raises DamagedTar.
    """
    offset, start, long_name, pax = 0, None, None, {}
    common: dict[bytes, bytes] = {}
    while offset < length:
        block = read(offset, BLOCK)
        if not block.strip(b"\0"):
            offset += BLOCK
            continue
        member = parse(block, offset)
        kind, size = member.type, member.size
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            size = 0
        if kind in (b"x", b"g", b"L", b"K"):
            if size > MAX_EXTENSION_RECORD:
                raise DamagedTar("an extension record of absurd size", offset)
            body = read(member.data_offset, size)
            if len(body) < size:
                raise DamagedTar("the file ends inside a member", offset)
            if kind == b"L":
                long_name = body.split(b"\0", 1)[0]
            elif kind == b"x":
                pax = _pax(body, offset)
            elif kind == b"g":
                common.update(_pax(body, offset))
            start = offset if start is None else start
            offset = member.data_offset + padded(size)
            continue
        records = {**common, **pax}
        if b"size" in records:
            try:
                size = int(records[b"size"])
            except ValueError:
                raise DamagedTar("a PAX size that is no number", offset) from None
            if size < 0:
                raise DamagedTar("negative size", offset)
        name = records.get(b"path") or long_name or member.name
        found = Member(name, offset if start is None else start, member.data_offset, size, kind)
        if found.data_offset + size > length:
            raise DamagedTar("the file ends inside a member", offset)
        yield found
        offset, start, long_name, pax = found.end, None, None, {}


def _number(field: bytes, offset: int) -> int:
    """An octal field, or GNU's base-256 one for large values."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text.strip(b"01234567"):
        raise DamagedTar("a header field that is no number", offset)
    return int(text, 8) if text else 0


def _pax(body: bytes, offset: int) -> dict[bytes, bytes]:
    records = {}
    while body:
        length, space, _ = body.partition(b" ")
        # Python refuses to convert more than 4300 digits; seven are enough for MAX_EXTENSION_RECORD.
        if not space or not length.isdigit() or len(length) > 9 or not len(length) < int(length) <= len(body):
            raise DamagedTar("a malformed PAX record", offset)
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        body = body[int(length) :]
    return records
