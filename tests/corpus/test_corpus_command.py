"""The command: what a user does wrong ends in one line, exit code 2; what is odd about images is counted and listed."""

import json
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from selfsight.corpus import build
from selfsight.shards import Corpus


@pytest.fixture
def selfsight(capsys):
    """Runs a command in-process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(selfsight):
    """Runs a command that must end in one line and exit code 2; gives the line."""

    def run(*argv: object) -> str:
        code, out, err = selfsight(*argv)
        lines = [line for line in err.splitlines() if line.startswith("selfsight: ")]
        assert (code, out, len(lines)) == (2, "", 1), err
        assert "Traceback" not in err
        return lines[0]

    return run


def test_build_verify_stats(selfsight, photos, tmp_path):
    code, out, _ = selfsight(
        "corpus", "build", photos, "--out", tmp_path / "out", "--workers", 1, "--shard-size", "20KiB"
    )
    corpus = Corpus.open(tmp_path / "out")
    assert code == 0
    assert f"corpus id {corpus.id}" in out
    assert "40 images, 2 classes" in out
    assert len(corpus.manifest.shards) > 1
    code, out, _ = selfsight("corpus", "verify", tmp_path / "out")
    assert (code, "sound" in out) == (0, True)
    code, out, _ = selfsight("corpus", "stats", tmp_path / "out")
    assert (code, corpus.id in out, "cat" in out) == (0, True, True)


def test_json_is_one_object_and_nothing_else(selfsight, photos, tmp_path):
    for argv in (
        ("build", photos, "--out", tmp_path / "out"),
        ("verify", tmp_path / "out"),
        ("stats", tmp_path / "out"),
    ):
        code, out, _ = selfsight("corpus", *argv, "--json")
        found = json.loads(out)
        assert (code, found["n"], found["path"]) == (0, 40, str(tmp_path / "out"))
    assert found["classes"] == {"cat": 20, "dog": 20}


def test_nothing_to_build_from(refused, tmp_path):
    empty, words, out = tmp_path / "empty", tmp_path / "words", tmp_path / "out"
    empty.mkdir()
    words.mkdir()
    (words / "notes.txt").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    assert "no images" in refused("corpus", "build", empty, "--out", out)
    assert "no images" in refused("corpus", "build", words, "--out", out)
    assert "no images" in refused("corpus", "build", tmp_path / "empty.zip", "--out", out)
    assert "does not exist" in refused("corpus", "build", tmp_path / "nowhere", "--out", out)
    (words / "broken.jpg").write_bytes(b"")
    assert "empty file" in refused("corpus", "build", words, "--out", out)
    assert not out.exists()


def test_bad_images_are_listed_and_the_rest_is_built(selfsight, photos, tmp_path, make_picture):
    jpeg = make_picture(77, size=(200, 200), kind="JPEG")
    side = 14_000
    Image.new("1", (side, side)).save(photos / "bomb.png")
    bad = {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": make_picture(78, size=(99, 99))[:999],
        "zero.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "photo.heic": b"\0\0\0\x18ftypheic",
    }
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    (photos / "README.txt").write_text("words")
    (photos / "._cat.jpg").write_bytes(b"\0\5\x16\7")
    (photos / "really a png.jpg").write_bytes(make_picture(79))
    code, out, _ = selfsight("corpus", "build", photos, "--out", tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["counts"] == {"seen": 49, "kept": 41, "rejected": 6, "skipped": 2, "outside": 0, "duplicates": 0}
    lines = (tmp_path / "out/rejected.jsonl").read_text().splitlines()
    listed = {entry["source"]: entry for entry in map(json.loads, lines)}
    assert set(listed) == {f"photos/{n}" for n in [*bad, "bomb.png", "README.txt", "._cat.jpg"]}
    assert listed["photos/zero.jpg"]["reason"] == "empty file"
    assert listed["photos/text.jpg"]["reason"] == "not an image"
    assert "truncated" in listed["photos/truncated.jpg"]["reason"]
    assert "pixels" in listed["photos/bomb.png"]["reason"]
    assert "not supported" in listed["photos/photo.heic"]["reason"]
    assert listed["photos/README.txt"]["kind"] == "skipped"
    assert sum(report["rejected_reasons"].values()) == 6
    code, out, _ = selfsight("corpus", "build", photos, "--out", tmp_path / "out")
    assert (code, "6 rejected" in out, "photos/zero.jpg: empty file" in out) == (0, True, True)


def test_damaged_archives(refused, tmp_path, make_picture):
    import tarfile

    good = tmp_path / "good.png"
    good.write_bytes(make_picture(0))
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")):
        path = tmp_path / f"t{suffix}"
        with tarfile.open(path, mode) as archive:
            for i in range(20):
                archive.add(good, f"{i}.png")
        data = bytearray(path.read_bytes())
        path.write_bytes(data[: len(data) * 2 // 3 - 100])
        assert f"t{suffix} is damaged" in refused("corpus", "build", path, "--out", tmp_path / "out")
        if suffix == ".tar":
            data[512 * 6 + 100] ^= 4
            path.write_bytes(data)
            assert "bad header checksum" in refused("corpus", "build", path, "--out", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(good, "a.png")
    (tmp_path / "z.zip").write_bytes((tmp_path / "z.zip").read_bytes()[:-30])
    assert "damaged" in refused("corpus", "build", tmp_path / "z.zip", "--out", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "label.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.cls", b"1" * 300)
        archive.write(good, "a.png")
    data = bytearray((tmp_path / "label.zip").read_bytes())
    data[50] ^= 255
    (tmp_path / "label.zip").write_bytes(data)
    assert "label.zip is damaged" in refused("corpus", "build", tmp_path / "label.zip", "--out", tmp_path / "out")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [make_picture(i) for i in range(50)]}), tmp_path / "page.parquet")
    data = bytearray((tmp_path / "page.parquet").read_bytes())
    data[30:200] = bytes(255 - byte for byte in data[30:200])
    (tmp_path / "page.parquet").write_bytes(data)
    assert "page.parquet is damaged" in refused("corpus", "build", tmp_path / "page.parquet", "--out", tmp_path / "out")
    pq.write_table(pa.table({"words": ["none"]}), tmp_path / "words.parquet")
    assert "no column of image" in refused("corpus", "build", tmp_path / "words.parquet", "--out", tmp_path / "out")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    assert "damaged" in refused("corpus", "build", tmp_path / "p.parquet", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_listed(selfsight, tmp_path, make_picture, method):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as archive:
        for name in ("a.png", "b.png", "c.png"):
            archive.writestr(name, make_picture(ord(name[0])))
        starts = {info.filename: info.header_offset for info in archive.infolist()}
    data = bytearray((tmp_path / "z.zip").read_bytes())
    data[starts["a.png"] + 60 : starts["a.png"] + 90] = bytes(30)
    central = data.rindex(b"PK\1\2")  # the last one's, c.png
    data[central + 8] |= 1
    (tmp_path / "z.zip").write_bytes(data)
    code, out, _ = selfsight("corpus", "build", tmp_path / "z.zip", "--out", tmp_path / "out", "--json")
    report = json.loads(out)
    assert (code, report["n"]) == (0, 1)
    assert {e["source"]: e["kind"] for e in report["listed"]} == {"z.zip/a.png": "rejected", "z.zip/c.png": "skipped"}


def test_what_is_not_a_file_is_not_waited_for(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "no images" in refused("corpus", "build", tmp_path / "pipe.jpg", "--out", tmp_path / "out")


def test_options_that_mean_nothing(refused, photos, tmp_path):
    for option, value in (("--hash-range", "1:0"), ("--hash-range", "x"), ("--shard-size", "big"), ("--workers", "0")):
        refused("corpus", "build", photos, "--out", tmp_path / "out", option, value)
    assert "hash range" in refused(
        "corpus", "build", photos, "--out", tmp_path / "out", "--hash-range", "0.5:0.500000001"
    )
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written(refused, photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("corpus", "build", photos, "--out", tmp_path / "file")
    refused("corpus", "build", photos, "--out", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in refused("corpus", "build", photos, "--out", tmp_path / "locked" / "out")


@pytest.mark.parametrize("limit", [1_000, 60_000, 150_000])
def test_a_full_disk_loses_nothing(limit, photos, tmp_path, make_picture):
    """A limit on file sizes stands in for the full disk: at first the ledger does not fit, then a shard."""
    (photos / "cat" / "large.png").write_bytes(make_picture(500, size=(300, 200)))
    command = [sys.executable, "-m", "launch", "corpus", "build", str(photos), "--out", str(tmp_path / "out")]
    root = Path(cli.__file__).parents[1]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("selfsight: ")]
    assert "stopped" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    again = build([photos], tmp_path / "out", workers=1)
    assert again.id == build([photos], tmp_path / "other", workers=1).id


def test_what_is_no_corpus(refused, photos, tmp_path):
    for verb in ("verify", "stats"):
        assert "no corpus" in refused("corpus", verb, photos)
        assert "no corpus" in refused("corpus", verb, tmp_path / "nowhere")
