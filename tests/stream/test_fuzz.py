"""Every byte of a shard, flipped one at a time: never silent, never a crash, and all that is sound is delivered."""

import os

import pytest
from PIL import Image

from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.shards import Corpus, DamagedTar
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.quarantine import Quarantine
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, ViewSpec

WHOLE = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),))
N = 4


@pytest.fixture
def corpus(tmp_path):
    """One shard of four labelled images, each of one colour."""
    for i in range(N):
        (tmp_path / f"images/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * i, 255 - 60 * i, 7)).save(tmp_path / f"images/{'ab'[i % 2]}/{i}.png")
    build([tmp_path / "images"], tmp_path / "corpus", workers=1, chunk_samples=2)
    return Corpus.open(tmp_path / "corpus")


def epoch(corpus: Corpus) -> tuple[list[tuple[int, tuple[int, ...]]], set[int]]:
    """What an epoch shows, as (ordinal, colour), and the samples in quarantine."""
    found = []
    quarantine = Quarantine()
    quarantine.add = lambda finding, read: found.append(finding)
    mixture = Mixture([Part(corpus)], batch_size=2, lanes=1, window=4, seed=0)
    steps = StepLoader(mixture, Views(WHOLE, seed=0), total_steps=2, workers=0, quarantine=quarantine)
    shown = [
        (ordinal, tuple(crop[:, 3, 3].tolist()))
        for (batch,) in steps
        for ordinal, crop in zip(batch["ordinal"].tolist(), batch["crop"][0].numpy(), strict=True)
    ]
    assert sum(steps.delivered.values()) == N
    assert all(f"{f.sample:012d}" in f.what and "shards/000000.tar" in f.what for f in found)
    return shown, {f.sample for f in found}


def test_every_byte(corpus):
    shard = corpus.path / "shards/000000.tar"
    rows = corpus.index(["member_offset", "end"]).to_pylist()
    sound = shard.read_bytes()
    order, none = epoch(corpus)
    colours = dict(order)
    assert (sorted(colours), none) == (list(range(N)), set())
    assert rows[0]["member_offset"] == 0
    assert rows[-1]["end"] == len(sound)
    handle = os.open(shard, os.O_RDWR)
    for offset in range(len(sound)):
        os.pwrite(handle, bytes([sound[offset] ^ 1 << offset % 8]), offset)
        (hit,) = [i for i, row in enumerate(rows) if row["member_offset"] <= offset < row["end"]]
        shown, quarantined = epoch(corpus)
        assert quarantined == {hit}, offset
        for (ordinal, colour), (was, _) in zip(shown, order, strict=True):
            assert colour == colours[ordinal], offset
            assert ordinal == was if was != hit else ordinal != hit, offset
        os.pwrite(handle, sound[offset : offset + 1], offset)
    os.close(handle)
    assert epoch(corpus) == (order, set())


def test_what_is_wrong_is_named(corpus):
    shard = corpus.path / "shards/000000.tar"
    row = corpus.index(["member_offset", "data_offset", "size", "end"]).to_pylist()[1]
    sound = shard.read_bytes()

    def named(damaged: bytes, sample: int = 1) -> str:
        shard.write_bytes(damaged)
        with pytest.raises(DamagedTar) as caught:
            Corpus.open(corpus.path).sample(sample)
        return str(caught.value)

    def flipped(offset: int) -> bytes:
        return sound[:offset] + bytes([sound[offset] ^ 4]) + sound[offset + 1 :]

    header, data = row["member_offset"], row["data_offset"]
    assert f"000000.tar: sample 000000000001: bad header checksum at byte {header}" in named(flipped(header + 5))
    assert "header" in named(sound[:header] + bytes(512) + sound[data:])
    assert "the image is not what was stored" in named(flipped(data + 9))
    assert "padding is not what was stored" in named(flipped(data + row["size"] + 1))
    assert "the shard ends inside it" in named(sound[: data + 20])  # a torn write
    assert "the shard ends inside it" in named(sound[:-700], N - 1)  # the end of the archive is missing
    shard.write_bytes(sound[: data + 20])
    assert epoch(Corpus.open(corpus.path))[1] == {1, 2, 3}


def test_a_damaged_index_never_passes(corpus):
    index = corpus.path / "index/000000.parquet"
    sound = index.read_bytes()
    for offset in range(0, len(sound), 29):
        index.write_bytes(sound[:offset] + bytes([sound[offset] ^ 1 << offset % 8]) + sound[offset + 1 :])
        with pytest.raises(UserError, match="is not the index of its shard"):
            epoch(Corpus.open(corpus.path))


def test_a_decompression_bomb_is_replaced(corpus, monkeypatch):
    from selfsight.shards import decode

    monkeypatch.setattr(decode, "MAX_PIXELS", 60)
    quarantine = Quarantine()
    mixture = Mixture([Part(corpus)], batch_size=2, lanes=1, window=4, seed=0)
    views = Views(WHOLE, seed=0)
    with pytest.raises(UserError, match="more than 60 pixels"):
        list(StepLoader(mixture, views, total_steps=2, workers=0, quarantine=quarantine))
    assert len(quarantine) == 1
