"""A corpus at a URL is the corpus in the folder: sample for sample, through every fault that a network has."""

import importlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from launch import cli
from selfsight.errors import UserError
from selfsight.shards import Corpus, DamagedTar, Unreachable
from selfsight.shards.selection import read_selection, write_selection

N, PER_SHARD, PER_CHUNK = 40, 16, 5
BUCKET = "corpora"
FAULTS = ["500", "503", "closed", "cut", "short", "truncated", "slow"]


def content(ordinal: int) -> bytes:
    return np.random.default_rng(ordinal).bytes(1000 + 97 * ordinal)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, write_corpus):
    return write_corpus(tmp_path_factory.mktemp("c") / "corpus", [content(i) for i in range(N)], PER_SHARD, PER_CHUNK)


def upload(client, bucket: str, folder: Path) -> str:
    client.create_bucket(Bucket=bucket)
    for path in (p for p in folder.rglob("*") if p.is_file()):
        client.put_object(Bucket=bucket, Key=f"a/corpus/{path.relative_to(folder).as_posix()}", Body=path.read_bytes())
    return f"s3://{bucket}/a/corpus"


@pytest.fixture(scope="session")
def uploaded(s3_client, folder):
    return upload(s3_client, BUCKET, folder)


@pytest.fixture
def url(s3, uploaded):
    """The corpus on S3."""
    return uploaded


@pytest.fixture
def put(s3, s3_client, folder):
    """A function that replaces or removes a file of another copy of the corpus, `put.url`, at its source."""
    bucket = f"copy-{time.monotonic_ns()}"

    def put(name: str, data: bytes | None) -> None:
        if data is None:
            s3_client.delete_object(Bucket=bucket, Key=f"a/corpus/{name}")
        else:
            s3_client.put_object(Bucket=bucket, Key=f"a/corpus/{name}", Body=data)

    put.url = upload(s3_client, bucket, folder)
    return put


def assert_whole(corpus: Corpus, folder: Path) -> None:
    """Every sample, in an order of its own, is that of the folder, byte for byte."""
    here = Corpus.open(folder)
    for ordinal in np.random.default_rng(len(os.listdir(folder))).permutation(N).tolist():
        assert corpus.sample(ordinal) == here.sample(ordinal)
        assert corpus.sample(ordinal).data == content(ordinal)


def test_a_corpus_on_s3_is_the_one_in_the_folder(url, s3, folder):
    corpus, here = Corpus.open(url), Corpus.open(folder)
    assert (corpus.id, corpus.n, corpus.name) == (here.id, N, "corpus")
    assert (corpus.chunks == here.chunks).all()
    assert isinstance(corpus.chunks, np.memmap)
    assert corpus.labels().tolist() == here.labels().tolist()
    s3.calm()
    assert_whole(corpus, folder)
    spans = [(path, span) for _, path, span in s3.gets("/shards/")]
    assert len(spans) == len(set(spans)) == len(here.chunks)  # a run is one request, and is asked for once
    s3.calm()
    assert_whole(Corpus.open(url), folder)
    assert {path.rpartition("/")[2] for _, path, _ in s3.gets()} == {"manifest.json", BUCKET}  # BUCKET: the listing
    assert corpus.whereabouts(0) == f"{0:012d} in {url}/shards/000000.tar"


def test_what_was_prefetched_needs_no_server(url, s3, folder):
    corpus = Corpus.open(url)
    for chunk in range(len(corpus.chunks)):
        corpus.prefetch(chunk)
        Corpus.open(folder).prefetch(chunk)  # which is nothing
    s3.plan = lambda path, nth: "500"
    assert_whole(corpus, folder)


def test_an_epoch_through_every_fault(url, s3, folder):
    s3.plan = lambda path, nth: FAULTS[nth] if nth < len(FAULTS) else None
    assert_whole(Corpus.open(url), folder)


def test_faults_that_come_again_and_again(url, s3, folder):
    """Every other answer is a fault, each kind in its turn."""
    s3.plan = lambda path, nth: FAULTS[nth // 2 % len(FAULTS)] if nth % 2 == 0 else None
    corpus = Corpus.open(url)
    threads_ok = []
    threads = [threading.Thread(target=lambda: threads_ok.append(assert_whole(corpus, folder))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert threads_ok == [None] * 4


def test_flipped_bits_heal(url, s3, folder):
    """Every second answer has a flipped bit: none reaches a sample, none stays in the cache."""
    s3.plan = lambda path, nth: "flipped" if nth % 2 == 0 and "manifest" not in path else None
    corpus = Corpus.open(url)
    assert_whole(corpus, folder)
    s3.calm()
    assert_whole(corpus, folder)
    s3.calm()
    assert_whole(corpus, folder)
    assert not s3.gets("/shards/")  # by now all that is kept is right


def test_bytes_that_rot_in_the_cache_heal(url, folder, quick):
    corpus = Corpus.open(url)
    assert_whole(corpus, folder)
    for path in quick.iterdir():
        if path.name != "lock":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert_whole(Corpus.open(url), folder)
    for path in quick.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert_whole(Corpus.open(url), folder)


def test_a_server_that_falls_silent(url, s3, folder, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_SILENCE", "0.3")
    s3.plan = lambda path, nth: "silent" if nth == 0 and "000001" in path else None
    assert_whole(Corpus.open(url), folder)


@pytest.mark.parametrize("gone", ["500", "closed", "cut", "truncated"])
def test_a_server_that_never_recovers(url, s3, monkeypatch, gone):
    monkeypatch.setenv("SELFSIGHT_TRIES", "3")
    corpus = Corpus.open(url)
    s3.plan = lambda path, nth: gone if "shards" in path else None
    with pytest.raises(OSError, match=rf"3 tries[^\n]*'{url}/shards/000000\.tar'$"):
        corpus.sample(0)
    assert 3 <= s3.asked[f"/{BUCKET}/a/corpus/shards/000000.tar"] <= 6  # a lost connection is tried again below us


def test_an_index_for_which_no_answer_came_is_not_called_damaged(url, s3, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_TRIES", "2")
    corpus = Corpus.open(url)
    s3.plan = lambda path, nth: "500" if "index" in path else None
    with pytest.raises(Unreachable, match=rf"2 tries[^\n]*'{url}/index/000000\.parquet'$"):
        corpus.sample(0)


def test_no_permission_is_not_asked_for_twice(url, s3):
    s3.plan = lambda path, nth: "403"
    with pytest.raises(UserError, match=rf"^{url}/manifest\.json cannot be read \(access is denied[^\n]*$"):
        Corpus.open(url)
    assert len(s3.requests) == 1
    s3.plan = lambda path, nth: "403" if "shards/" in path else None
    with pytest.raises(PermissionError, match=rf"access is denied[^\n]*'{url}/shards/000000\.tar'$"):
        Corpus.open(url).sample(0)
    assert len(s3.gets("shards/")) == 1


def test_a_server_that_is_gone_for_good(web, folder, quick, monkeypatch):
    (web.folder / "c").symlink_to(folder)
    url = f"{web.url}/c"
    monkeypatch.setenv("SELFSIGHT_TRIES", "3")
    corpus = Corpus.open(url)
    corpus.sample(0)
    web.plan = lambda path, nth: "closed"  # connections that were open
    web.stop()
    with pytest.raises(OSError, match=rf"3 tries[^\n]*'{url}/shards/000000\.tar'$"):
        corpus.sample(2 * PER_CHUNK)
    assert corpus.sample(PER_CHUNK - 1).data == content(PER_CHUNK - 1)  # what is kept is still there
    with pytest.raises(UserError, match=rf"^{url}/manifest\.json cannot be read[^\n]*$"):
        Corpus.open(url)


def test_damage_at_the_source_is_named_and_costs_its_own_sample(put, folder):
    url, name = put.url, "shards/000001.tar"
    data = bytearray((folder / name).read_bytes())
    offset = Corpus.open(folder).index(["data_offset"])["data_offset"].to_pylist()[PER_SHARD + 2]
    data[offset] ^= 1
    put(name, bytes(data))
    corpus = Corpus.open(url)
    with pytest.raises(DamagedTar, match=f"{url}/{name}: sample {PER_SHARD + 2:012d}: the image is not what was"):
        corpus.sample(PER_SHARD + 2)
    assert all(corpus.sample(i).data == content(i) for i in range(N) if i != PER_SHARD + 2)


def test_a_shard_cut_short_or_missing_at_the_source(put, folder, s3):
    url, whole = put.url, (folder / "shards/000001.tar").read_bytes()
    middle = int(Corpus.open(folder).index(["member_offset"])["member_offset"].to_pylist()[PER_SHARD + 7])
    put("shards/000001.tar", whole[: middle + 600])
    corpus = Corpus.open(url)
    for ordinal in range(PER_SHARD, 2 * PER_SHARD):
        if ordinal < PER_SHARD + 7:
            assert corpus.sample(ordinal).data == content(ordinal)
        else:
            with pytest.raises(DamagedTar, match=r"000001\.tar: [^\n]*the shard ends inside it"):
                corpus.sample(ordinal)
    put("shards/000002.tar", None)
    s3.calm()
    with pytest.raises(FileNotFoundError, match=f"no such file: '{url}/shards/000002.tar'"):
        corpus.sample(N - 1)
    assert len(s3.gets("shards/")) == 1  # that it is not there needs no second question
    with pytest.raises(UserError, match=rf"^{url} lacks shards/000002\.tar \(1 shards in all\)"):
        Corpus.open(url)


def test_what_is_no_corpus_ends_in_one_line(put, monkeypatch, tmp_path):
    from s3fs import S3FileSystem

    url = put.url
    for wrong in (f"{url}/nowhere", "s3://no-such-bucket/corpus"):
        with pytest.raises(UserError, match=rf"^{wrong} is no corpus[^\n]*$"):
            Corpus.open(wrong)
    with pytest.raises(UserError, match=r"^frob://x/manifest\.json cannot be opened[^\n]*$"):
        Corpus.open("frob://x")
    Corpus.open(url)
    for name in ("index/000000.parquet", "chunks.npy"):
        put(name, b"else")
    with pytest.raises(UserError, match=rf"^{url}/index/000000\.parquet is not the index of its shard[^\n]*$"):
        Corpus.open(url).sample(0)  # its chunk table is in the cache
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=rf"^{url}/chunks\.npy [^\n]*$"):
        Corpus.open(url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=rf"^{url}/manifest\.json cannot be read \(access is denied[^\n]*$"):
        Corpus.open(url)
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("scheme", ["s3", "gs", "http"])
def test_a_package_that_is_not_installed_is_named(scheme, monkeypatch, quick):
    for name in ("s3fs", "gcsfs", "aiohttp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, scheme, raising=False)
    extra = {"gs": "gcs"}.get(scheme, scheme)
    with pytest.raises(UserError, match=rf"pip install 'selfsight\[{extra}\]'$"):
        Corpus.open(f"{scheme}://bucket/corpus")


def test_a_web_server_with_faults(web, folder, quick):
    (web.folder / "c").symlink_to(folder)
    web.plan = lambda path, nth: FAULTS[nth] if nth < len(FAULTS) else None
    assert_whole(Corpus.open(f"{web.url}/c"), folder)
    with pytest.raises(UserError, match="is no corpus"):
        Corpus.open(f"{web.url}/d")


def test_a_server_without_ranges_is_said(web, folder, quick):
    (web.folder / "c").symlink_to(folder)
    web.plan = lambda path, nth: "whole"
    corpus = Corpus.open(f"{web.url}/c")
    with pytest.raises(OSError, match=rf"does not give ranges[^\n]*'{web.url}/c/shards/000000\.tar'$"):
        corpus.sample(0)
    assert len(web.gets("shards")) == 1


def test_two_urls_of_one_corpus_share_what_is_kept(url, put, s3, folder):
    assert_whole(Corpus.open(url), folder)
    s3.calm()
    assert_whole(Corpus.open(put.url), folder)
    assert not s3.gets("/shards/") + s3.gets("/index/") + s3.gets("chunks.npy")


def test_any_other_file_system_of_fsspec(folder, quick):
    import fsspec

    fsspec.filesystem("memory").put(str(folder), "/corpus", recursive=True)
    assert_whole(Corpus.open("memory://corpus"), folder)
    assert_whole(Corpus.open(f"file://{folder}"), folder)


def test_shards_that_lie_elsewhere(web, folder, tmp_path, quick):
    """A corpus of this machine whose manifest names a shard by URL, one by path, and one of its own."""
    root = tmp_path / "adopted"
    (root / "shards").mkdir(parents=True)
    for name in ("index", "chunks.npy"):
        (root / name).symlink_to(folder / name)
    (root / "shards/000002.tar").symlink_to(folder / "shards/000002.tar")
    (web.folder / "c").symlink_to(folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["shards"][0]["url"] = f"{web.url}/c/shards/000000.tar"
    manifest["shards"][1]["url"] = str(folder / "shards/000001.tar")
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert_whole(Corpus.open(root), folder)
    assert {path for _, path, _ in web.requests} == {"/c/shards/000000.tar"}
    manifest["shards"][1]["url"] = str(folder / "shards/else.tar")
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"lacks [^\n]*else\.tar"):
        Corpus.open(root)


def test_pickled_and_forked(url, folder):
    corpus = Corpus.open(url)
    corpus.sample(0)
    assert_whole(pickle.loads(pickle.dumps(corpus)), folder)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(corpus.sample, range(N)) == [corpus.sample(i) for i in range(N)]


READERS = """
import os, sys
import numpy as np
from selfsight.shards import Corpus

def read(seed):
    away, here = Corpus.open(sys.argv[1]), Corpus.open(sys.argv[2])
    for i in np.random.default_rng(seed).permutation(3 * here.n).tolist():
        assert away.sample(i % here.n) == here.sample(i % here.n), i

children = []
for seed in range(4):
    if (pid := os.fork()) == 0:
        status = 1
        try:
            read(seed)
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
"""


def test_processes_share_a_cache_smaller_than_the_corpus(web, folder, quick, monkeypatch, held):
    (web.folder / "c").symlink_to(folder)
    bound = sum(p.stat().st_size for p in folder.glob("shards/*")) // 3
    monkeypatch.setenv("SELFSIGHT_CACHE_BYTES", str(bound))
    readers = subprocess.Popen([sys.executable, "-c", READERS, f"{web.url}/c", str(folder)])
    most = 0
    while readers.poll() is None:
        most = max(most, held(quick))
        time.sleep(0.001)
    assert readers.returncode == 0
    assert 0 < most <= bound
    assert not list(quick.glob("*.part"))


def test_a_cache_that_is_off_or_too_small_for_a_run_takes_samples_one_by_one(url, s3, folder, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE_BYTES", "0")
    corpus = Corpus.open(url)
    s3.calm()
    assert_whole(corpus, folder)
    assert {int(r.rpartition("-")[2]) - int(r[6:].partition("-")[0]) < 8192 for _, _, r in s3.gets("shards/")} == {True}


def test_the_commands_take_urls(url, folder, capsys):
    for command in (["info"], ["corpus", "stats"]):
        assert cli.main([*command, url, "--json"]) == 0
        there = json.loads(capsys.readouterr().out)
        assert cli.main([*command, str(folder), "--json"]) == 0
        assert there == {**json.loads(capsys.readouterr().out), "path": url}
    assert cli.main(["corpus", "verify", url]) == 2
    assert "far away" in capsys.readouterr().err


def test_a_selection_at_a_url(put, folder, tmp_path):
    corpus = Corpus.open(put.url)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = write_selection(Corpus.open(copy), "some", np.array([3, 8]), np.array([1, 2]))
    put("selections/some.parquet", path.read_bytes())
    for name in ("some", str(path), f"{put.url}/selections/some.parquet"):
        assert read_selection(corpus, name).ordinals.tolist() == [3, 8]
    with pytest.raises(UserError, match=rf"^there is no {put.url}/selections/other\.parquet"):
        read_selection(corpus, "other")
    with pytest.raises(UserError, match="only read"):
        write_selection(corpus, "more", np.array([1]))


def test_a_cache_too_small_for_the_order_is_said(url, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE_BYTES", "60K")
    corpus = Corpus.open(url)
    assert corpus.too_large_for_cache(1, 2) is None
    said = corpus.too_large_for_cache(4, 4)
    assert said is not None
    assert url in said


def test_a_folder_needs_no_cache(folder):
    assert Corpus.open(folder).too_large_for_cache(10**6, 10**6) is None
