"""The three jobs that every rival does, described twice: as our `ViewSpec` and as the papers' torchvision transform.

DINO's multi-crop (facebookresearch/dino, main_dino.py: DataAugmentationDINO and its defaults), MAE's single crop
(facebookresearch/mae, main_pretrain.py), and the plain resize and centre crop of an evaluation.
"""

import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from selfsight.viewspec import MEAN, STD, CropSpec, ViewSpec

JOBS = {"dino": "DINO multi-crop, 2×224 + 8×96", "mae": "MAE crop, 224", "resize": "decode and resize, 256 → 224"}
Transform = Callable[[Image.Image], Any]

COLOUR: dict[str, Any] = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
}
EIGHTHS = (224 / 256) ** 2  # of the area: what the centre crop leaves of a square
SPECS = {
    "dino": ViewSpec(
        (
            CropSpec("global", 2, 224, (0.4, 1.0), blur=(1.0, 0.1), solarize=(0.0, 0.2), **COLOUR),
            CropSpec("local", 8, 96, (0.05, 0.4), blur=(0.5,) * 8, **COLOUR),
        )
    ),
    "mae": ViewSpec((CropSpec("crop", 1, 224, (0.2, 1.0)),)),
    "resize": ViewSpec((CropSpec("crop", 1, 224, (EIGHTHS, EIGHTHS), ratio=(1.0, 1.0), flip=0.0),)),
}


class Blur:
    """With probability `p`, PIL's Gaussian blur of a radius from 0.1 to 2."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() < self.p else image


class Solarize:
    """With probability `p`, inverts the values from 128 on."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if random.random() < self.p else image


class MultiCrop:
    """PIL image → a list of tensors, one per crop."""

    def __init__(self, transforms: list[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> list[Any]:
        return [transform(image) for transform in self.transforms]


def torchvision_transform(job: str, *, normalise: bool = True) -> Transform:
    """RGB PIL image → normalised float32 tensors as in the papers' code, or uint8 ones where `normalise` is off."""
    from torchvision import transforms as T

    bicubic = T.InterpolationMode.BICUBIC
    end = [T.ToTensor(), T.Normalize(MEAN, STD)] if normalise else [T.PILToTensor()]
    if job == "resize":
        return T.Compose([T.Resize(256, interpolation=bicubic), T.CenterCrop(224), *end])
    if job == "mae":
        crop = T.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=bicubic)
        return T.Compose([crop, T.RandomHorizontalFlip(), *end])

    def crop(size: int, scale: tuple[float, float], *last: Transform) -> Transform:
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        first = [T.RandomResizedCrop(size, scale=scale, interpolation=bicubic), T.RandomHorizontalFlip(0.5)]
        return T.Compose([*first, jitter, T.RandomGrayscale(0.2), *last, *end])

    first, second = crop(224, (0.4, 1.0), Blur(1.0)), crop(224, (0.4, 1.0), Blur(0.1), Solarize(0.2))
    return MultiCrop([first, second, *[crop(96, (0.05, 0.4), Blur(0.5))] * 8])
