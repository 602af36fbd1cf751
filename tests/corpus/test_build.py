"""Whatever the images come in, the same bytes come out, in an order that only content, names and seed decide."""

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsight.corpus import build, stats, verify
from selfsight.errors import UserError
from selfsight.shards import Corpus, decode_image

IMAGENET = Path(__file__).parents[3] / "shared/corpora/imagenet-sample-320.tar"


def digests(folder: Path) -> dict[str, str]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def contents(corpus: Corpus) -> dict[bytes, str]:
    """Image bytes → class name."""
    classes = corpus.classes or [""]
    return {s.data: classes[s.label or 0] for s in map(corpus.sample, range(corpus.n))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def sources(photos, tmp_path):
    """The same forty images as a folder, tars, zips and a Parquet file."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = files_of(photos)
    members = list(files.items())
    found = {"folder": photos, "tar": write_tar(tmp_path / "p.tar", members)}
    for suffix, mode in ((".tar.gz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")):
        found[suffix] = write_tar(tmp_path / f"p{suffix}", members, mode)
    for kind, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        found[kind] = tmp_path / f"{kind}.zip"
        with zipfile.ZipFile(found[kind], "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
    rows = [{"image": {"bytes": d, "path": n.split("/")[1]}, "label": n.split("/")[0]} for n, d in members]
    found["parquet"] = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(rows), found["parquet"], row_group_size=16)
    webdataset = []
    for name, data in members:
        label, file = name.split("/")
        webdataset += [(file, data), (file.replace(".png", ".cls"), b"0" if label == "cat" else b"1")]
    found["webdataset"] = write_tar(tmp_path / "w.tar", webdataset)
    return found


@pytest.mark.parametrize(
    "kind", ["folder", "tar", ".tar.gz", ".tar.bz2", ".tar.xz", "stored", "deflated", "parquet", "webdataset"]
)
def test_every_kind_of_source(kind, sources, photos, tmp_path):
    report = build([sources[kind]], tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    assert (report.n, report.id, corpus.n) == (40, corpus.id, 40)
    names = {"cat": "0", "dog": "1"} if kind == "webdataset" else {"cat": "cat", "dog": "dog"}
    assert corpus.classes == sorted(names.values())
    assert contents(corpus) == {data: names[name.split("/")[0]] for name, data in files_of(photos).items()}
    assert report.counts == {"seen": 40, "kept": 40, "rejected": 0, "skipped": 0, "outside": 0, "duplicates": 0}
    assert verify(tmp_path / "out") == []
    assert not (tmp_path / "out/.build").exists()


def test_a_corpus_is_a_source_and_keeps_its_class_names(photos, tmp_path):
    build([photos], tmp_path / "one", workers=1)
    build([tmp_path / "one"], tmp_path / "two", workers=1)
    one, two = Corpus.open(tmp_path / "one"), Corpus.open(tmp_path / "two")
    assert two.classes == ["cat", "dog"]
    assert contents(one) == contents(two)


def test_the_webdataset_library_reads_the_same_samples(photos, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    build([photos], tmp_path / "out", shard_bytes=30_000, workers=1)
    corpus = Corpus.open(tmp_path / "out")
    assert len(corpus.manifest.shards) > 1
    urls = [str(tmp_path / "out" / s.tar) for s in corpus.manifest.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = [corpus.sample(i) for i in range(corpus.n)]
    assert [(r["__key__"], r["png"], int(r["cls"])) for r in read] == [(s.key, s.data, s.label) for s in ours]
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")))
    assert (decoded["png"] == np.asarray(decode_image(ours[0].data))).all()
    with tarfile.open(urls[0]) as archive:
        assert all((m.mtime, m.uid, m.gid, m.pax_headers) == (0, 0, 0, {}) for m in archive)


def test_reproducible_to_the_byte(photos, tmp_path):
    more = tmp_path / "more"
    for seed in range(300):  # enough for several processes to have work
        (more / str(seed % 3)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (seed % 256, seed // 256, 7)).save(more / str(seed % 3) / f"{seed}.bmp")
    build([photos, more], tmp_path / "a", workers=2, shard_bytes=60_000)
    build([more, photos], tmp_path / "b", workers=1, shard_bytes=60_000)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    shutil.copytree(photos, tmp_path / "elsewhere" / "photos")
    build([tmp_path / "elsewhere" / "photos"], tmp_path / "c", workers=1)
    build([photos], tmp_path / "d", workers=1)
    build([photos], tmp_path / "e", workers=1, seed=1)
    assert digests(tmp_path / "c") == digests(tmp_path / "d")
    c, e = Corpus.open(tmp_path / "c"), Corpus.open(tmp_path / "e")
    assert c.id != e.id
    assert contents(c) == contents(e)


def test_shuffled_and_cut_into_chunks_that_lanes_can_mix(photos, tmp_path):
    build([photos], tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    labels = corpus.labels()
    assert labels is not None
    assert 5 < np.abs(np.diff(labels)).sum() < 35  # neither sorted by class nor by name, which alternates
    assert len(corpus.chunks) == 40
    assert corpus.chunks["n"].tolist() == [1] * 40


def test_index_says_what_each_image_is(tmp_path, make_picture):
    source = tmp_path / "in"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "png in disguise.jpg": make_picture(1),
        "progressive.jpeg": make_picture(2, kind="JPEG", progressive=True, exif=exif),
        "cmyk.jpg": make_picture(3, kind="JPEG", mode="CMYK"),
        "palette.png": make_picture(4, mode="P"),
        "no extension": make_picture(5, kind="WEBP", lossless=True),
        "animated.gif": make_picture(6, kind="GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]),
    }
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep, "PNG")
    files["16 bit.png"] = deep.getvalue()
    for name, data in files.items():
        (source / name).write_bytes(data)
    build([source], tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    rows = {r["source"].removeprefix("in/"): r for r in corpus.index().to_pylist()}
    assert rows.keys() == files.keys()
    for name, row in rows.items():
        sample = corpus.sample(row["sample"])
        assert (sample.data, sample.key) == (files[name], row["key"])
        assert (row["size"], row["sha256"]) == (len(files[name]), hashlib.sha256(files[name]).digest())
        assert decode_image(sample.data).mode == "RGB"

    def told(name: str, *columns: str) -> tuple:
        return tuple(rows[name][c] for c in columns)

    assert told("png in disguise.jpg", "format", "width", "height") == ("PNG", 24, 16)
    assert corpus.sample(rows["png in disguise.jpg"]["sample"]).extension == "png"
    assert told("progressive.jpeg", "progressive", "exif_orientation", "format") == (True, 6, "JPEG")
    assert told("cmyk.jpg", "mode", "progressive") == ("CMYK", False)
    assert told("palette.png", "mode") == ("P",)
    assert told("no extension", "format") == ("WEBP",)
    assert told("animated.gif", "frames") == (2,)
    assert told("16 bit.png", "mode") == ("I;16",)
    assert corpus.classes is None
    assert corpus.labels() is None
    found = stats(tmp_path / "out")
    assert json.loads(json.dumps(found)) == found
    assert (found["n"], found["animated"], found["rotated"], found["progressive"]) == (7, 1, 1, 1)
    assert found["formats"] == {"PNG": 3, "JPEG": 2, "GIF": 1, "WEBP": 1}


def test_odd_names_and_links(tmp_path, make_picture):
    source = tmp_path / "in"
    source.mkdir()
    names = ["with space.png", "a.b.c.png", "new\nline.png", "ünïcödé 图.png", "-dash.png", "'quote\".png", "a.b.d.png"]
    for seed, name in enumerate(names):
        (source / name).write_bytes(make_picture(seed))
    with open(bytes(source) + b"/latin-\xe9.png", "wb") as f:
        f.write(make_picture(99))
    (source / "loop").symlink_to(source)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.png").write_bytes(make_picture(98))
    (source / "folder link").symlink_to(tmp_path / "other")
    (source / "dangling.png").symlink_to(tmp_path / "nowhere")
    (source / "itself.png").symlink_to(source / "itself.png")
    report = build([source], tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    found = {r["source"] for r in corpus.index().to_pylist()}
    assert found == {f"in/{n}" for n in [*names, "latin-\\xe9.png", "folder link/linked.png"]}
    assert verify(tmp_path / "out") == []
    reason = "a dangling link or not a regular file"
    assert report.listed == [
        {"source": f"in/{name}.png", "kind": "skipped", "reason": reason} for name in ("dangling", "itself")
    ]


def test_folders_whose_names_are_not_text(tmp_path, make_picture):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    source.mkdir()
    (source / "1.png").write_bytes(make_picture(1))
    (source / "notes.txt").write_text("words")
    with open(source / "t.parquet", "wb") as f:
        pq.write_table(pa.table({"image": [make_picture(2)]}), f)
    report = build([source], source / "out", workers=1)
    corpus = Corpus.open(source / "out")
    names = {"caf\\xe9/1.png", "caf\\xe9/t.parquet/row000000000000"}
    assert set(corpus.index(["source"])["source"].to_pylist()) == names
    assert report.listed[0]["source"] == "caf\\xe9/notes.txt"
    assert stats(source / "out")["n"] == 2
    assert verify(source / "out") == []


def test_files_named_one_by_one(photos, tmp_path):
    report = build(sorted(photos.glob("*/00*.png")), tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    sources = sorted(corpus.index(["source"])["source"].to_pylist())
    assert sources == [f"{'cat' if i % 2 else 'dog'}/{i:03d}.png" for i in (1, 3, 5, 7, 9, 0, 2, 4, 6, 8)]
    assert (report.n, len(corpus.manifest.recipe["sources"])) == (10, 2)


def test_sources_of_one_name_are_told_apart(tmp_path, make_picture):
    for i, folder in enumerate(("a/x/set", "b/x/set", "b/y/set")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(make_picture(i))
    build(tmp_path.glob("*/*/set"), tmp_path / "out", workers=1)
    sources = sorted(Corpus.open(tmp_path / "out").index(["source"])["source"].to_pylist())
    assert sources == ["a/x/set/1.png", "b/x/set/1.png", "y/set/1.png"]


def test_an_archive_behind_a_link_of_another_name(tmp_path, make_picture):
    write_tar(tmp_path / "0a1b2c", [("1.png", make_picture(1))], "w:gz")
    (tmp_path / "p.tar.gz").symlink_to("0a1b2c")
    assert build([tmp_path / "p.tar.gz"], tmp_path / "out", workers=1).n == 1


def test_several_images_and_labels_under_one_key(tmp_path, make_picture):
    a, b, c, d, e = (make_picture(i) for i in range(5))
    members = [
        *[("s.v1.png", a), ("s.v2.png", b), ("s.cls", b"1"), ("s.json", b"{}")],  # two images, one label
        *[("t.png", c), ("t.cls", b"0"), ("t.png", d), ("t.cls", b"2")],  # one name twice, with labels of their own
        *[("u.cls", b"0"), ("u.png", e), ("u.jpg", e)],  # one content twice
    ]
    report = build([write_tar(tmp_path / "w.tar", members)], tmp_path / "out", workers=1)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.classes == ["0", "1", "2"]
    labels = sorted((r["source"].split("/")[1], r["label"]) for r in corpus.index().to_pylist())
    assert labels == [("s.v1.png", 1), ("s.v2.png", 1), ("t.png", 0), ("t.png", 2), ("u.jpg", 0), ("u.png", 0)]
    assert (report.counts["duplicates"], report.counts["skipped"]) == (1, 1)
    assert contents(corpus) == {a: "1", b: "1", c: "0", d: "2", e: "0"}


def test_a_tar_without_its_end_mark_is_remarked(tmp_path, make_picture):
    path = write_tar(tmp_path / "t.tar", [(f"{i}.bmp", make_picture(i, size=(14, 11), kind="BMP")) for i in range(3)])
    second = path.read_bytes().index(b"1.bmp")
    path.write_bytes(path.read_bytes()[:second])
    report = build([path], tmp_path / "out", workers=1)
    assert report.n == 1
    assert any("t.tar has no end mark" in note for note in report.notes)


def test_tar_members_cannot_reach_outside(tmp_path, make_picture):
    members = [("../../evil.png", make_picture(0)), ("/etc/evil.png", make_picture(1))]
    build([write_tar(tmp_path / "t.tar", members)], tmp_path / "deep/er/out", workers=1)
    assert not list(tmp_path.rglob("evil.png"))
    assert Corpus.open(tmp_path / "deep/er/out").n == 2


def test_class_folders(photos, tmp_path, make_picture):
    def classes_of(members: list[str]) -> list[str] | None:
        out = tmp_path / hashlib.sha256(repr(members).encode()).hexdigest()
        path = write_tar(out.with_suffix(".tar"), [(m, make_picture(i)) for i, m in enumerate(members)])
        build([path], out, workers=1)
        return Corpus.open(out).classes

    assert classes_of(["b/1.png", "a/1.png", "b/2.png"]) == ["a", "b"]
    assert classes_of(["./set/train/b/1.png", "set/train/a/1.png"]) == ["a", "b"]
    assert classes_of(["a/1.png", "b/1.png", "2.png"]) is None
    assert classes_of(["a/1.png", "b/c/1.png"]) is None
    assert classes_of(["x/a/1.png", "y/b/1.png"]) is None
    assert classes_of(["only/1.png", "only/2.png"]) is None
    assert classes_of(["1.png", "2.png"]) is None


def test_splits_share_classes_and_no_image(photos, tmp_path):
    (photos / "cat" / "copy of 0.png").write_bytes((photos / "dog" / "000.png").read_bytes())
    (photos / "rare").mkdir()
    shutil.copy(photos / "dog" / "002.png", photos / "rare" / "one.png")
    low = build([photos], tmp_path / "low", hash_range=(0, 0.7), workers=1)
    high = build([photos], tmp_path / "high", hash_range=(0.7, 1), workers=1)
    a, b = Corpus.open(tmp_path / "low"), Corpus.open(tmp_path / "high")
    assert a.classes == b.classes == ["cat", "dog", "rare"]
    assert contents(a).keys().isdisjoint(contents(b).keys())
    assert a.n + b.n == 42
    assert low.counts["outside"] == high.n
    assert low.counts["duplicates"] + high.counts["duplicates"] == 2


def test_a_finished_build_is_left_alone_and_another_is_refused(photos, tmp_path):
    first = build([photos], tmp_path / "out", workers=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = build([photos], tmp_path / "out", workers=2)
    assert (again.id, again.was_complete, first.was_complete) == (first.id, True, False)
    for change in ({"seed": 1}, {"hash_range": (0, 0.5)}, {"shard_bytes": 1000}):
        with pytest.raises(UserError, match="another corpus"):
            build([photos], tmp_path / "out", **change)
    (photos / "new.png").write_bytes(b"")
    with pytest.raises(UserError, match="another corpus"):
        build([photos], tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        build([photos], tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_out_inside_the_source_is_no_source(photos):
    first = build([photos], photos / "corpus", workers=1)
    assert build([photos], photos / "corpus", workers=1).was_complete
    assert first.n == 40


def test_splits_that_lie_inside_the_source_share_its_classes(photos):
    """The second build meets the first one's shards, whose images are all outside its range."""
    build([photos], photos / "train", hash_range=(0, 0.7), workers=1)
    build([photos], photos / "test", hash_range=(0.7, 1), workers=1)
    train, test = Corpus.open(photos / "train"), Corpus.open(photos / "test")
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.n + test.n == 40


def test_a_corpus_that_lacks_a_shard_is_no_source(photos, tmp_path):
    build([photos], tmp_path / "one", shard_bytes=20_000, workers=1)
    (tmp_path / "one/shards/000001.tar").unlink()
    with pytest.raises(UserError, match=r"lacks shards/000001\.tar"):
        build([tmp_path / "one"], tmp_path / "two", workers=1)
    assert not (tmp_path / "two").exists()


def test_archives_inside_a_folder_are_opened(photos, tmp_path, make_picture):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "plain.png").write_bytes(make_picture(100))
    write_tar(mixed / "some.tar", [("in tar.png", make_picture(101))])
    (mixed / "broken.zip").write_bytes(b"no zip")
    (mixed / "packed.txt.gz").write_bytes(gzip.compress(b"words"))
    report = build([mixed], tmp_path / "out", workers=1)
    sources = sorted(r["source"] for r in Corpus.open(tmp_path / "out").index().to_pylist())
    assert sources == ["mixed/plain.png", "mixed/some.tar/in tar.png"]
    assert report.counts["skipped"] == 2


@pytest.mark.skipif(not IMAGENET.exists(), reason=f"{IMAGENET.name} is not here")
def test_real_photographs(tmp_path):
    report = build([IMAGENET], tmp_path / "out", workers=2)
    assert (report.n, report.counts["rejected"], report.classes) == (320, 0, None)
    assert verify(tmp_path / "out") == []
    with tarfile.open(IMAGENET) as archive:
        originals = {hashlib.sha256(archive.extractfile(m).read()).digest() for m in archive}  # type: ignore[union-attr]
    corpus = Corpus.open(tmp_path / "out")
    assert {hashlib.sha256(corpus.sample(i).data).digest() for i in range(320)} == originals
