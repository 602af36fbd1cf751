"""Features are those of the encoder, extracted once, and never those of something else."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes import extraction
from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.features import Collapsed, Features, check_corpora
from eval_probes.pooling import Pooling
from eval_probes.subject import Subject
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


def extract(weights, corpus, *pooling, resize: int | None = None, **how) -> Features:
    return extraction.extract(Subject.open(weights), Corpus.open(corpus), Pooling(*pooling), How(**how), resize=resize)


def test_features_are_those_of_the_encoder(weights, corpus):
    oldest, last = by_hand(weights, corpus)
    found = extract(weights, corpus, batch_size=7)
    assert found.X.dtype == np.float32
    assert found.y is not None
    assert found.y.tolist() == Corpus.open(corpus).labels().tolist()
    assert (found.subject.digest, found.corpus_id) == (load_pretrained(weights).digest, Corpus.open(corpus).id)
    assert found.subject.meta["step"] == 3
    np.testing.assert_allclose(found.X, last.cls, atol=1e-5)
    both = extract(weights, corpus, 2, True)
    np.testing.assert_allclose(both.X, torch.cat([oldest.cls, last.cls, last.avg], dim=1), atol=1e-5)
    mean = extract(weights, corpus, 0, True)
    np.testing.assert_allclose(mean.X, last.avg, atol=1e-5)
    half = extract(weights, corpus, dtype="float16")
    assert half.X.dtype == np.float16
    np.testing.assert_allclose(half.tensor(), last.cls, atol=5e-3)


def test_threads_change_nothing(weights, corpus, tmp_path):
    alone = extract(weights, corpus, batch_size=5, workers=1)
    helped = extract(weights, corpus, batch_size=5, workers=4, cache=str(tmp_path / "other"))
    assert np.array_equal(alone.X, helped.X)


def test_the_second_time_nothing_is_computed_and_wider_features_serve_narrower_ones(weights, corpus, monkeypatch):
    _, last = by_hand(weights, corpus)
    extract(weights, corpus, 2, True)
    monkeypatch.setattr(Subject, "load", lambda *_: pytest.fail("loaded again"))
    np.testing.assert_allclose(extract(weights, corpus).X, last.cls, atol=1e-5)
    np.testing.assert_allclose(extract(weights, corpus, 0, True).X, last.avg, atol=1e-5)
    interleaved = torch.stack([last.cls, last.avg], dim=2).flatten(1)
    np.testing.assert_allclose(extract(weights, corpus, 1, True, True).X, interleaved, atol=1e-5)
    with pytest.raises(pytest.fail.Exception, match="loaded again"):
        extract(weights, corpus, 3)


def test_another_preprocessing_is_another_entry(weights, corpus):
    assert not np.array_equal(extract(weights, corpus).X, extract(weights, corpus, resize=40).X)
    with pytest.raises(UserError, match="smaller than the crop"):
        extract(weights, corpus, resize=16)


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


def test_pixels_are_standardised_by_channel(corpus):
    found = extract("pixels", corpus)
    channels = found.X.reshape(24, 3, 32 * 32)
    np.testing.assert_allclose(channels.mean(axis=(0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(channels.std(axis=(0, 2)), 1, atol=1e-5)
    assert found.subject.name == "pixels"


def test_features_that_are_not_finite_or_all_alike_are_refused(weights, corpus, monkeypatch):
    def answers(value: float):
        return lambda *_: lambda pixels: torch.full((len(pixels), 48), value)

    monkeypatch.setattr(extraction, "_embedder", answers(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        extract(weights, corpus)
    monkeypatch.setattr(extraction, "_embedder", answers(1e30))
    with pytest.raises(UserError, match="do not fit float16"):
        extract(weights, corpus, dtype="float16")
    monkeypatch.setattr(extraction, "_embedder", answers(3.0))
    with pytest.raises(Collapsed, match="collapsed"):
        extract(weights, corpus)


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
        (lambda: extract(weights, corpus, 9), "3 blocks"),
        (lambda: extract(weights, corpus, precision="fp8"), "precision"),
        (lambda: extract(weights, corpus, device="quantum"), "no device"),
        (lambda: Bench.open("pixels").encoder, "raw pixels have no encoder"),
        (lambda: Bench.open(weights).labelled(), "needs a train corpus"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_test_images_among_the_training_images_are_found(corpus, tmp_path, capsys):
    some = tmp_path / "some"
    for i in range(3):
        (some / f"class{i}").mkdir(parents=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(some / f"class{i}" / "new.png")
    build([some], tmp_path / "apart")
    for i in range(3):
        sample = Corpus.open(corpus).sample(i)
        (some / f"class{sample.label}" / f"copy{i}.png").write_bytes(sample.data)
    build([some], tmp_path / "mixed")
    for path in some.rglob("new.png"):
        path.unlink()
    build([some], tmp_path / "inside") if len({p.parent for p in some.rglob("*.png")}) == 3 else None
    train = Corpus.open(corpus)
    assert check_corpora(train, Corpus.open(tmp_path / "apart")) == 0
    assert check_corpora(train, Corpus.open(tmp_path / "mixed")) == 0.5
    bench = Bench.open("pixels", corpus, tmp_path / "mixed")
    bench.labelled()
    bench.labelled()
    assert capsys.readouterr().err.count("50.0% of the images") == 1
    if (tmp_path / "inside").exists():
        with pytest.raises(UserError, match="held out"):
            check_corpora(train, Corpus.open(tmp_path / "inside"))


def test_the_key_stands_beside_the_features(weights, corpus, cache):
    extract(weights, corpus)
    (key,) = cache.rglob("key.json")
    assert json.loads(key.read_text())["corpus"] == Corpus.open(corpus).id
