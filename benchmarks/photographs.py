"""The images that all rivals read: a folder of JPEGs and a corpus built from it, as many as a measurement needs."""

import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.corpus import build
from selfsight.errors import UserError

SYNTHETIC = 64  # distinct photographs
CLASSES = 8
MOST = 2048  # distinct images taken from what the user names


def prepare(source: Path | None, work: Path, n: int, shards: int) -> tuple[Path, Path]:
    """`n` JPEG files in work/images/CLASS/ and the corpus work/corpus of about `shards` shards.

    They come from a tar or folder, or are drawn, and are repeated in turn where there are fewer than `n`. Raises
    UserError where the source holds no JPEG.
    """
    distinct = list(islice(jpegs(source), min(n, MOST)) if source else synthetic(min(n, SYNTHETIC)))
    if not distinct:
        raise UserError(f"no JPEG photographs in {source}: give a folder or a tar of them, or leave --images out")
    images = work / "images"
    for i in range(CLASSES):
        (images / f"class{i}").mkdir(parents=True)
    size = 0
    for i, data in enumerate(islice(cycle(distinct), n)):
        (images / f"class{i % CLASSES}" / f"{i:06d}.jpg").write_bytes(data)
        size += len(data) + 2048  # with its tar headers and its label
    build([images], work / "corpus", shard_bytes=size // shards + 1)
    return images, work / "corpus"


def jpegs(source: Path) -> Iterator[bytes]:
    """The files of a folder or tar that are grey or RGB JPEGs, by name."""
    if source.is_dir():
        files = (p.read_bytes() for p in sorted(source.rglob("*")) if p.is_file())
    elif source.is_file() and tarfile.is_tarfile(source):
        files = _members(source)
    else:
        raise UserError(f"{source} is neither a folder nor a tar: give --images one of the two")
    for data in files:
        if data[:3] == b"\xff\xd8\xff" and Image.open(BytesIO(data)).mode in ("L", "RGB"):
            yield data


def _members(path: Path) -> Iterator[bytes]:
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                file = tar.extractfile(member)
                assert file
                yield file.read()


def synthetic(n: int, width: int = 500, height: int = 375, seed: int = 0) -> Iterator[bytes]:
    """Noise whose amplitude falls with its frequency, as in photographs: about 100 kB, ImageNet's average."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
        for octave in range(2, 10):
            cells = rng.integers(0, 256, (height * 2**octave // 512 + 2, width * 2**octave // 512 + 2, 3), np.uint8)
            layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, dtype=np.float32) - 128) * 0.8**octave * 1.5
        file = BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        yield file.getvalue()
