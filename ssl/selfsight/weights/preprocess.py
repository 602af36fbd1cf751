"""From a picture to what the encoder takes: timm's evaluation transform, from the same numbers that timm reads."""

import math
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

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
    """PIL image of any mode → (3, H, W) float32, normalised. Picklable, so that worker processes can have one."""

    def __init__(self, given: dict[str, Any]) -> None:
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        _, height, width = given["input_size"]
        scale = math.floor(height / given["crop_pct"])
        # Written out, because timm.data takes a second to import; a test holds it equal to timm's own.
        self._transform = transforms.Compose(
            [
                transforms.Resize(scale, interpolation=InterpolationMode(given["interpolation"])),
                transforms.CenterCrop((height, width)),
                transforms.ToTensor(),
                transforms.Normalize(given["mean"], given["std"]),
            ]
        )
        self.settings = given

    def __call__(self, image: Image.Image) -> Tensor:
        return self._transform(image if image.mode == "RGB" else image.convert("RGB"))
