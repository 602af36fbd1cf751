"""What an image becomes: the crops and noise of a `ViewSpec`, as uint8 and float32 arrays.

Every random number is a function of (seed, entry of the spec, sample ordinal, visit) through a counter-based generator,
so the pixels do not depend on which process made them, in which order, or on the other entries of the spec. `draw`
chooses the parameters of a crop, `render` applies them: DINO's and MAE's transforms, as torchvision defines them.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from selfsight.stream import photometric
from selfsight.viewspec import CropSpec, ViewSpec

_TRIES = 10  # of RandomResizedCrop, before it falls back to the centre
_DRAWS = 64  # uniform numbers set aside for each crop: 4 per try, 11 for the rest, the remainder for what may come
_ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True, slots=True)
class Crop:
    """The parameters of one crop. None, or an empty order, leaves a step out."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the source
    size: int  # pixels, square
    flip: bool
    jitter_order: tuple[int, ...]
    jitter_factors: tuple[float, float, float, float]  # brightness, contrast, saturation, hue
    grayscale: bool
    blur_radius: float | None
    solarize: bool


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def draw_box(
    u: list[float], width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The box of torchvision's RandomResizedCrop.get_params, from 40 uniform numbers: (left, top, right, bottom)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for i in range(0, 4 * _TRIES, 4):
        area = width * height * _between(*scale, u[i])
        aspect = math.exp(_between(low, high, u[i + 1]))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[i + 2] * (height - h + 1)), int(u[i + 3] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw(spec: CropSpec, k: int, u: list[float], width: int, height: int) -> Crop:
    """The parameters of crop `k` of `spec` for an image of width × height pixels, from 64 uniform numbers in [0, 1)."""
    flip, jitter, brightness, contrast, saturation, hue, order, grey, blur, radius, solar = u[4 * _TRIES :][:11]
    strengths = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    factors = (
        _between(max(0.0, 1 - spec.brightness), 1 + spec.brightness, brightness),
        _between(max(0.0, 1 - spec.contrast), 1 + spec.contrast, contrast),
        _between(max(0.0, 1 - spec.saturation), 1 + spec.saturation, saturation),
        _between(-spec.hue, spec.hue, hue),
    )
    active = tuple(op for op in _ORDERS[int(order * 24)] if strengths[op] > 0) if jitter < spec.jitter else ()
    return Crop(
        box=draw_box(u, width, height, spec.scale, spec.ratio),
        size=spec.size,
        flip=flip < spec.flip,
        jitter_order=active,
        jitter_factors=factors,
        grayscale=grey < spec.grayscale,
        blur_radius=_between(*spec.blur_radius, radius) if spec.blur and blur < spec.blur[k] else None,
        solarize=bool(spec.solarize) and solar < spec.solarize[k],
    )


def render(image: Image.Image, crop: Crop, out: np.ndarray) -> None:
    """Writes the crop of an RGB image into `out` (3, size, size), uint8.

    Cuts before it resizes, so that no pixel outside the box leaks in; bicubic with antialiasing as in DINO and MAE.
    """
    view = image.crop(crop.box).resize((crop.size, crop.size), Image.Resampling.BICUBIC)
    if crop.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    view = photometric.jitter(view, crop.jitter_factors, crop.jitter_order)
    if crop.grayscale:
        view = view.convert("L")  # one channel through the blur, three in `out`
    if crop.blur_radius is not None:
        view = photometric.gaussian_blur(view, crop.blur_radius)
    pixels = np.frombuffer(view.tobytes(), dtype=np.uint8).reshape(crop.size, crop.size, -1).transpose(2, 0, 1)
    out[:] = photometric.solarize(pixels) if crop.solarize else pixels


class Views:
    """Makes the views of a spec: `views(image, ordinal, visit)`.

    `decode` turns the bytes of an image file into an 8-bit RGB PIL image or raises ValueError; it is here, with the
    views, because how finely an image has to be decoded depends on what becomes of it.

    Raises ValueError for a spec that contradicts itself: that is a mistake in an objective.
    """

    def __init__(self, spec: ViewSpec, *, seed: int, decode: Callable[[bytes], Image.Image]) -> None:
        self.spec, self.seed, self.decode = spec, seed, decode
        names = [entry.name for entry in (*spec.crops, *spec.noise)]
        if len(set(names)) < len(names) or "ordinal" in names:
            raise ValueError(f"the names of views must differ, and none may be 'ordinal': {names}")
        for crop in spec.crops:
            for key in ("blur", "solarize"):
                if len(getattr(crop, key)) not in (0, crop.count):
                    raise ValueError(f"view {crop.name}: {key} needs one probability for each of {crop.count} crops")
        self._streams = {name: _stream_key(seed, name) for name in names}

    def shapes(self, batch: int) -> dict[str, tuple[tuple[int, ...], type]]:
        """What `batch` images become: crops uint8 (count, batch, 3, size, size), noise float32 (batch, length)."""
        crops = {c.name: ((c.count, batch, 3, c.size, c.size), np.uint8) for c in self.spec.crops}
        return crops | {n.name: ((batch, n.length), np.float32) for n in self.spec.noise}

    def into(self, image: Image.Image, ordinal: int, visit: int, out: dict[str, np.ndarray], i: int) -> None:
        """Writes the views of an RGB image to place `i` of arrays of these `shapes`."""
        for spec in self.spec.crops:
            # One row per crop: a further crop of this entry leaves the rows before it as they are.
            rows = self._generator(spec.name, ordinal, visit).random((spec.count, _DRAWS)).tolist()
            for k, u in enumerate(rows):
                render(image, draw(spec, k, u, image.width, image.height), out[spec.name][k, i])
        for noise in self.spec.noise:
            self._generator(noise.name, ordinal, visit).random(dtype=np.float32, out=out[noise.name][i])

    def __call__(self, image: Image.Image, ordinal: int, visit: int) -> dict[str, np.ndarray]:
        """The views of one image: crops uint8 (count, 3, size, size), noise float32 (length,)."""
        out = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.shapes(1).items()}
        self.into(image, ordinal, visit, out, 0)
        return {c.name: out[c.name][:, 0] for c in self.spec.crops} | {n.name: out[n.name][0] for n in self.spec.noise}

    def _generator(self, name: str, ordinal: int, visit: int) -> np.random.Generator:
        # The counter advances in its first word: 2^64 blocks for each sample and visit.
        counter = np.array([0, 0, ordinal, visit], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self._streams[name], counter=counter))


def _stream_key(seed: int, name: str) -> np.ndarray:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.array([seed % 2**64, int.from_bytes(digest, "little")], dtype=np.uint64)
