"""The crops of a batch of staged images on an accelerator, from the parameters that `selfsight.stream.draw` chose.

`render` is pure tensor arithmetic: what differs from sample to sample is a number in a tensor, never a branch, so
nothing waits for the host and the whole compiles into one graph. Resampling and blur are products with banded matrices,
built on the device for every crop; between them the colour functions are torchvision's, on levels of 0–255 in float32.
It agrees with `selfsight.stream.pixels` but for that path's rounding to whole levels.
"""

import torch
from einops import rearrange
from torch import Tensor

from selfsight.stream.draw import (
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    HUE,
    LEFT,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TOP,
    WIDTH,
)
from selfsight.stream.views import CANVAS
from selfsight.viewspec import MEAN, STD, CropSpec, ViewSpec


def render(
    spec: ViewSpec,
    staged: dict[str, Tensor],
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    dtype: torch.dtype = torch.float32,
    chunk: int = 64,
) -> dict[str, Tensor]:
    """The views of a batch that `Views.stage` filled: crops `dtype` (count, B, 3, size, size), normalised; the noise.

    Matrix products run in `dtype`. bfloat16 costs a third of a level of 255 on average, and here and there a few;
    float32 follows torch's setting for float32 products, and is off by up to 0.4 of a level with TF32 allowed. `chunk`
    images at a time, to bound the memory: about 20 MB per image for DINO's crops.
    """
    views = {noise.name: staged[noise.name] for noise in spec.noise}
    canvas = staged[CANVAS]
    for crops in spec.crops:
        parts = [
            _crops(crops, pixels, params, mean, std, dtype)
            for pixels, params in zip(canvas.split(chunk), staged[crops.name].split(chunk), strict=True)
        ]
        views[crops.name] = torch.cat(parts, dim=1)
    return views


def _crops(
    spec: CropSpec, canvas: Tensor, params: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """canvas uint8 (B, S, S, 3), params float32 (B, count, COLUMNS) → (count, B, 3, size, size)."""
    levels = resample(
        canvas, params, spec.size, dtype, spec.interpolation
    )  # (B, count, 3, size, size), as what follows
    column = params[..., None, None, None]  # broadcasts over (3, size, size)
    if spec.jitter > 0:
        levels = jitter(levels, column)
    if spec.grayscale > 0:
        levels = torch.where(column[:, :, GRAYSCALE] > 0, _gray(levels), levels)
    if any(spec.blur):
        levels = gaussian_blur(levels, params[..., SIGMA], spec.blur_taps, dtype)
    if any(spec.solarize):
        # The lesser of a level and its inverse: torchvision's threshold of 128, between whole levels.
        levels = torch.where(column[:, :, SOLARIZE] > 0, torch.minimum(levels, 255 - levels), levels)
    normalised = [
        (levels[:, :, c] * (1 / (255 * s)) - m / s).to(dtype) for c, (m, s) in enumerate(zip(mean, std, strict=True))
    ]
    return rearrange(normalised, "c b n h w -> n b c h w").contiguous()


def resample(canvas: Tensor, params: Tensor, size: int, dtype: torch.dtype, interpolation: str = "bicubic") -> Tensor:
    """Cuts and resizes, antialiased, flips: float32 (B, count, 3, size, size) in levels, clamped to 0–255."""
    side = canvas.shape[1]
    weights = bilinear if interpolation == "bilinear" else bicubic
    down = weights(params[..., TOP], params[..., HEIGHT], side, size)  # (B, count, size, S)
    along = weights(params[..., LEFT], params[..., WIDTH], side, size)
    along = torch.where(params[..., FLIP, None, None] > 0, along.flip(-2), along)
    with torch.autocast(canvas.device.type, enabled=False):
        # One product per image cuts all its crops' lines: they share the pixels.
        lines = rearrange(down, "b n y s -> b (n y) s").to(dtype) @ rearrange(canvas, "b s t c -> b s (t c)").to(dtype)
        lines = rearrange(lines, "b (n y) (t c) -> (b n) (c y) t", y=size, c=3)
        crops = lines @ rearrange(along, "b n x t -> (b n) t x").to(dtype)
    return rearrange(crops, "(b n) (c y) x -> b n c y x", b=len(params), c=3).float().clamp(0, 255)


def bicubic(first: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """PIL's antialiased bicubic (a = −0.5) of `length` pixels from `first` on: float32 (…, n_out, n_in), rows sum to 1.

    What lies outside of first … first + length has no part in it.
    """
    x, inside = _distance(first, length, n_in, n_out)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, far * (x < 2)) * inside
    return weights / weights.sum(-1, keepdim=True)


def bilinear(first: Tensor, length: Tensor, n_in: int, n_out: int) -> Tensor:
    """PIL's antialiased bilinear, as `bicubic` has its own."""
    x, inside = _distance(first, length, n_in, n_out)
    weights = (1 - x).clamp(min=0) * inside
    return weights / weights.sum(-1, keepdim=True)


def _distance(first: Tensor, length: Tensor, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """(…, n_out, n_in) both: how far an input is from an output's centre, in the wider of their two pixels, and whether
    it lies in the box."""
    i = torch.arange(n_out, device=first.device, dtype=torch.float32)[:, None]
    j = torch.arange(n_in, device=first.device, dtype=torch.float32) - first[..., None, None]
    scale = length[..., None, None] / n_out
    wide = scale.clamp(min=1)
    return ((j + 0.5 - (i + 0.5) * scale) / wide).abs(), (j >= 0) & (j < length[..., None, None])


def _gray(levels: Tensor) -> Tensor:
    """torchvision's rgb_to_grayscale, over dimension −3, which becomes 1."""
    red, green, blue = levels.split(1, dim=-3)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def jitter(levels: Tensor, column: Tensor) -> Tensor:
    """Colour jitter in the order of each sample: levels (B, count, 3, h, w), column (B, count, COLUMNS, 1, 1, 1).

    In each of four rounds the three affine operations are one: a blend with black, with the mean grey level or with the
    grey image. The hue is turned wherever that is asked for in that round.
    """
    for k in range(4):
        op = column[:, :, ORDER + k]  # (B, count, 1, 1, 1)
        gray = _gray(levels)
        mean = gray.mean(dim=(-2, -1), keepdim=True)
        other = torch.where(op == SATURATION, gray, torch.where(op == CONTRAST, mean, 0))
        factor = torch.ones_like(op)
        for affine in (BRIGHTNESS, CONTRAST, SATURATION):
            factor = torch.where(op == affine, column[:, :, FACTORS + affine], factor)
        blended = (factor * levels + (1 - factor) * other).clamp(0, 255)
        turned = adjust_hue(levels, column[:, :, FACTORS + HUE])
        levels = torch.where(op == HUE, turned, torch.where(op >= 0, blended, levels))
    return levels


def adjust_hue(levels: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue by `factor` of a circle, through HSV: levels (…, 3, h, w), factor (…, 1, 1, 1)."""
    red, green, blue = levels.split(1, dim=-3)
    value = levels.amax(-3, keepdim=True)
    chroma = value - levels.amin(-3, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + hue + 6 * factor, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.cat(channels, dim=-3)


def gaussian_blur(levels: Tensor, sigma: Tensor, taps: int, dtype: torch.dtype) -> Tensor:
    """torchvision's gaussian_blur with a sigma (B, count) for each crop, in pixels; 0 leaves a crop as it is.

    The edges are mirrored by folding the kernel's ends back into its matrix.
    """
    size = levels.shape[-1]
    i = torch.arange(size, device=levels.device, dtype=torch.float32)
    narrow = sigma[..., None, None].clamp(min=1e-2)

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-0.5 * (distance / narrow) ** 2) * (distance.abs() <= taps // 2)

    at = i[:, None]
    before = kernel(at + i) * (i > 0)  # pixel −j stands for pixel j
    after = kernel(2 * (size - 1) - i - at) * (i < size - 1)
    matrix = kernel(i - at) + before + after
    matrix = matrix / matrix.sum(-1, keepdim=True)  # (B, count, size, size)
    with torch.autocast(levels.device.type, enabled=False):
        matrix = rearrange(matrix, "b n y x -> (b n) y x").to(dtype)
        blurred = rearrange(levels, "b n c y x -> (b n) (c y) x").to(dtype) @ matrix.mT
        blurred = matrix @ rearrange(blurred, "m (c y) x -> m y (c x)", c=3)
        blurred = rearrange(blurred, "(b n) y (c x) -> b n c y x", b=len(levels), c=3).float()
    return torch.where(sigma[..., None, None, None] > 0, blurred, levels)
