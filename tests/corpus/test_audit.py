"""Verification: whatever bit flips, wherever, is named; a sound corpus has no faults."""

import shutil

import pytest

from launch import cli
from selfsight.corpus import build, verify
from selfsight.shards import Corpus


@pytest.fixture
def corpus(photos, tmp_path):
    build([photos], tmp_path / "corpus", shard_bytes=30_000, workers=1)
    return Corpus.open(tmp_path / "corpus")


def flip(path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def row_of(corpus: Corpus, ordinal: int) -> dict:
    return corpus.index().to_pylist()[ordinal]


def faults_of(corpus: Corpus) -> list[str]:
    return [str(f) for f in verify(corpus.path, workers=1)]


def test_flips_in_header_payload_padding_and_label(corpus, capsys):
    shard, row = corpus.path / "shards/000000.tar", row_of(corpus, 3)
    spots = {
        row["member_offset"] + 2: "checksum",  # name
        row["member_offset"] + 130: "checksum",  # size
        row["data_offset"] + 20: "crc32c, sha256 not as in the index",
        row["data_offset"] + row["size"]: "padding",
    }
    label = row["data_offset"] + -(-row["size"] // 512) * 512
    spots |= {label + 5: "checksum", label + 512: "label", label + 513: "padding"}
    sound = shard.read_bytes()
    for offset, word in spots.items():
        flip(shard, offset)
        faults = faults_of(corpus)
        assert "SHA-256" in faults[0]
        assert len(faults) == 2, faults  # the other samples are found and sound
        assert row["key"] in faults[1]
        assert word in faults[1]
        assert cli.main(["corpus", "verify", str(corpus.path)]) == 1
        assert row["key"] in capsys.readouterr().out
        shard.write_bytes(sound)
    assert faults_of(corpus) == []
    assert cli.main(["corpus", "verify", str(corpus.path)]) == 0


def test_several_faults_are_all_named(corpus):
    shard, rows = corpus.path / "shards/000000.tar", corpus.index().to_pylist()
    for ordinal in (0, 4, 7):
        flip(shard, rows[ordinal]["data_offset"] + 9)
    faults = faults_of(corpus)
    assert [r["key"] for r in rows[:9] if any(r["key"] in f for f in faults)] == [rows[i]["key"] for i in (0, 4, 7)]


def test_every_byte_of_every_file_is_held(corpus):
    for path in sorted(p for p in corpus.path.rglob("*") if p.is_file() and p.name != "manifest.json"):
        sound, name = path.read_bytes(), path.relative_to(corpus.path).as_posix()
        for offset in range(0, len(sound), max(1, len(sound) // 7)):
            flip(path, offset, bit=offset % 8)
            assert any(f.startswith(name) for f in faults_of(corpus)), (name, offset)
            path.write_bytes(sound)
    assert faults_of(corpus) == []


def test_cut_lost_and_foreign_files(corpus, tmp_path):
    shard = corpus.path / "shards/000001.tar"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-2000])
    assert any("long instead of" in f for f in faults_of(corpus))
    shard.write_bytes(b"")
    assert any("0 bytes" in f for f in faults_of(corpus))
    shard.unlink()
    assert "shards/000001.tar: is missing" in faults_of(corpus)
    shard.write_bytes(sound)
    shutil.copy(shard, corpus.path / "shards/999999.tar")
    assert faults_of(corpus) == ["shards/999999.tar: is not in the manifest"]
    (corpus.path / "shards/999999.tar").unlink()
    (corpus.path / "chunks.npy").unlink()
    assert any(f.startswith("chunks.npy") for f in faults_of(corpus))


def test_two_shards_exchanged(corpus):
    one, two = corpus.path / "shards/000000.tar", corpus.path / "shards/000001.tar"
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)
    assert {f.split(":")[0] for f in faults_of(corpus)} == {"shards/000000.tar", "shards/000001.tar"}
