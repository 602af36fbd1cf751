"""NVIDIA's loaders read our shards by indexes of theirs: the formats as known, and the loaders where installed."""

import json
import sqlite3
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path

import numpy as np
import pytest

from launch import cli
from selfsight.corpus import adopt, build, verify
from selfsight.errors import UserError
from selfsight.shards import Corpus, decode_image
from selfsight.shards.interop import write_dali, write_energon


@pytest.fixture(params=["labelled", "unlabelled"])
def corpus(request, tmp_path, make_picture):
    """60 PNGs and JPEGs in several shards, with both kinds of index."""
    for i in range(60):
        folder = tmp_path / "photos" / (f"class {i % 12}" if request.param == "labelled" else "")
        folder.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if i % 2 else "JPEG"
        (folder / f"{i}.{kind.lower()}").write_bytes(make_picture(i, kind=kind))
    build([tmp_path / "photos"], tmp_path / "corpus", shard_bytes=30_000, workers=1)
    assert cli.main(["corpus", "index", str(tmp_path / "corpus")]) == 0
    return Corpus.open(tmp_path / "corpus")


def members(shard: Path) -> dict[str, list[tarfile.TarInfo]]:
    """The files of a shard by key, as tarfile finds them."""
    found: dict[str, list[tarfile.TarInfo]] = {}
    with tarfile.open(shard) as archive:
        for member in archive:
            found.setdefault(member.name.partition(".")[0], []).append(member)
    return found


def test_dali_index_lists_every_file_of_every_sample(corpus):
    for shard in corpus.manifest.shards:
        tar = corpus.path / shard.tar
        version, *lines = tar.with_suffix(".idx").read_text().splitlines()
        assert version == f"v1.2 {shard.count}"
        want = [
            [w for m in files for w in (m.name.partition(".")[2], str(m.offset_data), str(m.size), m.name)]
            for files in members(tar).values()
        ]
        assert [line.split(" ") for line in lines] == want


def test_energon_index_is_where_samples_begin_and_the_last_ends(corpus):
    for shard in corpus.manifest.shards:
        tar = corpus.path / shard.tar
        offsets = np.frombuffer((tar.parent / f"{tar.name}.idx").read_bytes(), "<u8").tolist()
        assert offsets[:-1] == [files[0].offset for files in members(tar).values()]
        assert offsets[-1] == tar.stat().st_size - 1024  # before the two empty blocks


def test_energon_metadata(corpus):
    meta = corpus.path / ".nv-meta"
    shards = [s.tar for s in corpus.manifest.shards]
    assert json.loads((meta / ".info.json").read_text()) == {
        "shard_counts": {s.tar: s.count for s in corpus.manifest.shards}
    }
    assert f"train:\n  - shards/{{000000..{len(shards) - 1:06d}}}.tar\n" in (meta / "split.yaml").read_text()
    kind = "ImageSample" if corpus.classes is None else "ImageClassificationSample"
    assert f"__class__: {kind}\n" in (meta / "dataset.yaml").read_text()
    uuid.UUID((meta / "index.uuid").read_text())
    with sqlite3.connect(meta / "index.sqlite") as database:
        samples = database.execute("SELECT * FROM samples ORDER BY tar_file_id, sample_index").fetchall()
        parts = database.execute("SELECT * FROM sample_parts ORDER BY 1, 2, 4").fetchall()
    want_samples, want_parts = [], []
    for number, shard in enumerate(shards):
        for at, (key, files) in enumerate(members(corpus.path / shard).items()):
            end = files[-1].offset_data + -(-files[-1].size // 512) * 512
            want_samples.append((number, key, at, files[0].offset, end - files[0].offset))
            want_parts += [(number, at, m.name.partition(".")[2], m.offset_data, m.size) for m in files]
    assert samples == want_samples
    assert parts == want_parts


def test_verify_knows_these_files_and_holds_them(corpus):
    assert verify(corpus.path, workers=1) == []
    for name in ("shards/000001.idx", "shards/000001.tar.idx"):
        path = corpus.path / name
        sound = path.read_bytes()
        path.write_bytes(sound.replace(b"1", b"2") if name.endswith("1.idx") else sound[:-1])
        assert [str(f) for f in verify(corpus.path, workers=1)] == [f"{name}: is not the index of its shard"]
        path.write_bytes(sound)
    (corpus.path / "shards/000999.idx").write_bytes(b"")
    assert [f.file for f in verify(corpus.path, workers=1)] == ["shards/000999.idx"]


def test_what_a_user_edited_stays(corpus):
    edited = corpus.path / ".nv-meta/split.yaml"
    edited.write_text("split_parts: {}\n")
    write_energon(corpus.path)
    assert edited.read_text() == "split_parts: {}\n"


def test_shards_of_others_are_not_written_beside(corpus, tmp_path):
    adopt([f"{corpus.path}/shards/*.tar"], tmp_path / "adopted", workers=1)
    for write in (write_dali, write_energon):
        with pytest.raises(UserError, match="belong to others"):
            write(tmp_path / "adopted")


def test_wds2idx_writes_the_same(corpus, tmp_path):
    tool = Path(sys.executable).with_name("wds2idx")
    if not tool.exists():
        pytest.skip("DALI, which has wds2idx, is not installed")
    for shard in corpus.manifest.shards:
        tar = corpus.path / shard.tar
        subprocess.run([sys.executable, tool, tar, tmp_path / "idx"], check=True, stdout=subprocess.DEVNULL)
        assert (tmp_path / "idx").read_bytes() == tar.with_suffix(".idx").read_bytes()


def test_dali_reads_every_byte(corpus):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, pipeline_def

    paths = [str(corpus.path / s.tar) for s in corpus.manifest.shards]
    labelled = corpus.classes is not None
    parts = ["jpg;png", "cls"] if labelled else ["jpg;png"]

    @pipeline_def(batch_size=corpus.n, num_threads=1, device_id=None)
    def read():
        indexes = [p.removesuffix("tar") + "idx" for p in paths]
        found = fn.readers.webdataset(paths=paths, index_paths=indexes, ext=parts, missing_component_behavior="error")
        return tuple(found) if labelled else found

    pipeline = read()
    pipeline.build()
    found = pipeline.run()
    for i in range(corpus.n):
        assert bytes(found[0].at(i)) == corpus.sample(i).data
        if labelled:
            assert int(bytes(found[1].at(i))) == corpus.sample(i).label


def test_energon_prepares_the_same(corpus, tmp_path):
    prepare = pytest.importorskip(
        "megatron.energon.flavors.webdataset.prepare", reason="Megatron-Energon is not installed"
    )
    paths = [s.tar for s in corpus.manifest.shards]
    for path in paths:
        (tmp_path / "theirs" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "theirs" / path).write_bytes((corpus.path / path).read_bytes())
    prepare.WebdatasetPreparator.prepare_dataset(
        tmp_path / "theirs",
        paths,
        split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)],
        shuffle_seed=None,
        workers=1,
    )

    def tables(root: Path) -> list:
        with sqlite3.connect(root / ".nv-meta/index.sqlite") as database:
            names = sorted(row[0] for row in database.execute("SELECT name FROM sqlite_master"))
            return [names, *(sorted(database.execute(f"SELECT * FROM {t}")) for t in ("samples", "sample_parts"))]

    assert tables(corpus.path) == tables(tmp_path / "theirs")
    for path in [*(f"{p}.idx" for p in paths), ".nv-meta/split.yaml"]:
        assert (corpus.path / path).read_bytes() == (tmp_path / "theirs" / path).read_bytes(), path
    counts = [json.loads((root / ".nv-meta/.info.json").read_text()) for root in (corpus.path, tmp_path / "theirs")]
    assert counts[0]["shard_counts"] == counts[1]["shard_counts"]


@pytest.mark.parametrize("decoded", [False, True])
def test_energon_reads_every_sample(decoded, corpus):
    energon = pytest.importorskip("megatron.energon", reason="Megatron-Energon is not installed")

    class Raw(energon.DefaultTaskEncoder):
        decoder = energon.DefaultTaskEncoder.decoder if decoded else None

    dataset = energon.get_train_dataset(
        corpus.path,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        repeat=False,
        task_encoder=Raw(),
    )
    seen = []
    for sample in energon.get_loader(dataset):
        ordinal = int(sample.__key__.rpartition("/")[2])
        seen.append(ordinal)
        if decoded:
            want = np.asarray(decode_image(corpus.sample(ordinal).data)).transpose(2, 0, 1)
            np.testing.assert_allclose(sample.image.numpy() * 255, want, atol=1e-3)
        else:
            assert bytes(sample.image) == corpus.sample(ordinal).data
        if corpus.classes is not None:
            assert int(sample.label) == corpus.sample(ordinal).label
    assert sorted(seen) == list(range(corpus.n))
