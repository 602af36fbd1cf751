"""Benches whose encoder knows the answer, or knows nothing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from PIL import Image
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.subject import Subject
from selfsight.corpus import build
from selfsight.encoders import Tokens
from selfsight.weights.preprocess import EvalTransform, settings

PATCH = 8
SIZE = 96


class Constructed:
    """An encoder whose tokens are `code` of uint8-like images (B, 3, H, W) in 0–1."""

    patch_size, img_size = PATCH, SIZE

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        self.code = code
        self.preprocess = EvalTransform({**settings(SIZE), "mean": [0, 0, 0], "std": [1, 1, 1]})

    def __call__(self, images: Tensor) -> Tokens:
        patches = self.code(images)
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        return Tokens(None, patches[:, :0], patches, grid)


def position_code(images: Tensor) -> Tensor:
    """Of pictures whose red and green are x and y where blue is 1: the place that a patch shows, as a direction."""
    means = reduce(images, "b c (h p) (w q) -> b (h w) c", "mean", p=PATCH, q=PATCH)
    r, g, b = means.unbind(-1)
    return torch.stack([r - b / 2, g - b / 2, 8 * b], dim=-1)


def constant_code(images: Tensor) -> Tensor:
    return torch.ones(len(images), images.shape[2] * images.shape[3] // PATCH**2, 16)


def random_code(images: Tensor) -> Tensor:
    n = images.shape[2] * images.shape[3] // PATCH**2
    seed = int(images.double().sum() * 1000) % 2**31
    return torch.randn(len(images), n, 32, generator=torch.Generator().manual_seed(seed))


def pixel_code(images: Tensor) -> Tensor:
    """The patch itself, its mean taken off."""
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)
    return patches - patches.mean(dim=-1, keepdim=True)


def positions(height: int, width: int) -> np.ndarray:
    """A picture, uint8, that `position_code` reads: red grows with x and green with y."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return np.round(255 * np.stack([x, y, np.ones_like(x)], axis=-1)).astype(np.uint8)


@pytest.fixture(scope="session")
def codes() -> SimpleNamespace:
    """What the encoders made for tests can be, and the patch size and side that they have."""
    return SimpleNamespace(
        position=position_code,
        constant=constant_code,
        random=random_code,
        pixels=pixel_code,
        patch=PATCH,
        size=SIZE,
        picture=positions,
    )


@pytest.fixture(scope="session")
def ramps(tmp_path_factory) -> Path:
    """A corpus of pictures of positions, told apart by a pixel."""
    root = tmp_path_factory.mktemp("ramps")
    (root / "images").mkdir()
    for i in range(24):
        picture = positions(SIZE, SIZE)
        picture[0, 0, 2] -= i
        Image.fromarray(picture).save(root / "images" / f"{i}.png")
    build([root / "images"], root / "corpus")
    return root / "corpus"


@pytest.fixture
def bench_of() -> Callable[..., Bench]:
    """`bench_of(code, test=CORPUS)`: a bench with an encoder made for the test."""

    def make(code: Callable[[Tensor], Tensor], **given) -> Bench:
        bench = Bench(Subject("made", code.__name__, {}, {}, 3), how=How(batch_size=16, device="cpu"), **given)
        bench.__dict__["encoder"] = Constructed(code)  # where cached_property keeps it
        return bench

    return make
