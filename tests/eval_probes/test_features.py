"""Features are those of the encoder, extracted once, and never those of something else."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes import features
from eval_probes.features import extract
from eval_probes.store import FeatureStore
from selfsight import encoders
from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image
from selfsight.weights import export_encoder, load_pretrained

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(24):
        (folder / f"class{i % 3}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, size=(40, 36 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 3}" / f"{i}.png")
    out = tmp_path_factory.mktemp("corpora") / "corpus"
    build([folder], out)
    return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("weights") / "export"
    return export_encoder(encoders.build(TINY, drop_path=False), TINY, out, meta={"step": 3})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def by_hand(weights: Path, corpus: Path) -> list:
    encoder = load_pretrained(weights)
    opened = Corpus.open(corpus)
    images = [encoder.preprocess(decode_image(opened.sample(i).data)) for i in range(opened.n)]
    with torch.inference_mode():
        return encoder.intermediate(torch.stack(images), n=2)


def test_features_are_those_of_the_encoder(weights, corpus):
    oldest, last = by_hand(weights, corpus)
    found = extract(weights, corpus, batch_size=7)
    assert found.X.dtype == np.float32
    assert found.y is not None
    assert found.y.tolist() == Corpus.open(corpus).labels().tolist()
    assert (found.weights_digest, found.corpus_id) == (load_pretrained(weights).digest, Corpus.open(corpus).id)
    assert found.meta["step"] == 3
    np.testing.assert_allclose(found.X, last.cls, atol=1e-5)
    both = extract(weights, corpus, n_last_blocks=2, avgpool=True)
    np.testing.assert_allclose(both.X, torch.cat([oldest.cls, last.cls, last.avg], dim=1), atol=1e-5)
    mean = extract(weights, corpus, n_last_blocks=0, avgpool=True)
    np.testing.assert_allclose(mean.X, last.avg, atol=1e-5)


def test_worker_processes_change_nothing(weights, corpus, tmp_path):
    alone = extract(weights, corpus, batch_size=5, workers=0)
    helped = extract(weights, corpus, batch_size=5, workers=2, cache=tmp_path / "other")
    assert np.array_equal(alone.X, helped.X)


def test_the_second_time_nothing_is_computed(weights, corpus, monkeypatch):
    first = extract(weights, corpus)

    def fail(*_args, **_kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr(features, "load_pretrained", fail)
    assert np.array_equal(extract(weights, corpus).X, first.X)
    with pytest.raises(AssertionError, match="loaded again"):
        extract(weights, corpus, avgpool=True)


def test_what_is_done_to_the_array_does_not_reach_the_store(weights, corpus):
    first = extract(weights, corpus)
    kept = first.X.copy()
    first.X[:] = 0
    assert np.array_equal(extract(weights, corpus).X, kept)


def test_other_weights_in_the_same_folder_are_other_features(weights, corpus, tmp_path):
    import shutil

    place = tmp_path / "weights"
    shutil.copytree(weights, place)
    first = extract(place, corpus)
    shutil.rmtree(place)
    torch.manual_seed(1)
    export_encoder(encoders.build(TINY, drop_path=False), TINY, place, meta={})
    assert not np.allclose(extract(place, corpus).X, first.X)


def test_a_damaged_entry_is_computed_again(weights, corpus, cache):
    first = extract(weights, corpus).X.copy()
    (array,) = cache.rglob("features.npy")
    array.write_bytes(array.read_bytes()[:100])
    assert np.array_equal(extract(weights, corpus).X, first)


def test_many_may_fill_one_entry(tmp_path):
    def one(_):
        return FeatureStore(tmp_path).get({"k": 1}, (5, 2), lambda out: out.__setitem__(slice(None), 7.0))

    with ThreadPoolExecutor(8) as pool:
        for array in pool.map(one, range(16)):
            assert (array == 7).all()
    assert len(list(tmp_path.iterdir())) == 1, "temporary folders are removed"


def test_a_failed_extraction_leaves_nothing(tmp_path):
    def fail(_):
        raise UserError("no")

    with pytest.raises(UserError):
        FeatureStore(tmp_path).get({"k": 1}, (5, 2), fail)
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_standardised_by_channel(corpus):
    found = extract("pixels", corpus)
    channels = found.X.reshape(24, 3, 32 * 32)
    np.testing.assert_allclose(channels.mean(axis=(0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(channels.std(axis=(0, 2)), 1, atol=1e-5)
    assert found.weights == "pixels"


def test_features_that_are_not_finite_are_refused(corpus, tmp_path):
    torch.manual_seed(0)
    encoder = encoders.build(TINY, drop_path=False)
    folder = export_encoder(encoder, TINY, tmp_path / "export", meta={})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features._Source, "embedder", lambda *_: lambda pixels: torch.full((len(pixels), 48), torch.nan))
        with pytest.raises(UserError, match="not finite"):
            extract(folder, corpus)


def test_a_damaged_shard_is_named(weights, corpus, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    (tar,) = (broken / "shards").glob("*.tar")
    data = bytearray(tar.read_bytes())
    sample = Corpus.open(corpus).sample(5).data
    at = data.index(sample)
    data[at : at + 64] = bytes(64)
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"sample 5 cannot be read .*corpus verify"):
        extract(weights, broken)


def test_what_cannot_be_opened_is_one_sentence(weights, corpus, tmp_path):
    for attempt, message in (
        (lambda: extract(tmp_path / "none", corpus), "no weights folder"),
        (lambda: extract(weights, tmp_path / "none"), "none"),
        (lambda: extract(weights, corpus, n_last_blocks=9), "3 blocks"),
        (lambda: extract(weights, corpus, precision="fp8"), "precision"),
        (lambda: extract(weights, corpus, device="quantum"), "no device"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_a_store_on_a_full_disk_says_so(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="make room"):
        FeatureStore(tmp_path).get({"k": 1}, (5, 2), lambda out: None)


def test_the_key_stands_beside_the_features(weights, corpus, cache):
    extract(weights, corpus)
    (key,) = cache.rglob("key.json")
    assert json.loads(key.read_text())["corpus"] == Corpus.open(corpus).id
