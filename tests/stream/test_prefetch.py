import threading

import numpy as np
import pytest

from selfsight.errors import UserError
from selfsight.shards import Unreachable
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, ViewSpec

SPEC = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0)),))


@pytest.fixture
def far(images):
    """A corpus somewhere else, which notes what is fetched and read."""

    class Far(images):
        is_far = True

        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.log, self.lock = [], threading.Lock()

        def prefetch(self, chunk):
            with self.lock:
                self.log.append(("fetched", chunk))

        def sample(self, ordinal):
            with self.lock:
                self.log.append(("read", int(np.searchsorted(self.chunks["first"], ordinal, side="right")) - 1))
            return super().sample(ordinal)

    return Far


def test_chunks_come_before_they_are_read(far):
    corpus = far([8] * 60)
    mixture = Mixture([Part(corpus)], batch_size=8, lanes=4, window=3, seed=0)
    steps = iter(StepLoader(mixture, Views(SPEC, seed=0), total_steps=60, workers=1))
    for _ in range(60):
        next(steps)
    steps.close()
    first = {}
    for i, (what, chunk) in enumerate(corpus.log):
        first.setdefault((what, chunk), i)
    read = [chunk for what, chunk in first if what == "read"]
    assert len(read) == 60
    early = [c for c in read if first.get(("fetched", c), 10**9) < first["read", c]]
    assert len(early) >= 60 - 4 * 3  # all but the windows that the run begins with
    assert len([x for x in corpus.log if x[0] == "fetched"]) <= 60 + 4 * 3 * 2


def test_the_chunks_in_hand_are_those_of_the_batch(images):
    corpus = images([5] * 40)
    parts = [Part(corpus), Part(images([4] * 30, name="1" * 64))]
    mixture = Mixture(parts, batch_size=8, lanes=4, window=3, seed=0)
    for t in (0, 17, 400):
        slots, inhand = mixture.step(t, 2, 6), mixture.chunks(t, 2, 6)
        for part, ordinal in zip(slots.part.tolist(), slots.ordinal.tolist(), strict=True):
            chunk = int(np.searchsorted(parts[part].corpus.chunks["first"], ordinal, side="right")) - 1
            assert (part, chunk) in inhand


def test_storage_that_is_gone_ends_in_a_sentence(far, monkeypatch):
    def gone(self, ordinal):
        raise Unreachable(5, "nothing came in 6 tries (TimeoutError)", "s3://bucket/shards/000000.tar")

    monkeypatch.setattr(far, "sample", gone)
    mixture = Mixture([Part(far())], batch_size=8, lanes=4, window=3, seed=0)
    loader = StepLoader(mixture, Views(SPEC, seed=0), total_steps=2, workers=1)
    with pytest.raises(UserError, match=r"nothing came in 6 tries.*s3://bucket.*give the same command again$"):
        list(loader)
    assert len(loader.quarantine) == 0


def test_storage_that_goes_while_a_stand_in_is_sought_says_nothing_against_the_images(far, monkeypatch):
    read = []

    def sample(self, ordinal):
        read.append(ordinal)
        if len(read) == 1:
            raise ValueError("the image is not what was stored")
        raise Unreachable(5, "nothing came in 6 tries (TimeoutError)", "s3://bucket/shards/000000.tar")

    monkeypatch.setattr(far, "sample", sample)
    mixture = Mixture([Part(far())], batch_size=8, lanes=4, window=3, seed=0)
    loader = StepLoader(mixture, Views(SPEC, seed=0), total_steps=2, workers=0)
    with pytest.raises(UserError, match=r"nothing came in 6 tries.*give the same command again$"):
        list(loader)
    assert (len(read), len(loader.quarantine)) == (2, 0)
