"""What an objective wants to see of an image, as data. Where the work runs (process, thread, GPU) is not its business.

An objective returns a `ViewSpec`; `selfsight.stream.views` turns an image into it. A batch is then a dict of tensors
with one entry per spec name: a crop is uint8 of shape (count, B, 3, size, size), or normalised and of a float type
where an accelerator made it; a noise is float32 of shape (B, length).
"""

from dataclasses import dataclass

from selfsight.errors import UserError, check_range

# ImageNet's channel statistics, on a 0–1 scale: what every encoder here is trained and fed with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CropSpec:
    """`count` random crops of one kind. Probabilities and strengths given as tuples are per crop, in order."""

    name: str  # key in the batch
    count: int
    size: int  # pixels, square
    scale: tuple[float, float]  # fraction of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # aspect ratio, drawn log-uniformly
    flip: float = 0.5  # probability of a horizontal flip
    interpolation: str = "bicubic"  # or bilinear; antialiased either way
    jitter: float = 0.0  # probability of colour jitter
    brightness: float = 0.0  # jitter strengths, as torchvision.transforms.ColorJitter defines them
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0  # probability
    blur: tuple[float, ...] = ()  # probability of a Gaussian blur, for each of the `count` crops; empty = never
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # standard deviation in pixels
    blur_taps: int = 13  # pixels that the Gaussian spans, odd: the centre and 3 σ to either side
    solarize: tuple[float, ...] = ()  # probability, for each of the `count` crops; empty = never
    like: str = ""  # name of other crops whose random numbers these take too: with their scale, ratio and flip, their
    # boxes and flips. "" = numbers of its own

    def __post_init__(self) -> None:
        """Raises UserError for crops that cannot be made."""
        named = {"count": (1,), "size": (1,), "flip": (0, 1), "jitter": (0, 1), "grayscale": (0, 1), "hue": (0, 0.5)}
        for key, limits in {**named, **dict.fromkeys(("brightness", "contrast", "saturation"), (0,))}.items():
            check_range(f"{key} of the {self.name} crops", getattr(self, key), *limits)
        for key in ("blur", "solarize"):
            for probability in getattr(self, key):
                check_range(f"{key} of the {self.name} crops", probability, 0, 1)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale of the {self.name} crops is {list(self.scale)}: give 0 < from ≤ to ≤ 1")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"the {self.name} crops cannot be {self.interpolation!r}: choose bicubic or bilinear")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UserError(f"blur_sigma of the {self.name} crops is {list(self.blur_sigma)}: give 0 < from ≤ to")
        if self.blur_taps < 1 or self.blur_taps % 2 == 0:
            raise UserError(f"blur_taps of the {self.name} crops is {self.blur_taps}: give an odd number")
        if self.blur and self.blur_taps // 2 >= self.size:
            raise UserError(
                f"a blur of {self.blur_taps} taps reaches across the {self.name} crops of {self.size} pixels: "
                "turn their blur off, or make them larger"
            )


@dataclass(frozen=True)
class NoiseSpec:
    """`length` uniform numbers in [0, 1) per image, from which an objective derives its masks."""

    name: str
    length: int


@dataclass(frozen=True)
class ViewSpec:
    crops: tuple[CropSpec, ...]
    noise: tuple[NoiseSpec, ...] = ()
