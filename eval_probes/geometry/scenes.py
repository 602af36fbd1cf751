"""Views of a scene: a folder of images, with a matrix in a file for the pairs whose geometry is known.

`F_a_b.txt` holds the fundamental matrix of the images a and b, named by their stems: nine numbers, row by row, for
points in pixels of the files, with (0, 0) at the centre of the first pixel as in OpenCV and most data sets.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.shards.decode import EXTENSIONS, DecodeError, decode_image

IMAGES = {f".{e}" for e in EXTENSIONS.values()} | {".jpeg", ".tiff", ".pgm"}


@dataclass(frozen=True)
class Scene:
    """The views in `path`, by name."""

    path: Path
    views: dict[str, Path]  # stem → file

    @classmethod
    def open(cls, path: str | Path) -> "Scene":
        """Raises UserError for a folder without two images, or with two of one name."""
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"there is no folder {path}: --scene wants a folder of images")
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES)
        views = {p.stem: p for p in files}
        if len(views) < len(files):
            raise UserError(f"{path} has two images of one name: give each its own")
        if len(views) < 2:
            raise UserError(f"{path} has {len(views)} images: a scene wants two views of it, or more")
        return cls(path, views)

    @cached_property
    def id(self) -> str:
        """sha256 of the names and bytes of all views and matrices."""
        files = sorted([*self.views.values(), *self.path.glob("F_*_*.txt")])
        return hashlib.sha256("".join(f"{p.name} {sha256_of(p)}\n" for p in files).encode()).hexdigest()

    def image(self, name: str) -> Image.Image:
        try:
            return decode_image(self.views[name].read_bytes())
        except (DecodeError, OSError) as e:
            raise UserError(f"{self.views[name]} cannot be read: {' '.join(str(e).split())}") from e

    def pairs(self, apart: int) -> Iterator[tuple[str, str]]:
        """Views that follow each other in the order of names, up to `apart` places."""
        names = list(self.views)
        for i, first in enumerate(names):
            for second in names[i + 1 : i + 1 + apart]:
                yield first, second

    def matrix(self, first: str, second: str) -> np.ndarray | None:
        """F of two views for points whose first pixel has its centre at a half; None where nobody knows it."""
        path = self.path / f"F_{first}_{second}.txt"
        if not path.is_file():
            return None
        try:
            F = np.loadtxt(path, dtype=np.float64).reshape(3, 3)
        except (ValueError, UnicodeDecodeError) as e:
            raise UserError(f"{path} should hold a matrix: nine numbers, row by row") from e
        if not np.isfinite(F).all() or not F.any():
            raise UserError(f"{path} holds no fundamental matrix: its numbers must be finite and not all zero")
        to_theirs = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
        return to_theirs.T @ F @ to_theirs


def fitted(image: Image.Image, shorter: int, patch: int) -> tuple[Image.Image, np.ndarray]:
    """The picture with a shorter side of about `shorter` pixels and both sides multiples of `patch`, and by what its
    points were multiplied, (2,): along x and y each exactly, as the whole picture is kept."""
    factor = shorter / min(image.size)
    size = [max(1, round(side * factor / patch)) * patch for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC), np.array(size) / np.array(image.size)
