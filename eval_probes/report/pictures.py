"""Pictures of what an encoder sees: nearest neighbours, patch features as colours, attention of the class token.

In: images and encoders or their features. Out: arrays and data URIs small enough to be embedded by the dozen. Patch
colours are the first three principal components over all images shown, as in DINOv2 (Oquab et al. 2023, figure 1);
attention is the class token's in the last block, as in DINO (Caron et al. 2021, figure 1).
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from selfsight.encoders import Encoder
from selfsight.viewspec import MEAN, STD

FINE_GRID = 28  # patches along a side to aim at: what a picture of this size on a page can show
LARGEST_SCALE = 4  # times the training size; beyond it position embeddings are stretched too far

# Nine stops of matplotlib's magma, which rises evenly in lightness and is safe for colour-blind readers.
_MAGMA = np.array(
    [
        *((0, 0, 4), (29, 17, 71), (81, 18, 124), (131, 38, 129), (183, 55, 121)),
        *((230, 81, 98), (252, 137, 97), (254, 196, 136), (252, 253, 191)),
    ],
    dtype=np.float64,
)


def choose(n: int, labels: np.ndarray | None, count: int, *, seed: int = 0) -> np.ndarray:
    """`count` ordinals of `n`, drawn by seed and never by result; with labels, spread over the classes."""
    order = np.random.default_rng(seed).permutation(n)
    if labels is not None and n:
        # The first of every class, then the second of every class, …; the classes themselves in the drawn order.
        drawn = labels[order]
        classes, first = np.unique(drawn, return_index=True)
        rank_of_class = dict(zip(classes.tolist(), np.argsort(np.argsort(first)).tolist(), strict=True))
        seen: dict[int, int] = {}
        keys = []
        for label in drawn.tolist():
            keys.append((seen.get(label, 0), rank_of_class[label]))
            seen[label] = seen.get(label, 0) + 1
        order = order[sorted(range(n), key=keys.__getitem__)]
    return order[:count]


def square(image: Image.Image, size: int) -> Image.Image:
    """The central square, `size` pixels wide."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def data_uri(image: Image.Image) -> str:
    """The picture as a data URI: lossless when it is small (icons, maps of patches), else as WebP at quality 80."""
    held = io.BytesIO()
    if max(image.size) <= 64:
        image.save(held, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii")
    image.save(held, "WEBP", quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def thumbnail(image: Image.Image, size: int = 112) -> str:
    """A square thumbnail as a data URI; an image smaller than `size` keeps its own pixels."""
    return data_uri(square(image, min(size, *image.size)))


@dataclass(frozen=True)
class PatchMaps:
    """What an encoder makes of each image's patches. h × w is the grid of patches."""

    patches: np.ndarray  # float32 (images, h, w, D)
    attention: np.ndarray | None  # float32 (images, heads, h, w), each map sums to 1; None if there is none
    size: int  # pixels along a side of the input


@torch.inference_mode()
def patch_maps(encoder: Encoder, images: Sequence[Image.Image], *, img_size: int, attention: bool = True) -> PatchMaps:
    """Runs `encoder` on `images`, larger than it was trained on if its grid is coarse.

    There are no attention maps without a class token, or of an encoder that has none.
    """
    device = next(encoder.parameters()).device
    scale = min(max(round(FINE_GRID / encoder.grid(img_size)), 1), LARGEST_SCALE)
    size = img_size * scale
    patches, looks = [], []
    for image in images:  # one by one: attention is quadratic in the number of patches
        pixels = normalised(square(image, size)).to(device)[None]  # (1, 3, size, size)
        tokens = encoder(pixels)
        assert tokens.grid is not None, "all patches were kept"
        h, w = tokens.grid
        patches.append(tokens.patches[0].float().cpu().reshape(h, w, -1).numpy())
        if attention and tokens.cls is not None and encoder.has_attention_maps:
            weights = encoder.last_attention(pixels)[0, :, 0, -h * w :].float()  # (heads, h·w): class token → patches
            weights = weights / weights.sum(dim=1, keepdim=True)
            looks.append(weights.cpu().reshape(-1, h, w).numpy())
    return PatchMaps(np.stack(patches), np.stack(looks) if looks else None, size)


def normalised(image: Image.Image) -> Tensor:
    """RGB → float32 (3, H, W) with ImageNet's mean and deviation."""
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def principal_colours(patches: np.ndarray) -> tuple[np.ndarray, float]:
    """Patch features (images, h, w, D) → uint8 colours (images, h, w, 3), and the share of variance they show.

    The components are shared by all images, so that one colour means one thing. Each is stretched from its 1st to its
    99th percentile; its sign is the one that makes its largest loading positive, so that a rerun gives equal colours.
    """
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    variance, axes = np.linalg.eigh(flat.T @ flat / len(flat))
    axes = axes[:, ::-1][:, :3]  # (D, 3), largest first
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    colours = flat @ axes
    low, high = np.percentile(colours, 1, axis=0), np.percentile(colours, 99, axis=0)
    colours = np.clip((colours - low) / np.maximum(high - low, 1e-12), 0, 1)
    if colours.shape[1] < 3:
        colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))
    total = float(variance.clip(min=0).sum())
    shown = float(variance[::-1][:3].clip(min=0).sum()) / total if total > 0 else 0.0
    return np.round(255 * colours).astype(np.uint8).reshape(*patches.shape[:-1], 3), shown


def heat(attention: np.ndarray) -> Image.Image:
    """One attention map (h, w) in magma, from its least to its 99.5th percentile."""
    low, high = float(attention.min()), float(np.percentile(attention, 99.5))
    level = np.clip((attention - low) / max(high - low, 1e-12), 0, 1) * (len(_MAGMA) - 1)
    below = np.minimum(level.astype(np.int64), len(_MAGMA) - 2)
    share = (level - below)[..., None]
    return Image.fromarray(np.round(_MAGMA[below] * (1 - share) + _MAGMA[below + 1] * share).astype(np.uint8))
