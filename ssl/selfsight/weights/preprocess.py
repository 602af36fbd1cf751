"""From a picture to what the encoder takes: timm's evaluation transform, from the same numbers that timm reads."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsight.errors import UserError
from selfsight.viewspec import MEAN, STD

Preprocess = Callable[[Image.Image], Tensor]


def settings(img_size: int) -> dict[str, Any]:
    """What goes into config.json's pretrained_cfg and selfsight.json.

    Photographs are scaled to 8/7 of the size and cropped at the centre (256 → 224), as DINO and MAE evaluate.
    Thumbnails (below 96 pixels: CIFAR and its like) fill their frame already and are not cropped.
    """
    return {
        "input_size": [3, img_size, img_size],
        "interpolation": "bicubic",
        "crop_pct": 0.875 if img_size >= 96 else 1.0,
        "crop_mode": "center",
        "mean": list(MEAN),
        "std": list(STD),
    }


class EvalTransform:
    """PIL image of any mode → (3, H, W) float32, normalised. Picklable, so that worker processes can have one.

    The two halves stand apart as well: `pixels` is work for a decoding process, `normalise` for the device. `given` is
    what `settings` writes; raises UserError when it is anything else.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        try:
            self._prepare(given)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as e:
            raise UserError("preprocess in selfsight.json is malformed: export the weights again") from e

    def _prepare(self, given: dict[str, Any]) -> None:
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        _, height, width = given["input_size"]
        scale = math.floor(height / given["crop_pct"])
        if not scale >= height > 0 or not width > 0:
            raise ValueError(given)
        # Written out, because timm.data takes a second to import; a test holds it equal to timm's own.
        self._frame = transforms.Compose(
            [
                transforms.Resize(scale, interpolation=InterpolationMode(given["interpolation"])),
                transforms.CenterCrop((height, width)),
            ]
        )
        self._mean = torch.tensor(given["mean"]).view(3, 1, 1)
        self._std = torch.tensor(given["std"]).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.normalise(torch.from_numpy(self.pixels(image)))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The part of the picture that the encoder sees: uint8 (3, H, W)."""
        framed = self._frame(image if image.mode == "RGB" else image.convert("RGB"))
        return np.asarray(framed).transpose(2, 0, 1).copy()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (…, 3, H, W) on any device → float32 of the same shape."""
        mean, std = self._mean.to(pixels.device), self._std.to(pixels.device)
        return pixels.float().div_(255).sub_(mean).div_(std)
