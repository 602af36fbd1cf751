"""Corpora in memory for the tests of the stream; images, and torchvision's crops of them, for those of the views."""

import tarfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from selfsight.shards.corpus import CHUNK_DTYPE
from selfsight.stream import draw

IMAGENET = Path(__file__).parents[3] / "shared/corpora/imagenet-sample-320.tar"


class Images:
    """What the stream uses of a Corpus, in memory: images each like no other, 5 chunks to a shard."""

    path, is_far = "corpus", False

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


def _scene(height: int, width: int, seed: int) -> np.ndarray:
    """Something like a photograph: a soft light, hard edges of many colours, black and white areas, grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.stack([128 + 110 * np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + p) for p in range(3)], axis=-1)
    for _ in range(14):
        a, b, r = rng.random(3)
        image[(y - a) ** 2 + (x - b) ** 2 < (r / 4) ** 2] = rng.choice([0, 255, *rng.integers(0, 256, 6)], 3)
    image += rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def scenes() -> list[np.ndarray]:
    return [_scene(375, 500, 0), _scene(500, 333, 1), _scene(64, 64, 2), _scene(300, 200, 3)]


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    if not IMAGENET.exists():
        pytest.skip(f"no {IMAGENET}: the sample of ImageNet lies beside the checkout in some places only")
    with tarfile.open(IMAGENET) as tar:
        files = [tar.extractfile(m).read() for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]  # pyright: ignore
    return files[::20]


def _torchvision_crop(
    image: np.ndarray, row: np.ndarray, size: int, taps: int = 13, interpolation: str = "bicubic"
) -> np.ndarray:
    """The crop of these parameters by torchvision.transforms.v2.functional on float tensors: float, levels 0–255.

    Clamped after bicubic resampling, which overshoots, as the 8-bit functions are.
    """
    left, top, width, height = (int(v) for v in row[draw.LEFT : draw.HEIGHT + 1])
    x = torch.from_numpy(image).permute(2, 0, 1).double() / 255
    how = functional.InterpolationMode(interpolation)
    x = functional.resized_crop(x, top, left, height, width, [size, size], interpolation=how, antialias=True)
    x = x.clamp(0, 1)
    if row[draw.FLIP]:
        x = functional.horizontal_flip(x)
    for op in row[draw.ORDER : draw.ORDER + 4].astype(int):
        if op >= 0:
            name = ("brightness", "contrast", "saturation", "hue")[op]
            x = getattr(functional, f"adjust_{name}")(x, float(row[draw.FACTORS + op]))
    if row[draw.GRAYSCALE]:
        x = functional.rgb_to_grayscale(x, num_output_channels=3)
    if row[draw.SIGMA]:
        x = functional.gaussian_blur(x, [taps, taps], [float(row[draw.SIGMA])] * 2)
    if row[draw.SOLARIZE]:
        x = functional.solarize(x, 0.5)
    return 255 * x.numpy()


@pytest.fixture(scope="session")
def torchvision_crop():
    return _torchvision_crop
