import shutil

import numpy as np
import pytest
from PIL import Image

from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.shards import Corpus, decode_image
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.order import auto_lanes
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, ViewSpec

PLAIN = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """90 PNGs, each of one colour, in chunks of 8 and several shards."""
    images = tmp_path_factory.mktemp("images")
    for i in range(90):
        Image.new("RGB", (8, 8), (i, 255 - i, 7)).save(images / f"{i}.png")
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    build([images], out, workers=1, chunk_samples=8, shard_bytes=32 * 1024)
    return Corpus.open(out)


def loader(corpus, **more):
    lanes = auto_lanes(30, len(corpus.chunks))
    mixture = Mixture([Part(corpus)], batch_size=30, lanes=lanes, window=2, seed=0)
    return StepLoader(mixture, Views(PLAIN, seed=0), **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_pixel_of_an_epoch_is_that_of_the_corpus(corpus, workers):
    seen = {}
    for (batch,) in loader(corpus, total_steps=12, workers=workers):
        for ordinal, crop in zip(batch["ordinal"].tolist(), batch["crop"][0].numpy(), strict=True):
            want = np.asarray(decode_image(corpus.sample(ordinal).data)).transpose(2, 0, 1)
            np.testing.assert_array_equal(crop, want)
            seen[ordinal] = int(crop[0, 0, 0])
    assert sorted(seen) == list(range(90))
    assert sorted(seen.values()) == list(range(90))


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus.path, tmp_path / "corpus")


def test_a_flipped_bit_costs_its_own_sample(corpus, copy):
    shard = sorted((copy / "shards").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[3] ^= 1  # in the name field of its first header
    shard.write_bytes(data)
    lost = corpus.manifest.shards[1].first
    steps = loader(Corpus.open(copy), total_steps=6, workers=1)
    shown = [b["ordinal"].tolist() for (b,) in steps]
    want = [b["ordinal"].tolist() for (b,) in loader(corpus, total_steps=6, workers=0)]
    changed = [(a, b) for x, y in zip(shown, want, strict=True) for a, b in zip(x, y, strict=True) if a != b]
    assert [b for _, b in changed] == [lost, lost]
    assert len(steps.quarantine) == 1


def test_a_shard_that_went_missing_ends_in_a_sentence(copy):
    opened = Corpus.open(copy)
    gone = sorted((copy / "shards").iterdir())[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"^[^\n]*{gone}[^\n]*: run selfsight corpus verify$"):
        list(loader(opened, total_steps=3, workers=1))
