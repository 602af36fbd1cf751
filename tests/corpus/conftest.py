import io

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (24, 16), kind: str = "PNG", mode: str = "RGB", **save) -> bytes:
    """The file of a random image, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, kind, **save)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 images in two class folders."""
    folder = tmp_path / "photos"
    for seed in range(40):
        path = folder / ("cat" if seed % 2 else "dog") / f"{seed:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    return folder


@pytest.fixture
def make_picture():
    return picture
