"""What an image becomes: the crops and noise of a `ViewSpec`, made here on a CPU, or staged for an accelerator to make.

Every random number is a function of (seed, entry of the spec, sample ordinal, visit) through a counter-based generator,
so the pixels do not depend on which process or thread made them, in which order, or on the other entries of the spec.
`selfsight.stream.draw` chooses the parameters of the crops; `selfsight.stream.pixels` applies them on a CPU,
`selfsight.stream.device` on batches of `stage`d images. Both start from the pixels that `decode` returns; those of
JPEGs that `decode_later` leaves encoded are made by `selfsight.stream.device_decode`.
"""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from selfsight.shards.decode import baseline_size, decode_pixels, scaled_size
from selfsight.stream import draw, pixels
from selfsight.viewspec import ViewSpec

CANVAS, EXTENT = "canvas", "extent"  # the staged pixels of a batch, and how much of each canvas an image covers
ENCODED = "encoded"  # how many bytes of a JPEG lie on each canvas where its pixels would, or 0
FULL_SIZE = 4  # longer side of the largest JPEG that a device decodes, in canvases: it knows no smaller scales
Shapes = dict[str, tuple[tuple[int, ...], type]]


class Jpeg(NamedTuple):
    """An image for the device to decode."""

    data: bytes
    shape: tuple[int, int]  # height and width of what `Views.decode` would have returned


class Views:
    """Makes the views of a spec: `decode` the bytes of an image, then `into` (or `stage`).

    `canvas` bounds the longer side of what `decode` returns. By default it is just large enough that a 4:3 image has no
    crop of mean aspect enlarged which the file could have filled. A `decode` of one's own turns the bytes of a file
    into an 8-bit RGB image, or raises ValueError; what it returns is shrunk to the canvas, too.

    All methods may be called by many threads at once; the first call ever on a machine compiles for some seconds.
    Raises ValueError for a spec that contradicts itself: that is a mistake in an objective.
    """

    def __init__(
        self,
        spec: ViewSpec,
        *,
        seed: int,
        decode: Callable[[bytes], object] | None = None,
        canvas: int | None = None,
    ) -> None:
        self.spec, self.seed, self._read = spec, seed, decode
        names = [entry.name for entry in (*spec.crops, *spec.noise)]
        reserved = {"part", "ordinal", CANVAS, EXTENT, ENCODED}
        if len(set(names)) < len(names) or reserved & set(names):
            raise ValueError(f"the names of views must differ, and none may be one of {sorted(reserved)}: {names}")
        for crop in spec.crops:
            for key in ("blur", "solarize"):
                if len(getattr(crop, key)) not in (0, crop.count):
                    raise ValueError(f"view {crop.name}: {key} needs one probability for each of {crop.count} crops")
        # The shorter side that the smallest crop of a square image needs, to be resized by a factor of 1.
        self.short_side = max((math.ceil(c.size / math.sqrt(c.scale[0])) for c in spec.crops), default=1)
        self.canvas = canvas or math.ceil(self.short_side * math.sqrt(4 / 3) / 64) * 64
        likes = {crop.name: crop.like for crop in spec.crops if crop.like}
        if strangers := set(likes.values()) - set(names):
            raise ValueError(f"views are to be like {strangers.pop()}, and there is none of that name")
        self._streams = {name: _stream_key(seed, likes.get(name, name)) for name in names}
        self._rules = {c.name: draw.rules(c) for c in spec.crops}

    def decode(self, data: bytes) -> np.ndarray:
        """The pixels that crops are cut from, uint8 (H, W, 3): large JPEGs at a half, a quarter or an eighth of their
        size where that is enough, then shrunk to the canvas where the longer side exceeds it. Raises ValueError."""
        image = decode_pixels(data, self.short_side) if self._read is None else _plain(self._read(data))
        size = self._bounded(*image.shape[:2])
        if size == image.shape[:2]:
            return image
        small = np.empty((*size, 3), np.uint8)
        pixels.shrink(image, small)
        return small

    def decode_later(self, data: bytes) -> Jpeg | np.ndarray:
        """What `decode` returns, or the bytes where a device can be left to decode them: a JPEG that reads alike
        everywhere, needs no more room than the canvas has, and is no longer than `FULL_SIZE` canvases.

        Of the latter the header is all that is looked at here. Raises ValueError.
        """
        size = baseline_size(data) if self._read is None and len(data) <= 3 * self.canvas**2 else None
        if size is None or max(size) > FULL_SIZE * self.canvas:
            return self.decode(data)
        return Jpeg(data, self._bounded(*scaled_size(*size, self.short_side)))

    def _bounded(self, height: int, width: int) -> tuple[int, int]:
        """A height and width in the same proportion that the canvas holds."""
        if max(height, width) <= self.canvas:
            return height, width
        factor = self.canvas / max(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def shapes(self, batch: int) -> Shapes:
        """What `batch` images become: crops uint8 (count, batch, 3, size, size), noise float32 (batch, length)."""
        crops: Shapes = {c.name: ((c.count, batch, 3, c.size, c.size), np.uint8) for c in self.spec.crops}
        return crops | self._noise_shapes(batch)

    def into(self, image: np.ndarray, ordinal: int, visit: int, out: dict[str, np.ndarray], i: int) -> None:
        """Writes the views of pixels (H, W, 3) to place `i` of contiguous arrays of these `shapes`."""
        image = _plain(image)
        for spec in self.spec.crops:
            rows = np.empty((spec.count, draw.COLUMNS), np.float32)
            self._draw(spec.name, image, ordinal, visit, rows)
            pixels.render(image, rows, spec.blur_taps, spec.interpolation == "bilinear", out[spec.name], i)
        self._noise(ordinal, visit, out, i)

    def staging_shapes(self, batch: int, *, encoded: bool = False) -> Shapes:
        """What travels to a device that makes the crops itself, for `batch` images.

        "canvas" uint8 (batch, S, S, 3), zeros beyond the image; "extent" int32 (batch, 2), its height and width; for
        each entry of crops float32 (batch, count, draw.COLUMNS), their parameters; noise float32 (batch, length).
        Where images may come `encoded`, "encoded" int32 (batch,), how many bytes of a canvas are a JPEG, or 0; what
        lies behind them is undefined.
        """
        side = self.canvas
        crops: Shapes = {c.name: ((batch, c.count, draw.COLUMNS), np.float32) for c in self.spec.crops}
        staged: Shapes = {CANVAS: ((batch, side, side, 3), np.uint8), EXTENT: ((batch, 2), np.int32)}
        if encoded:
            staged[ENCODED] = (batch,), np.int32
        return staged | crops | self._noise_shapes(batch)

    def stage(self, image: np.ndarray | Jpeg, ordinal: int, visit: int, out: dict[str, np.ndarray], i: int) -> None:
        """Writes what `decode` or `decode_later` returned, and what is to become of it, to place `i` of
        `staging_shapes`: `encoded` ones for the latter."""
        height, width = image.shape[:2]
        canvas = out[CANVAS][i]
        if isinstance(image, Jpeg):
            canvas.reshape(-1)[: len(image.data)] = np.frombuffer(image.data, np.uint8)
        else:
            canvas[:height, :width] = image
            canvas[:height, width:] = 0
            canvas[height:] = 0
        if ENCODED in out:
            out[ENCODED][i] = len(image.data) if isinstance(image, Jpeg) else 0
        out[EXTENT][i] = height, width
        for spec in self.spec.crops:
            self._draw(spec.name, image, ordinal, visit, out[spec.name][i])
        self._noise(ordinal, visit, out, i)

    def __call__(self, image: np.ndarray, ordinal: int, visit: int) -> dict[str, np.ndarray]:
        """The views of one image: crops uint8 (count, 3, size, size), noise float32 (length,)."""
        out = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.shapes(1).items()}
        self.into(image, ordinal, visit, out, 0)
        return {c.name: out[c.name][:, 0] for c in self.spec.crops} | {n.name: out[n.name][0] for n in self.spec.noise}

    def _noise_shapes(self, batch: int) -> Shapes:
        return {n.name: ((batch, n.length), np.float32) for n in self.spec.noise}

    def _draw(self, name: str, image: np.ndarray | Jpeg, ordinal: int, visit: int, rows: np.ndarray) -> None:
        height, width = image.shape[:2]
        draw.draw_crops(self._rules[name], self._streams[name], int(ordinal), int(visit), width, height, rows)

    def _noise(self, ordinal: int, visit: int, out: dict[str, np.ndarray], i: int) -> None:
        for noise in self.spec.noise:
            draw.uniform(self._streams[noise.name], int(ordinal), int(visit), out[noise.name][i])


def _plain(image: object) -> np.ndarray:
    """Pixels as the compiled loops are compiled for: writable, contiguous; copied only where they are not."""
    return np.require(image, np.uint8, ["C", "W"])


def _stream_key(seed: int, name: str) -> np.ndarray:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.array([seed % 2**64, int.from_bytes(digest, "little")], dtype=np.uint64)
