"""Random access: any ordinal from any process gives the sample that was written; damage never passes for data."""

import json
import pickle
import threading

import numpy as np
import pytest

from selfsight.errors import UserError
from selfsight.shards import Corpus, DamagedTar
from selfsight.shards.corpus import CHUNK_DTYPE
from selfsight.shards.manifest import Shard, merkle_root

N, PER_SHARD = 23, 9


def content(ordinal: int) -> bytes:
    return np.random.default_rng(ordinal).bytes(ordinal * 97)


@pytest.fixture
def folder(tmp_path, write_corpus):
    return write_corpus(tmp_path / "corpus", [content(i) for i in range(N)], PER_SHARD, 4)


def same(corpus: Corpus) -> bool:
    order = np.random.default_rng(1).permutation(N)
    return all(
        (s.ordinal, s.key, s.data, s.extension, s.label) == (i, f"{i:012d}", content(i), "png", i % 3)
        for i in map(int, order)
        for s in [corpus.sample(i)]
    )


def test_every_sample(folder):
    corpus = Corpus.open(folder)
    assert corpus.n == N
    assert corpus.chunks.dtype == CHUNK_DTYPE
    assert corpus.chunks["n"].tolist() == [4, 4, 1, 4, 4, 1, 4, 1]
    assert same(corpus)
    labels = corpus.labels()
    assert labels is not None
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 3 for i in range(N)]
    assert corpus.index(["sample"])["sample"].to_pylist() == list(range(N))
    for outside in (-1, N):
        with pytest.raises(IndexError):
            corpus.sample(outside)


def test_pickled_forked_and_threaded(folder):
    import multiprocessing

    corpus = Corpus.open(folder)
    corpus.sample(0)
    assert same(pickle.loads(pickle.dumps(corpus)))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(corpus.sample, range(N)) == [corpus.sample(i) for i in range(N)]
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(same(corpus))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == [True] * 8


def test_a_damaged_header_raises_and_names_the_shard(folder):
    path = folder / "shards/000001.tar"
    data = bytearray(path.read_bytes())
    data[130] ^= 1
    path.write_bytes(data)
    corpus = Corpus.open(folder)
    with pytest.raises(DamagedTar, match=rf"000001\.tar: sample {PER_SHARD:012d}: bad header checksum"):
        corpus.sample(PER_SHARD)
    assert all(corpus.sample(i).data == content(i) for i in range(N) if i != PER_SHARD)
    path.write_bytes(data[:-512])
    with pytest.raises(DamagedTar, match=f"sample {2 * PER_SHARD - 1:012d}: the shard ends inside it"):
        Corpus.open(folder).sample(2 * PER_SHARD - 1)


@pytest.mark.parametrize("ordinal", [1, PER_SHARD, N - 1])
def test_an_image_that_is_not_what_was_stored_never_passes(folder, ordinal):
    offset = Corpus.open(folder).index(["data_offset"])["data_offset"].to_pylist()[ordinal]
    path = folder / f"shards/{ordinal // PER_SHARD:06d}.tar"
    data = bytearray(path.read_bytes())
    data[offset + len(content(ordinal)) // 2] ^= 8
    path.write_bytes(data)
    corpus = Corpus.open(folder)
    with pytest.raises(DamagedTar, match=rf"{path}: sample {ordinal:012d}: the image is not what was stored"):
        corpus.sample(ordinal)
    assert all(corpus.sample(i).data == content(i) for i in range(N) if i != ordinal)


def test_an_index_that_is_lost_or_of_another_shard(folder):
    first, second = folder / "index/000000.parquet", folder / "index/000002.parquet"
    first.write_bytes(second.read_bytes())
    for say in ("is not the index of its shard", "cannot be read"):
        with pytest.raises(UserError, match=rf"^{first} {say}[^\n]*$"):
            Corpus.open(folder).sample(0)
        with pytest.raises(UserError, match=rf"^{first} {say}[^\n]*$"):
            Corpus.open(folder).labels()
        first.unlink(missing_ok=True)


@pytest.mark.parametrize("damage", [lambda d: b"", lambda d: d[:-1], lambda d: d[:-2] + b"\7\0", lambda d: b"PK\3\4"])
def test_a_chunk_table_that_is_not_the_one_of_the_manifest(folder, damage):
    path = folder / "chunks.npy"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"^{path} [^\n]*restore it[^\n]*$"):
        Corpus.open(folder)


def test_no_corpus_and_broken_ones_end_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="no corpus"):
        Corpus.open(tmp_path / "nowhere")
    good = json.loads((folder / "manifest.json").read_bytes())

    def refused(change: dict, match: str) -> None:
        (folder / "manifest.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=match):
            Corpus.open(folder)

    refused({"id": "0" * 64}, "id")
    refused({"n": N + 1}, "hold")
    refused({"n": "many"}, "malformed")
    refused({"schema": 99}, "schema")
    refused({"kind": "else"}, "not the manifest")
    refused({"surplus": 1}, "unknown")
    refused({"counts": {}}, "counts")
    refused({"classes": 5}, "classes")
    refused({"notes": "words"}, "notes")
    refused({"shards": [{**good["shards"][0], "sha256": "xyz"}], "n": PER_SHARD}, "hexadecimal")
    (folder / "manifest.json").write_bytes(b"{")
    with pytest.raises(UserError, match="not JSON"):
        Corpus.open(folder)
    (folder / "manifest.json").write_text(json.dumps(good))
    (folder / "shards/000002.tar").unlink()
    with pytest.raises(UserError, match=r"000002\.tar"):
        Corpus.open(folder)


def test_the_root_depends_on_every_shard_and_count():
    shards = [Shard(i, i, 1, 1, f"{i:064x}", "") for i in range(5)]
    roots = {merkle_root(shards[:k]) for k in range(6)}
    assert len(roots) == 6
    assert merkle_root([*shards[:4], Shard(4, 4, 2, 1, f"{4:064x}", "")]) not in roots
