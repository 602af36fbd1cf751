from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from selfsight.shards.corpus import CHUNK_DTYPE


class Images:
    """What the stream uses of a Corpus, in memory: images each like no other, 5 chunks to a shard."""

    path = "corpus"

    def __init__(self, sizes=(4, 4, 4, 4, 4) * 4, bad=(), name="0" * 64):
        self.chunks = np.zeros(len(sizes), dtype=CHUNK_DTYPE)
        self.chunks["n"], self.chunks["first"] = sizes, np.cumsum(sizes) - sizes
        self.n, self.bad, self.id = sum(sizes), bad, name

    def sample(self, ordinal):
        if ordinal in self.bad:
            return SimpleNamespace(data=b"no image")
        pixels = np.random.default_rng(ordinal).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file := BytesIO(), "PNG")
        return SimpleNamespace(data=file.getvalue())

    def whereabouts(self, ordinal):
        return f"{ordinal:012d} in corpus/shards/000000.tar"


@pytest.fixture(scope="session")
def images():
    return Images
