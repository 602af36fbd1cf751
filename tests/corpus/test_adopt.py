"""Shards of others, read where they lie: whoever wrote them, every sample is theirs to the byte, and is checked."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from webdataset import ShardWriter

from launch import cli
from selfsight.corpus import adopt, build, stats, verify
from selfsight.errors import UserError
from selfsight.shards import Corpus, DamagedTar, decode_image
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.order import auto_lanes
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, ViewSpec

N, PER_SHARD = 23, 10
LONG = "a_folder_of_a_hundred_letters_and_more_" * 4


def by_webdataset(folder: Path, picture) -> None:
    with ShardWriter(f"{folder}/%06d.tar", maxcount=PER_SHARD, verbose=0) as writer:
        for i in range(N):
            writer.write({"__key__": f"x{i:04d}", "png": picture(i), "cls": i % 3, "json": {"caption": f"ü {i}"}})


def by_gnu_tar(form: str):
    def write(folder: Path, picture) -> None:
        for shard in range(0, N, PER_SHARD):
            files = folder / "files" / LONG
            files.mkdir(parents=True)
            for i in range(shard, min(N, shard + PER_SHARD)):
                (files / f"x{i:04d}.png").write_bytes(picture(i))
                (files / f"x{i:04d}.cls").write_text(f"{i % 3}\n")
                (files / f"x{i:04d}.json").write_text("{}")
            tar = folder / f"{shard // PER_SHARD:06d}.tar"
            command = ["tar", f"--format={form}", "--sort=name", "-cf", tar, "-C", folder / "files", "."]
            subprocess.run(command, check=True)
            subprocess.run(["rm", "-r", folder / "files"], check=True)

    return write


def by_tarfile(form: int):
    def write(folder: Path, picture) -> None:
        for shard in range(0, N, PER_SHARD):
            with tarfile.open(folder / f"{shard // PER_SHARD:06d}.tar", "w", format=form) as archive:
                for i in range(shard, min(N, shard + PER_SHARD)):
                    for name, data in (("PNG", picture(i)), ("json", b"{}"), ("cls", b"%d" % (i % 3))):
                        info = tarfile.TarInfo(f"{LONG}/é{i:04d}.{name}")
                        info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                        archive.addfile(info, io.BytesIO(data))

    return write


WRITERS = {
    "webdataset": by_webdataset,
    "gnu tar, gnu": by_gnu_tar("gnu"),
    "gnu tar, posix": by_gnu_tar("posix"),
    "tarfile, pax": by_tarfile(tarfile.PAX_FORMAT),
    "tarfile, gnu": by_tarfile(tarfile.GNU_FORMAT),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    return tmp_path / "theirs"


@pytest.fixture
def shards(folder, make_picture):
    by_webdataset(folder, make_picture)
    return folder


def adopted(folder: Path, out: Path, **options) -> Corpus:
    adopt([f"{folder}/*.tar"], out, workers=1, **options)
    return Corpus.open(out)


def pack(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def rejected(corpus: Corpus) -> dict[str, str]:
    lines = (corpus.path / "rejected.jsonl").read_text().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writers_samples_to_the_byte(writer, folder, tmp_path, make_picture):
    WRITERS[writer](folder, make_picture)
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    corpus = adopted(folder, tmp_path / "out")
    assert [corpus.sample(i).data for i in range(corpus.n)] == [make_picture(i) for i in range(N)]
    assert [corpus.sample(i).label for i in range(corpus.n)] == [i % 3 for i in range(N)]
    assert [s.sha256 for s in corpus.manifest.shards] == [before[p] for p in sorted(before)]
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == before
    assert sorted(p.name for p in corpus.path.iterdir()) == ["chunks.npy", "index", "manifest.json", "rejected.jsonl"]
    assert "0022." in corpus.index(["source"])["source"][22].as_py()
    assert verify(corpus.path, workers=1) == []
    assert list(stats(corpus.path)["classes"].values()) == [8, 8, 7]


def test_what_the_index_says_of_an_image_is_what_a_build_says(shards, tmp_path, make_picture):
    corpus = adopted(shards, tmp_path / "out")
    build([shards], tmp_path / "built", workers=1)
    about = ["sha256", "crc32c", "size", "width", "height", "format", "mode", "frames", "exif_orientation", "label"]
    theirs, ours = (c.index(about).to_pylist() for c in (corpus, Corpus.open(tmp_path / "built")))
    assert sorted(map(str, theirs)) == sorted(map(str, ours))


def test_samples_without_an_image_and_samples_with_several(folder, tmp_path, make_picture):
    a, b, c, d = (make_picture(i) for i in range(4))
    members = {
        "README": b"no sample",
        "one.left.png": a, "one.right.png": b, "one.cls": b"1", "one.txt": b"a caption",
        "none.json": b"{}",
        "broken.png": d[:-40], "broken.cls": b"0",
        "mixed.a.png": d[:-40], "mixed.b.png": c, "mixed.cls": b"0",
        "._mixed.cls": b"Mac OS X",
        "last.PNG": d, "last.cls": b"2",
    }  # fmt: skip
    pack(folder / "s.tar", members)
    corpus = adopted(folder, tmp_path / "out")
    assert [corpus.sample(i).data for i in range(corpus.n)] == [a, b, c, d]
    assert [corpus.sample(i).label for i in range(corpus.n)] == [1, 1, 0, 2]
    names = corpus.index(["source"])["source"].to_pylist()
    assert names == ["s.tar/one.left.png", "s.tar/one.right.png", "s.tar/mixed.b.png", "s.tar/last.PNG"]
    listed = rejected(corpus)
    assert set(listed) == {f"s.tar/{n}" for n in ("README", "none", "broken.png", "mixed.a.png", "._mixed.cls")}
    assert listed["s.tar/none"] == "a sample without an image"
    assert listed["s.tar/broken.png"] == listed["s.tar/mixed.a.png"]
    rows = corpus.index(["member_offset", "end"]).to_pylist()
    with tarfile.open(folder / "s.tar") as archive:
        at = {m.name: m.offset for m in archive}
    # An extent ends where the next image or the next key begins; what was left out lies in none.
    borders = [
        ("one.left.png", "one.right.png"), ("one.right.png", "none.json"), ("mixed.a.png", "last.PNG"),
    ]  # fmt: skip
    assert [(r["member_offset"], r["end"]) for r in rows[:3]] == [(at[begin], at[end]) for begin, end in borders]
    assert rows[3]["end"] == (folder / "s.tar").stat().st_size
    assert verify(corpus.path) == []
    for name in ("none.json", "broken.png"):  # their bytes are no business of a healthy sample
        flip(folder / "s.tar", at[name] + 512)
        assert corpus.sample(2).data == c
        assert [str(f).split(": ", 1)[1] for f in verify(corpus.path)] == ["its SHA-256 is not that of the manifest"]
        flip(folder / "s.tar", at[name] + 512)


def test_a_flip_anywhere_in_a_sample_is_that_samples_damage(shards, tmp_path):
    corpus = adopted(shards, tmp_path / "out")
    shard = shards / "000001.tar"
    size, rows = shard.stat().st_size, corpus.index().to_pylist()[PER_SHARD : 2 * PER_SHARD]
    assert (rows[0]["member_offset"], rows[-1]["end"]) == (0, size)
    for offset in range(0, size, 499):
        flip(shard, offset)
        (touched,) = [r["sample"] for r in rows if r["member_offset"] <= offset < r["end"]]
        for row in rows:
            if row["sample"] == touched:
                with pytest.raises(DamagedTar, match=row["key"]):
                    corpus.sample(touched)
            else:
                corpus.sample(row["sample"])
        faults = [str(f) for f in verify(corpus.path, workers=1)]
        assert len(faults) == 2, faults
        assert f"{shard}: sample {rows[touched - PER_SHARD]['key']}" in faults[0]
        assert "SHA-256" in faults[1]
        flip(shard, offset)
    assert verify(corpus.path) == []


def test_verify_names_lost_cut_and_altered_files(shards, tmp_path, capsys):
    corpus = adopted(shards, tmp_path / "out")
    shard = shards / "000002.tar"
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-3000])
    assert any("bytes long" in str(f) for f in verify(corpus.path))
    shard.unlink()
    assert cli.main(["corpus", "verify", str(corpus.path)]) == 1
    assert f"{shard}: cannot be read" in capsys.readouterr().out
    shard.write_bytes(sound)
    for name in ("index/000001.parquet", "chunks.npy", "rejected.jsonl"):
        path = corpus.path / name
        kept = path.read_bytes()
        path.write_bytes(kept[: len(kept) // 2] + b"x" + kept[len(kept) // 2 + 1 :])
        assert any(str(f).startswith(name) for f in verify(corpus.path)), name
        path.write_bytes(kept)
    assert verify(corpus.path) == []


@pytest.mark.parametrize("member", ["png", "cls"])
def test_a_damaged_shard_is_refused_or_taken_without_the_sample_that_damage_touches(
    member, shards, tmp_path, make_picture
):
    with tarfile.open(shards / "000000.tar") as archive:
        at = {m.name: m.offset_data - 512 for m in archive}[f"x0004.{member}"]
    flip(shards / "000000.tar", at + 2)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"000000\.tar is damaged \(bad header checksum at byte {at}\)"):
        adopted(shards, out)
    corpus = adopted(shards, out, skip_damaged=True)
    assert [corpus.sample(i).data for i in range(corpus.n)] == [make_picture(i) for i in range(N) if i != 4]
    assert [corpus.sample(i).label for i in range(corpus.n)] == [i % 3 for i in range(N) if i != 4]
    listed = rejected(corpus)
    assert listed.pop(f"000000.tar/byte {at}") == "bad header checksum"
    assert [name[:16] for name in listed] == ["000000.tar/x0004"]
    assert verify(out) == []


def test_beside_damage_a_sample_is_taken_only_if_it_is_known_to_be_whole(folder, tmp_path, make_picture):
    names = ["a.cls", "a.png", "b.png", "c.cls", "c.png", "d.cls", "d.png"]
    pack(folder / "s.tar", {n: b"0" if n.endswith("cls") else make_picture(ord(n[0])) for n in names})
    with tarfile.open(folder / "s.tar") as archive:
        at = {m.name: m.offset for m in archive}
    flip(folder / "s.tar", at["a.cls"])  # nothing says yet what a sample has
    flip(folder / "s.tar", at["c.cls"])
    corpus = adopted(folder, tmp_path / "out", skip_damaged=True)
    # b, without a label, stood between two damages; c lost its own; d has no whole sample before it, but no damage.
    assert corpus.index(["source"])["source"].to_pylist() == ["s.tar/d.png"]
    assert corpus.classes == ["0"]


def test_a_cut_shard_loses_its_last_sample_only(shards, tmp_path, make_picture):
    shard = shards / "000002.tar"
    with tarfile.open(shard) as archive:
        at = {m.name: m.offset_data for m in archive}
    shard.write_bytes(shard.read_bytes()[: at["x0022.png"] + 100])
    with pytest.raises(UserError, match=r"the file ends inside a member .*--skip-damaged"):
        adopted(shards, tmp_path / "out")
    corpus = adopted(shards, tmp_path / "out", skip_damaged=True)
    assert [corpus.sample(i).data for i in range(corpus.n)] == [make_picture(i) for i in range(N - 1)]
    assert any("000002.tar has no end mark" in note for note in corpus.manifest.notes)


def test_a_refused_adoption_goes_on_where_it_was(shards, tmp_path, make_picture):
    flip(shards / "000001.tar", 5)
    with pytest.raises(UserError, match=r"000001\.tar is damaged"):
        adopted(shards, tmp_path / "out")
    flip(shards / "000001.tar", 5)
    flip(shards / "000000.tar", 5)  # would be refused if it were read again
    assert adopted(shards, tmp_path / "out").n == N
    flip(shards / "000000.tar", 5)
    assert verify(tmp_path / "out") == []


def test_a_finished_adoption_is_left_alone_and_never_overwritten(shards, tmp_path):
    corpus = adopted(shards, tmp_path / "out")
    report = adopt([f"{shards}/{{000000..000002}}.tar"], tmp_path / "out")
    assert (report.was_complete, report.id) == (True, corpus.id)
    with pytest.raises(UserError, match="already holds another corpus"):
        adopt([f"{shards}/000000.tar"], tmp_path / "out")


def test_workers_change_nothing(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("selfsight.corpus.adoption.INLINE_BYTES", 0)
    for workers in (1, 2):
        adopt([f"{shards}/*.tar"], tmp_path / str(workers), workers=workers)
    files = [p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file()]
    assert [(tmp_path / "1" / f).read_bytes() for f in files] == [(tmp_path / "2" / f).read_bytes() for f in files]


def test_shards_on_another_file_system(shards, tmp_path, monkeypatch, make_picture):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    here = adopted(shards, tmp_path / "here")
    memory = fsspec.filesystem("memory")
    try:
        for path in sorted(shards.iterdir()):
            memory.pipe(f"/bucket/{path.name}", path.read_bytes())
        for pattern in ("memory://bucket/*.tar", "memory://bucket/{000000..000002}.tar"):
            out = tmp_path / str(len(pattern))
            report = adopt([pattern], out, workers=1)
            assert report.id == here.id
            assert [(out / s.index).read_bytes() for s in here.manifest.shards] == [
                (here.path / s.index).read_bytes() for s in here.manifest.shards
            ]
            assert verify(out, workers=1) == []
            corpus = Corpus.open(out)
            assert [corpus.sample(i).data for i in range(N)] == [make_picture(i) for i in range(N)]
        memory.pipe("/bucket/000001.tar", memory.cat("/bucket/000001.tar")[::-1])
        assert any("memory://" in f.file and "000001.tar" in f.file for f in verify(out, workers=1))
        with pytest.raises(UserError, match=r"memory://bucket/9\.tar cannot be read"):
            adopt(["memory://bucket/9.tar"], tmp_path / "none")
        with pytest.raises(UserError, match="matches nothing"):
            adopt(["memory://elsewhere/*.tar"], tmp_path / "none")
    finally:
        memory.store.clear()


def test_shards_are_named_in_the_order_given_each_once(shards, tmp_path):
    names = [f"{shards}/000002.tar", f"{shards}/*.tar", f"file://{shards}/000000.tar"]
    adopt(names, tmp_path / "out", workers=1)
    found = [Path(s.tar).name for s in Corpus.open(tmp_path / "out").manifest.shards]
    assert found == ["000002.tar", "000000.tar", "000001.tar"]


def test_shards_of_one_name_are_told_apart_by_their_folders(tmp_path, make_picture):
    for split in ("train", "more/train"):
        (tmp_path / split).mkdir(parents=True)
        pack(tmp_path / split / "0.tar", {"a.png": make_picture(len(split))})
    adopt([f"{tmp_path}/train/0.tar", f"{tmp_path}/more/train/0.tar"], tmp_path / "out")
    names = Corpus.open(tmp_path / "out").index(["source"])["source"].to_pylist()
    assert names == ["train/0.tar/a.png", "more/train/0.tar/a.png"]


def test_what_is_no_shard_is_refused_in_a_sentence(folder, tmp_path, make_picture):
    pack(folder / "s.tar", {"a.png": make_picture(0)})
    (folder / "s.tar.gz").write_bytes(gzip.compress((folder / "s.tar").read_bytes()))
    (folder / "page.tar").write_text("<html>Not Found</html>" * 100)
    (folder / "empty.tar").write_bytes(bytes(10240))
    said = {
        str(folder): "is a folder: name its shards",
        f"{folder}/no.tar": "does not exist",
        f"{folder}/no*.tar": "does not exist",
        f"{folder}/{{0..1.tar": "braces",
        f"{folder}/s.tar.gz": "compressed .gzip.*corpus build",
        f"{folder}/page.tar": "is damaged .*at byte 0",
        f"{folder}/empty.tar": "no images in 1 shards",
    }
    for number, (url, sentence) in enumerate(said.items()):
        with pytest.raises(UserError, match=sentence):
            adopt([url], tmp_path / f"out{number}")


def test_an_adopted_corpus_feeds_a_run(shards, tmp_path):
    corpus = adopted(shards, tmp_path / "out")
    spec = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0), ratio=(1.5, 1.5), flip=0.0),))
    views = Views(spec, seed=0, decode=decode_image)
    mixture = Mixture([Part(corpus)], batch_size=N, lanes=auto_lanes(N, len(corpus.chunks)), window=2, seed=0)
    (batch,) = next(iter(StepLoader(mixture, views, total_steps=1, workers=0)))
    assert sorted(batch["ordinal"].tolist()) == list(range(N))
    for ordinal, crop in zip(batch["ordinal"].tolist(), batch["crop"][0].numpy(), strict=True):
        want = views(views.decode(corpus.sample(ordinal).data), ordinal, 0)["crop"][0]
        np.testing.assert_array_equal(crop, want)


def test_the_command(shards, tmp_path, capsys):
    pattern, out = f"{shards}/{{000000..000002}}.tar", str(tmp_path / "out")
    assert cli.main(["corpus", "adopt", pattern, "--out", out, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "23 images, 3 classes" in said
    assert "3 shards adopted where they lie" in said
    assert cli.main(["corpus", "adopt", pattern, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["was_complete"]
    assert cli.main(["corpus", "verify", out]) == 0
    assert cli.main(["corpus", "stats", out]) == 0
    assert cli.main(["info", out]) == 0
    flip(shards / "000000.tar", 5)
    assert cli.main(["corpus", "adopt", f"{shards}/000000.tar", "--out", f"{out}2"]) == 2
    assert "--skip-damaged" in capsys.readouterr().err
