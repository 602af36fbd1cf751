"""Headers are what other tars read, and no bit of one can flip unseen."""

import io
import tarfile

import pytest

from selfsight.shards import tar


def read_from(data: bytes):
    return lambda offset, size: data[offset : offset + size]


def test_header_is_what_tarfile_reads():
    info = tarfile.TarInfo.frombuf(tar.header("000000000007.jpg", 12345), "ascii", "strict")
    assert (info.name, info.size, info.type) == ("000000000007.jpg", 12345, tarfile.REGTYPE)
    assert (info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname) == (0, 0, 0, 0o644, "", "")


def test_every_bit_of_a_header_counts():
    good = tar.header("000000000000.png", 100)
    changed = []
    for bit in range(8 * 512):
        block = bytearray(good)
        block[bit // 8] ^= 1 << bit % 8
        try:
            changed.append(tar.parse(block, 0))
        except tar.DamagedTar:
            continue
    # Only in the checksum's own padding can a bit flip without changing what the header says.
    assert all((m.name, m.size) == (b"000000000000.png", 100) for m in changed)
    assert len(changed) <= 16


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_with_long_and_odd_names(form):
    names = [
        "a.png",
        "dir/with space/ü.png",
        "x" * 90 + "/" + "y" * 120 + ".png" if form != tarfile.USTAR_FORMAT else "z",
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 700 * i, 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(bytes([i]) * info.size))
    data = file.getvalue()
    found = list(tar.members(read_from(data), len(data)))
    assert [m.name.decode() for m in found] == names
    assert [data[m.data_offset : m.data_offset + m.size] for m in found] == [bytes([i]) * 700 * i for i in range(3)]


def test_concatenated_archives_lose_nothing():
    one = tar.header("a", 3) + b"abc" + bytes(509) + tar.END + bytes(8192)
    two = tar.header("b", 0) + tar.END
    assert [m.name for m in tar.members(read_from(one + two), len(one + two))] == [b"a", b"b"]


@pytest.mark.parametrize("cut", [100, 600, 1200])
def test_a_truncated_tar_says_so(cut):
    data = (tar.header("a", 400) + bytes(512) + tar.header("b", 400) + b"x" * 400)[:cut]
    with pytest.raises(tar.DamagedTar):
        list(tar.members(read_from(data), len(data)))


def test_a_pax_record_of_absurd_length_is_damage():
    body = b"1" * 5000 + b" path=a\n"
    header = bytearray(tar.header("a", len(body)))
    header[156:157] = b"x"
    header[148:156] = b"%06o\0 " % tar.checksum(header)
    data = bytes(header) + body + bytes(-len(body) % tar.BLOCK)
    with pytest.raises(tar.DamagedTar, match="malformed PAX record"):
        list(tar.members(read_from(data), len(data)))
