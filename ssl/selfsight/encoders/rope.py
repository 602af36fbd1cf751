"""Rotary positions: where each patch lies in the image, as the angles that its queries and keys are turned by.

DINOv3 (2025, §3.2) places patch centres in [-1, 1] along each axis and, in training, shifts, stretches (jitter, per
axis) and scales (rescale, both axes) all of them by one random draw per block and resolution. timm draws once for all
blocks; its angles are these in float32. The official code makes them in bfloat16 unless told otherwise: here they have
the type of the weights, so that weights answer in timm what they answer here.
"""

import math
from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor

KINDS = (RotaryEmbeddingDinoV3, RotaryEmbeddingCat)
AUGMENTATIONS = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")  # as arguments of timm's Eva


class Rotations:
    """The tables of one encoder. They depend on the grid only, so each is made once, unless training draws them."""

    def __init__(self) -> None:
        self._tables: dict[tuple, Tensor] = {}

    @staticmethod
    def drawn(rope: Any) -> bool:
        """Whether the next table will be another one than the last."""
        return rope is not None and rope.training and bool(getattr(rope, "aug_active", False))

    def table(self, rope: Any, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Sines, then cosines: (1, 1, N, 2·d), or (B, 1, n_keep, 2·d) of the patches in `keep` (B, n_keep)."""
        table_Nd = make(rope, grid) if self.drawn(rope) else self._kept(rope, grid)
        return table_Nd[None, None] if keep is None else table_Nd[keep].unsqueeze(1)

    def _kept(self, rope: Any, grid: tuple[int, int]) -> Tensor:
        like = next(rope.buffers())
        key = (*grid, like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # a table first needed for inference may be needed for training later
                self._tables[key] = make(rope, grid)
        return self._tables[key]


@torch.no_grad()
def make(rope: Any, grid: tuple[int, int]) -> Tensor:
    """The table (N, 2·d) of timm's module, with its device and type; augmented if it is in training mode."""
    like = next(rope.buffers())
    with torch.autocast(like.device.type, enabled=False):
        if type(rope) is RotaryEmbeddingCat:
            return rope.get_embed(list(grid)).to(like)
        coords_N2 = coordinates(grid, rope.normalize_coords, like)
        if Rotations.drawn(rope):
            coords_N2 = augment(coords_N2, rope.shift_coords, rope.jitter_coords, rope.rescale_coords)
        return sincos(coords_N2, periods(rope, like))


def periods(rope: Any, like: Tensor) -> Tensor:
    """(d / 4,): base^(4i / d), or geometric between the shortest and the longest."""
    n = rope.dim // 4
    if rope.min_period is None or rope.max_period is None:
        return rope.temperature ** (2 * torch.arange(n, device=like.device, dtype=like.dtype) / (2 * n))
    return rope.min_period * (rope.max_period / rope.min_period) ** torch.linspace(
        0, 1, n, device=like.device, dtype=like.dtype
    )


def coordinates(grid: tuple[int, int], normalize: str, like: Tensor) -> Tensor:
    """Patch centres (N, 2), rows first, in [-1, 1] along each axis ("separate"), or along the longer or shorter one."""
    sides = {"separate": grid, "max": (max(grid),) * 2, "min": (min(grid),) * 2}[normalize]
    axes = [torch.arange(0.5, n, device=like.device, dtype=like.dtype) / s for n, s in zip(grid, sides, strict=True)]
    return 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) - 1


def augment(coords_N2: Tensor, shift: float | None, jitter: float | None, rescale: float | None) -> Tensor:
    """One draw for the whole batch, in this order, from torch's generator of the device; jitter and rescale are
    log-uniform between their inverse and themselves.
    """
    if shift is not None:
        coords_N2 = coords_N2 + coords_N2.new_empty(2).uniform_(-shift, shift)
    if jitter is not None:
        coords_N2 = coords_N2 * coords_N2.new_empty(2).uniform_(-math.log(jitter), math.log(jitter)).exp()
    if rescale is not None:
        coords_N2 = coords_N2 * coords_N2.new_empty(1).uniform_(-math.log(rescale), math.log(rescale)).exp()
    return coords_N2


def sincos(coords_N2: Tensor, periods: Tensor) -> Tensor:
    """(N, 2·d): the sines of all angles 2π · coordinate / period, rows' then columns', twice; then their cosines."""
    angles_Nd = (2 * math.pi * coords_N2[:, :, None] / periods).flatten(1).tile(2)
    return torch.cat([angles_Nd.sin(), angles_Nd.cos()], dim=-1)
